"""Errors in a config, with a fix as the user types it: `train.epochs=3` in a shell, `epochs: 3` in YAML."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ValidationError

from clipkit.errors import ConfigError, option
from clipkit.paths import did_you_mean
from clipkit.suggest import closest
from clipkit.training.config.model import ModelConfig
from clipkit.training.config.sections import DataConfig, EvaluateConfig, SimilarConfig
from clipkit.training.config.train import TrainConfig

# The sections of a `RunConfig`, in its order.
SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "similar": SimilarConfig,
    "evaluate": EvaluateConfig,
}

# Required keys: the key that a fix names, and an example of its value.
_REQUIRED = {
    **dict.fromkeys(("model", "model.name"), ("model.name", "FOLDER")),
    **dict.fromkeys(("data", "data.train"), ("data.train", "FILE")),
    **dict.fromkeys(("train", "train.output_dir"), ("train.output_dir", "runs/NAME")),
}

# Names that other programs use, where the spelling gives no hint.
_ALIASES = {
    **dict.fromkeys(("report_to", "logger", "log_with"), "trackers"),
    **dict.fromkeys(("amp", "fp16", "bf16", "dtype"), "precision"),
    **dict.fromkeys(("val", "validation", "eval"), "test"),
    **dict.fromkeys(("accum_freq", "gradient_accumulation_steps"), "micro_batch"),
    **{"caption": "text", "lock": "freeze"},
}


def is_override(text: str) -> bool:
    """Whether the user typed `key.sub=value` and not the path of a file, since a file name may contain a `=`."""
    key, equals, _ = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        return False
    return _fields([key.partition(".")[0]]) != [] or not Path(text).exists()


def no_config(path: Path) -> ConfigError:
    """Return the error for a path that is not a YAML file: what it is instead, and what to type."""
    from clipkit.data.reading.tables import TABLE_SUFFIXES

    if path.suffix.lower() in TABLE_SUFFIXES and path.exists():
        return ConfigError(
            "a table of data, where a config was expected", where=path, fix=as_setting("data.train", path)
        )
    if path.is_dir():
        config = next(path.glob("config.yaml"), None)
        fix = f"its config: {config}" if config else as_setting("data.train", path)
        return ConfigError("a folder, where a config was expected", where=path, fix=fix)
    if path.exists():
        return ConfigError("not a regular file, where a config was expected", where=path)
    if _fields([str(path).partition(".")[0]]):
        return ConfigError("a key without a value", where=path, fix=f"{path}=VALUE")
    fix = did_you_mean(path) or f"give the path of a YAML file, or settings such as {as_setting('data.train', 'FILE')}"
    return ConfigError("no such config file", where=path, fix=fix)


def as_setting(name: str, value: object) -> str:
    """Return a setting as an override, quoted for the shell: ``train.on_bad=skip``."""
    name = _full(name)
    if value is None:
        return name
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{name}={shlex.quote(text)}"


def as_yaml(name: str, value: object) -> str:
    """Return a setting as a line of YAML, with its section: ``on_bad: skip`` (under `train:`)."""
    section, _, key = _full(name).rpartition(".")
    if value is not None:
        value = list(value) if isinstance(value, tuple) else value
        flow = None if isinstance(value, list | dict) else False
        key = yaml.safe_dump({key: value}, default_flow_style=flow, allow_unicode=True, width=1000).strip()
    return f"`{key}` under `{section}:`" if section else f"`{key}`"


def config_error(error: ValidationError, path: str | Path | None, overrides: Sequence[str]) -> ConfigError:
    """Return one error for all problems that pydantic names, with the first fix.

    The fix for a wrong key is written where the key is: as an override or as YAML. The fix for a missing key is
    written by `option`.

    Args:
        error: of the whole config.
        path: the file, if there was one.
        overrides: typed in addition to the file.
    """
    fixes: list[str] = []
    places: list[object] = []
    messages: dict[str, list[str]] = {}
    for problem in error.errors():
        key = _key(problem["loc"])
        override = _closest_override(key, overrides)
        places.append(override or path)
        message, fix = _describe(problem, key, override, in_file=path is not None and override is None)
        messages.setdefault(key, []).append(message)
        if fix:
            fixes.append(fix)
    where = ", ".join(dict.fromkeys(str(place) for place in places if place is not None)) or None
    message = "; ".join(_joined(messages_of_key) for messages_of_key in messages.values())
    return ConfigError(message, where=where, fix=fixes[0] if fixes else None)


def _key(place: Sequence[Any]) -> str:
    """Return the dotted key, without the member of a union that pydantic tried."""
    parts = [str(part) for part in place]
    while len(parts) > 1 and (parts[-1] in ("int", "float", "str", "bool") or "[" in parts[-1]):
        parts.pop()
    return ".".join(parts)


def _closest_override(key: str, overrides: Sequence[str]) -> str | None:
    """Return the override that sets this key, a part of it, or a section that contains it; None if none does."""
    closest, least = None, 0
    for override in overrides:
        name = override.partition("=")[0]
        if not (f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")):
            continue
        distance = abs(name.count(".") - key.count("."))
        if closest is None or distance < least:
            closest, least = override, distance
    return closest


def _joined(messages: Sequence[str]) -> str:
    """Return pydantic's messages about one key, which has one for each member of a union, as one message."""
    parts = [message.partition(": ")[2].rpartition(", found ") for message in messages]
    if len(messages) == 1 or not all(separator for _, separator, _ in parts):
        return "; ".join(dict.fromkeys(messages))
    expected = " or ".join(dict.fromkeys(text.removeprefix("input should be ") for text, _, _ in parts))
    return f"{messages[0].partition(': ')[0]}: input should be {expected}, found {parts[0][2]}"


