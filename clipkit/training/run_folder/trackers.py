"""Trackers: TensorBoard, Weights & Biases, MLflow, trackio and what else Accelerate knows, told of a run by rank 0."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from clipkit import distributed
from clipkit.errors import UsageError
from clipkit.files import write_json

logger = logging.getLogger("clipkit")

PROJECT = "clipkit"  # of Weights & Biases, MLflow and trackio, unless their own variables name another
_SLOW, _PART = 10.0, 0.05  # seconds, and part of the run's time, that a tracker takes before it is told


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there, before anything else is done.

    Raises:
        UsageError: Accelerate knows none of that name, or its package is not installed.
    """
    ready = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise UsageError(f"there is no tracker {name!r}", where="trackers", fix=f"one of: {known}")
        if name in LoggerType.list() and name not in ready:
            raise UsageError(f"the tracker {name!r} is not installed", where="trackers", fix=f"pip install {name}")


class Trackers:
    """The trackers of one run; its config, losses and metrics go to all of them, under the name of its folder.

    trackers.json in the folder keeps their ids, so that a run that is resumed goes on in the same tracker runs. Steps
    that were taken after the last checkpoint come twice, except in TensorBoard, which forgets the first ones.

    A tracker that does not start ends a run that has not begun. One that fails later is left out with a warning, for
    metrics.jsonl has it all; one that takes long is told, too.

    Args:
        names: as `check_trackers` accepts them.
        folder: of the run.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.names, self.folder, self.path = tuple(dict.fromkeys(names)), folder, folder / "trackers.json"
        self.running: dict[str, Any] = {}
        self.spent = dict.fromkeys(self.names, 0.0)  # seconds
        self.slow: set[str] = set()  # that were told to be
        self.begin = time.monotonic()

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """Start all, on rank 0: the attempt goes on after `step`.

        Raises:
            UsageError: one does not start, and this is the beginning of the run.
        """
        distributed.on_main(lambda: self._start(config, step))

    def _start(self, config: Mapping[str, Any], step: int) -> None:
        ids = self._known()
        for name in self.names:
            try:
                with _data_alone():
                    ids[name] = self._open(name, ids.get(name), config, step)
            except Exception as error:  # of any kind: these are other people's programs
                if not step:
                    raise UsageError(
                        f"the tracker {name!r} does not start: {_short(error)}",
                        where="trackers",
                        fix=f"set {name} up as it asks for, or leave it out of trackers",
                    ) from error
                self._leave_out(name, error)
        if self.names:
            write_json(self.path, ids)
        self.begin = time.monotonic()

    def _known(self) -> dict[str, str]:
        """The ids of the tracker runs that an earlier attempt began."""
        with contextlib.suppress(OSError, ValueError):
            if (self.folder / "metrics.jsonl").is_file():  # else the attempt ended before it was a run
                return dict(json.loads(self.path.read_text(encoding="utf-8")))
        return {}

    def _open(self, name: str, known: str | None, config: Mapping[str, Any], step: int) -> str:
        """Start one; the id of its run."""
        run, found = self.folder.resolve().name, known or uuid.uuid4().hex
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": None if known is None else step + 1},
            "wandb": {"name": run, "id": found, "resume": "allow"},
            "mlflow": {"run_name": run, "run_id": known},
            "trackio": {"name": run, "resume": "never" if known is None else "allow"},
        }
        kind = LOGGER_TYPE_TO_CLASS[name]
        places = [self.folder] if kind.requires_logging_directory else []
        title = {"tensorboard": "tensorboard", "wandb": os.environ.get("WANDB_PROJECT", PROJECT)}
        tracker = kind(title.get(name, PROJECT), *places, **options.get(name, {}))
        tracker.start()
        if name == "mlflow":
            found = tracker.tracker.info.run_id
            logger.info("mlflow: run %s of the experiment %s", run, tracker.experiment_name)
        elif name == "trackio":  # which goes by the name, and takes the last run that bears it
            tracker.tracker.id = known or tracker.tracker.id
            found = tracker.tracker.id
        if known is None or name in ("wandb", "trackio"):  # which begin with an empty config each time
            _describe(name, tracker, config)
        self.running[name] = tracker
        if name == "tensorboard":
            logger.info("tensorboard --logdir %s", self.folder / "tensorboard")
        return found

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Losses or metrics of the model as it stands after `step`; what is no finite number is left out."""
        numbers = {key: each for key, each in values.items() if isinstance(each, int | float) and math.isfinite(each)}
        for name, tracker in list(self.running.items()):
            begin = time.monotonic()
            try:
                tracker.log(_keys(name, numbers), step=step)
            except Exception as error:
                self._leave_out(name, error)
            now = time.monotonic()
            self._watch(name, now - begin, now - self.begin)

    def _watch(self, name: str, took: float, passed: float) -> None:
        self.spent[name] += took
        if name not in self.slow and self.spent[name] > max(_SLOW, _PART * passed):
            self.slow.add(name)
            share = 100 * self.spent[name] / passed
            logger.warning("the tracker %r takes %.0f %% of the run's time; a higher log_every helps", name, share)

    def _leave_out(self, name: str, error: Exception) -> None:
        self.running.pop(name, None)
        where = self.folder / "metrics.jsonl"
        logger.warning("the tracker %r failed, and is told no more; %s has it all: %s", name, where, _short(error))

    def finish(self, status: str) -> None:
        """Close all, however the run ended: ``FINISHED``, ``KILLED`` or ``FAILED``."""
        for name, tracker in self.running.items():
            try:
                with _data_alone():
                    _close(name, tracker, status)
            except Exception as error:
                logger.warning("the tracker %r was not closed: %s", name, _short(error))
        self.running = {}


def _describe(name: str, tracker: Any, config: Mapping[str, Any]) -> None:
    """Give a tracker the config, flat: ``train.batch_size``."""
    values = _keys(name, flat(config))
    if name != "tensorboard":
        tracker.store_init_configuration(values)
        return
    from torch.utils.tensorboard.summary import hparams

    # Accelerate would make a second run of them, which shows no loss beside its config
    for summary in hparams(values, {"loss": 0.0}):  # type: ignore[no-untyped-call]
        tracker.tracker.file_writer.add_summary(summary)


def _close(name: str, tracker: Any, status: str) -> None:
    if name == "mlflow":
        import mlflow

        mlflow.end_run(status)
    elif name == "wandb":
        tracker.tracker.finish(exit_code=int(status != "FINISHED"))
    elif name == "trackio":  # its run alone would be finished again when Python ends
        import trackio

        trackio.finish()  # type: ignore[no-untyped-call]
    else:
        tracker.finish()


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one: ``{"a": {"b": [1, 2]}}`` is ``{"a.b.0": 1, "a.b.1": 2}``.

    >>> flat({"train": {"betas": (0.9, 0.98), "warmup": 0.1}, "similar": []})
    {'train.betas.0': 0.9, 'train.betas.1': 0.98, 'train.warmup': 0.1, 'similar': '[]'}
    """
    if isinstance(values, Mapping | list | tuple) and values:
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in pairs]
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: values if isinstance(values, bool | int | float | str) else str(values)}


def _keys(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """As the tracker allows them: MLflow knows no `@`."""
    if name != "mlflow":
        return dict(values)
    return {re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_")): value for key, value in values.items()}


def _data_alone() -> contextlib.AbstractContextManager[Any]:
    """What trackers print goes to standard error: standard output is for data."""
    return contextlib.redirect_stdout(sys.stderr)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
