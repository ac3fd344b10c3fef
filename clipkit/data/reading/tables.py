"""Tables read strictly: every cell as it stands in the file, or an error that names the line.

A lenient reader loses data in silence: one unbalanced quote swallows the rows after it, an unquoted comma shifts the
columns, "None" becomes NaN and "007" becomes 7.0. Here text stays text, and a file that can be read in two ways is
refused.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from clipkit.data.reading.rejects import Reject
from clipkit.errors import DataError, ResourceError, UsageError, option
from clipkit.images.load import is_image_name
from clipkit.paths import did_you_mean, is_url, show

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


TABLE_SUFFIXES = (*SEPARATORS, *JSON_SUFFIXES, ".parquet")


_LARGEST_FIELD = 16 * 1024**2
_BATCH = 1000  # rows that `datasets` turns into Python objects at once: a fifth of the time of one by one


SEPARATOR_WORDS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}  # which are typed without quotes


Quoting: TypeAlias = Literal["double", "backslash", "none"]


_QUOTING: dict[str, dict[str, Any]] = {
    "double": {},
    "backslash": {"escapechar": "\\", "doublequote": False},
    "none": {"quoting": csv.QUOTE_NONE},
}


class TextFormat(NamedTuple):
    """How text files are written.

    Args:
        separator: of the columns of a CSV file, a character or one of the words comma, semicolon, tab, bar; None: a
            comma, or a tab for .tsv and .tab.
        encoding: as Python names it. A byte-order mark of UTF-8 or UTF-16 is understood without it.
        quoting: how a quotation mark within a quoted cell is written: ``double`` (``""``, as spreadsheets and pandas do
            it) or ``backslash`` (as databases and Spark do it); ``none``: cells are not quoted, and a quotation mark
            is a character like any other.

    Raises:
        UsageError: see `checked_format`.
    """

    separator: str | None = None
    encoding: str = "utf-8-sig"
    quoting: Quoting = "double"


_PLAIN = TextFormat()


def checked_format(separator: str | None, encoding: str, quoting: str) -> TextFormat:
    """Raises UsageError where one of them means nothing."""
    words = {word: character for character, word in SEPARATOR_WORDS.items()} | {"\\t": "\t"}
    character = None if separator is None else words.get(separator, separator)
    if character is not None and (len(character) != 1 or character in '"\r\n\\'):
        found = f"a separator is one character, or a word of {', '.join(SEPARATOR_WORDS.values())}; found {separator!r}"
        raise UsageError(found, fix=option("separator", "semicolon"))
    if quoting not in _QUOTING:
        raise UsageError(f"quoting is one of {', '.join(_QUOTING)}; found {quoting!r}", fix=option("quoting", "none"))
    return TextFormat(character, encoding, quoting)  # type: ignore[arg-type]


class Unusable(NamedTuple):
    """What stands in a cell that could not be read: its row is a reject."""

    code: str
    message: str


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where each row stands.

    Args:
        name: what to call the source in messages.
        root: the folder that relative paths start from.
        columns: name -> cells, or a `datasets.Dataset`.
        lines: line of each row in a text file (from 1); None where rows are counted from 0.
        places: how a person finds each row, where its number is not enough.
        rejects: rows that could not even be read; they are not among the columns.
        no_text: what to say of a row without a caption.
        templates: make texts out of the label where the user names no other way.
    """

    name: str
    root: Path
    columns: Mapping[str, Sequence[Any]] | Dataset
    lines: Sequence[int] | None = None
    places: Sequence[str] | None = None
    rejects: list[Reject] = field(default_factory=list)
    no_text: str = "the caption is empty"
    templates: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(self.columns) if isinstance(self.columns, Mapping) else list(self.columns.column_names)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ())) if isinstance(self.columns, Mapping) else len(self.columns)

    def cells(self, name: str) -> list[Any]:
        """Return the cells of a column."""
        if isinstance(self.columns, Mapping):
            return list(self.columns[name])
        column = self.columns.select_columns([name])
        cells: list[Any] = []
        for start in range(0, len(column), _BATCH):
            cells += column[start : start + _BATCH][name]
        return cells

    def row(self, index: int) -> int:
        return index if self.lines is None else self.lines[index]

    def where(self, index: int) -> str:
        if self.places is not None:
            return self.places[index]
        return f"{self.name}, row {index}" if self.lines is None else f"{self.name}:{self.lines[index]}"


