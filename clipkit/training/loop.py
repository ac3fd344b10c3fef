"""The loop: steps, evaluations and checkpoints, from wherever the run stands to its end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import torch

from clipkit import distributed
from clipkit.data.batches.batch import Batch
from clipkit.data.batches.plan import hash64
from clipkit.errors import ClipkitError, Interrupted, TooManyRejected, option
from clipkit.files import write_json
from clipkit.losses.contrastive import Loss
from clipkit.progress import WAIT, Progress
from clipkit.training.checkpoints import resume
from clipkit.training.checkpoints.checkpoint import Checkpoints, Snapshot, read, size_of
from clipkit.training.checkpoints.non_finite import NonFinite
from clipkit.training.checkpoints.signals import StopSignal
from clipkit.training.checks.memory import explain_out_of_memory
from clipkit.training.checks.preflight import preflight
from clipkit.training.ema import EMA
from clipkit.training.forgetting.guardrail import ALPHAS, Forgetting
from clipkit.training.optimizer import build_optimizer, schedule
from clipkit.training.run_folder.attempts import Attempts, draw_curves, environment
from clipkit.training.run_folder.best_model import BestModel
from clipkit.training.run_folder.metrics_log import MetricsLog, write_rejects, write_timing
from clipkit.training.setup import TrainSetup
from clipkit.training.state import Adam, Facts, Stateful, Weights
from clipkit.training.step import backward
from clipkit.training.trackers import Trackers

logger = logging.getLogger("clipkit")


class Loop:
    """One attempt at a run.

    A step is: batch, gradients, update, a line in the log; then, where they are due, a checkpoint and an evaluation.
    A checkpoint is thus of the moment between a step and its evaluation, which the next attempt catches up on.
    Whatever ranks have to agree on (errors, signals, clocks) they agree on twice a step, so that all stop at once.

    Args:
        setup: its model is trained in place.
        stop: whether a signal asked to stop.
    """

    def __init__(self, setup: TrainSetup, stop: StopSignal) -> None:
        self.setup, self.stop = setup, stop
        self.config, self.model, self.folder = setup.config, setup.model, setup.folder
        self.accelerator, self.total = setup.accelerator, setup.total
        self.learner = setup.learner.to(self.accelerator.device)
        self.identity = setup.identity()
        # before: what the loss never reaches is part of the model all the same
        weights, self.best = Weights(self.learner), BestModel(self.model, self.folder, self.config.best)
        self.guardrail = setup.guardrail
        if self.guardrail is not None:
            self.best.name = "last"  # `model` is what the guardrail chooses
        setup.leave_out_unused()
        optimizer = build_optimizer(self.model, self.config, heads=self.learner.heads)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.learner, optimizer)
        # after: DDP has made the weights of all ranks those of rank 0
        self.average = None if self.config.ema is None else EMA(self.learner, weights.names, self.config.ema)
        self.ceiling = max(math.log(100), float(self.model.logit_scale.detach()))  # what was loaded may lie above 100

        self.log = MetricsLog(self.folder / "metrics.jsonl")
        self.nonfinite = NonFinite(self.folder, setup.plan, self.config.skip_nonfinite)
        self.rejected = Facts()  # by row: a bad image comes back each epoch
        self.clock = Facts(seconds=0.0, evaluated=False)
        scaler = getattr(self.accelerator, "scaler", None)
        self.parts: dict[str, Stateful] = {
            "weights": weights,
            "optimizer": Adam(optimizer, self.learner, scaler),
            "best": self.best,
            "metrics": self.log,
            "rejected": self.rejected,
            "nonfinite": self.nonfinite,
            "clock": self.clock,
        }
        if self.average is not None:
            self.parts["average"] = self.average
        if self.guardrail is not None:
            self.parts["forgetting"] = self.guardrail
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.step = 0  # that was taken last
        self.evaluation = 0.0  # seconds that the last one took
        self.every = self.config.evaluate_every or setup.plan.steps_per_epoch
        here = environment(self.accelerator.device, self.accelerator.mixed_precision, self.config.micro_batch)
        self.attempts = Attempts(self.folder, asdict(self.config), here)
        self.trackers = Trackers(self.config.trackers, self.folder)

    def run(self) -> TrainResult:
        """Go on from the newest checkpoint, or begin; to the end.

        Raises:
            Interrupted: a signal came; a checkpoint was saved.
            ClipkitError: see `Trainer`.
        """
        self._resume()
        later = 0 if self.step else 3 * size_of({"weights": self.parts["weights"]})  # two moments, the best weights
        distributed.on_main(lambda: self.checkpoints.foresee(self.parts, later))
        self.attempts.begin(self.step)
        self.start = self.saved = time.monotonic()
        self.before = self.clock.values["seconds"]
        how = "done"
        try:
            self._warm_up_ddp()
            self.trackers.start(self.model.card.config, self.step)
            with self.log, self._progress(self.total, "training", done=self.step) as progress:
                self._report_preflight(progress)
                self._measure_baseline(progress)
                self._evaluate_if_due(progress)
                self._steps(progress)
                return self._finish(progress)
        except BaseException as error:
            how = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise
        finally:
            self.trackers.finish(
                "FINISHED" if how == "done" else "KILLED" if how.startswith("Interrupted") else "FAILED"
            )
            self.attempts.end(self.step, how)

    def _progress(self, total: int, what: str, *, unit: str = "step", done: int = 0) -> Progress:
        main = distributed.is_main()
        return Progress(total, what, unit=unit, done=done, shown=self.config.progress, silent=not main)

    # -- before the first step

    def _resume(self) -> None:
        """Take up the folder's run, if there is one."""
        resume.check_same_on_ranks(self.identity)
        path = distributed.on_main(lambda: resume.find_checkpoint(self.folder, self.checkpoints, self.identity))
        if path is None:
            return
        snapshots: list[Snapshot] = []
        distributed.together(lambda: snapshots.append(read(path)))  # if one cannot read it, all stop
        snapshots[0].restore(self.parts)
        self.step = snapshots[0].step
        before = self.attempts.last()
        changed = resume.differences(before, dict(self.attempts.topology)) if before else []
        if distributed.is_main():
            logger.info("%s: going on after step %d of %d", path, self.step, self.total)
            if changed:
                logger.warning(
                    "the same global batches follow, but the last bits of the results may differ, for this is not the "
                    "set-up of the last attempt: %s",
                    "; ".join(changed),
                )

    def _warm_up_ddp(self) -> None:
        """Let DDP find its buckets before the first step.

        It rebuilds them after the first backward pass, and sums of three or more ranks depend in their last bits on
        where a gradient lies in its bucket: a resumed run would otherwise begin with other buckets than it had.
        """
        if distributed.world_size() < 3:
            return
        backward(
            self.wrapped,
            self.setup.first_batch().to(self.accelerator.device),
            self.setup.similar,
            self.setup.contrast,
            micro_batch=self.config.micro_batch,
            send=self.accelerator.backward,
        )
        self.optimizer.zero_grad(set_to_none=True)

    def _report_preflight(self, progress: Progress) -> None:
        """Say what this data at this batch allows, on rank 0; the others wait at the first collective."""
        if not distributed.is_main() or self.step:
            return
        setup = self.setup
        sigmoid = setup.contrast.loss == "sigmoid"
        report = preflight(
            self.model, setup.pairs, setup.plan, setup.similar, self.config, steps=self.total, sigmoid=sigmoid
        )
        write_json(self.folder / "preflight.json", {**report.as_dict(), "plan": list(setup.plan.notes)})
        epochs = self.total / setup.plan.steps_per_epoch
        length = f"training: {self.total:,} steps of {self.config.batch_size:,} pairs, {epochs:.3g} epochs"
        for line in [length, *setup.plan.notes, *report.lines()]:
            progress.note(line)

    def _measure_baseline(self, progress: Progress) -> None:
        """Keep the start for the guardrail, once in a run; its reference is the line of step 0."""
        if self.guardrail is None or self.guardrail.baseline:
            return
        progress.note("before the first step: measuring what must not be forgotten")
        self._record(0, self.guardrail.begin())

    # -- the steps

    def _steps(self, progress: Progress) -> None:
        self.wrapped.train()
        if self._over():  # a run that was done, or stopped early
            return
        progress.begin()
        with closing(self._batches()) as batches:
            for batch in batches:
                loss, norm = self._step(batch)
                self._log_step(loss, norm, progress)
                stop, due = self._any_rank(self.stop.wanted is not None, self._is_due())
                if stop or due:
                    self.save()
                if stop:
                    raise self._interrupted("a checkpoint was saved")
                self._evaluate_if_due(progress)
                if self._over():
                    return

    def _interrupted(self, state: str) -> Interrupted:
        by = self.stop.wanted.name if self.stop.wanted else "another rank"
        return Interrupted(
            f"stopped by {by} after step {self.step} of {self.total}; {state}",
            where=self.folder,
            fix=f"start the same again with {option('resume', 'auto')} to go on",
        )

    def _over(self) -> bool:
        return self.step >= self.total or self._stopped_early()

    def _stopped_early(self) -> bool:
        return self.config.patience is not None and self.best.since >= self.config.patience

    def _batches(self) -> Generator[Batch, None, None]:
        """This rank's part of each global batch; an error on one rank is raised on all."""
        batches = self.setup.loader.batches(self.step, self.total)
        for _ in range(self.step, self.total):
            batch, error = None, None
            try:
                batch = next(batches)
            except ClipkitError as own:
                error = own
            failed, rejected = self._any_rank(error is not None, bool(batch and batch.rejected))
            if failed:
                raise next(e for e in [error, *distributed.all_gather_object(error)] if e is not None)
            assert batch is not None  # or there was an error
            if rejected:
                for share in distributed.all_gather_object(batch.rejected):
                    self.rejected.values |= {str(reject["row"]): reject for reject in share}
                self._check_reject_budget()
            yield batch.to(self.accelerator.device)

    def _step(self, batch: Batch) -> tuple[Loss, float]:
        """One update of the weights, unless loss or gradient are not finite; the loss, and the gradient's norm."""
        config, setup = self.config, self.setup
        self.step += 1
        self.clock.values["evaluated"] = False
        torch.manual_seed(hash64(config.seed, self.step, distributed.rank()) >> 1)
        factor = schedule(self.step - 1, self.total, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        # Here, not after the update: what is freed is taken again at once; malloc would give it back to the system
        # and then ask for it page by page (3 % of a step on the CPU).
        self.optimizer.zero_grad(set_to_none=True)
        with explain_out_of_memory(self.learner, batch, config, self.optimizer):
            loss = backward(
                self.wrapped,
                batch,
                setup.similar,
                setup.contrast,
                micro_batch=config.micro_batch,
                send=self.accelerator.backward,
            )
        norm = self._clip()
        # gradients are summed over ranks before this, so that all ranks see the same norm; a loss is a rank's own
        mean = _mean(loss)
        scaler = getattr(self.accelerator, "scaler", None)
        lowering = scaler is not None and scaler.get_scale() >= 1  # fp16: too large a scale is halved until it fits
        if not math.isfinite(float(mean.loss)) or (not math.isfinite(norm) and not lowering):
            self.nonfinite.refuse(self.step, float(mean.loss), norm, self.learner)
            if scaler is not None:
                scaler.update()
        else:
            with explain_out_of_memory(self.learner, batch, config, self.optimizer):
                self.optimizer.step()
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=self.ceiling)
            if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
                self.average.update()
        return mean, norm

    def _clip(self) -> float:
        """The norm of the gradient, clipped if it is finite: a clipped NaN would spread to every parameter."""
        trained = [parameter for parameter in self.learner.parameters() if parameter.grad is not None]
        limit = math.inf if self.config.clip_grad_norm is None else self.config.clip_grad_norm
        if self.accelerator.distributed_type == "FSDP":  # only the wrapper knows all shards
            return float(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit))
        self.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        if limit < math.inf and bool(norm.isfinite()):
            torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
        return float(norm)

    def _log_step(self, loss: Loss, norm: float, progress: Progress) -> None:
        """Show every step, and log those that `log_every` asks for, the first and the last."""
        step, scale = self.step, float(self.model.logit_scale.detach().exp())
        progress.show(step, loss=float(loss.loss), scale=scale)
        if step % self.config.log_every and step not in (1, self.total):
            return
        line = {
            "epoch": round(step / self.setup.plan.steps_per_epoch, 4),
            "loss": _finite(float(loss.loss)),
            "kl": _finite(float(loss.kl)),
            "logit_scale": scale,
            "gradient_norm": _finite(norm),
            "learning_rate": self.config.learning_rate * schedule(step - 1, self.total, self.config.warmup),
        }
        self._record(step, line)
        write_timing(self.folder, step, self._seconds(), self.config.batch_size)

    def _record(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, and the same for the trackers."""
        self.log.write({"step": step, **values})
        self.trackers.log(values, step)

    def _any_rank(self, *flags: bool) -> list[bool]:
        """Which of these hold on any rank."""
        if distributed.world_size() == 1:
            return list(flags)
        mine = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
        return [bool(flag) for flag in distributed.max_over_ranks(mine).tolist()]

    def _check_reject_budget(self) -> None:
        limit, bad, rows = self.config.max_bad, len(self.rejected.values), len(self.setup.plan.captions)
        if bad > (limit if isinstance(limit, int) else limit * rows):
            raise TooManyRejected(
                f"{bad} of {rows} images cannot be used, more than max_bad={limit} allows",
                where=self.folder,
                fix=f"`clipkit check data` lists them; mend them, or raise {option('max_bad')}",
            )

    # -- between the steps

    def _is_due(self) -> bool:
        """Whether a checkpoint is, after this step; an evaluation that is to follow counts as long as the last one."""
        steps = self.config.save_steps
        if steps is not None and self.step % steps == 0:
            return True
        return self._is_late(self.evaluation if self._is_measured() else 0.0)

    def _is_late(self, ahead: float = 0.0) -> bool:
        """Whether more than `save_minutes` could be lost in so many seconds, by rank 0's clock."""
        return distributed.is_main() and time.monotonic() - self.saved + ahead >= 60 * self.config.save_minutes

    def _is_measured(self) -> bool:
        return bool(self.setup.evaluators) and (self.step % self.every == 0 or self.step == self.total)

    def save(self, *, keep: int | None = None) -> None:
        """A checkpoint of this moment."""
        begin = time.monotonic()
        self.clock.values["seconds"] = self._seconds()
        options = {} if keep is None else {"keep": keep}
        path = distributed.on_main(lambda: self.checkpoints.save(self.step, self.parts, **options))
        took, self.saved = time.monotonic() - begin, time.monotonic()
        if distributed.is_main():
            size = sum(file.stat().st_size for file in path.iterdir())
            share = took / (60 * self.config.save_minutes)
            advice = "" if share < 0.02 else f"; save_minutes={math.ceil(took / 1.2)} would make it 2 %"
            logger.info(
                "%s: %.1f MB in %.2f s, %.1f %% of the time between two%s", path, size / 1e6, took, 100 * share, advice
            )

    def _seconds(self) -> float:
        return float(self.before + time.monotonic() - self.start)

    def _evaluate_if_due(self, progress: Progress) -> None:
        """The evaluation that is due after this step, unless it is done."""
        if not self.step or not self._is_measured() or self.clock.values["evaluated"]:
            return
        if not 0 < self.evaluation < WAIT:  # of the first one nobody knows how long it takes
            progress.note(f"step {self.step}: measuring")
        begin = time.monotonic()
        with nullcontext() if self.average is None else self.average.applied():
            metrics = self.setup.evaluate()
            self._record(self.step, metrics)
            self.best.update(self.step, metrics, self.setup.counts(), progress)
        self.clock.values["evaluated"] = True
        self.evaluation = time.monotonic() - begin
        (late,) = self._any_rank(self._is_late())
        if late and not self._over():
            self.save()
        self.wrapped.train()

    # -- after the last step

    def _finish(self, progress: Progress) -> TrainResult:
        self.save(keep=1)
        early = self.step < self.total
        if early and distributed.is_main():
            logger.info(
                "stopped early after step %d of %d: %d evaluations in a row gave no better %s than step %d did",
                *(self.step, self.total, self.best.since, self.best.key, self.best.step),
            )
        seconds = self._seconds()
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        if self.average is not None and not self.best.weights:
            self.average.restore_average()
        metrics, step = self.best.restore_best(self.step)
        forgetting = self._guard(progress)
        metrics = metrics if forgetting is None else forgetting.chosen.metrics
        self.model.name = str(self.folder / "model")  # from where it can be opened again, for indexes and results
        rejected = self.rejected.values
        lines = [{"stage": "train", **rejected[row]} for row in sorted(rejected, key=int)]
        measured = self.setup.measured()
        lines += [{"stage": "evaluate", **vars(reject)} for evaluator in measured for reject in evaluator.rejected]
        if distributed.is_main():
            write_rejects(self.folder / "rejects.jsonl", lines)
            draw_curves(self.folder / "curves", self.log.lines)
        return TrainResult(metrics, step, self.step, seconds, self.log.lines, lines, early, forgetting)

    def _guard(self, progress: Progress) -> Forgetting | None:
        """Walk back as far as the budget asks; a walk that is interrupted is done again by the next attempt."""
        if self.guardrail is None:
            return None
        with self._progress(len(ALPHAS), "walking back to the start", unit="point") as walk:
            done = count()

            def next_point() -> None:
                self._stop_if_asked()
                walk.show(next(done))

            forgetting = self.guardrail.walk_back(self.setup.evaluate, self.best.key, self.setup.counts(), next_point)
        for line in forgetting.lines():
            progress.note(line)
        return forgetting

    def _stop_if_asked(self) -> None:
        """Where a signal came after the last step, end: the last checkpoint holds all that training gave."""
        (stop,) = self._any_rank(self.stop.wanted is not None)
        if stop:
            raise self._interrupted("all steps are taken, and the last checkpoint holds them")


def _mean(loss: Loss) -> Loss:
    """Of all ranks; not finite where that of one is not."""
    own = torch.stack(loss).detach().float().reshape(1, 2)
    return Loss(*distributed.gather_rows(own, [1] * distributed.world_size()).mean(dim=0))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        metrics: of the weights that were kept.
        step: after which these weights stood, from 1.
        steps: taken in all.
        seconds: of wall clock, evaluations included, of all attempts.
        history: every line of metrics.jsonl.
        rejected: rows left out because their image could not be used.
        stopped_early: whether `patience` ended it.
        forgetting: what the guardrail found and chose, where there is a `forget_budget`.
    """

    metrics: dict[str, float]
    step: int
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)
    rejected: list[dict[str, Any]] = field(default_factory=list, repr=False)
    stopped_early: bool = False
    forgetting: Forgetting | None = None
