"""`clipkit label`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipkit.cli.options import (
    Batching,
    ImageColumn,
    Json,
    ModelOption,
    Overwrite,
    RejectPolicy,
    TableFormat,
    Templates,
    open_model,
)
from clipkit.cli.output import print_json, say, tell, write_csv
from clipkit.errors import UsageError
from clipkit.paths import show
from clipkit.prompts import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    from clipkit.data.reading.rejects import LoadReport
    from clipkit.labelling.classifier import ZeroShotClassifier

TopClasses = list[tuple[str, float]]  # with their probabilities, best first


def label(
    images: Annotated[
        str, typer.Argument(help="A folder of images, an image, a table that names images, or a data set of the hub.")
    ],
    model: ModelOption,
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
    *,
    table: TableFormat,
    policy: RejectPolicy,
    batching: Batching,
    to: Annotated[
        Path | None,
        typer.Option(help="Write a CSV file: image, label, score; with --top 2 also label_2, score_2; and so on."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Name what is on each image, out of the classes you give."""
    from clipkit import distributed
    from clipkit.files import require_free
    from clipkit.labelling.classifier import ZeroShotClassifier

    require_free(to, overwrite)
    names = _class_names(classes or [], class_file)
    paths, items, load_report = _read_images(images, image, table, policy)
    classifier = ZeroShotClassifier(
        open_model(model), names, templates=template or DEFAULT_TEMPLATE, progress=not as_json
    )
    labelled = classifier.label(items, top_k=top, on_bad=policy.on_bad, **vars(batching), progress=not as_json)
    if not distributed.is_main():
        return
    load_report.refuse(labelled.rejected)
    load_report.settle(images, **vars(policy))
    rows = [(paths[prediction.row], prediction.top) for prediction in labelled.predictions]
    if to:
        _write_table(to, rows)
    if as_json:
        print_json(_as_json(rows, classifier))
    elif not to:
        for path, best in rows:
            say("\t".join([show(path), *(f"{name} {score:.2f}" for name, score in best)]))


def _read_images(
    source: str, column: str | None, table: TableFormat, policy: RejectPolicy
) -> tuple[list[str], list[Any], LoadReport]:
    """The names of the images as they are printed, the images, and the count of what was read."""
    from clipkit.data.listed_images import load_images, names_images
    from clipkit.data.reading.rejects import LoadReport
    from clipkit.search.listing import list_images

    if names_images(source, table.separator):
        load_report = LoadReport()
        paths, items = load_images(source, image=column, ledger=load_report, **vars(table), **vars(policy))
        return paths, items, load_report
    listing = list_images(source, on_bad=policy.on_bad)
    return [str(file) for file in listing.files], list(listing.files), listing.load_report()


def _write_table(path: Path, rows: Sequence[tuple[str, TopClasses]]) -> None:
    """Columns image, label, score, label_2, score_2, …"""
    head = ["image", "label", "score"]
    for place in range(2, 1 + len(rows[0][1])):
        head += [f"label_{place}", f"score_{place}"]
    lines = []
    for image, best in rows:
        line = [image]
        for name, score in best:
            line += [name, f"{score:.4f}"]
        lines.append(line)
    write_csv(path, head, lines)


def _as_json(rows: Sequence[tuple[str, TopClasses]], classifier: ZeroShotClassifier) -> list[dict[str, Any]]:
    """The predictions, each with what the model cannot see of its class."""
    warnings: dict[str, list[Any]] = {name: [] for name in classifier.class_names}
    for notice in classifier.notices:
        for name in classifier.class_names:
            if name in notice.texts:
                warnings[name].append(notice.as_dict())
    records = []
    for image, best in rows:
        name, score = best[0]
        records.append({"image": image, "label": name, "score": score, "top": best, "warnings": warnings[name]})
    return records


def _class_names(typed: Sequence[str], file: Path | None) -> list[str]:
    """The classes that were typed, and those of a file."""
    from clipkit.data.reading.text_files import read_text

    names = []
    for argument in typed:
        parts = [part.strip() for part in argument.split(",") if part.strip()]
        names += parts or [argument]
        if len(parts) > 1:
            tell(
                f"-c {shlex.quote(argument)}: {len(parts)} classes, {', '.join(map(repr, parts))}; "
                "a name with a comma goes into a file: --classes FILE"
            )
    if file is not None:
        lines = read_text(file, "utf-8-sig").splitlines()
        names += [line.strip() for line in lines if line.strip()]
    if not names:
        raise UsageError("there is no class to choose from", where=file, fix="-c robin -c crow, or --classes FILE")
    return names
