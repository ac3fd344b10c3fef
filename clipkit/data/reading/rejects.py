"""Rows that cannot be used: listed, counted against a budget, and never lost from the sum."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Literal

from clipkit.errors import ClipkitError, DataError, TooManyRejected, UsageError, option
from clipkit.files import dump_json, write_text
from clipkit.paths import Tree, show

log = logging.getLogger("clipkit")
OnBad = Literal["error", "skip"]
_SHOWN = 10


@dataclass(frozen=True)
class Reject:
    """One row that cannot be used."""

    row: int
    """Line of a text table (from 1, as an editor counts), else index of the row (from 0)."""
    code: str
    """Short reason: a code of `load_image`, or EMPTY_TEXT, NOT_TEXT, EMPTY_LABEL, NOT_LABEL, CONFLICT, BAD_JSON,
    BAD_NAME."""
    message: str
    """The reason in words, with what to do where that is known."""
    where: str
    """As a person would look for it: ``birds.csv:12``."""
    path: str | None = None
    """The image as the row names it, also where that cannot be printed."""

    def __str__(self) -> str:
        known = self.path is None or self.path in self.where or self.path.endswith(self.where)
        return f"{self.where}: {self.code}: {self.message}" + ("" if known else f" [{show(self.path or '')}]")


def unreadable_folders(tree: Tree, row: int) -> list[Reject]:
    """One reject for each folder that could not be listed, numbered from `row` on."""
    message = "the folder cannot be listed: {}; give yourself permission to read it, or move it out of the way"
    return [
        Reject(row + i, "UNREADABLE", message.format(why), show(folder), str(folder))
        for i, (folder, why) in enumerate(sorted(tree.unreadable.items()))
    ]


@dataclass
class LoadReport:
    """What became of every row that came in: ``rows == used + len(rejects)``, always.

    Hand one to ``load_pairs(..., ledger=ledger)`` to read it afterwards. What is done with the rows may refuse more of
    them (`refuse`); `settle` holds all of them to the user's policy.
    """

    rows: int = 0
    used: int = 0
    images: int = 0
    """Distinct rows of the result: several table rows of one image become one."""
    rejects: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was put right or passed over, in words."""
    origin: Callable[[int], list[tuple[int, str]]] | None = None
    """See `source_rows`."""
    warned: set[Reject] = field(default_factory=set)
    """Rejects that were logged already."""
    logged: str = ""
    """The summary that was logged last."""

    def summary(self) -> str:
        """One line: ``1,003 rows = 1,000 used + 3 rejected (2 MISSING, 1 EMPTY_TEXT); 200 images``."""
        codes = Counter(reject.code for reject in self.rejects)
        why = ", ".join(f"{n:,} {code}" for code, n in codes.most_common())
        rejected = f"{len(self.rejects):,} rejected" + (f" ({why})" if why else "")
        return f"{self.rows:,} rows = {self.used:,} used + {rejected}; {self.images:,} images"

    def at(self, reject: Reject) -> list[Reject]:
        """A row of the result that turned out to be unusable, as the rows of the source that it was made of."""
        if self.origin is None:
            return [reject]
        return [replace(reject, row=row, where=where) for row, where in self.origin(reject.row)]

    def source_rows(self, row: int) -> list[tuple[int, str]]:
        """The number and the place of each row of the source that a row of the result was made of."""
        return [(row, f"row {row}")] if self.origin is None else self.origin(row)

    def refuse(self, unusable: Iterable[Reject]) -> None:
        """Move rows of the result that turned out to be unusable to the rejects; a row named twice counts once."""
        rows = {reject.row: reject for reject in unusable}
        late = [row for reject in rows.values() for row in self.at(reject)]
        self.rejects += late
        self.used -= len(late)
        self.images -= len(rows)

    def note(self, text: str) -> None:
        self.notes.append(text)
        log.info(text)

    def settle(
        self,
        source: object,
        *,
        on_bad: OnBad,
        max_bad: int | float,
        rejects: str | PathLike[str] | None = None,
        hint: str | None = None,
    ) -> None:
        """Write the list, check the sum, and raise if the rejects are not to be tolerated; `hint` says why they are.

        Raises:
            DataError: `on_bad` is ``error`` and there are rejects, or nothing is left.
            TooManyRejected: more than `max_bad` rows (int) or that fraction of them (float).
        """
        self.rejects.sort(key=lambda reject: reject.row)
        if rejects is not None:
            write_rejects(rejects, self.rejects)
        if self.rows != self.used + len(self.rejects):
            raise ClipkitError(f"rows do not add up: {self.summary()}", where=source, fix="this is a bug: report it")
        place = f"; listed in {rejects}" if rejects is not None and self.rejects else ""
        if (line := f"{source}: {self.summary()}{place}") != self.logged:
            self.logged = line
            log.info(line)
        if self.rejects and on_bad == "error":
            fix = hint or f"fix them, or leave them out with {option('on_bad', 'skip')}"
            raise DataError(self._listed("cannot be used"), where=source, fix=fix)
        if not self.used:
            raise DataError(self._listed("are rejected: none is left"), where=source, fix=hint)
        allowed = max_bad if isinstance(max_bad, int) else max_bad * self.rows
        if len(self.rejects) > allowed:
            budget = f"max_bad={max_bad}" if isinstance(max_bad, int) else f"max_bad={max_bad:g} of the rows"
            fix = hint or f"fix them, or raise {option('max_bad')} if losing that many is right"
            raise TooManyRejected(self._listed(f"are rejected; {budget} allows fewer"), where=source, fix=fix)
        fresh = [reject for reject in self.rejects if reject not in self.warned]
        for reject in fresh[:_SHOWN]:
            log.warning("skipped %s", reject)
        self.warned.update(fresh)

    def _listed(self, verdict: str) -> str:
        lines = [f"{len(self.rejects):,} of {self.rows:,} rows {verdict}"]
        lines += [f"  {reject}" for reject in self.rejects[:_SHOWN]]
        if len(self.rejects) > _SHOWN:
            lines.append(f"  ... and {len(self.rejects) - _SHOWN:,} more")
        return "\n".join(lines)


def write_rejects(path: str | PathLike[str], rejects: Sequence[Reject]) -> None:
    """JSON lines of row, code, message, where and path; no file where there is nothing to list."""
    if rejects:
        write_text(path, "".join(dump_json(asdict(reject), indent=None) for reject in rejects))


def check_policy(on_bad: str, max_bad: int | float) -> None:
    """Refuse a policy that means nothing, before any work is done.

    Raises:
        UsageError: an unknown `on_bad`, or a `max_bad` that is neither a count nor a fraction.
    """
    if on_bad not in ("error", "skip"):
        raise UsageError(f"on_bad is 'error' or 'skip'; found {on_bad!r}")
    if isinstance(max_bad, bool) or max_bad < 0 or (isinstance(max_bad, float) and not max_bad <= 1):
        raise UsageError(f"max_bad is a count (int) or a fraction in [0, 1] (float); found {max_bad!r}")
