"""Tables read strictly: every cell as it stands in the file, or an error that names the line.

A lenient reader loses data in silence: one unbalanced quote swallows the rows after it, an unquoted comma shifts the
columns, "None" becomes NaN and "007" becomes 7.0. Here text stays text, and a file that can be read in two ways is
refused.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.data.reading.csv_files import read_csv
from clipkit.data.reading.rejects import Reject
from clipkit.data.reading.table import Table
from clipkit.data.reading.text_files import TextFormat, read_bytes, read_text
from clipkit.errors import DataError, option
from clipkit.paths import show

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*SEPARATORS, *JSON_SUFFIXES, ".parquet")
_PLAIN = TextFormat()


def read_table(path: Path, form: TextFormat = _PLAIN) -> Table:
    """Read a CSV, TSV, JSON-lines or Parquet file into memory.

    Args:
        path: the file; its suffix decides how it is read, and a separator makes it a CSV file.
        form: how a text file is written.

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
        return read_csv(path, read_text(path, form.encoding), form)
    raise DataError(
        f"expected a file that ends in {', '.join(TABLE_SUFFIXES)}; found {suffix or 'no suffix'}",
        code="NOT_A_TABLE",
        where=show(path),
        fix=f"convert it, or name the separator if it is a text table: {option('separator', 'semicolon')}",
    )


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
    """Return a JSON object, read strictly. Raises ValueError or RecursionError."""
    value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object {{...}}, found {type(value).__name__}")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff alone) is not a character") from error
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return mapping


def _read_parquet(path: Path) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    data = pa.py_buffer(read_bytes(path))
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
