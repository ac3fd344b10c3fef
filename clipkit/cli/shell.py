"""What every verb does in a shell: expands `~`, names options as they are typed there, ends quietly on Ctrl-C."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer.core

from clipkit.cli.output import discard_output_without_reader
from clipkit.errors import as_option, speaking
from clipkit.paths import at_home

# 128 + SIGINT, 128 + SIGPIPE: the codes that a shell reports for other programs
INTERRUPTED = 130
READER_LEFT = 141


class Verb(typer.core.TyperCommand):
    """A command: its errors name options as it takes them, and Ctrl-C or a closed pipe ends it quietly."""

    def invoke(self, ctx: Any) -> Any:  # click's or typer's own Context, by typer's version
        ctx.params = {name: _expand_home(value) for name, value in ctx.params.items()}
        try:
            with speaking(partial(_typed_option, self.params)):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            if not discard_output_without_reader():
                raise
            raise typer.Exit(READER_LEFT) from None


def _expand_home(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_expand_home, value))
    if isinstance(value, str | Path):
        return type(value)(at_home(str(value)))
    return value


def _typed_option(parameters: Sequence[Any], name: str, value: object) -> str:
    """`--on-bad skip` where the verb has that option, `train.on_bad=skip` where it takes a config."""
    key = name.rpartition(".")[2]
    for parameter in parameters:
        if parameter.name == key and parameter.opts[0].startswith("-"):
            is_flag = value is None or value is True
            return parameter.opts[0] if is_flag else f"{parameter.opts[0]} {shlex.quote(str(value))}"
    takes_config = any(parameter.name == "settings" for parameter in parameters)
    if takes_config or "." in name:
        from clipkit.training.config.errors import as_setting

        return as_setting(name, value)
    return as_option(name, value)  # of another verb
