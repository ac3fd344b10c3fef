"""What is wrong in a config, and its mend as it is typed there: `train.epochs=3` in a shell, `epochs: 3` in YAML."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ValidationError

from clipkit.errors import ConfigError, option
from clipkit.paths import did_you_mean
from clipkit.training.config.model import ModelConfig
from clipkit.training.config.sections import DataConfig, EvaluateConfig, SimilarConfig
from clipkit.training.config.train import TrainConfig

# Of a `RunConfig`, in its order.
SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "similar": SimilarConfig,
    "evaluate": EvaluateConfig,
}

_NEEDED = {
    **dict.fromkeys(("model", "model.name"), ("model.name", "FOLDER")),
    **dict.fromkeys(("data", "data.train"), ("data.train", "FILE")),
    **dict.fromkeys(("train", "train.output_dir"), ("train.output_dir", "runs/NAME")),
}


# What other programs call it, where the spelling does not tell.
_ALIASES = {
    **dict.fromkeys(("report_to", "logger", "log_with"), "trackers"),
    **dict.fromkeys(("amp", "fp16", "bf16", "dtype"), "precision"),
    **dict.fromkeys(("val", "validation", "eval"), "test"),
    **dict.fromkeys(("accum_freq", "gradient_accumulation_steps"), "micro_batch"),
    **{"caption": "text", "lock": "freeze"},
}


def is_override(text: str) -> bool:
    """Whether what was typed is `key.sub=value` rather than the path of a file, whose name may hold a `=`, too."""
    key, equals, _ = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        return False
    return _fields([key.partition(".")[0]]) != [] or not Path(text).exists()


def no_config(path: Path) -> ConfigError:
    """Of something that is no YAML file: what it is instead, and what to type."""
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
    """As an override, quoted for the shell: ``train.on_bad=skip``."""
    name = _full(name)
    if value is None:
        return name
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{name}={shlex.quote(text)}"


def as_yaml(name: str, value: object) -> str:
    """As a line of a file, and its section: ``on_bad: skip`` (under `train:`)."""
    section, _, key = _full(name).rpartition(".")
    if value is not None:
        value = list(value) if isinstance(value, tuple) else value
        flow = None if isinstance(value, list | dict) else False
        key = yaml.safe_dump({key: value}, default_flow_style=flow, allow_unicode=True, width=1000).strip()
    return f"`{key}` under `{section}:`" if section else f"`{key}`"


def config_error(error: ValidationError, path: str | Path | None, overrides: Sequence[str]) -> ConfigError:
    """One error of all that pydantic names, with the first mend: of a wrong key where it stands, of what is missing as
    `option` writes it.

    Args:
        error: of the whole config.
        path: the file, if there was one.
        overrides: what was typed beside it.
    """
    fixes: list[str] = []
    places: list[object] = []
    said: dict[str, list[str]] = {}
    for problem in error.errors():
        key = _key(problem["loc"])
        typed = min(
            (each for each in overrides if _about(each, key)), key=lambda each: _distance(each, key), default=None
        )
        places.append(typed or path)
        message, fix = _said(problem, key, typed, in_file=path is not None and typed is None)
        said.setdefault(key, []).append(message)
        fixes += [fix] if fix else []
    where = ", ".join(dict.fromkeys(str(place) for place in places if place is not None)) or None
    message = "; ".join(_joined(messages) for messages in said.values())
    return ConfigError(message, where=where, fix=fixes[0] if fixes else None)


def _key(place: Sequence[Any]) -> str:
    """The dotted key, without the member of a union that pydantic tried."""
    parts = [str(part) for part in place]
    while len(parts) > 1 and (parts[-1] in ("int", "float", "str", "bool") or "[" in parts[-1]):
        parts.pop()
    return ".".join(parts)


def _distance(override: str, key: str) -> int:
    return abs(override.partition("=")[0].count(".") - key.count("."))


def _joined(messages: Sequence[str]) -> str:
    """What pydantic says of each member of a union, as one."""
    parts = [message.partition(": ")[2].rpartition(", found ") for message in messages]
    if len(messages) == 1 or not all(found for _, found, _ in parts):
        return "; ".join(dict.fromkeys(messages))
    expected = " or ".join(dict.fromkeys(said.removeprefix("input should be ") for said, _, _ in parts))
    return f"{messages[0].partition(': ')[0]}: input should be {expected}, found {parts[0][2]}"


def _about(override: str, key: str) -> bool:
    """Whether an override sets this key, a part of it, or what it is a part of."""
    name = override.partition("=")[0]
    return f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")


def _said(problem: Any, key: str, typed: str | None, *, in_file: bool) -> tuple[str, str | None]:
    cause = problem.get("ctx", {}).get("error")
    found = problem["input"]
    if isinstance(cause, ConfigError):
        return cause.message, cause.fix
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key `{key}`", _meant(problem["loc"], found, typed, in_file=in_file)
    if problem["type"] == "missing":
        name, example = _NEEDED.get(key, (key, "VALUE"))
        return f"`{key}` is missing", option(name, example)
    if problem["type"] == "tuple_type":
        return f"`{key}` is a list, found {found!r}", None
    if problem["type"].startswith("dataclass_type"):
        known = _fields(problem["loc"])
        return (
            f"`{key}` is a section, found {found!r}",
            f"known in it: {', '.join(known[:12])}{', …' * (len(known) > 12)}",
        )
    expected = problem["msg"].partition(", unable to parse")[0]
    return f"`{key}`: {expected[0].lower()}{expected[1:]}, found {found!r}", None


def _meant(place: Sequence[Any], value: Any, typed: str | None, *, in_file: bool) -> str:
    """The key that was probably meant, typed with its value; else the keys that there are."""
    section, leaf = [str(part) for part in place[:-1]], str(place[-1])
    known = _fields(section)
    near = _near(leaf, known)
    meant = ".".join([*section, near]) if near else _elsewhere(leaf)
    if meant is None:
        return f"known here: {', '.join(known)}"
    if in_file:
        return f"did you mean {as_yaml(meant, None if isinstance(value, dict) else value)}?"
    key, _, text = (typed or "").partition("=")
    wrong = ".".join([*section, leaf])
    if f"{key}.".startswith(f"{wrong}."):
        return f"did you mean {as_setting(meant + key.removeprefix(wrong), text)}?"
    return f"did you mean {as_setting(meant, None if isinstance(value, dict) else value)}?"


def _near(leaf: str, known: Sequence[str]) -> str | None:
    """The known key that a wrong one stands for."""
    return next((found for rule in _RULES if (found := rule(leaf.lower().replace("-", "_"), known))), None)


def _elsewhere(leaf: str) -> str | None:
    """The key of any section that a key without its section, or in a wrong one, stands for."""
    word = leaf.lower().replace("-", "_")
    sections = {name: _fields([name]) for name in ("data", "train", "evaluate", "model")}
    for rule in (lambda word, known: word if word in known else None, *_RULES):
        for name, known in sections.items():
            if found := rule(word, known):
                return f"{name}.{found}"
    return None


def _initials(word: str, known: Sequence[str]) -> str | None:
    """lr: learning_rate"""
    return next((name for name in known if "_" in name and "".join(part[0] for part in name.split("_")) == word), None)


def _custom(word: str, known: Sequence[str]) -> str | None:
    found = _ALIASES.get(word)
    return found if found in known else None


def _beginning(word: str, known: Sequence[str]) -> str | None:
    found = [name for name in known if name.startswith(word)]
    return found[0] if len(found) == 1 else None


def _spelling(word: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1) if len(word) > 2 else []), None)


def _part(word: str, known: Sequence[str]) -> str | None:
    """steps: max_steps, num_train_epochs: epochs"""
    return next((name for name in known if word in name.split("_") or (len(name) > 3 and name in word)), None)


_RULES = (_initials, _custom, _beginning, _spelling, _part)


def _full(name: str) -> str:
    """A key with its section, where it came without one."""
    if "." in name or name in _fields([]):
        return name
    order = ("data", "train", "model", "evaluate", "similar")
    return next((f"{section}.{name}" for section in order if name in _fields([section])), f"train.{name}")


def _fields(place: Sequence[Any]) -> list[str]:
    """The keys of the section that lies at this place of a config; of an empty place the sections."""
    if not place:
        return list(SECTIONS)
    section: Any = SECTIONS.get(str(place[0]))
    for part in place[1:]:
        if isinstance(part, int) or str(part).isdecimal():
            continue
        hints = get_type_hints(section) if dataclasses.is_dataclass(section) else {}
        section = next(_dataclasses(hints.get(str(part))), None)
    return [key.name for key in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []


def _dataclasses(hint: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _dataclasses(part)
