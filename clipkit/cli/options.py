"""Options that several verbs share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]


ModelName = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="A folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER."),
]


ImageColumn = Annotated[
    str | None, typer.Option("--image", metavar="COLUMN", help="Column of the image; found by itself if obvious.")
]


TextColumn = Annotated[
    list[str] | None, typer.Option("--text", metavar="COLUMN", help="Column of the text; repeat for several.")
]


Separator = Annotated[
    str | None, typer.Option(help="Of a CSV file: a character, or comma, semicolon, tab, bar; a tab in .tsv files.")
]


Encoding = Annotated[str, typer.Option(help="Of text files, such as cp1252; UTF-16 is seen by its mark.")]


Quoting = Annotated[
    Literal["double", "backslash", "none"],
    typer.Option(help='How a quotation mark within a quoted cell is written: "" or \\"; none: nothing is quoted.'),
]


LabelColumn = Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="Column of the class.")]


OnBad = Annotated[
    Literal["error", "skip"], typer.Option(help="error: stop at what cannot be used; skip: leave it out and list it.")
]


def _budget(typed: str | float) -> int | float:
    """`20` is a number of rows, `0.2` a part of them, and `1.0` all."""
    try:
        return int(typed) if isinstance(typed, str) else typed
    except ValueError:
        return float(typed)


MaxBad = Annotated[
    float,
    typer.Option(
        parser=_budget, metavar="NUMBER", help="With skip: how much may be left out, a part (0.1) or a number (20)."
    ),
]


Split = Annotated[str, typer.Option(help="Of a data set of the hub.")]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file that --to names.")]


BatchSize = Annotated[int, typer.Option(help="Items embedded at once.", min=1)]


Rejects = Annotated[Path, typer.Option(help="Where images and rows that cannot be used are listed, if there are any.")]


Workers = Annotated[int, typer.Option(help="Processes that decode images; 0: this one.", min=0)]


Templates = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="TEXT", help="Prompt with {} for the class; repeat to average several."),
]
