"""`clipkit quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/quickstart"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of an earlier quickstart.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the unseen characters, the weights and the batches.")] = 0,
    max_steps: Annotated[int | None, typer.Option(help="Stop early, to try the command out.", min=1)] = None,
) -> None:
    """Do the main job on embedded data, from pairs to a report."""
    from clipkit.quickstart.job import main

    main(output, overwrite=overwrite, seed=seed, max_steps=max_steps)
