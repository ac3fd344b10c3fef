"""How a verb meets the shell: `~` in what was typed, options as they are typed there, a reader that left, Ctrl-C."""

from __future__ import annotations

import io
import os
import select
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import typer.core

from clipkit.errors import speaking
from clipkit.paths import at_home

INTERRUPTED, READER_LEFT = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what a shell gives for other programs


class Verb(typer.core.TyperCommand):
    """A command whose errors name options as this command takes them, and which ends quietly when it is not wanted."""

    def invoke(self, ctx: Any) -> Any:  # click's or typer's own Context, by typer's version
        ctx.params = {name: _at_home(value) for name, value in ctx.params.items()}
        try:
            with speaking(partial(_typed, self.params)):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            if not reader_left():
                raise
            raise typer.Exit(READER_LEFT) from None


def reader_left() -> bool:
    """Whether nobody reads standard output any more (`| head`); what is still to be written is then thrown away."""
    left = [stream for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
    for stream in left:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # or the interpreter complains when it flushes at its end
        os.close(nowhere)
    return bool(left)


def _is_broken(stream: TextIO) -> bool:
    try:
        asked = select.poll()
        asked.register(stream.fileno(), 0)  # errors alone
    except (OSError, ValueError):  # no file, or closed
        return False
    return any(state & select.POLLERR for _, state in asked.poll(0))


def never_fail_on_a_name() -> None:
    """One odd character, in a locale that lacks it, must not cost the output of an hour. JSON is UTF-8 anywhere."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _at_home(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_at_home, value))
    return type(value)(at_home(str(value))) if isinstance(value, str | Path) else value


def _typed(params: Sequence[Any], name: str, value: object) -> str:
    """`--on-bad skip` where the verb has that option, `train.on_bad=skip` where it takes a config."""
    word = name.rpartition(".")[2]
    for each in params:
        if each.name == word and each.opts[0].startswith("-"):
            flag = value is None or value is True
            return each.opts[0] if flag else f"{each.opts[0]} {shlex.quote(str(value))}"
    if "." in name or any(each.name == "settings" for each in params):
        from clipkit.training.config.errors import as_setting

        return as_setting(name, value)
    return as_option(name, value)  # of another verb


def as_option(name: str, value: object) -> str:
    """As an option of a program: ``--on-bad skip``."""
    flag = f"--{name.rpartition('.')[2].replace('_', '-')}"
    return flag if value is None else f"{flag} {shlex.quote(str(value))}"
