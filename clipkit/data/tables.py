"""Tables read strictly: every cell as it stands in the file, or an error that names the line.

A lenient reader loses data in silence: one unbalanced quote swallows the rows after it, an unquoted comma shifts the
columns, "None" becomes NaN and "007" becomes 7.0. Here text stays text, and a file that can be read in two ways is
refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.data.rejects import Reject
from clipkit.errors import DataError, ResourceError
from clipkit.images import is_image_name
from clipkit.paths import did_you_mean, show

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*SEPARATORS, *JSON_SUFFIXES, ".parquet")
_LARGEST_FIELD = 16 * 1024**2
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where each row stands.

    Args:
        name: what to call the source in messages.
        root: the folder that relative paths start from.
        columns: name -> cells, or a `datasets.Dataset`.
        lines: line of each row in a text file (from 1); None where rows are counted from 0.
        rejects: rows that could not even be read; they are not among the columns.
        no_text: what to say of a row without a caption.
        templates: make texts out of the label where the user names no other way.
    """

    name: str
    root: Path
    columns: Mapping[str, Sequence[Any]] | Dataset
    lines: Sequence[int] | None = None
    rejects: list[Reject] = field(default_factory=list)
    no_text: str = "the caption is empty"
    templates: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(self.columns) if isinstance(self.columns, Mapping) else list(self.columns.column_names)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ())) if isinstance(self.columns, Mapping) else len(self.columns)

    def cells(self, name: str) -> list[Any]:
        return list(self.columns[name])

    def row(self, index: int) -> int:
        return index if self.lines is None else self.lines[index]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}" if self.lines is None else f"{self.name}:{self.lines[index]}"


def read_table(path: Path, *, sep: str | None = None, encoding: str = "utf-8-sig") -> Table:
    """A CSV, TSV, JSON-lines or Parquet file, read into memory.

    Args:
        path: the file; its suffix decides how it is read.
        sep: column separator of a CSV; by default comma, or tab for .tsv and .tab.
        encoding: of text files. A UTF-8 or UTF-16 byte-order mark is understood without it.

    Raises:
        DataError: for everything that makes the table doubtful. The message begins with a code: ENCODING, NUL, QUOTE,
            FIELDS, FIELD_SIZE, HEADER, SEPARATOR, EMPTY_TABLE, BAD_JSON, BAD_PARQUET, NOT_A_TABLE.
        ResourceError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Table(show(path), path.parent, _read_parquet(path))
    if suffix in JSON_SUFFIXES:
        return _read_jsonl(path, read_text(path, encoding))
    if suffix in SEPARATORS or sep is not None:
        return _read_csv(path, read_text(path, encoding), sep or SEPARATORS[suffix])
    raise DataError(
        f"NOT_A_TABLE: expected a file that ends in {', '.join(TABLE_SUFFIXES)}; found {suffix or 'no suffix'}",
        where=show(path),
        fix="convert it, or name the separator with sep= if it is a text table",
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError("MISSING: no such file", where=show(path), fix=did_you_mean(path)) from error
    except OSError as error:
        raise ResourceError(f"the file cannot be read: {error.strerror}", where=show(path)) from error


def read_text(path: Path, encoding: str, *, empty_ok: bool = False) -> str:
    """A text file decoded strictly; a byte-order mark wins over `encoding`. Raises as `read_table`."""
    data = _bytes(path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    if not data.strip() and not empty_ok:
        raise DataError("EMPTY_TABLE: the file is empty", where=show(path))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"ENCODING: byte 0x{data[error.start]:02x} at offset {error.start:,} is not {encoding}: {error.reason}",
            where=f"{show(path)}:{line}",
            fix='name the encoding the file was saved in, e.g. encoding="cp1252", or save it as UTF-8',
        ) from error
    except LookupError as error:
        raise DataError(f"ENCODING: {error}", where=show(path), fix='e.g. encoding="cp1252"') from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        fix = 'remove it; if every other byte is NUL the file is UTF-16: encoding="utf-16"'
        raise DataError("NUL: a NUL character in a text table", where=f"{show(path)}:{line}", fix=fix)
    return text


# --------------------------------------------------------------------------------------------------------------- CSV


def _read_csv(path: Path, text: str, sep: str) -> Table:
    header: list[str] = []
    lines: list[int] = []
    rows: list[list[str]] = []
    for line, cells in _records(path, text, sep):
        if not header:
            header = _header(path, line, cells, sep)
            continue
        if len(cells) != len(header):
            raise DataError(
                f"FIELDS: expected {len(header)} fields as in the header, found {len(cells)}: {_abridged(cells)}",
                where=f"{show(path)}:{line}",
                fix=f"put quotes around a cell that holds a {_NAMES.get(sep, repr(sep))}",
            )
        _refuse_swallowed_rows(path, line, cells, sep, len(header))
        lines.append(line)
        rows.append(cells)
    if not rows:
        raise DataError("EMPTY_TABLE: there is a header, but no row", where=show(path))
    return Table(show(path), path.parent, dict(zip(header, zip(*rows, strict=True), strict=True)), lines)


def _records(path: Path, text: str, sep: str) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line that it begins on; blank lines are passed over."""
    before = csv.field_size_limit(_LARGEST_FIELD)  # belongs to the process: put back below
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        if "field larger" in str(error):
            message, fix = f"FIELD_SIZE: a cell of more than {_LARGEST_FIELD:,} characters", "is a quote left open?"
        else:
            message = f"QUOTE: a quotation mark is not balanced ({error})"
            fix = 'inside a quoted cell write a quotation mark twice: "a 5"" nail"'
        raise DataError(message, where=f"{show(path)}:{line}", fix=fix) from error
    finally:
        csv.field_size_limit(before)


