"""Which texts can be used as captions, queries and names of classes, wherever they come from."""

from __future__ import annotations

import re
import unicodedata

from clipkit.errors import DataError

# Printable by their category, but without ink: fillers of Hangul, the blank pattern of Braille, variation selectors.
_BLANK = {"\u115f", "\u1160", "\u3164", "\uffa0", "\u2800", *map(chr, range(0xFE00, 0xFE10))}
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadText(DataError):
    """A text that cannot be used; `code` is NOT_TEXT, EMPTY_TEXT or BAD_TEXT."""

    code: str

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, fix="fix or drop it", code=code)


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, controls, byte-order marks, zero-width characters.

    >>> is_blank("\\ufeff\\u200b \\n"), is_blank("007")
    (True, False)
    """
    if "!" <= text[:1] <= "~":  # the ASCII signs that print; most captions begin with one
        return False
    return not any(map(_has_ink, text))


def _has_ink(c: str) -> bool:
    if c.isprintable():
        return c != " " and c not in _BLANK
    return unicodedata.category(c) in ("Co", "Cs")  # private use: fonts of icons draw there; Cs is broken, not blank


def is_broken(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, as names and arguments that are not UTF-8 do in Python."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def checked_text(item: object) -> str:
    """The text as it stands.

    Raises:
        BadText: it is not a text, holds half of a surrogate pair, or nothing of it can be seen.
    """
    if not isinstance(item, str):
        raise BadText("NOT_TEXT", f"expected a text; found {type(item).__name__} {repr(item)[:40]}")
    if is_broken(item):
        raise BadText("BAD_TEXT", f"half of a surrogate pair, from bytes that are not UTF-8: {ascii(item)[:60]}")
    if not item.strip():
        raise BadText("EMPTY_TEXT", "the text is empty")
    if is_blank(item):
        raise BadText("EMPTY_TEXT", f"nothing of the text can be seen: {ascii(item)[:60]}")
    return item


def is_text(item: object) -> bool:
    """Whether `checked_text` takes it."""
    return isinstance(item, str) and not is_broken(item) and not is_blank(item)