def read_table(path: Path, form: TextFormat = _PLAIN) -> Table:
    """A CSV, TSV, JSON-lines or Parquet file, read into memory.

    Args:
        path: the file; its suffix decides how it is read, and a separator makes it a CSV file.
        form: of text files.

    Raises:
        DataError: for everything that makes the table doubtful. The message begins with a code: ENCODING, NUL, QUOTE,
            FIELDS, FIELD_SIZE, HEADER, SEPARATOR, EMPTY_TABLE, BAD_JSON, BAD_PARQUET, NOT_A_TABLE.
        ResourceError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Table(show(path), path.parent, _read_parquet(path))
    if suffix in JSON_SUFFIXES:
        return _read_jsonl(path, read_text(path, form.encoding))
    if suffix in SEPARATORS or form.separator is not None:
        form = form._replace(separator=form.separator or SEPARATORS[suffix])
        return _read_csv(path, read_text(path, form.encoding), form)
    raise DataError(
        f"expected a file that ends in {', '.join(TABLE_SUFFIXES)}; found {suffix or 'no suffix'}",
        code="NOT_A_TABLE",
        where=show(path),
        fix=f"convert it, or name the separator if it is a text table: {option('separator', 'semicolon')}",
    )


def absolute(folder: Path, cell: Any) -> Any:
    """The path of a cell, or a list of paths, as it starts at a folder."""
    if isinstance(cell, str) and cell.strip() and not is_url(cell):
        return os.path.abspath(folder / cell)  # noqa: PTH100 (a link is named as it is)
    return [absolute(folder, each) for each in cell] if isinstance(cell, list) else cell


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError("no such file", where=show(path), fix=did_you_mean(path), code="MISSING") from error
    except OSError as error:
        raise ResourceError(f"the file cannot be read: {error.strerror}", where=show(path)) from error


def read_text(path: Path, encoding: str, *, empty_ok: bool = False) -> str:
    """A text file decoded strictly; a byte-order mark wins over `encoding`. Raises as `read_table`."""
    data = _bytes(path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    if not data.strip() and not empty_ok:
        raise DataError("the file is empty", where=show(path), code="EMPTY_TABLE")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig")
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"byte 0x{data[error.start]:02x} at offset {error.start:,} is not {name}: {error.reason}",
            code="ENCODING",
            where=f"{show(path)}:{line}",
            fix=f"name the encoding that the file was saved in, such as {option('encoding', 'cp1252')}",
        ) from error
    except (LookupError, UnicodeError) as error:  # no such encoding, or none of texts
        fix = f"name one that Python knows, such as {option('encoding', 'cp1252')}"
        raise DataError(str(error), where=show(path), fix=fix, code="ENCODING") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        fix = f"remove it; if every other byte is NUL the file is UTF-16: {option('encoding', 'utf-16')}"
        raise DataError("a NUL character in a text table", where=f"{show(path)}:{line}", fix=fix, code="NUL")
    return text


def _read_csv(path: Path, text: str, form: TextFormat) -> Table:
    sep = form.separator or ","
    verb = "mend" if form.quoting == "none" else "put quotes around"
    header: list[str] = []
    lines: list[int] = []
    rows: list[list[str]] = []
    for line, cells in _records(path, text, sep, form.quoting):
        if not header:
            header = _header(path, line, cells, sep)
            continue
        if len(cells) != len(header):
            raise DataError(
                f"expected {len(header)} fields as in the header, found {len(cells)}: {_abridged(cells)}",
                code="FIELDS",
                where=f"{show(path)}:{line}",
                fix=f"{verb} a cell that holds a {SEPARATOR_WORDS.get(sep, repr(sep))}",
            )
        _refuse_swallowed_rows(path, line, cells, sep)
        lines.append(line)
        rows.append(cells)
    if not rows:
        raise DataError("there is a header, but no row", where=show(path), code="EMPTY_TABLE")
    return Table(show(path), path.parent, dict(zip(header, zip(*rows, strict=True), strict=True)), lines)


def _records(path: Path, text: str, sep: str, quoting: Quoting) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line that it begins on; blank lines are passed over."""
    before = csv.field_size_limit(_LARGEST_FIELD)  # belongs to the process: put back below
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=True, **_QUOTING[quoting])
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        if "field larger" in str(error):
            code = "FIELD_SIZE"
            message = f"a cell of more than {_LARGEST_FIELD:,} characters"
            fix = "is a quote left open?"
        else:
            code = "QUOTE"
            message = f"a quotation mark is not balanced ({error})"
            fix = _mend_quotes(text.splitlines()[line - 1 : line], quoting)
        raise DataError(message, where=f"{show(path)}:{line}", fix=fix, code=code) from error
    finally:
        csv.field_size_limit(before)


