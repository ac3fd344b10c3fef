"""How a verb meets the shell: `~` in what was typed, and options in errors as they are typed there."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer.core

from clipkit.errors import speaking


class Verb(typer.core.TyperCommand):
    """A command whose errors name options as this command takes them."""

    def invoke(self, ctx: Any) -> Any:  # click's or typer's own Context, by typer's version
        ctx.params = {name: at_home(value) for name, value in ctx.params.items()}
        with speaking(partial(_typed, self.params)):
            return super().invoke(ctx)


def at_home(value: Any) -> Any:
    """What was typed, with `~/` as the home folder: a shell leaves it alone in `--to=~/x` and `key=~/x`."""
    if isinstance(value, list | tuple):
        return type(value)(at_home(item) for item in value)
    if isinstance(value, str | Path) and (str(value) == "~" or str(value).startswith("~/")):
        return type(value)(Path(value).expanduser())
    return value


def _typed(params: Sequence[Any], name: str, value: object) -> str:
    """`--on-bad skip` where the verb has that option, `train.on_bad=skip` where it takes a config."""
    word = name.rpartition(".")[2]
    for each in params:
        if each.name == word and each.opts[0].startswith("-"):
            return each.opts[0] if value is None else f"{each.opts[0]} {shlex.quote(str(value))}"
    if any(each.name == "settings" for each in params):
        return as_setting(name, value)
    return word if value is None else f"{word}={shlex.quote(str(value))}"


def as_setting(name: str, value: object) -> str:
    """As an override of a config, quoted for the shell: ``train.on_bad=skip``."""
    from clipkit.training.config import DataConfig, EvaluateConfig, ModelConfig, TrainConfig

    sections = {"data": DataConfig, "train": TrainConfig, "model": ModelConfig, "evaluate": EvaluateConfig}
    if "." not in name:
        homes = (part for part, kind in sections.items() if name in {each.name for each in dataclasses.fields(kind)})
        name = f"{next(homes, 'train')}.{name}"
    if value is None:
        return name
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{name}={shlex.quote(text)}"
