"""YAML as people mean it: numbers are numbers, words are words, a key stands once."""

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


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where people trip: `1e-5` is a number, `no` is a word, a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"the key `{key}` stands twice", where=f"line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: object) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=where) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, no mapping.
    """
    if not path.is_file():
        raise ConfigError("no such config file", where=path, fix="give the path of a YAML file, or overrides alone")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8: {error.reason} at byte {error.start}", where=path, fix="save it as UTF-8"
        ) from None
    values = _parse_yaml(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"expected sections such as `model:` and `data:`, found {type(values).__name__}", where=path)
    return values


def set_value(values: dict[str, Any], override: str) -> None:
    """Put ``key.sub=value`` into nested mappings.

    Raises:
        ConfigError: no `=`, not YAML, or a value where a section would have to be.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"expected key=value, found {override!r}", fix="e.g. train.epochs=3")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{parent!r} is a value, not a section", where=override)
    values[leaf] = _parse_yaml(text, override) if text else None
