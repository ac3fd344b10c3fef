"""From what a user passes (a file, a folder, a name, a data set) to a `Table`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.data.reading.folders import read_folder
from clipkit.data.reading.rejects import LoadReport
from clipkit.data.reading.table import Table
from clipkit.data.reading.tables import read_table
from clipkit.data.reading.text_files import TextFormat
from clipkit.errors import DataError, UsageError, option
from clipkit.paths import did_you_mean, show

if TYPE_CHECKING:
    from datasets import Dataset


def open_source(source: Any, ledger: LoadReport, *, split: str, form: TextFormat) -> Table:
    """Read the source; see `load_pairs` for what it may be.

    Raises:
        DataError: the source does not exist, or it cannot be read as data.
        UsageError: it is of a type that is never data.
    """
    if not isinstance(source, (str, Path)):
        data = _one_split(source, split)
        return Table(f"data set {data.builder_name or ''}".strip(), Path.cwd(), data)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_directory(path, ledger, split, form)
    if path.exists():
        return read_table(path, form)
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.parent.is_dir():
        return Table(f"data set {source}", Path.cwd(), _from_hub(source, split))
    raise DataError(
        "no such file or folder",
        code="MISSING",
        where=show(path),
        fix=did_you_mean(path) or "check the path; a data set of the hub is written org/name",
    )


def _read_directory(path: Path, ledger: LoadReport, split: str, form: TextFormat) -> Table:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk  # a folder that datasets' save_to_disk wrote

        return Table(show(path), Path.cwd(), _one_split(load_from_disk(str(path)), split))
    return read_folder(path, ledger, form)


def _one_split(data: Any, split: str) -> Dataset:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(data, DatasetDict):
        if split not in data:
            names = ", ".join(map(repr, data))
            raise DataError(f"no split {split!r}; there are {names}", fix=option("split", next(iter(data), "train")))
        data = data[split]
    if isinstance(data, (IterableDataset, IterableDatasetDict)):
        fix = "pack it first: load it with streaming=False, or Dataset.from_generator"
        raise DataError("a stream has no length and no order to come back to, so it cannot be trained on", fix=fix)
    if not isinstance(data, Dataset):
        fix = "datasets.Dataset.from_pandas, from_list and from_dict make a data set of what is in memory"
        raise UsageError(f"expected a path, a name or a datasets.Dataset; found {type(data).__name__}", fix=fix)
    if not len(data):
        raise DataError("the data set has no row", code="EMPTY_TABLE")
    return data.with_format(None)


def _from_hub(name: str, split: str) -> Dataset:
    from datasets import load_dataset

    try:
        return _one_split(load_dataset(name, split=split), split)
    except DataError:
        raise
    except Exception as error:  # datasets raises many types
        text = str(error).strip()
        reason = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"
        raise DataError(
            f"neither a local file or folder, nor a data set that could be loaded: {reason}",
            code="MISSING",
            where=name,
            fix="check the spelling; if the network is off (HF_HUB_OFFLINE), load it once with the network on",
        ) from error
