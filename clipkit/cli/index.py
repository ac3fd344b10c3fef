"""`clipkit index` and `clipkit search`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.app import app
from clipkit.cli.inputs import open_model
from clipkit.cli.options import BatchSize, Json, MaxBad, ModelName, OnBad, Rejects, Workers
from clipkit.cli.output import print_json, say, tell
from clipkit.cli.shell import Verb
from clipkit.paths import show


@app.command(cls=Verb, epilog="Example: clipkit index photos/ --model runs/birds/model --to photos.index")
def index(
    folder: Annotated[Path, typer.Argument(help="A folder of images.")],
    model: ModelName,
    to: Annotated[Path, typer.Option(help="The index to write.")],
    on_bad: OnBad = "error",
    max_bad: MaxBad = 0.1,
    rejects: Rejects = Path("rejects.jsonl"),
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all files again, to see those replaced with the same size and time, too."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Embed a folder of images for search, or update its index."""
    from clipkit import distributed
    from clipkit.search.existing import open_existing
    from clipkit.search.index import EmbeddingIndex

    standing = None if overwrite else open_existing(to, folder)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": not as_json}
    options |= {"on_bad": on_bad, "max_bad": max_bad, "rejects": rejects}
    changes = None
    if standing is None:
        standing = EmbeddingIndex.build(open_model(model), folder, to, overwrite=overwrite, **options)
    else:
        changes = standing.update(open_model(model), verify=verify, **options)
    if not distributed.is_main():
        return
    if as_json:
        counts = changes.counts() if changes else None
        print_json({"index": to, "images": len(standing), "rejected": len(standing.rejected), "changes": counts})
        return
    tell(f"{show(to)}: {len(standing)} images" + (f" ({changes})" if changes else ""))
    tell(f'next: clipkit search {shlex.quote(show(to))} "what you look for"')


@app.command(cls=Verb, epilog='Example: clipkit search photos.index "two dogs on a beach" -k 5')
def search(
    index: Annotated[Path, typer.Argument(help="An index that `clipkit index` wrote.")],
    query: Annotated[str, typer.Argument(help="A text, or the path of an image.")],
    k: Annotated[int, typer.Option("-k", help="Images to show.", min=1)] = 10,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="Where the model is now, if it moved.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the folder that was indexed is now, if it moved.")] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Show files that are no longer there, too, marked as missing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find images by text or by image."""
    from clipkit.models.text_notices import text_notices
    from clipkit.search.index import EmbeddingIndex
    from clipkit.search.query import query_type

    query_type(query)  # what cannot be asked is told before anything is opened
    opened = EmbeddingIndex.open(index, model=model, root=root)
    hits = opened.search(query, k=k, missing=missing)
    if as_json:
        notices = text_notices(opened.model.processor, [query]) if query_type(query) == "text" else []
        warnings = [notice.as_dict() for notice in notices]
        print_json(
            [{"path": hit.path, "score": hit.score, "missing": hit.missing, "warnings": warnings} for hit in hits]
        )
        return
    for hit in hits:
        say(f"{hit.score:.3f}  {show(hit.path)}" + ("  (missing)" if hit.missing else ""))
