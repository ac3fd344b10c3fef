"""Trackers: rank 0 sends a run to TensorBoard, Weights & Biases, MLflow, trackio, or others that Accelerate knows."""

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

PROJECT = "clipkit"  # for Weights & Biases, MLflow and trackio, unless their own variables name another

# A tracker that takes more seconds than this, and more than this part of the run's time, is reported as slow.
_SLOW_SECONDS, _SLOW_SHARE = 10.0, 0.05


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not available, before the run begins.

    Raises:
        UsageError: Accelerate knows none of that name, or its package is not installed.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise UsageError(f"there is no tracker {name!r}", where="trackers", fix=f"one of: {known}")
        if name in LoggerType.list() and name not in available:
            raise UsageError(f"the tracker {name!r} is not installed", where="trackers", fix=f"pip install {name}")


class Trackers:
    """The trackers of one run; its config, losses and metrics go to all of them, under the name of its folder.

    trackers.json in the folder stores their ids, so that a resumed run continues in the same tracker runs. Steps
    after the last checkpoint are sent twice; TensorBoard removes the first ones, the other trackers show both.

    A tracker that does not start ends a run that has not begun. One that fails later is left out with a warning,
    since metrics.jsonl has everything; a slow one is reported.

    Args:
        names: as `check_trackers` accepts them.
        folder: of the run.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.folder, self.path = folder, folder / "trackers.json"
        self.running: dict[str, Any] = {}
        self.spent = dict.fromkeys(self.names, 0.0)  # seconds
        self.slow: set[str] = set()  # those reported as slow
        self.begin = time.monotonic()

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """Start all, on rank 0; the attempt continues after `step`.

        Raises:
            UsageError: one does not start, and this is the beginning of the run.
        """
        distributed.on_main(lambda: self._start(config, step))

    def _start(self, config: Mapping[str, Any], step: int) -> None:
        ids = self._known()
        for name in self.names:
            try:
                with _stdout_to_stderr():
                    ids[name] = self._open(name, ids.get(name), config, step)
            except Exception as error:  # any exception: this is code of other packages
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
        """Return the ids of the tracker runs that an earlier attempt began."""
        with contextlib.suppress(OSError, ValueError):
            if (self.folder / "metrics.jsonl").is_file():  # else the attempt ended before its first step
                return dict(json.loads(self.path.read_text(encoding="utf-8")))
        return {}

    def _open(self, name: str, known: str | None, config: Mapping[str, Any], step: int) -> str:
        """Start one tracker, and return the id of its run."""
        run, run_id = self.folder.resolve().name, known or uuid.uuid4().hex
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": None if known is None else step + 1},
            "wandb": {"name": run, "id": run_id, "resume": "allow"},
            "mlflow": {"run_name": run, "run_id": known},
            "trackio": {"name": run, "resume": "never" if known is None else "allow"},
        }
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        projects = {"tensorboard": "tensorboard", "wandb": os.environ.get("WANDB_PROJECT", PROJECT)}
        arguments: list[Any] = [projects.get(name, PROJECT)]
        if tracker_class.requires_logging_directory:
            arguments.append(self.folder)
        tracker = tracker_class(*arguments, **options.get(name, {}))
        tracker.start()
        if name == "mlflow":
            run_id = tracker.tracker.info.run_id
            logger.info("mlflow: run %s of the experiment %s", run, tracker.experiment_name)
        elif name == "trackio":  # resumes by the name, and takes the last run of that name
            tracker.tracker.id = known or tracker.tracker.id
            run_id = tracker.tracker.id
        if known is None or name in ("wandb", "trackio"):  # these two begin with an empty config in each attempt
            _describe(name, tracker, config)
        self.running[name] = tracker
        if name == "tensorboard":
            logger.info("tensorboard --logdir %s", self.folder / "tensorboard")
        return run_id

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send losses or metrics of the model after `step`; values that are not finite numbers are left out."""
        numbers = {}
        for key, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                numbers[key] = value
        for name, tracker in list(self.running.items()):
            begin = time.monotonic()
            try:
                tracker.log(_keys(name, numbers), step=step)
            except Exception as error:
                self._leave_out(name, error)
            now = time.monotonic()
            self._report_if_slow(name, now - begin, now - self.begin)

    def _report_if_slow(self, name: str, seconds: float, run_seconds: float) -> None:
        self.spent[name] += seconds
        if name not in self.slow and self.spent[name] > max(_SLOW_SECONDS, _SLOW_SHARE * run_seconds):
            self.slow.add(name)
            share = 100 * self.spent[name] / run_seconds
            logger.warning("the tracker %r takes %.0f %% of the run's time; a higher log_every helps", name, share)

    def _leave_out(self, name: str, error: Exception) -> None:
        self.running.pop(name, None)
        where = self.folder / "metrics.jsonl"
        logger.warning(
            "the tracker %r failed, and gets no more data; %s has everything: %s", name, where, _short(error)
        )

    def finish(self, status: str) -> None:
        """Close all, however the run ended: ``FINISHED``, ``KILLED`` or ``FAILED``."""
        for name, tracker in self.running.items():
            try:
                with _stdout_to_stderr():
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

    # Accelerate would make a second run of them, in which the config has no loss
    for summary in hparams(values, {"loss": 0.0}):  # type: ignore[no-untyped-call]
        tracker.tracker.file_writer.add_summary(summary)


def _close(name: str, tracker: Any, status: str) -> None:
    if name == "mlflow":
        import mlflow

        mlflow.end_run(status)
    elif name == "wandb":
        tracker.tracker.finish(exit_code=int(status != "FINISHED"))
    elif name == "trackio":  # finishing only its run would finish it again when Python ends
        import trackio

        trackio.finish()  # type: ignore[no-untyped-call]
    else:
        tracker.finish()


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one: ``{"a": {"b": [1, 2]}}`` is ``{"a.b.0": 1, "a.b.1": 2}``.

    >>> flat({"train": {"betas": (0.9, 0.98), "warmup": 0.1}, "similar": []})
    {'train.betas.0': 0.9, 'train.betas.1': 0.98, 'train.warmup': 0.1, 'similar': '[]'}
    """
    if isinstance(values, Mapping | list | tuple) and values:
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        flattened: dict[str, Any] = {}
        for key, value in pairs:
            flattened |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return flattened
    return {prefix: values if isinstance(values, bool | int | float | str) else str(values)}


def _keys(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with keys that the tracker allows: MLflow has no `@`."""
    if name != "mlflow":
        return dict(values)
    allowed = {}
    for key, value in values.items():
        allowed[re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_"))] = value
    return allowed


def _stdout_to_stderr() -> contextlib.AbstractContextManager[Any]:
    """Send what trackers print to standard error: standard output is for data."""
    return contextlib.redirect_stdout(sys.stderr)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
