"""The report of `check_data`: what it counts, how people read it, and what it advises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipkit.data.reading.rejects import Reject
from clipkit.errors import option

_SHOWN = 5


@dataclass
class DataReport:
    """The findings of `check_data`. ``str(report)`` is for people, `as_dict` for machines."""

    rows: int = 0
    """Rows that came in, those included that `load_pairs` rejected."""
    images: int = 0
    """Rows whose image decodes."""
    captions: int = 0
    captions_per_image: dict[str, float] = field(default_factory=dict)
    words: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    """min, median, p95 and max, special tokens included; empty without a processor."""
    truncated: int = 0
    """Captions longer than the model's context."""
    context_length: int | None = None
    width: dict[str, float] = field(default_factory=dict)
    height: dict[str, float] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    duplicates: list[list[int]] = field(default_factory=list)
    """Rows whose decoded images are equal pixel by pixel; numbered as in `rejects`."""
    conflicts: list[list[int]] = field(default_factory=list)
    """Those of the duplicates whose labels differ."""
    shared_captions: dict[str, int] = field(default_factory=dict)
    """Captions of several images, with the number of images; the most frequent first."""
    unreferenced: list[str] = field(default_factory=list)
    """Image files in the folders of the data that belong to no row."""
    rejects: list[Reject] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row can be used and no image has two labels."""
        return not self.rejects and not self.conflicts

    @property
    def exit_code(self) -> int:
        """0, or 3 (bad data)."""
        return 0 if self.ok else 3

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def advise(report: DataReport, place: dict[int, str]) -> Iterator[str]:
    """Yield what to do about the data, a sentence at a time; `place` says where a row is, by its number."""
    split = option("data.split_by", "image", python='split_pairs(by="image")')
    alike = option("similar.group", "COLUMN", python="similar=SameGroup(column)")
    if report.rejects:
        skip = option("train.on_bad", "skip")
        yield f"fix the rows listed, or train with {skip}, which leaves them out and counts them"
    if report.conflicts:
        rows = ", ".join(place[row] for row in report.conflicts[0][:_SHOWN])
        yield f"{len(report.conflicts)} images carry two different labels, e.g. {rows}: decide on one"
    if report.duplicates:
        extra = sum(len(rows) - 1 for rows in report.duplicates)
        rows = ", ".join(place[row] for row in report.duplicates[0][:_SHOWN])
        yield (
            f"{extra:,} rows repeat an image, e.g. {rows}: split files that are equal with {split}; in one batch they "
            f"are false negatives of each other, which {alike} prevents"
        )
    if report.shared_captions:
        text, n = next(iter(report.shared_captions.items()))
        yield (
            f"{len(report.shared_captions):,} captions stand for several images, {text[:40]!r} for {n:,}: retrieval "
            f"counts only one of them as right; {alike} treats them as alike"
        )
    if report.truncated:
        share = report.truncated / report.captions
        yield (
            f"{report.truncated:,} captions ({share:.1%}) are longer than the {report.context_length} tokens of the "
            "model and lose their end: shorten them, or take a model with a longer context"
        )
    if report.unreferenced:
        first = ", ".join(Path(path).name for path in report.unreferenced[:3])
        yield f"{len(report.unreferenced):,} images beside these are in no row, e.g. {first}: were they forgotten?"
    counts = sorted(report.labels.values())
    if counts and counts[-1] > 10 * max(counts[0], 1):
        few = min(report.labels, key=report.labels.__getitem__)
        many = max(report.labels, key=report.labels.__getitem__)
        yield (
            f"the classes are uneven: {many!r} has {counts[-1]:,} images, {few!r} {counts[0]:,}: read the mean per "
            "class beside the accuracy"
        )


def _lines(report: DataReport) -> Iterator[str]:
    captions = f"{report.captions:,} captions" if report.captions_per_image else "no column of captions"
    yield f"{report.rows:,} rows, {report.images:,} images that decode, {captions}"
    for name, spread, unit in (
        ("captions an image", report.captions_per_image, ""),
        ("words a caption", report.words, ""),
        ("tokens a caption", report.tokens, f" (context {report.context_length})"),
        ("width", report.width, " px"),
        ("height", report.height, " px"),
    ):
        if spread:
            yield "  {:<18} {min:g} to {max:g}, median {median:g}, 95 % up to {p95:g}".format(name, **spread) + unit
    if report.labels:
        counts = report.labels.values()
        yield f"  {'classes':<18} {len(counts)}, with {min(counts):,} to {max(counts):,} images"
    if report.rejects:
        codes = Counter(reject.code for reject in report.rejects)
        yield f"{len(report.rejects):,} rows cannot be used: " + ", ".join(f"{n:,} {c}" for c, n in codes.most_common())
        yield from (f"  {reject}" for reject in report.rejects[: 2 * _SHOWN])
        if len(report.rejects) > 2 * _SHOWN:
            yield f"  ... and {len(report.rejects) - 2 * _SHOWN:,} more"
    yield from (f"- {line}" for line in report.advice)
    yield "ok" if report.ok else "not ok"