def _describe(problem: Any, key: str, override: str | None, *, in_file: bool) -> tuple[str, str | None]:
    """Return the message about one problem, and its fix if there is one."""
    cause = problem.get("ctx", {}).get("error")
    value = problem["input"]
    if isinstance(cause, ConfigError):
        return cause.message, cause.fix
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key `{key}`", _suggest_key(problem["loc"], value, override, in_file=in_file)
    if problem["type"] == "missing":
        name, example = _REQUIRED.get(key, (key, "VALUE"))
        return f"`{key}` is missing", option(name, example)
    if problem["type"] == "tuple_type":
        return f"`{key}` is a list, found {value!r}", None
    if problem["type"].startswith("dataclass_type"):
        known = _fields(problem["loc"])
        more = ", …" if len(known) > 12 else ""
        return f"`{key}` is a section, found {value!r}", f"known in it: {', '.join(known[:12])}{more}"
    expected = problem["msg"].partition(", unable to parse")[0]
    return f"`{key}`: {expected[0].lower()}{expected[1:]}, found {value!r}", None


def _suggest_key(place: Sequence[Any], value: Any, override: str | None, *, in_file: bool) -> str:
    """Return the key that the user probably meant, with its value; else all keys of the section."""
    section, leaf = [str(part) for part in place[:-1]], str(place[-1])
    known = _fields(section)
    near = _near(leaf, known)
    meant = ".".join([*section, near]) if near else _elsewhere(leaf)
    if meant is None:
        return f"known here: {', '.join(known)}"
    suggested_value = None if isinstance(value, dict) else value
    if in_file:
        return f"did you mean {as_yaml(meant, suggested_value)}?"
    key, _, text = (override or "").partition("=")
    wrong = ".".join([*section, leaf])
    if f"{key}.".startswith(f"{wrong}."):
        return f"did you mean {as_setting(meant + key.removeprefix(wrong), text)}?"
    return f"did you mean {as_setting(meant, suggested_value)}?"


def _near(leaf: str, known: Sequence[str]) -> str | None:
    """Return the known key that a wrong one probably means."""
    word = leaf.lower().replace("-", "_")
    for rule in _RULES:
        name = rule(word, known)
        if name:
            return name
    return None


def _elsewhere(leaf: str) -> str | None:
    """Return the key of any section that a key without its section, or in a wrong one, probably means."""
    word = leaf.lower().replace("-", "_")
    sections = {name: _fields([name]) for name in ("data", "train", "evaluate", "model")}
    for rule in (_same, *_RULES):
        for section, known in sections.items():
            name = rule(word, known)
            if name:
                return f"{section}.{name}"
    return None


def _same(word: str, known: Sequence[str]) -> str | None:
    return word if word in known else None


def _initials(word: str, known: Sequence[str]) -> str | None:
    """lr: learning_rate"""
    for name in known:
        parts = name.split("_")
        if len(parts) > 1 and word == "".join(part[0] for part in parts):
            return name
    return None


def _alias(word: str, known: Sequence[str]) -> str | None:
    """accum_freq: micro_batch"""
    name = _ALIASES.get(word)
    return name if name in known else None


def _beginning(word: str, known: Sequence[str]) -> str | None:
    """aug: augmentation"""
    names = [name for name in known if name.startswith(word)]
    return names[0] if len(names) == 1 else None


def _spelling(word: str, known: Sequence[str]) -> str | None:
    """lerning_rate: learning_rate"""
    matches = closest(word, known) if len(word) > 2 else []
    return matches[0] if matches else None


def _part(word: str, known: Sequence[str]) -> str | None:
    """steps: max_steps, num_train_epochs: epochs"""
    for name in known:
        if word in name.split("_") or (len(name) > 3 and name in word):
            return name
    return None


_RULES = (_initials, _alias, _beginning, _spelling, _part)


def _full(name: str) -> str:
    """Return a key with its section, also if it came without one."""
    if "." in name or name in _fields([]):
        return name
    for section in ("data", "train", "model", "evaluate", "similar"):
        if name in _fields([section]):
            return f"{section}.{name}"
    return f"train.{name}"


def _fields(place: Sequence[Any]) -> list[str]:
    """Return the keys of the section at this place of a config; of an empty place the sections."""
    if not place:
        return list(SECTIONS)
    section: Any = SECTIONS.get(str(place[0]))
    for part in place[1:]:
        if isinstance(part, int) or str(part).isdecimal():
            continue
        hints = get_type_hints(section) if dataclasses.is_dataclass(section) else {}
        section = next(_dataclasses(hints.get(str(part))), None)
    return [field.name for field in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []


def _dataclasses(hint: Any) -> Iterator[Any]:
    """Yield the dataclasses within a type."""
    if dataclasses.is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses(argument)
