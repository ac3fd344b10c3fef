"""Read YAML: a key may occur only once, and plain values keep their text until the type of their field is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clipkit.errors import ConfigError


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Return the YAML text of nested mappings, tuples as lists, in their own order."""
    return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


class Scalar(str):
    """A plain value as typed, and in `value` what YAML reads it as: "007" and 7, "null" and None."""

    value: int | float | bool | None


class Override(str):
    """The text after `key=`, to be read by the type of its field (see `typed.fit`). `typed` is the whole override."""

    typed: str


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in these points: `1e-5` is a number, `no` and dates are words, 010 is ten, a key occurs only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"the key `{key}` occurs twice", where=f"line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        tag = node.tag.rpartition(":")[2]
        value: int | float | bool | None = None
        if tag in ("int", "float"):
            value = _number(node.value)
        elif tag == "bool":
            value = self.construct_yaml_bool(node)
        if node.style:  # quoted, with a tag
            return value
        scalar = Scalar(node.value)
        scalar.value = value
        return scalar


_PATTERNS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?\d+|0x[\da-fA-F]+|0o[0-7]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)|\.nan",
        list("-+0123456789."),
    ),
}

# Of SafeLoader's own resolvers only that of merge keys stays; those of YAML 1.1's numbers, words and dates go.
_MERGE = "tag:yaml.org,2002:merge"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == _MERGE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

for _tag, (_pattern, _first) in _PATTERNS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_plain)


def _number(text: str) -> int | float:
    if text[:2] in ("0x", "0o"):
        return int(text, 0)
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text.replace(".inf", "inf").replace(".nan", "nan"))


def plain(text: str) -> str:
    """Return the text as a plain value of YAML, whatever characters it has: a `Scalar`, or the text if it is a word."""
    loader: Any = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    value: str = loader.construct_object(yaml.ScalarNode(tag, text))
    return value


def parse_yaml(text: str, where: object) -> Any:
    """Return the content of a YAML text, with plain values that are not words as `Scalar`.

    Raises:
        ConfigError: it is not YAML, or a key occurs twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"not valid YAML: {error.problem or error.context}{place}", where=where) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=where) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a file.

    Raises:
        ConfigError: the file is not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8: {error.reason} at byte {error.start}", where=path, fix="save it as UTF-8"
        ) from None
    values = parse_yaml(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"expected sections such as `model:` and `data:`, found {type(values).__name__}", where=path)
    return values


def set_value(values: dict[str, Any], override: str) -> None:
    """Put ``key.sub=value`` into nested mappings; the value is an `Override`.

    Raises:
        ConfigError: no `=`, or a value in the place of a section.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError("expected key=value", where=override, fix=f"{key}=VALUE")
    *parents, leaf = key.split(".")
    for parent in parents:
        section = values.get(parent)
        if getattr(section, "value", section) is None:  # no section, or an empty one
            section = {}
        if not isinstance(section, dict):
            content = "a list" if isinstance(section, list) else "a value"
            raise ConfigError(f"{parent!r} is {content}, not a section", where=override)
        values[parent] = section
        values = section
    values[leaf] = Override(text)
    values[leaf].typed = override
