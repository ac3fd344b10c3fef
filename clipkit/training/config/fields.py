"""What the sections of a config have in common: how pydantic reads them, and how their fields are checked in Python."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from clipkit.errors import ConfigError, option
from clipkit.paths import at_home

STRICT = ConfigDict(extra="forbid")  # an unknown key is an error

FractionBelow1: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


def check_fields(config: object) -> None:
    """Check the ranges and choices that a section's annotations declare.

    pydantic checks them when it reads YAML; this does the same for a section that is constructed in Python.

    Raises:
        ConfigError: a value is out of range, or none of the choices.
    """
    section: Any = type(config)
    for name, adapter in _adapters(section).items():
        value = getattr(config, name)
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            expected = error.errors()[0]["msg"].removeprefix("Input should be ")
            where = f"{section.__name__}.{name}"
            raise ConfigError(
                f"{name} must be {expected}, found {value!r}", where=where, fix=_default(config, name)
            ) from None


@cache
def _adapters(section: type) -> dict[str, TypeAdapter[Any]]:
    """Return what validates each field that declares a range or choices."""
    hints = get_type_hints(section, include_extras=True)
    return {name: TypeAdapter(hint) for name, hint in hints.items() if _is_limited(hint)}


def _is_limited(hint: Any) -> bool:
    """Whether a type, or one within it, declares a range or choices."""
    if get_origin(hint) is Literal:
        return True
    if get_origin(hint) is Annotated and not all(isinstance(mark, str) for mark in hint.__metadata__):
        return True
    return any(_is_limited(argument) for argument in get_args(hint))


def _default(config: Any, name: str) -> str:
    """Return what to write in place of a wrong value."""
    for field in dataclasses.fields(config):
        if field.name == name and field.default not in (None, dataclasses.MISSING):
            return f"the default is {option(name, field.default)}"
    return f"leave out {option(name)}"


def as_lists(config: object, *names: str) -> None:
    """Turn a single value into a tuple of one: the letters of a str would be taken for items."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str | int):
            object.__setattr__(config, name, (value,))


def as_paths(config: object, *names: str) -> None:
    """Replace `~` by the home folder, which the shell does only at the start of a word.

    Raises:
        ConfigError: a path or name is empty.
    """
    for name in names:
        value = getattr(config, name)
        if value == "":
            raise ConfigError(f"{name} is empty", fix=option(name, "FOLDER" if name == "output_dir" else "NAME"))
        if isinstance(value, str):
            object.__setattr__(config, name, at_home(value))
