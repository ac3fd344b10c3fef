"""The loop: steps, evaluations and checkpoints, from wherever the run stopped last to its end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict
from itertools import count
from typing import Any

import torch

from clipkit import distributed
from clipkit.data.batches.batch import Batch
from clipkit.errors import ClipkitError, Interrupted, option
from clipkit.files import write_json
from clipkit.losses.contrastive import Loss
from clipkit.progress import WAIT, Progress
from clipkit.training.checkpoints import resume
from clipkit.training.checkpoints.checkpoint import Checkpoints, Snapshot, read, size_of
from clipkit.training.checkpoints.non_finite import NonFinite
from clipkit.training.checkpoints.signals import StopSignal
from clipkit.training.checks.preflight import preflight
from clipkit.training.ema import EMA
from clipkit.training.forgetting.guardrail import ALPHAS, Forgetting
from clipkit.training.optimizer import build_optimizer, schedule
from clipkit.training.result import TrainResult
from clipkit.training.run_folder.attempts import Attempts, draw_curves, environment
from clipkit.training.run_folder.best_model import BestModel
from clipkit.training.run_folder.metrics_log import MetricsLog, write_timing
from clipkit.training.run_folder.rejects import RejectedImages, write_rejects
from clipkit.training.run_folder.trackers import Trackers
from clipkit.training.setup import TrainSetup
from clipkit.training.state import Adam, Facts, Stateful, Weights
from clipkit.training.update import Updater

logger = logging.getLogger("clipkit")


class Loop:
    """One attempt at a run.

    A step is: batch, gradients, update, a line in the log; then, where they are due, a checkpoint and an evaluation.
    A checkpoint is thus of the moment between a step and its evaluation, which the next attempt catches up on.
    Ranks compare their errors, signals and clocks twice a step, so that all of them stop at the same step.

    Args:
        setup: its model is trained in place.
        stop: whether a signal asked to stop.
    """

    def __init__(self, setup: TrainSetup, stop: StopSignal) -> None:
        self.setup, self.stop = setup, stop
        self.config, self.model, self.folder = setup.config, setup.model, setup.folder
        self.accelerator, self.total = setup.accelerator, setup.total
        self.learner = setup.learner.to(self.accelerator.device)
        self.fingerprint = setup.fingerprint()
        # before `leave_out_unused`: parameters that the loss never reaches are still part of the model
        weights = Weights(self.learner)
        self.best = BestModel(self.model, self.folder, self.config.best, setup.greater_is_better)
        self.guardrail = setup.guardrail
        if self.guardrail is not None:
            self.best.name = "last"  # the guardrail chooses the weights of `model`
        setup.leave_out_unused()
        optimizer = build_optimizer(self.model, self.config, heads=self.learner.heads)
        self.wrapped, wrapped_optimizer = self.accelerator.prepare(self.learner, optimizer)
        # after `prepare`: DDP has given all ranks the weights of rank 0
        self.average = None if self.config.ema is None else EMA(self.learner, weights.names, self.config.ema)

        self.log = MetricsLog(self.folder / "metrics.jsonl")
        self.nonfinite = NonFinite(self.folder, setup.plan, self.config.skip_nonfinite)
        self.updater = Updater(setup, self.wrapped, wrapped_optimizer, self.average, self.nonfinite)
        self.rejected = RejectedImages(self.folder, len(setup.plan.captions), self.config.max_bad)
        self.clock = Facts(seconds=0.0, evaluated=False)
        self.parts: dict[str, Stateful] = {
            "weights": weights,
            "optimizer": Adam(optimizer, self.learner, self.updater.scaler),
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
        self.step = 0  # the last one taken
        self.evaluation_seconds = 0.0  # of the last evaluation
        self.evaluate_every = self.config.evaluate_every or setup.plan.steps_per_epoch
        here = environment(self.accelerator.device, self.accelerator.mixed_precision, self.config.micro_batch)
        self.attempts = Attempts(self.folder, asdict(self.config), here)
        self.trackers = Trackers(self.config.trackers, self.folder)

    def run(self) -> TrainResult:
        """Start the run, or continue from its newest checkpoint, and train to the end.

        Raises:
            Interrupted: a signal came; a checkpoint was saved.
            ClipkitError: see `Trainer`.
        """
        self._resume()
        # the first checkpoint lacks what later ones hold: two moments of AdamW and the best weights
        later = 0 if self.step else 3 * size_of({"weights": self.parts["weights"]})
        distributed.on_main(lambda: self.checkpoints.foresee(self.parts, later))
        self.attempts.begin(self.step)
        self.start = self.saved = time.monotonic()
        self.earlier_seconds = self.clock.values["seconds"]
        outcome, status = "done", "FINISHED"
        try:
            self.updater.warm_up_ddp()
            self.trackers.start(self.model.card.config, self.step)
            with self.log, self._progress(self.total, "training", done=self.step) as progress:
                self._report_preflight(progress)
                self._measure_baseline(progress)
                self._evaluate_if_due(progress)
                self._steps(progress)
                return self._finish(progress)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}".partition("\n")[0]
            status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
            raise
        finally:
            self.trackers.finish(status)
            self.attempts.end(self.step, outcome)

    def _progress(self, total: int, what: str, *, unit: str = "step", done: int = 0) -> Progress:
        main = distributed.is_main()
        return Progress(total, what, unit=unit, done=done, shown=self.config.progress, silent=not main)

    # -- before the first step

    def _resume(self) -> None:
        """Restore the newest checkpoint of the folder's run, if there is one."""
        resume.check_same_on_ranks(self.fingerprint)
        path = distributed.on_main(lambda: resume.find_checkpoint(self.folder, self.checkpoints, self.fingerprint))
        if path is None:
            return
        snapshots: list[Snapshot] = []
        distributed.together(lambda: snapshots.append(read(path)))  # if one rank cannot read it, all stop
        snapshots[0].restore(self.parts)
        self.step = snapshots[0].step
        before = self.attempts.last()
        changed = resume.differences(before, dict(self.attempts.topology)) if before else []
        if distributed.is_main():
            logger.info("%s: going on after step %d of %d", path, self.step, self.total)
            if changed:
                logger.warning(
                    "the same global batches follow, but the last bits of the results may differ, because the set-up "
                    "differs from that of the last attempt: %s",
                    "; ".join(changed),
                )

    def _report_preflight(self, progress: Progress) -> None:
        """Report what to expect of this data at this batch size, on rank 0; the others wait at the first collective."""
        if not distributed.is_main() or self.step:
            return
        setup = self.setup
        sigmoid = setup.loss_config.loss == "sigmoid"
        report = preflight(
            self.model, setup.pairs, setup.plan, setup.similar, self.config, steps=self.total, sigmoid=sigmoid
        )
        write_json(self.folder / "preflight.json", {**report.as_dict(), "plan": list(setup.plan.notes)})
        epochs = self.total / setup.plan.steps_per_epoch
        length = f"training: {self.total:,} steps of {self.config.batch_size:,} pairs, {epochs:.3g} epochs"
        for line in [length, *setup.plan.notes, *report.lines()]:
            progress.note(line)

    def _measure_baseline(self, progress: Progress) -> None:
        """Save and measure the start for the guardrail, once in a run; its metrics are the log's line of step 0."""
        if self.guardrail is None or self.guardrail.baseline:
            return
        progress.note("before the first step: measuring what must not be forgotten")
        self._record(0, self.guardrail.begin())

    # -- the steps

    def _steps(self, progress: Progress) -> None:
        self.wrapped.train()
        if self._is_over():  # a run that was done, or stopped early
            return
        progress.begin()
        with closing(self._batches()) as batches:
            for batch in batches:
                self.step += 1
                self.clock.values["evaluated"] = False
                loss, norm = self.updater.update(self.step, batch)
                self._log_step(loss, norm, progress)
                stop, due = self._any_rank(self.stop.received is not None, self._is_checkpoint_due())
                if stop or due:
                    self.save()
                if stop:
                    raise self._interrupted("a checkpoint was saved")
                self._evaluate_if_due(progress)
                if self._is_over():
                    return

    def _interrupted(self, state: str) -> Interrupted:
        by = self.stop.received.name if self.stop.received else "another rank"
        return Interrupted(
            f"stopped by {by} after step {self.step} of {self.total}; {state}",
            where=self.folder,
            fix=f"start the same again with {option('resume', 'auto')} to go on",
        )

    def _is_over(self) -> bool:
        stopped_early = self.config.patience is not None and self.best.since >= self.config.patience
        return self.step >= self.total or stopped_early

    def _batches(self) -> Generator[Batch, None, None]:
        """Yield this rank's part of each global batch; an error on one rank is raised on all."""
        batches = self.setup.loader.batches(self.step, self.total)
        for _ in range(self.step, self.total):
            batch, error = None, None
            try:
                batch = next(batches)
            except ClipkitError as batch_error:
                error = batch_error
            failed, rejected = self._any_rank(error is not None, bool(batch and batch.rejected))
            if failed:
                errors = [error, *distributed.all_gather_object(error)]
                raise next(error for error in errors if error is not None)
            assert batch is not None  # or there was an error
            if rejected:
                shares = distributed.all_gather_object(batch.rejected)
                self.rejected.add([reject for share in shares for reject in share])
            yield batch.to(self.accelerator.device)

    def _log_step(self, loss: Loss, norm: float, progress: Progress) -> None:
        """Show every step; log the first, the last, and every `log_every`-th."""
        step, scale = self.step, float(self.model.logit_scale.detach().exp())
        progress.show(step, loss=float(loss.loss), scale=scale)
        if step % self.config.log_every and step not in (1, self.total):
            return
        line = {
            "epoch": round(step / self.setup.plan.steps_per_epoch, 4),
            "loss": _json_number(float(loss.loss)),
            "kl": _json_number(float(loss.kl)),
            "logit_scale": scale,
            "gradient_norm": _json_number(norm),
            "learning_rate": self.config.learning_rate * schedule(step - 1, self.total, self.config.warmup),
        }
        self._record(step, line)
        write_timing(self.folder, step, self._seconds(), self.config.batch_size)

    def _record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl, and send it to the trackers."""
        self.log.write({"step": step, **values})
        self.trackers.log(values, step)

    def _any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        if distributed.world_size() == 1:
            return list(flags)
        own = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
        return [bool(flag) for flag in distributed.max_over_ranks(own).tolist()]

    # -- between the steps

    def _is_checkpoint_due(self) -> bool:
        """Whether to save after this step; an evaluation that follows is expected to take as long as the last one."""
        steps = self.config.save_steps
        if steps is not None and self.step % steps == 0:
            return True
        return self._is_save_late(self.evaluation_seconds if self._is_measured() else 0.0)

    def _is_save_late(self, ahead: float = 0.0) -> bool:
        """Whether the last save will be `save_minutes` old in `ahead` seconds, by rank 0's clock."""
        return distributed.is_main() and time.monotonic() - self.saved + ahead >= 60 * self.config.save_minutes

    def _is_measured(self) -> bool:
        return bool(self.setup.evaluators) and (self.step % self.evaluate_every == 0 or self.step == self.total)

    def save(self, *, keep: int | None = None) -> None:
        """Save a checkpoint, and log how much of the time it takes; remove all but the newest `keep`."""
        begin = time.monotonic()
        self.clock.values["seconds"] = self._seconds()
        options = {} if keep is None else {"keep": keep}
        path = distributed.on_main(lambda: self.checkpoints.save(self.step, self.parts, **options))
        self.saved = time.monotonic()
        if distributed.is_main():
            seconds = self.saved - begin
            size = sum(file.stat().st_size for file in path.iterdir())
            share = seconds / (60 * self.config.save_minutes)
            advice = "" if share < 0.02 else f"; save_minutes={math.ceil(seconds / 1.2)} would make it 2 %"
            message = "%s: %.1f MB in %.2f s, %.1f %% of the time between two%s"
            logger.info(message, path, size / 1e6, seconds, 100 * share, advice)

    def _seconds(self) -> float:
        return float(self.earlier_seconds + time.monotonic() - self.start)

    def _evaluate_if_due(self, progress: Progress) -> None:
        """Evaluate after this step if that is due and not yet done."""
        if not self.step or not self._is_measured() or self.clock.values["evaluated"]:
            return
        if not 0 < self.evaluation_seconds < WAIT:  # the first one may take long
            progress.note(f"step {self.step}: measuring")
        begin = time.monotonic()
        with nullcontext() if self.average is None else self.average.applied():
            metrics = self.setup.evaluate()
            self._record(self.step, metrics)
            self.best.update(self.step, metrics, self.setup.counts(), progress)
        self.clock.values["evaluated"] = True
        self.evaluation_seconds = time.monotonic() - begin
        (late,) = self._any_rank(self._is_save_late())
        if late and not self._is_over():
            self.save()
        self.wrapped.train()

    # -- after the last step

    def _finish(self, progress: Progress) -> TrainResult:
        self.save(keep=1)
        stopped_early = self.step < self.total
        if stopped_early and distributed.is_main():
            message = "stopped early after step %d of %d: %d evaluations in a row gave no better %s than step %d did"
            logger.info(message, self.step, self.total, self.best.since, self.best.key, self.best.step)
        seconds = self._seconds()
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        if self.average is not None and not self.best.weights:
            self.average.restore_average()
        metrics, step = self.best.restore_best(self.step)
        forgetting = self._walk_back(progress)
        metrics = metrics if forgetting is None else forgetting.chosen.metrics
        self.model.name = str(self.folder / "model")  # the path to open it again, for indexes and results
        rejects = self.rejected.lines()
        for evaluator in self.setup.measured():
            rejects += [{"stage": "evaluate", **vars(reject)} for reject in evaluator.rejected]
        if distributed.is_main():
            write_rejects(self.folder / "rejects.jsonl", rejects)
            draw_curves(self.folder / "curves", self.log.lines)
        return TrainResult(metrics, step, self.step, seconds, self.log.lines, rejects, stopped_early, forgetting)

    def _walk_back(self, progress: Progress) -> Forgetting | None:
        """Go back towards the start as far as the budget asks; if interrupted, the next attempt does it again."""
        if self.guardrail is None:
            return None
        with self._progress(len(ALPHAS), "walking back to the start", unit="point") as walk:
            done = count()

            def next_point() -> None:
                self._stop_if_asked()
                walk.show(next(done))

            forgetting = self.guardrail.walk_back(
                self.setup.evaluate, self.best.key, self.setup.counts(), next_point, self.setup.greater_is_better
            )
        for line in forgetting.lines():
            progress.note(line)
        return forgetting

    def _stop_if_asked(self) -> None:
        """Stop if a signal came after the last step; the last checkpoint holds everything that was trained."""
        (stop,) = self._any_rank(self.stop.received is not None)
        if stop:
            raise self._interrupted("all steps are taken, and the last checkpoint holds them")


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
