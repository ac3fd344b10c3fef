"""What was typed, as its field wants it: `007` is a name where a name is wanted, and 7 where a number is."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from clipkit.errors import ConfigError
from clipkit.training.config.yaml_file import Override, Scalar, parse_yaml, plain

COMMAS = "commas"


"""Marks a field that also takes one string as one that several may be typed for, with commas between them."""


Columns: TypeAlias = Annotated[str | tuple[str, ...], COMMAS]


def fit(value: Any, hint: Any) -> Any:
    """A value from YAML or from an override, made of what pydantic takes for this type.

    Text stays text where text is wanted, a number becomes one where a number is, one value becomes a list of one where
    a list is, and an empty section takes its defaults. What does not fit is left for pydantic to name.

    Args:
        value: mappings and lists, with `Scalar` and `Override` as leaves.
        hint: of the field; dataclasses within it are followed.
    """
    kinds, marks = _kinds(hint)
    if isinstance(value, Override):
        value = _read(value, kinds, commas=COMMAS in marks or not _takes_text(kinds))
    section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    items = _item_hints(kinds)
    if isinstance(value, dict) and section is not None:
        hints = get_type_hints(section, include_extras=True)
        return {str(key): fit(item, hints.get(key, Any)) for key, item in value.items()}
    if isinstance(value, dict) and (mapping := [kind for kind in kinds if get_origin(kind) is dict]):
        return {str(key): fit(item, get_args(mapping[0])[1]) for key, item in value.items()}
    if items and not isinstance(value, list) and _is_one(value, kinds):
        value = [value]
    if isinstance(value, list):
        return [fit(item, items[min(i, len(items) - 1)] if items else Any) for i, item in enumerate(value)]
    if section is not None and type(None) not in kinds and isinstance(value, Scalar) and value.value is None:
        return {}
    return _scalar(value, kinds)


def _kinds(hint: Any) -> tuple[list[Any], list[Any]]:
    """The members of a union, and what it and they are annotated with."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        kinds, more = _kinds(inner)
        return kinds, [*marks, *more]
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_kinds(part) for part in get_args(hint)]
        return [kind for kinds, _ in parts for kind in kinds], [mark for _, marks in parts for mark in marks]
    return [hint], []


def _takes_text(kinds: Sequence[Any]) -> bool:
    words = (kind for kind in kinds if get_origin(kind) is Literal)
    return str in kinds or any(isinstance(word, str) for kind in words for word in get_args(kind))


def _item_hints(kinds: Sequence[Any]) -> list[Any]:
    """Of the tuple that is among the kinds: one a place, or one for all; none if there is no tuple."""
    found = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    return [] if found is None else [hint for hint in get_args(found) if hint is not Ellipsis]


def _is_one(value: Any, kinds: Sequence[Any]) -> bool:
    """Whether a value that is no list stands for a list of one."""
    listed = next(kind for kind in kinds if get_origin(kind) is tuple)
    absent = value is None or (isinstance(value, Scalar) and value.value is None)
    return Ellipsis in get_args(listed) and not absent and not _takes_text(kinds)


def _read(text: Override, kinds: Sequence[Any], *, commas: bool) -> Any:
    lists = any(get_origin(kind) is tuple for kind in kinds)
    if type(None) in kinds and text in ("", "null", "~"):
        return None
    if text[:1] == "{" and any(_is_nested(kind) for kind in [*kinds, *_item_hints(kinds)]):
        return _mapping(text, kinds)
    if lists and text[:1] == "[":
        return parse_yaml(text, text.typed)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if lists and commas and ("," in text or not text):
        return [plain(part.strip()) for part in text.split(",") if part.strip()]
    return str(text) if _takes_text(kinds) and text in ("", "null", "~") else plain(text)


def _is_nested(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or get_origin(kind) is dict


def _mapping(text: Override, kinds: Sequence[Any]) -> Any:
    """The mapping that a text in braces is; a template such as "{} in the wild" may begin with braces, too."""
    if not _takes_text(kinds):
        return parse_yaml(text, text.typed)
    with contextlib.suppress(ConfigError):
        found = parse_yaml(text, text.typed)
        if (
            isinstance(found, dict)
            and found
            and all(getattr(item, "value", item) is not None for item in found.values())
        ):
            return found
    return str(text)


def _scalar(value: Any, kinds: Sequence[Any]) -> Any:
    if not isinstance(value, Scalar):
        return value
    found = value.value
    wanted = (int, float) if isinstance(found, int) and not isinstance(found, bool) else (type(found),)
    if found is None or Any in kinds or any(kind in kinds for kind in wanted):
        return found
    if isinstance(found, float) and int in kinds and not _takes_text(kinds):  # 1e3 steps
        return found
    return str(value)