def _mend_quotes(lines: list[str], quoting: Quoting) -> str:
    if quoting == "double" and lines and '\\"' in lines[0]:
        return f"quotation marks are written with a backslash here: {option('quoting', 'backslash')}"
    mark = '""' if quoting == "double" else '\\"'
    none = option("quoting", "none")
    return f"within a quoted cell write {mark} for a quotation mark; where cells are not quoted: {none}"


def _header(path: Path, line: int, cells: list[str], sep: str) -> list[str]:
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    where = f"{show(path)}:{line}"
    if len(names) == 1:
        other = next((s for s in SEPARATOR_WORDS if s != sep and s in names[0]), None)
        raise DataError(
            f"expected at least two columns, found one: {names[0]!r}",
            code="SEPARATOR",
            where=where,
            fix=f"the separator is probably a {SEPARATOR_WORDS[other]}: {option('separator', SEPARATOR_WORDS[other])}"
            if other
            else "a table has at least a column of images, and one of texts or labels",
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"a column name occurs twice: {', '.join(twice)}", where=where, fix="rename one", code="HEADER")
    if any(is_image_name(name) for name in names):
        raise DataError(
            f"the first line looks like data, not like column names: {_abridged(cells)}",
            code="HEADER",
            where=where,
            fix=f"add a first line such as image{sep}text",
        )
    return names


def _refuse_swallowed_rows(path: Path, line: int, cells: list[str], sep: str) -> None:
    """A quote left open and closed rows later gives one well-formed cell; an image named within it betrays it."""
    suspect = [(column, cell) for column, cell in enumerate(cells) if sep in cell and ("\n" in cell or "\r" in cell)]
    if not suspect:
        return
    columns = {column for column, cell in enumerate(cells) if _names_image(path, cell)} or set(range(len(cells)))
    for column, cell in suspect:
        for number, inner in enumerate(cell.splitlines()):
            # The first line of a cell begins in its own column, the others begin a row.
            parts = enumerate(inner.split(sep), 0 if number else column)
            if any(at in columns and (number or at > column) and _names_image(path, part) for at, part in parts):
                raise DataError(
                    f"a quoted cell holds what looks like another row: {inner[:60]!r}",
                    code="QUOTE",
                    where=f"{show(path)}:{line}",
                    fix=f"close the quotation mark; where cells are not quoted: {option('quoting', 'none')}",
                )


def _names_image(path: Path, cell: str) -> bool:
    """Whether a cell is the name of an image, or of a file."""
    name = cell.strip('" ')
    if not name or "\n" in name:
        return False
    return is_image_name(name) or os.path.isfile(path.parent / name)  # noqa: PTH113 (for any text, however long)


def _abridged(cells: Sequence[str]) -> str:
    text = " | ".join(cells)
    return text if len(text) <= 100 else text[:99] + "…"


def _read_jsonl(path: Path, text: str) -> Table:
    if text.lstrip().startswith("["):
        fix = "write one object a line (JSON lines)"
        raise DataError("the file is one JSON array", where=show(path), fix=fix, code="BAD_JSON")
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    # Only the three line ends: a caption may hold U+2028 or a form feed, which str.splitlines would cut at.
    for line, content in enumerate(io.StringIO(text, newline=None), 1):
        if not content.strip():
            continue
        try:
            rows.append(json_object(content))
            lines.append(line)
        except (ValueError, RecursionError) as error:
            rejects.append(Reject(line, "BAD_JSON", str(error), f"{show(path)}:{line}"))
    names = dict.fromkeys(name for row in rows for name in row)
    if rejects and not rows:
        raise DataError(f"no line is a JSON object: {rejects[0].message}", where=rejects[0].where, code="BAD_JSON")
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(show(path), path.parent, columns, lines, rejects=rejects)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, read strictly. Raises ValueError or RecursionError."""
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


def _read_parquet(path: Path) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    data = pa.py_buffer(_bytes(path))
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        fix = "write or copy it again"
        raise DataError(str(error).splitlines()[0], where=show(path), fix=fix, code="BAD_PARQUET") from error
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):  # pandas' categories
            table = table.set_column(index, column.name, table.column(index).cast(column.type.value_type))
    if not table.num_rows:
        raise DataError("there are columns, but no row", where=show(path), code="EMPTY_TABLE")
    if len(set(table.column_names)) != table.num_columns:
        raise DataError("a column name occurs twice", where=show(path), fix="rename one", code="HEADER")
    return Dataset(table)
