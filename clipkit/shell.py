"""How a verb meets the shell: `~` in what was typed, and options in errors as they are typed there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer.core

from clipkit.errors import speaking
from clipkit.paths import at_home


class Verb(typer.core.TyperCommand):
    """A command whose errors name options as this command takes them."""

    def invoke(self, ctx: Any) -> Any:  # click's or typer's own Context, by typer's version
        ctx.params = {name: _at_home(value) for name, value in ctx.params.items()}
        with speaking(partial(_typed, self.params)):
            return super().invoke(ctx)


def _at_home(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_at_home, value))
    return type(value)(at_home(str(value))) if isinstance(value, str | Path) else value


def _typed(params: Sequence[Any], name: str, value: object) -> str:
    """`--on-bad skip` where the verb has that option, `train.on_bad=skip` where it takes a config."""
    word = name.rpartition(".")[2]
    for each in params:
        if each.name == word and each.opts[0].startswith("-"):
            return each.opts[0] if value is None else f"{each.opts[0]} {shlex.quote(str(value))}"
    if any(each.name == "settings" for each in params):
        from clipkit.training.config_errors import as_setting

        return as_setting(name, value)
    return word if value is None else f"{word}={shlex.quote(str(value))}"
