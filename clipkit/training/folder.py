"""The folder of a run: claimed before, written while, and left whole after."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UsageError
from clipkit.files import resource_errors
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.saving import Saved, check_saved, save
from clipkit.training.progress import Progress

logger = logging.getLogger("clipkit")


def claim_folder(folder: Path) -> Path:
    """Create the folder of a run, on every process of a launcher.

    Raises:
        UsageError: another run, another model, or a file stands there.
        ResourceError: it cannot be written.
    """
    taken = [name for name in ("metrics.jsonl", "model") if (folder / name).exists()]
    if distributed.broadcast_object(bool(taken) or folder.is_file()):
        raise UsageError(
            "the output folder holds another run" if taken else "the output folder is a file",
            where=folder / taken[0] if taken else folder,
            fix="choose another output_dir, or remove it",
        )
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    return folder


class Best:
    """Keeps the weights of the best evaluation, in memory and in output_dir/model.

    The first folder is opened again at once, so that a model that cannot be saved is known early; those that
    replace it hold other weights in the same form, and only the last of them is opened, in `restore`.
    """

    def __init__(self, model: DualEncoder, folder: Path, key: str | None) -> None:
        self.model, self.folder, self.key = model, folder, key
        self.value, self.step = -math.inf, 0
        self.card = model.card
        self.saved: Saved | None = None
        self.unopened = False
        self.metrics: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}

    def offer(self, step: int, metrics: dict[str, float], n: Mapping[str, int], progress: Progress) -> None:
        self.key = self.key or next(iter(metrics))
        if self.key not in metrics:
            raise UsageError(
                f"no evaluator gives the metric {self.key!r} that `best` names", fix=f"one of: {', '.join(metrics)}"
            )
        value = -metrics[self.key] if self.key.endswith("_rank") else metrics[self.key]  # a low rank is a good one
        best = " (best so far)" if value > self.value else ""
        progress.note(f"step {step}: {self.key} {metrics[self.key]:.4f}{best}")
        if value > self.value:
            self.value, self.step, self.metrics = value, step, metrics
            self.weights = {name: each.detach().clone() for name, each in self._state()}
            self._save(metrics, n)

    def restore(self, total: int) -> tuple[dict[str, float], int]:
        if not self.weights:  # nothing was measured: the last weights are all there is
            self._save({}, {})
            return {}, total
        with torch.no_grad():
            for name, each in self._state():
                each.copy_(self.weights[name])
        self.model.card = self.card
        if self.unopened and distributed.is_main():
            check_saved(self.model, self.folder / "model")
        distributed.barrier()
        return self.metrics, self.step

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        model = self.model
        yield from (pair for pair in model.named_parameters() if pair[1].requires_grad)
        yield from model.named_buffers()

    def _save(self, metrics: Mapping[str, float], n: Mapping[str, int]) -> None:
        self.model.card = self.model.card.updated({"metrics": metrics, "n": n})
        self.unopened = self.saved is not None
        if distributed.is_main():
            self.saved = save(self.model, self.folder / "model", overwrite=True, proven=self.saved)
        self.card = self.model.card
        distributed.barrier()


class Log:
    """metrics.jsonl: one line a measurement, written at once, by rank 0."""

    def __init__(self, path: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self.path = path
        self.file: TextIO | None = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if not distributed.is_main():
            return
        if self.file is None:  # not before: a run that stops on its first batch is no run
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
        self.file.write(json.dumps(line, allow_nan=False) + "\n")


def write_rejects(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    if lines and distributed.is_main():
        with path.open("a", encoding="utf-8") as file:  # beside those of loading
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        logger.warning("%d images could not be used and were left out; see %s", len(lines), path)
