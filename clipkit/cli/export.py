"""`clipkit export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clipkit.cli.app import app
from clipkit.cli.options import Json
from clipkit.cli.output import print_json, say
from clipkit.cli.shell import Verb


@app.command(cls=Verb, epilog="Example: clipkit export runs/birds/model birds-open-clip --to open_clip")
def export(
    model: Annotated[str, typer.Argument(help="A folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[Literal["transformers", "open_clip", "onnx"], typer.Option(help="The format.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model in another library's format, and compare the two."""
    from dataclasses import asdict

    from clipkit.models.dual_encoder import DualEncoder

    report = DualEncoder.from_pretrained(model).export(folder, to=to, overwrite=overwrite)
    if as_json:
        print_json(asdict(report))
    else:
        say(str(report))
