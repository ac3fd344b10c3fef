"""CSV and TSV files, read strictly: a file that can be read in two ways is refused."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipkit.data.reading.table import Table
from clipkit.data.reading.text_files import SEPARATOR_WORDS, Quoting, TextFormat
from clipkit.errors import DataError, option
from clipkit.images.load import is_image_name
from clipkit.paths import show

_LARGEST_FIELD = 16 * 1024**2
_QUOTING: dict[str, dict[str, Any]] = {
    "double": {},
    "backslash": {"escapechar": "\\", "doublequote": False},
    "none": {"quoting": csv.QUOTE_NONE},
}


def read_csv(path: Path, text: str, form: TextFormat) -> Table:
    """Return the table in the text of a CSV file. Raises DataError as `read_table`."""
    sep = form.separator or ","
    remedy = "fix" if form.quoting == "none" else "put quotes around"
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
                fix=f"{remedy} a cell that holds a {SEPARATOR_WORDS.get(sep, repr(sep))}",
            )
        _refuse_swallowed_rows(path, line, cells, sep)
        lines.append(line)
        rows.append(cells)
    if not rows:
        raise DataError("there is a header, but no row", where=show(path), code="EMPTY_TABLE")
    return Table(show(path), path.parent, dict(zip(header, zip(*rows, strict=True), strict=True)), lines)


def _records(path: Path, text: str, sep: str, quoting: Quoting) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line that it begins on, without blank lines."""
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
            fix = _fix_of_quotes(text.splitlines()[line - 1 : line], quoting)
        raise DataError(message, where=f"{show(path)}:{line}", fix=fix, code=code) from error
    finally:
        csv.field_size_limit(before)


def _fix_of_quotes(lines: list[str], quoting: Quoting) -> str:
    if quoting == "double" and lines and '\\"' in lines[0]:
        return f"quotation marks are written with a backslash here: {option('quoting', 'backslash')}"
    mark = '""' if quoting == "double" else '\\"'
    none = option("quoting", "none")
    return f"within a quoted cell write {mark} for a quotation mark; where cells are not quoted: {none}"


def _header(path: Path, line: int, cells: list[str], sep: str) -> list[str]:
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    where = f"{show(path)}:{line}"
    if len(names) == 1:
        others = [word for character, word in SEPARATOR_WORDS.items() if character != sep and character in names[0]]
        if others:
            fix = f"the separator is probably a {others[0]}: {option('separator', others[0])}"
        else:
            fix = "a table has at least a column of images, and one of texts or labels"
        message = f"expected at least two columns, found one: {names[0]!r}"
        raise DataError(message, where=where, fix=fix, code="SEPARATOR")
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
    """Raise DataError where a cell seems to hold other rows.

    A quote that is left open, and closed some rows later, gives one well-formed cell; but an image is named within it.
    """
    suspect = [(column, cell) for column, cell in enumerate(cells) if sep in cell and ("\n" in cell or "\r" in cell)]
    if not suspect:
        return
    image_columns = {column for column, cell in enumerate(cells) if _names_image(path, cell)}
    if not image_columns:
        image_columns = set(range(len(cells)))
    for column, cell in suspect:
        for number, inner in enumerate(cell.splitlines()):
            parts = inner.split(sep)
            # The first line begins in the cell's own column, and that part is the cell's; the others begin a row.
            places = enumerate(parts[1:], column + 1) if number == 0 else enumerate(parts)
            if any(place in image_columns and _names_image(path, part) for place, part in places):
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
