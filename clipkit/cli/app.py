"""The two Typer applications that the verbs belong to."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Train, measure and use text-image dual encoders.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

check = typer.Typer(help="Look for what is wrong.", no_args_is_help=True, rich_markup_mode=None)

app.add_typer(check, name="check")
