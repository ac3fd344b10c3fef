"""`clipkit evaluate`."""

from __future__ import annotations

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
    LabelColumn,
    MaxBad,
    ModelName,
    OnBad,
    Overwrite,
    Quoting,
    Rejects,
    Separator,
    Split,
    Templates,
    TextColumn,
    Workers,
)
from clipkit.cli.output import print_json, print_metrics, tell
from clipkit.cli.shell import Verb
from clipkit.errors import UsageError
from clipkit.prompts import DEFAULT_TEMPLATE


@app.command(
    cls=Verb, epilog="Example: clipkit evaluate birds.csv --model runs/birds/model --image file --text caption"
)
def evaluate(
    data: Annotated[str, typer.Argument(help="A table, a folder, or a data set of the hub.")],
    model: ModelName,
    image: ImageColumn = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column whose members all count as correct.")
    ] = None,
    template: Templates = None,
    split: Split = "train",
    separator: Separator = None,
    encoding: Encoding = "utf-8-sig",
    quoting: Quoting = "double",
    on_bad: OnBad = "error",
    max_bad: MaxBad = 0.1,
    rejects: Rejects = Path("rejects.jsonl"),
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    to: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure retrieval, and zero-shot classification by labels."""
    import time

    from clipkit import distributed
    from clipkit.data.dataset import has_texts, key_values
    from clipkit.data.pairs import load_pairs
    from clipkit.data.reading.rejects import LoadReport
    from clipkit.evaluation.result import build_result
    from clipkit.evaluation.retrieval import RetrievalEvaluator
    from clipkit.evaluation.zero_shot import ZeroShotEvaluator
    from clipkit.files import require_free, write_json

    require_free(to, overwrite)
    distributed.start()
    start, ledger = time.perf_counter(), LoadReport()
    policy: dict[str, Any] = {"on_bad": on_bad, "max_bad": max_bad}
    policy["rejects"] = rejects if distributed.is_main() else None
    pairs = load_pairs(
        data, image=image, text=text or None, label=label, split=split, separator=separator, encoding=encoding,
        quoting=quoting, ledger=ledger, **policy,
    )  # fmt: skip
    opened = open_model(model)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "on_bad": on_bad}
    options["progress"] = not as_json
    evaluators: list[Any] = []
    if has_texts(pairs):
        evaluators.append(RetrievalEvaluator(pairs, group=group, **options))
    elif group is not None:
        raise UsageError(
            "--group is of retrieval, and there are no texts to be retrieved", fix="--text COLUMN, or leave it out"
        )
    else:
        tell("the images have labels, but no texts: retrieval is not measured")
    if "label" in pairs.column_names and (label or None not in key_values(pairs, "label")):
        evaluators.append(ZeroShotEvaluator(pairs, templates=template or DEFAULT_TEMPLATE, **options))
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        metrics |= evaluator(opened)
    if undecoded := [reject for evaluator in evaluators for reject in evaluator.rejected]:
        ledger.refuse(undecoded)
        ledger.settle(data, **policy)
    result = build_result(opened, metrics, evaluators, 0, time.perf_counter() - start)
    if not distributed.is_main():
        return
    if to:
        write_json(to, result)
    if as_json:
        print_json(result)
    else:
        print_metrics(metrics, result["chance"])
