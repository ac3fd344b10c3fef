"""What a verb prints: data on standard output, messages on standard error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from clipkit.paths import show


def say(text: str) -> None:
    """A line of the result, on standard output."""
    typer.echo(_harmless(text))


def tell(text: str) -> None:
    """A message to who waits, on standard error."""
    typer.echo(_harmless(text), err=True)


def _harmless(text: str) -> str:
    # control characters in names and captions could rewrite the terminal
    return "".join(c if c.isprintable() or c in "\t\n" else f"\\x{ord(c):02x}" for c in text)


def print_json(value: Any) -> None:
    from clipkit.files import dump_json

    typer.echo(dump_json(value), nl=False)


def print_metrics(metrics: dict[str, float], chance: dict[str, float] | None = None) -> None:
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        beside = f"   chance {chance[name]:.4f}" if chance and name in chance else ""
        say(f"{name:<{width}}  {value:.4f}{beside}")


def write_csv(path: Path, head: list[str], rows: list[list[str]]) -> None:
    import csv
    import io

    from clipkit.files import write_text

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
    tell(f"{show(path)}: {len(rows)} rows")
