"""The logs of a run: metrics.jsonl and timing.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from clipkit import distributed
from clipkit.errors import CorruptArtefact
from clipkit.files import resource_errors


class MetricsLog:
    """metrics.jsonl: one line a measurement, written at once by rank 0. A part of the run.

    A checkpoint holds the length of the file: lines that a killed attempt wrote after it are cut off and written again.
    """

    def __init__(self, path: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self.path = path
        self.file: TextIO | None = None

    def __enter__(self) -> MetricsLog:
        if not self.lines and distributed.is_main():
            self.path.unlink(missing_ok=True)  # an earlier attempt was killed before its first checkpoint
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if not distributed.is_main():
            return
        if self.file is None:  # not before: the file marks a run, and one that stops on its first batch is none
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
        with resource_errors(self.path):
            self.file.write(json.dumps(line, allow_nan=False) + "\n")

    def tensor_state(self) -> dict[str, Tensor]:
        return {}

    def json_state(self) -> dict[str, Any]:
        if self.file is not None:  # the checkpoint must not be the first of the two to reach the disk
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"bytes": self.path.stat().st_size if self.path.exists() else 0}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        size = values["bytes"]
        kept = self.path.read_bytes()[:size] if size and self.path.is_file() else b""
        if len(kept) < size:
            raise CorruptArtefact(
                f"expected at least the {size} bytes that the file had at the checkpoint, found {len(kept)}",
                where=self.path,
                fix="restore the file from a copy",
            )
        self.lines = [json.loads(line) for line in kept.splitlines()]
        distributed.barrier()  # until all ranks have read the file
        if distributed.is_main() and size:
            os.truncate(self.path, size)


def write_timing(folder: Path, step: int, seconds: float, batch_size: int) -> None:
    """Add a line to timing.jsonl. It is kept out of metrics.jsonl, which is the same however often a run was killed.

    Args:
        folder: of the run.
        step: taken last.
        seconds: of the whole run so far.
        batch_size: pairs of a global batch.
    """
    if distributed.is_main():
        line = {"step": step, "seconds": round(seconds, 3), "pairs_per_second": round(step * batch_size / seconds, 2)}
        with resource_errors(folder), (folder / "timing.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
