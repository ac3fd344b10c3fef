"""Read a typed value by the type of its field: `007` is a name in a field for names, and 7 in a field for numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from clipkit.errors import ConfigError
from clipkit.training.config.yaml_file import Override, Scalar, parse_yaml, plain

COMMAS = "commas"
"""Marks a field that takes one string or several: a typed value is split at commas."""

Columns: TypeAlias = Annotated[str | tuple[str, ...], COMMAS]


def fit(value: Any, hint: Any) -> Any:
    """Return a value from YAML or from an override as pydantic takes it for this type.

    Text stays text for a field of text, and becomes a number for a field of numbers. A single value becomes a list of
    one for a list, and an empty section gets its defaults. Values that do not fit are left for pydantic to report.

    Args:
        value: mappings and lists, with `Scalar` and `Override` as leaves.
        hint: type of the field; it may contain dataclasses.
    """
    members, marks = _union_members(hint)
    if isinstance(value, Override):
        value = _read(value, members, commas=COMMAS in marks or not _takes_text(members))
    sections = [member for member in members if dataclasses.is_dataclass(member)]
    mappings = [member for member in members if get_origin(member) is dict]
    items = _item_hints(members)
    if isinstance(value, dict) and sections:
        hints = get_type_hints(sections[0], include_extras=True)
        return {str(key): fit(item, hints.get(key, Any)) for key, item in value.items()}
    if isinstance(value, dict) and mappings:
        item_type = get_args(mappings[0])[1]
        return {str(key): fit(item, item_type) for key, item in value.items()}
    if items and not isinstance(value, list) and _is_one(value, members):
        value = [value]
    if isinstance(value, list):
        if not items:
            return [fit(item, Any) for item in value]
        return [fit(item, items[min(i, len(items) - 1)]) for i, item in enumerate(value)]
    if sections and type(None) not in members and isinstance(value, Scalar) and value.value is None:
        return {}
    return _scalar(value, members)


def _union_members(hint: Any) -> tuple[list[Any], list[Any]]:
    """Return the members of a union, and the annotations of the union and its members."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        members, inner_marks = _union_members(inner)
        return members, [*marks, *inner_marks]
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_union_members(part) for part in get_args(hint)]
        members = [member for members_of_part, _ in parts for member in members_of_part]
        marks = [mark for _, marks_of_part in parts for mark in marks_of_part]
        return members, marks
    return [hint], []


def _takes_text(members: Sequence[Any]) -> bool:
    """Whether one of the types is str, or a choice between words."""
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    return str in members or any(isinstance(choice, str) for choice in choices)


def _item_hints(members: Sequence[Any]) -> list[Any]:
    """Return the item types of the tuple among the types: one a place, or one for all; empty if there is no tuple."""
    for member in members:
        if get_origin(member) is tuple:
            return [hint for hint in get_args(member) if hint is not Ellipsis]
    return []


def _is_one(value: Any, members: Sequence[Any]) -> bool:
    """Whether a value that is not a list means a list of one."""
    tuple_type = next(member for member in members if get_origin(member) is tuple)
    absent = value is None or (isinstance(value, Scalar) and value.value is None)
    return Ellipsis in get_args(tuple_type) and not absent and not _takes_text(members)


def _read(text: Override, members: Sequence[Any], *, commas: bool) -> Any:
    """Return the value that the text of an override means for a field of these types."""
    takes_list = any(get_origin(member) is tuple for member in members)
    if type(None) in members and text in ("", "null", "~"):
        return None
    if text[:1] == "{" and any(_is_nested(member) for member in [*members, *_item_hints(members)]):
        return _mapping(text, members)
    if takes_list and text[:1] == "[":
        return parse_yaml(text, text.typed)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if takes_list and commas and ("," in text or not text):
        return [plain(part.strip()) for part in text.split(",") if part.strip()]
    return str(text) if _takes_text(members) and text in ("", "null", "~") else plain(text)


def _is_nested(member: Any) -> bool:
    return dataclasses.is_dataclass(member) or get_origin(member) is dict


def _mapping(text: Override, members: Sequence[Any]) -> Any:
    """Return the mapping that a text in braces means, unless it is a template such as "{} in the wild"."""
    if not _takes_text(members):
        return parse_yaml(text, text.typed)
    with contextlib.suppress(ConfigError):
        mapping = parse_yaml(text, text.typed)
        if isinstance(mapping, dict) and mapping:
            values = [getattr(item, "value", item) for item in mapping.values()]
            if None not in values:
                return mapping
    return str(text)


def _scalar(value: Any, members: Sequence[Any]) -> Any:
    """Return YAML's value of a `Scalar` if a field of these types takes it, else its text."""
    if not isinstance(value, Scalar):
        return value
    number = value.value
    is_integer = isinstance(number, int) and not isinstance(number, bool)
    accepted = (int, float) if is_integer else (type(number),)
    if number is None or Any in members or any(member in members for member in accepted):
        return number
    if isinstance(number, float) and int in members and not _takes_text(members):  # 1e3 steps
        return number
    return str(value)
