"""YAML as people mean it: a key stands once, and what is typed is kept until its field says what it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clipkit.errors import ConfigError


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of nested mappings, tuples as lists, in their own order."""
    return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


class Scalar(str):
    """A plain value as it was typed, and in `value` what YAML takes it for: "007" and 7, "null" and None."""

    value: int | float | bool | None


class Override(str):
    """The text after `key=`, not read yet: how depends on its field (see `typed.fit`). `typed` is the whole."""

    typed: str


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where people trip: `1e-5` is a number, `no` and dates are words, 010 is ten, a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"the key `{key}` stands twice", where=f"line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.rpartition(":")[2]
        value = (
            _number(node.value)
            if kind in ("int", "float")
            else self.construct_yaml_bool(node)
            if kind == "bool"
            else None
        )
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


_KEPT = ("tag:yaml.org,2002:merge",)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


for _kind, (_pattern, _first) in _PATTERNS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_plain)


def _number(text: str) -> int | float:
    if text[:2] in ("0x", "0o"):
        return int(text, 0)
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text.replace(".inf", "inf").replace(".nan", "nan"))


def plain(text: str) -> str:
    """The text as YAML's plain value, whatever signs it holds: a `Scalar`, or the text itself where it is a word."""
    loader: Any = _Loader("")
    found: str = loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    return found


def parse_yaml(text: str, where: object) -> Any:
    """What a YAML text holds, plain values that are no words as `Scalar`.

    Raises:
        ConfigError: it is no YAML, or a key stands twice.
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
    """The mapping that a file holds.

    Raises:
        ConfigError: not UTF-8, not YAML, no mapping.
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
        ConfigError: no `=`, or a value where a section would have to be.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError("expected key=value", where=override, fix=f"{key}=VALUE")
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        values[parent] = inner = {} if inner is None or getattr(inner, "value", inner) is None else inner
        if not isinstance(inner, dict):
            kind = "a list" if isinstance(inner, list) else "a value"
            raise ConfigError(f"{parent!r} is {kind}, not a section", where=override)
        values = inner
    values[leaf] = Override(text)
    values[leaf].typed = override
