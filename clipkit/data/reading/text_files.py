"""Text files: how they are written, and their text, decoded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from clipkit.errors import DataError, ResourceError, UsageError, option
from clipkit.paths import did_you_mean, show

SEPARATOR_WORDS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}  # the words need no quotes in a shell
Quoting: TypeAlias = Literal["double", "backslash", "none"]


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


def checked_format(separator: str | None, encoding: str, quoting: str) -> TextFormat:
    """Return the format; a separator may be a character or its word.

    Raises:
        UsageError: a separator of several characters, or an unknown quoting.
    """
    words = {word: character for character, word in SEPARATOR_WORDS.items()} | {"\\t": "\t"}
    character = None if separator is None else words.get(separator, separator)
    if character is not None and (len(character) != 1 or character in '"\r\n\\'):
        words_listed = ", ".join(SEPARATOR_WORDS.values())
        message = f"a separator is one character, or a word of {words_listed}; found {separator!r}"
        raise UsageError(message, fix=option("separator", "semicolon"))
    styles = get_args(Quoting)
    if quoting not in styles:
        raise UsageError(f"quoting is one of {', '.join(styles)}; found {quoting!r}", fix=option("quoting", "none"))
    return TextFormat(character, encoding, quoting)  # type: ignore[arg-type]


def read_text(path: Path, encoding: str, *, empty_ok: bool = False) -> str:
    """Return the content of a text file, decoded strictly; a byte-order mark wins over `encoding`.

    Raises:
        DataError: ENCODING, NUL or EMPTY_TABLE (unless `empty_ok`).
        ResourceError: the file cannot be read.
    """
    data = read_bytes(path)
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
    except (LookupError, UnicodeError) as error:  # no such encoding, or not one of texts
        fix = f"name one that Python knows, such as {option('encoding', 'cp1252')}"
        raise DataError(str(error), where=show(path), fix=fix, code="ENCODING") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        fix = f"remove it; if every other byte is NUL the file is UTF-16: {option('encoding', 'utf-16')}"
        raise DataError("a NUL character in a text table", where=f"{show(path)}:{line}", fix=fix, code="NUL")
    return text


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        DataError: the file does not exist.
        ResourceError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError("no such file", where=show(path), fix=did_you_mean(path), code="MISSING") from error
    except OSError as error:
        raise ResourceError(f"the file cannot be read: {error.strerror}", where=show(path)) from error
