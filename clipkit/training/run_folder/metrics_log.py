"""What a run writes into its folder: the best model, the log, the rejects."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from clipkit import distributed
from clipkit.errors import CorruptArtefact
from clipkit.files import resource_errors, write_text

logger = logging.getLogger("clipkit")


class MetricsLog:
    """metrics.jsonl: one line a measurement, written at once, by rank 0. A part of the run.

    A checkpoint remembers how long the file was: what a killed attempt wrote after it is cut off, and written again.
    """

    def __init__(self, path: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self.path = path
        self.file: TextIO | None = None

    def __enter__(self) -> MetricsLog:
        if not self.lines and distributed.is_main():
            self.path.unlink(missing_ok=True)  # of an attempt that was killed before its first checkpoint
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
        with resource_errors(self.path):
            self.file.write(json.dumps(line, allow_nan=False) + "\n")

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def facts(self) -> dict[str, Any]:
        if self.file is not None:  # the checkpoint must not be the first of the two to reach the disk
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"bytes": self.path.stat().st_size if self.path.exists() else 0}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        size = facts["bytes"]
        kept = self.path.read_bytes()[:size] if size and self.path.is_file() else b""
        if len(kept) < size:
            raise CorruptArtefact(
                f"expected at least the {size} bytes that it had at the checkpoint, found {len(kept)}",
                where=self.path,
                fix="restore the file from a copy",
            )
        self.lines = [json.loads(line) for line in kept.splitlines()]
        distributed.barrier()  # all have read
        if distributed.is_main() and size:
            os.truncate(self.path, size)


def write_timing(folder: Path, step: int, seconds: float, batch_size: int) -> None:
    """timing.jsonl: how fast it went; apart from metrics.jsonl, which is the same however often a run was killed."""
    if distributed.is_main():
        line = {"step": step, "seconds": round(seconds, 3), "pairs_per_second": round(step * batch_size / seconds, 2)}
        with resource_errors(folder), (folder / "timing.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def write_rejects(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add what training and evaluation left out to what loading did, in place of what an earlier attempt added."""
    if not lines:
        return
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in before if "stage" not in json.loads(line)]
    write_text(
        path, "".join(f"{line}\n" for line in [*kept, *(json.dumps(each, ensure_ascii=False) for each in lines)])
    )
    logger.warning("%d images could not be used and were left out; see %s", len(lines), path)
