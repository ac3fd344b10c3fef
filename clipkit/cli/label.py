"""`clipkit label`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.app import app
from clipkit.cli.inputs import open_model
from clipkit.cli.options import (
    BatchSize,
    Encoding,
    ImageColumn,
    Json,
    MaxBad,
    ModelName,
    OnBad,
    Overwrite,
    Quoting,
    Rejects,
    Separator,
    Split,
    Templates,
    Workers,
)
from clipkit.cli.output import print_json, say, tell, write_csv
from clipkit.cli.shell import Verb
from clipkit.errors import UsageError
from clipkit.paths import show
from clipkit.prompts import DEFAULT_TEMPLATE


@app.command(
    cls=Verb,
    epilog="Example: clipkit label photos/ --model runs/birds/model --class robin --class crow --to labels.csv",
)
def label(
    images: Annotated[
        str, typer.Argument(help="A folder of images, an image, a table that names images, or a data set of the hub.")
    ],
    model: ModelName,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", "-c", metavar="NAMES", help="A class, in words; repeat, or put commas between several."
        ),
    ] = None,
    class_file: Annotated[
        Path | None, typer.Option("--classes", help="A file of classes, one a line; commas are part of their names.")
    ] = None,
    template: Templates = None,
    top: Annotated[int, typer.Option(help="Classes to give for each image, best first.", min=1)] = 1,
    image: ImageColumn = None,
    split: Split = "train",
    separator: Separator = None,
    encoding: Encoding = "utf-8-sig",
    quoting: Quoting = "double",
    on_bad: OnBad = "error",
    max_bad: MaxBad = 0.1,
    rejects: Rejects = Path("rejects.jsonl"),
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    to: Annotated[
        Path | None,
        typer.Option(help="Write a CSV file: image, label, score; with --top 2 also label_2, score_2; and so on."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Name what is on each image, out of the classes you give."""
    from clipkit import distributed
    from clipkit.data.listed_images import load_images, names_images
    from clipkit.data.reading.rejects import LoadReport
    from clipkit.files import require_free
    from clipkit.labelling.classifier import ZeroShotClassifier
    from clipkit.search.listing import list_images

    require_free(to, overwrite)
    names = _class_names(classes or [], class_file)
    policy: dict[str, Any] = {"on_bad": on_bad, "max_bad": max_bad, "rejects": rejects}
    if names_images(images, separator):
        form: dict[str, Any] = {"separator": separator, "encoding": encoding, "quoting": quoting}
        ledger = LoadReport()
        paths, items = load_images(images, image=image, split=split, ledger=ledger, **form, **policy)
    else:
        listing = list_images(images, on_bad=on_bad)
        paths, items, ledger = list(map(str, listing.files)), list(listing.files), listing.load_report()
    classify = ZeroShotClassifier(
        open_model(model), names, templates=template or DEFAULT_TEMPLATE, progress=not as_json
    )
    found = classify.label(
        items, top_k=top, on_bad=on_bad, batch_size=batch_size, workers=workers, progress=not as_json
    )
    if not distributed.is_main():
        return
    ledger.refuse(found.rejected)
    ledger.settle(images, **policy)
    rows = [(paths[each.row], each.top) for each in found.predictions]
    if to:
        heads = [
            f"{name}_{place}" if place > 1 else name
            for place in range(1, 1 + len(rows[0][1]))
            for name in ("label", "score")
        ]
        cells = [[path, *(cell for name, score in best for cell in (name, f"{score:.4f}"))] for path, best in rows]
        write_csv(to, ["image", *heads], cells)
    if as_json:
        warnings = {
            name: [notice.as_dict() for notice in classify.notices if name in notice.texts]
            for name in classify.class_names
        }
        print_json(
            [
                {"image": path, "label": best[0][0], "score": best[0][1], "top": best, "warnings": warnings[best[0][0]]}
                for path, best in rows
            ]
        )
    elif not to:
        for path, best in rows:
            say(f"{show(path)}\t" + "\t".join(f"{name} {score:.2f}" for name, score in best))


def _class_names(typed: Sequence[str], file: Path | None) -> list[str]:
    """The classes that were typed, and those of a file."""
    from clipkit.data.reading.tables import read_text

    names = []
    for each in typed:
        parts = [part.strip() for part in each.split(",") if part.strip()]
        names += parts or [each]
        if len(parts) > 1:
            tell(f"-c {shlex.quote(each)}: {len(parts)} classes, {', '.join(map(repr, parts))}; "
                  "a name with a comma goes into a file: --classes FILE")  # fmt: skip
    if file is not None:
        names += [line.strip() for line in read_text(file, "utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise UsageError("there is no class to choose from", where=file, fix="-c robin -c crow, or --classes FILE")
    return names
