"""What is wrong with this data, and what to do about it, before a run pays for it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from clipkit.data.check_report import DataReport, advise
from clipkit.data.dataset import has_texts, iterate_column
from clipkit.data.reading.rejects import LoadReport, Reject
from clipkit.errors import BadImage, DataError
from clipkit.images.load import describe, is_image_name, load_image
from clipkit.progress import track
from clipkit.texts import is_blank

if TYPE_CHECKING:
    from datasets import Dataset

_WINDOW = 256  # images in flight: enough to keep threads busy, few enough to stay small in memory


class TokenCounter(Protocol):
    """The part of a model's processor that measures captions."""

    @property
    def context_length(self) -> int: ...
    def token_counts(self, texts: Sequence[str]) -> list[int]: ...


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
    images = _decode_all(pairs, threads or min(8, os.cpu_count() or 1))
    decoded = list(track(images, len(pairs), "decoding", unit="image", shown=progress))
    report = DataReport(rows=len(pairs), rejects=[image.reject for image in decoded if image.reject])
    good = [row for row, image in enumerate(decoded) if image.reject is None]
    report.images = len(good)
    report.width = _spread(decoded[row].size[0] for row in good)
    report.height = _spread(decoded[row].size[1] for row in good)
    _measure_images(report, pairs, decoded, good)
    if has_texts(pairs):
        _measure_captions(report, pairs, processor)
    ledger = ledger or LoadReport(rows=len(pairs))
    place = _number_as(report, ledger)
    report.unreferenced = _unreferenced(pairs, [reject.path for reject in report.rejects if reject.path])
    report.advice = list(advise(report, place))
    return report


def _number_as(report: DataReport, ledger: LoadReport) -> dict[int, str]:
    """Number the rows of a report as their source does; return where a person finds the duplicates, by number."""
    report.rows = ledger.rows
    undecoded = [row for reject in report.rejects for row in ledger.at(reject)]
    report.rejects = sorted([*ledger.rejects, *undecoded], key=lambda reject: reject.row)
    first = {row: ledger.source_rows(row)[0] for rows in report.duplicates for row in rows}
    report.duplicates = [[first[row][0] for row in rows] for rows in report.duplicates]
    report.conflicts = [[first[row][0] for row in rows] for rows in report.conflicts]
    return dict(first.values())


# ------------------------------------------------------------------------------------------------------------ images


class DecodedImage(NamedTuple):
    size: tuple[int, int]
    digest: bytes
    reject: Reject | None = None


def _decode_all(pairs: Dataset, threads: int) -> Iterator[DecodedImage]:
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


def _measure_images(report: DataReport, pairs: Dataset, decoded: list[DecodedImage], good: list[int]) -> None:
    same: dict[bytes, list[int]] = defaultdict(list)
    for row in good:
        same[decoded[row].digest].append(row)
    report.duplicates = [rows for rows in same.values() if len(rows) > 1]
    if "label" not in pairs.column_names:
        return
    labels = list(iterate_column(pairs, "label"))
    names = getattr(pairs.features["label"], "names", None)
    shown = [label if label is None or names is None or label < 0 else names[label] for label in labels]
    counts = Counter(str(label) for label in shown if label is not None)
    report.labels = {str(name): counts[str(name)] for name in names or sorted(counts)}
    report.conflicts = [rows for rows in report.duplicates if len({labels[row] for row in rows} - {None}) > 1]


def _unreferenced(pairs: Dataset, rejected: Sequence[str]) -> list[str]:
    from datasets import Image

    column = pairs.select_columns(["image"]).cast_column("image", Image(decode=False))
    files = {Path(cell["path"]) for cell in column["image"] if cell["bytes"] is None and cell["path"]}
    folders = {file.parent for file in files}
    there = {path for folder in folders for path in folder.glob("[!.]*") if is_image_name(path)}
    ends = tuple(rejected)  # as the table names them: relative to it
    return sorted(str(path) for path in there - files if not str(path).endswith(ends))


# ---------------------------------------------------------------------------------------------------------- captions


def _measure_captions(report: DataReport, pairs: Dataset, processor: TokenCounter | None) -> None:
    all_texts = list(iterate_column(pairs, "texts"))
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
        counts: list[int] = []
        for start in range(0, len(texts), 1024):
            counts += processor.token_counts(texts[start : start + 1024])
        report.context_length = processor.context_length
        report.tokens = _spread(counts)
        report.truncated = sum(n > processor.context_length for n in counts)


def _spread(values: Iterable[int]) -> dict[str, float]:
    numbers = np.array(list(values), dtype=np.float64)
    if not len(numbers):
        return {}
    low, median, high, top = np.percentile(numbers, [0, 50, 95, 100])
    return {"min": float(low), "median": float(median), "p95": float(high), "max": float(top)}
