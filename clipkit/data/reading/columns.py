"""Which column is the image, which are the texts, which is the label; and what a cell of each means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from clipkit.data.reading.table import Table
from clipkit.data.reading.text_files import SEPARATOR_WORDS
from clipkit.errors import DataError, UsageError, option
from clipkit.suggest import closest
from clipkit.texts import checked_text, is_blank

# In the order of preference; compared without case.
# fmt: off
IMAGE_NAMES = ["image", "images", "img", "image_path", "image_file", "filepath", "file_path", "file", "filename",
               "file_name", "path", "photo"]
TEXT_NAMES = ["texts", "captions", "text", "caption", "sentences", "sentence", "title", "description", "alt_text",
              "alt", "prompt"]


# fmt: on
LABEL_NAMES = ["label"]


class Columns(NamedTuple):
    """The columns chosen. `texts` is empty where templates make texts of the label, or where there are labels alone."""

    image: str
    texts: list[str]
    label: str | None
    label_needed: bool
    """Whether a row without a label is to be rejected: it was asked for, the texts are made of it, or it is all."""


def choose(
    table: Table,
    *,
    image: str | None,
    text: str | Sequence[str] | None,
    label: str | None,
    templates: bool,
) -> Columns:
    """Find the columns that were named, or that have an obvious name; a label alone does without texts.

    Raises:
        DataError: a named column is not there, or none has an obvious name; lists what there is.
        UsageError: `text` and `templates` are both given, or one column is given two roles.
    """
    if templates and text is not None:
        raise UsageError("templates make texts out of the label; text names columns of texts: give one of the two")
    text_names = [text] if isinstance(text, str) else list(text or ())
    the_image = image_column(table, image)
    the_label = _named(table, label, "label") if label else obvious(table.names, LABEL_NAMES)
    the_texts = [_named(table, name, "text") for name in text_names]
    if not the_texts and not templates:
        obvious_text = obvious(table.names, TEXT_NAMES)
        the_texts = [obvious_text] if obvious_text else []
    if not the_texts and the_label is None:
        raise _unknown(table, "label" if templates else "text", None)
    needed = bool(label or not the_texts)
    chosen = [the_image, *the_texts] + ([the_label] if needed else [])
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"a column can have one role; found {', '.join(map(repr, chosen))}", where=table.name)
    _refuse_overwriting(table, the_image, the_texts, the_label)
    return Columns(the_image, the_texts, the_label, needed)


def image_column(table: Table, name: str | None) -> str:
    """The column of the images: the one that was named, or the one that is obvious.

    Raises:
        DataError: it is not there, or none is obvious.
    """
    if name:
        return _named(table, name, "image")
    column = obvious(table.names, IMAGE_NAMES) or _of_images(table)
    if column is None:
        raise _unknown(table, "image", None)
    return column


def texts_of(cell: Any) -> list[str]:
    """The captions of one cell as they stand; "" for each that is empty: None, NaN, or a text without ink.

    Raises:
        BadText: the cell holds something that is not a text.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return [""]
    if isinstance(cell, (list, tuple)):
        return [text for part in cell for text in texts_of(part)]
    return [""] if isinstance(cell, str) and is_blank(cell) else [checked_text(cell)]


def label_of(cell: Any) -> str | None:
    """A label as text; None where the cell is empty, or a list or an object."""
    if cell is None or isinstance(cell, (list, dict)) or (isinstance(cell, float) and math.isnan(cell)):
        return None
    text = str(cell).strip()
    return None if is_blank(text) else text


def _named(table: Table, name: str, role: str) -> str:
    if name not in table.names:
        raise _unknown(table, role, name)
    return name


def obvious(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    """The name that is first among the candidates, compared without case."""
    by_name = {name.strip().lower(): name for name in reversed(names)}
    return next((by_name[candidate] for candidate in candidates if candidate in by_name), None)


def _of_images(table: Table) -> str | None:
    """The one column of a `datasets.Dataset` that is typed as images."""
    typed = [n for n, f in getattr(table.columns, "features", {}).items() if type(f).__name__ == "Image"]
    return typed[0] if len(typed) == 1 else None


def _unknown(table: Table, role: str, name: str | None) -> DataError:
    columns = ", ".join(map(repr, table.names))
    if name is None:
        message = f"no column is obviously the {role}; there are {columns}"
        fix = f"name it: {option(role, 'COLUMN')}"
        if role == "text":
            fix += f", or the column of the class: {option('label', 'COLUMN')}"
    else:
        message = f"no column {name!r} for the {role}; there are {columns}"
        matches = closest(name, table.names)
        fix = f"did you mean {option(role, matches[0])}?" if matches else f"name one of them: {option(role, 'COLUMN')}"
    header = "".join(table.names)
    separators = [word for character, word in SEPARATOR_WORDS.items() if character != "," and character in header]
    if separators:
        fix = f"if the columns look wrong, name their separator: {option('separator', separators[0])}"
    return DataError(message, where=table.name, fix=fix, code="COLUMN")


def _refuse_overwriting(table: Table, image: str, texts: Sequence[str], label: str | None) -> None:
    for role, chosen in (("image", [image]), ("texts", texts), ("label", [label])):
        if role in table.names and chosen != [None] and role not in [image, *texts, label]:
            raise DataError(
                f"the result has a column {role!r} of its own, but one of that name is there already",
                code="HEADER",
                where=table.name,
                fix=f"rename the column {role!r}, or use it: {option(role.removesuffix('s'), role)}",
            )
