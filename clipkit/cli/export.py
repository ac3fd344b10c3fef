"""`clipkit export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clipkit.cli.options import Json, ModelArgument
from clipkit.cli.output import print_json, say


def export(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[Literal["transformers", "open_clip", "onnx"], typer.Option(help="The format.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing export.")] = False,
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
