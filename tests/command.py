"""The command line in this process: what a user types, what comes back."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from typing import NamedTuple
from unittest import mock


class Done(NamedTuple):
    code: int
    out: str
    err: str


def clipkit(*arguments: object) -> Done:
    """Exit code, standard output and standard error of `clipkit ARGUMENTS`."""
    from clipkit.cli.main import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))  # as a shell gives them
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # the command sets up its own, on this standard error
    try:
        with (
            mock.patch.object(sys, "argv", ["clipkit", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as stop:
                return Done(int(stop.code or 0), _written(out), _written(err))
    finally:
        root.handlers = handlers
    raise AssertionError("main() always exits")


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode("utf-8")
