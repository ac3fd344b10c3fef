"""The images that a run left out, and its rejects.jsonl."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipkit.errors import TooManyRejected, option
from clipkit.files import write_text
from clipkit.training.state import Facts

logger = logging.getLogger("clipkit")


class RejectedImages(Facts):
    """The images that training left out, by row, since a bad image comes back in each epoch. A part of the run.

    Args:
        folder: of the run, for the error.
        rows: number of training rows.
        max_bad: how many may be left out: a fraction of the rows (float) or a count (int).
    """

    def __init__(self, folder: Path, rows: int, max_bad: int | float) -> None:
        super().__init__()
        self.folder, self.rows, self.max_bad = folder, rows, max_bad

    def add(self, rejects: Sequence[Mapping[str, Any]]) -> None:
        """Add rejected images; those that are known already count once.

        Raises:
            TooManyRejected: more than `max_bad`.
        """
        self.values |= {str(reject["row"]): reject for reject in rejects}
        limit = self.max_bad if isinstance(self.max_bad, int) else self.max_bad * self.rows
        if len(self.values) > limit:
            raise TooManyRejected(
                f"{len(self.values)} of {self.rows} images cannot be used, more than max_bad={self.max_bad} allows",
                where=self.folder,
                fix=f"`clipkit check data` lists them; fix them, or raise {option('max_bad')}",
            )

    def lines(self) -> list[dict[str, Any]]:
        """Return a line of rejects.jsonl for each image, in the order of the rows."""
        return [{"stage": "train", **self.values[row]} for row in sorted(self.values, key=int)]


def write_rejects(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add the images that training and evaluation left out to those that loading did.

    Lines that an earlier attempt at the run added are replaced.
    """
    if not lines:
        return
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    from_loading = [line for line in before if "stage" not in json.loads(line)]
    from_run = [json.dumps(line, ensure_ascii=False) for line in lines]
    write_text(path, "".join(f"{line}\n" for line in [*from_loading, *from_run]))
    logger.warning("%d images could not be used and were left out; see %s", len(lines), path)