def _header(path: Path, line: int, cells: list[str], sep: str) -> list[str]:
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    where = f"{show(path)}:{line}"
    if len(names) == 1:
        other = next((s for s in _NAMES if s != sep and s in names[0]), None)
        raise DataError(
            f"SEPARATOR: expected at least two columns, found one: {names[0]!r}",
            where=where,
            fix=f"the separator is probably a {_NAMES[other]}: sep={other!r}" if other else "name it with sep=",
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"HEADER: a column name occurs twice: {', '.join(twice)}", where=where, fix="rename one")
    if any(is_image_name(name) for name in names):
        raise DataError(
            f"HEADER: the first line looks like data, not like column names: {_abridged(cells)}",
            where=where,
            fix=f"add a first line such as image{sep}text",
        )
    return names


def _refuse_swallowed_rows(path: Path, line: int, cells: list[str], sep: str, width: int) -> None:
    """A quote left open and closed rows later gives one well-formed cell; the rows within it betray it."""
    for cell in cells:
        for inner in cell.splitlines()[1:] if "\n" in cell or "\r" in cell else ():
            parts = inner.split(sep)
            if len(parts) >= width and any(is_image_name(part.strip('" ')) for part in parts):
                raise DataError(
                    f"QUOTE: a quoted cell holds what looks like another row: {inner[:60]!r}",
                    where=f"{show(path)}:{line}",
                    fix='close the quotation mark on this line, or write it twice: ""',
                )


def _abridged(cells: Sequence[str]) -> str:
    text = " | ".join(cells)
    return text if len(text) <= 100 else text[:99] + "…"


# -------------------------------------------------------------------------------------------------------- JSON lines


def _read_jsonl(path: Path, text: str) -> Table:
    if text.lstrip().startswith("["):
        fix = "write one object a line (JSON lines)"
        raise DataError("BAD_JSON: the file is one JSON array", where=show(path), fix=fix)
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    # Only the three line ends: a caption may hold U+2028 or a form feed, which str.splitlines would cut at.
    for line, content in enumerate(io.StringIO(text, newline=None), 1):
        if not content.strip():
            continue
        try:
            rows.append(_json_object(content))
            lines.append(line)
        except (ValueError, RecursionError) as error:
            rejects.append(Reject(line, "BAD_JSON", str(error), f"{show(path)}:{line}"))
    names = dict.fromkeys(name for row in rows for name in row)
    if rejects and not rows:
        raise DataError(f"BAD_JSON: no line is a JSON object: {rejects[0].message}", where=rejects[0].where)
    return Table(show(path), path.parent, {name: [row.get(name) for row in rows] for name in names}, lines, rejects)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object {{...}}, found {type(value).__name__}")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff alone) is no character") from error
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


# ----------------------------------------------------------------------------------------------------------- Parquet


def _read_parquet(path: Path) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    data = pa.py_buffer(_bytes(path))
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        fix = "write or copy it again"
        raise DataError(f"BAD_PARQUET: {str(error).splitlines()[0]}", where=show(path), fix=fix) from error
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):  # pandas' categories
            table = table.set_column(index, column.name, table.column(index).cast(column.type.value_type))
    if not table.num_rows:
        raise DataError("EMPTY_TABLE: there are columns, but no row", where=show(path))
    if len(set(table.column_names)) != table.num_columns:
        raise DataError("HEADER: a column name occurs twice", where=show(path), fix="rename one")
    return Dataset(table)
