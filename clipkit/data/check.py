"""What is wrong with this data, and what to do about it, before a run pays for it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from clipkit.data.dataset import has_texts
from clipkit.data.reading.rejects import LoadReport, Reject
from clipkit.errors import BadImage, DataError, option
from clipkit.images.load import describe, is_image_name, load_image
from clipkit.progress import track
from clipkit.texts import is_blank

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 5
_WINDOW = 256  # images in flight: enough to keep threads busy, few enough to stay small in memory


class TokenCounter(Protocol):
    """What is needed of a model's processor to measure captions."""

    @property
    def context_length(self) -> int: ...
    def token_counts(self, texts: Sequence[str]) -> list[int]: ...


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
    """Image files that lie beside those of the data, but belong to no row."""
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


def check_data(
    pairs: Dataset,
    *,
    processor: TokenCounter | None = None,
    ledger: LoadReport | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> DataReport:
    """Decode every image and measure every caption.

    Args:
        pairs: as `load_pairs` gives them.
        processor: of the model to be trained; with it captions are counted in its tokens.
        ledger: of the `load_pairs` call; its rejects become part of the report, and every row is named by its number in
            the source (the line of a text table). Without it rows are numbered from 0 as they stand in `pairs`.
        threads: that decode; by default one a core, at most 8.
        progress: show a bar.

    Raises:
        DataError: `pairs` has no column image, or neither texts nor label.
    """
    if "image" not in pairs.column_names or not {"texts", "label"} & set(pairs.column_names):
        names = ", ".join(map(repr, pairs.column_names))
        fix = "load_pairs makes them"
        raise DataError(f"expected the columns image, and texts or label or both; found {names}", fix=fix)
    decoded = _look(pairs, threads or min(8, os.cpu_count() or 1))
    looks = list(track(decoded, len(pairs), "decoding", unit="image", shown=progress))
    report = DataReport(rows=len(pairs), rejects=[look.reject for look in looks if look.reject])
    good = [row for row, look in enumerate(looks) if look.reject is None]
    report.images = len(good)
    report.width, report.height = (
        _spread(looks[row].size[0] for row in good),
        _spread(looks[row].size[1] for row in good),
    )
    _measure_images(report, pairs, looks, good)
    if has_texts(pairs):
        _measure_captions(report, pairs, processor)
    ledger = ledger or LoadReport(rows=len(pairs))
    place = _number_as(report, ledger)
    report.unreferenced = _unreferenced(pairs, [reject.path for reject in report.rejects if reject.path])
    report.advice = list(_advise(report, place))
    return report


def _number_as(report: DataReport, ledger: LoadReport) -> dict[int, str]:
    """Number the rows of a report as their source does; where a person finds those that are alike."""
    report.rows = ledger.rows
    undecoded = [row for reject in report.rejects for row in ledger.at(reject)]
    report.rejects = sorted([*ledger.rejects, *undecoded], key=lambda reject: reject.row)
    first = {row: ledger.source_rows(row)[0] for rows in report.duplicates for row in rows}
    report.duplicates, report.conflicts = (
        [[first[row][0] for row in rows] for rows in groups] for groups in (report.duplicates, report.conflicts)
    )
    return dict(first.values())


# ------------------------------------------------------------------------------------------------------------ images


class DecodedImage(NamedTuple):
    size: tuple[int, int]
    digest: bytes
    reject: Reject | None = None


def _look(pairs: Dataset, threads: int) -> Iterator[DecodedImage]:
    from datasets import Image

    column = pairs.select_columns(["image"]).cast_column("image", Image(decode=False))
    pending = iter(range(len(column)))
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes outside the interpreter's lock
        while window := list(islice(pending, _WINDOW)):
            yield from pool.map(_decode, window, column.select(window)["image"])


def _decode(row: int, cell: dict[str, Any]) -> DecodedImage:
    try:
        image = load_image(cell)
    except BadImage as bad:
        return DecodedImage((0, 0), b"", Reject(row, bad.code, bad.reason, f"row {row}", describe(cell)))
    return DecodedImage(image.size, hashlib.sha256(b"%d %d " % image.size + image.tobytes()).digest())


def _measure_images(report: DataReport, pairs: Dataset, looks: list[DecodedImage], good: list[int]) -> None:
    same: dict[bytes, list[int]] = defaultdict(list)
    for row in good:
        same[looks[row].digest].append(row)
    report.duplicates = [rows for rows in same.values() if len(rows) > 1]
    if "label" not in pairs.column_names:
        return
    labels = list(pairs["label"])
    names = getattr(pairs.features["label"], "names", None)
    shown = [label if label is None or names is None or label < 0 else names[label] for label in labels]
    counts = Counter(str(label) for label in shown if label is not None)
    report.labels = {str(name): counts[str(name)] for name in names or sorted(counts)}
    report.conflicts = [rows for rows in report.duplicates if len({labels[row] for row in rows} - {None}) > 1]


def _unreferenced(pairs: Dataset, rejected: Sequence[str]) -> list[str]:
    from datasets import Image

    column = pairs.select_columns(["image"]).cast_column("image", Image(decode=False))
    files = {Path(cell["path"]) for cell in column["image"] if cell["bytes"] is None and cell["path"]}
    there = {path for folder in {file.parent for file in files} for path in folder.glob("[!.]*") if is_image_name(path)}
    ends = tuple(rejected)  # as the table names them: relative to it
    return sorted(str(path) for path in there - files if not str(path).endswith(ends))


# ---------------------------------------------------------------------------------------------------------- captions


def _measure_captions(report: DataReport, pairs: Dataset, processor: TokenCounter | None) -> None:
    all_texts = list(pairs["texts"])
    texts = [text for row in all_texts for text in row]
    report.captions = len(texts)
    report.captions_per_image = _spread(len(row) for row in all_texts)
    report.words = _spread(len(text.split()) for text in texts)
    images = Counter(text for row in all_texts for text in set(row))
    report.shared_captions = {text: n for text, n in images.most_common() if n > 1}
    for row, captions in enumerate(all_texts):
        if all(map(is_blank, captions)):
            report.rejects.append(Reject(row, "EMPTY_TEXT", "the row has no caption", f"row {row}"))
    if processor is not None:
        counts = [
            n for start in range(0, len(texts), 1024) for n in processor.token_counts(texts[start : start + 1024])
        ]
        report.context_length = processor.context_length
        report.tokens = _spread(counts)
        report.truncated = sum(n > processor.context_length for n in counts)


def _spread(values: Iterable[int]) -> dict[str, float]:
    numbers = np.array(list(values), dtype=np.float64)
    if not len(numbers):
        return {}
    low, median, high, top = np.percentile(numbers, [0, 50, 95, 100])
    return {"min": float(low), "median": float(median), "p95": float(high), "max": float(top)}


# ------------------------------------------------------------------------------------------------------------ report


def _advise(report: DataReport, place: dict[int, str]) -> Iterator[str]:
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
        few, many = min(report.labels, key=report.labels.__getitem__), max(report.labels, key=report.labels.__getitem__)
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
