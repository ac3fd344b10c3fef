"""What a verb prints: data on standard output, messages on standard error."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import typer

from clipkit.paths import show


def say(text: str) -> None:
    """Print a line of the result on standard output."""
    typer.echo(_without_control_characters(text))


def tell(text: str) -> None:
    """Print a message to the user on standard error."""
    typer.echo(_without_control_characters(text), err=True)


def _without_control_characters(text: str) -> str:
    # those in names and captions could rewrite the terminal
    return "".join(c if c.isprintable() or c in "\t\n" else f"\\x{ord(c):02x}" for c in text)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    from clipkit.files import dump_json

    typer.echo(dump_json(value), nl=False)


def print_metrics(metrics: dict[str, float], chance: dict[str, float] | None = None) -> None:
    """Print one metric a line, beside its value for random embeddings where that is known."""
    chance = chance or {}
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        comparison = f"   chance {chance[name]:.4f}" if name in chance else ""
        say(f"{name:<{width}}  {value:.4f}{comparison}")


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table as a CSV file, and say how many rows it has."""
    import csv

    from clipkit.files import write_text

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
    tell(f"{show(path)}: {len(rows)} rows")


def replace_unencodable_characters() -> None:
    """Write UTF-8 on both streams, and escape what it cannot encode.

    A file name with an odd character, in a locale that lacks it, must not lose the output of an hour.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def discard_output_without_reader() -> bool:
    """Discard what is still to be written to a stream that nobody reads any more (`| head`).

    Returns:
        Whether there is such a stream.
    """
    broken = [stream for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
    for stream in broken:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # the interpreter flushes at its end, and would complain
        os.close(nowhere)
    return bool(broken)


def _is_broken(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors alone
    except (OSError, ValueError):  # not a file, or closed
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))
