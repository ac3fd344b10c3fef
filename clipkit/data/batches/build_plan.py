"""Build the plan of a data set out of its columns."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from clipkit.data.batches.assignment import Ints
from clipkit.data.batches.plan import Plan
from clipkit.data.dataset import as_dataset, caption_counts, iterate_column, key_values, require_texts
from clipkit.data.fingerprint import opened, steady
from clipkit.data.split import image_keys
from clipkit.errors import DataError, UsageError
from clipkit.metrics.codes import assign_codes


def build_plan(
    pairs: Any,
    *,
    batch_size: int,
    seed: int = 0,
    distinct: Sequence[str] = (),
    balanced: str | None = None,
    grouped: str | None = None,
    group_size: int = 4,
) -> Plan:
    """Return the plan of batches of a data set.

    Args:
        pairs: as `Trainer` takes them.
        batch_size, seed, group_size: of `Plan`.
        distinct: what stands at most once in a global batch: ``texts`` (the captions drawn, letter by letter),
            ``image`` (the files, byte by byte; read once where two have one size), or columns, whose empty cells are
            never equal.
        balanced, grouped: columns without empty cells.

    Raises:
        UsageError: a stream; no such column; distinct images that change; what `Plan` cannot give.
        DataError: a row without captions, or with an empty cell in `balanced` or `grouped`.
    """
    pairs = as_dataset(pairs)
    require_texts(pairs)
    keys = {name: _codes(pairs, name) for name in dict.fromkeys(distinct)}
    return Plan(
        caption_counts(pairs),
        batch_size=batch_size,
        seed=seed,
        distinct=keys,
        balanced=None if balanced is None else _filled(pairs, balanced),
        grouped=None if grouped is None else _filled(pairs, grouped),
        group_size=group_size,
    )


def _codes(pairs: Any, name: str) -> Ints:
    if name == "texts":
        return _numbered(text for texts in iterate_column(pairs, "texts") for text in texts)
    if name == "image":
        if "image_features" in pairs.column_names:
            return _numbered(np.asarray(cell, dtype=np.float32).tobytes() for cell in pairs["image_features"])
        if opened(pairs) and not steady(pairs):
            raise UsageError(
                "distinct images have to be the same at every look; those of the first rows are not",
                where="column 'image'",
                fix="give them as they are, as paths, bytes or PIL images: TrainConfig(augmentation=…) augments them",
            )
        return _numbered(image_keys(pairs))
    return _numbered(key_values(pairs, name))


def _filled(pairs: Any, column: str) -> Ints:
    codes = _numbered(key_values(pairs, column))
    empty = np.flatnonzero(codes < 0)
    if empty.size:
        raise DataError(
            f"{empty.size:,} of {len(codes):,} cells are empty, so that these rows belong to no class or group",
            where=f"column {column!r}, row {empty[0]}",
            fix="fill them, or leave these rows out",
        )
    return codes


def _numbered(values: Iterable[Hashable | None]) -> Ints:
    return np.array(assign_codes(values), dtype=np.int64)
