"""`clipkit index` and `clipkit search`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.options import Batching, Json, ModelOption, RejectPolicy, open_model
from clipkit.cli.output import print_json, say, tell
from clipkit.paths import show


def index(
    folder: Annotated[Path, typer.Argument(help="A folder of images.")],
    model: ModelOption,
    to: Annotated[Path, typer.Option(help="The index to write.")],
    *,
    policy: RejectPolicy,
    batching: Batching,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing index.")] = False,
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

    options: dict[str, Any] = {**vars(batching), **vars(policy), "progress": not as_json}
    existing = None if overwrite else open_existing(to, folder)
    if existing is None:
        written = EmbeddingIndex.build(open_model(model), folder, to, overwrite=overwrite, **options)
        changes = None
    else:
        written = existing
        changes = existing.update(open_model(model), verify=verify, **options)
    if not distributed.is_main():
        return
    if as_json:
        counts = changes.counts() if changes else None
        print_json({"index": to, "images": len(written), "rejected": len(written.rejected), "changes": counts})
        return
    summary = f"{show(to)}: {len(written)} images"
    tell(f"{summary} ({changes})" if changes else summary)
    tell(f'next: clipkit search {shlex.quote(show(to))} "what you look for"')


def search(
    index: Annotated[Path, typer.Argument(help="An index that `clipkit index` wrote.")],
    query: Annotated[str, typer.Argument(help="A text, or the path of an image.")],
    k: Annotated[int, typer.Option("-k", help="Images to show.", min=1)] = 10,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="Where the model is now, if it moved.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the folder that was indexed is now, if it moved.")] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Show files that no longer exist, too, marked as missing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find images by text or by image."""
    from clipkit.models.text_notices import text_notices
    from clipkit.search.index import EmbeddingIndex
    from clipkit.search.query import query_type

    is_text = query_type(query) == "text"  # fails before anything is opened
    opened = EmbeddingIndex.open(index, model=model, root=root)
    hits = opened.search(query, k=k, missing=missing)
    if as_json:
        notices = text_notices(opened.model.processor, [query]) if is_text else []
        warnings = [notice.as_dict() for notice in notices]
        print_json(
            [{"path": hit.path, "score": hit.score, "missing": hit.missing, "warnings": warnings} for hit in hits]
        )
        return
    for hit in hits:
        mark = "  (missing)" if hit.missing else ""
        say(f"{hit.score:.3f}  {show(hit.path)}{mark}")
