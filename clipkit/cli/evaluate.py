"""`clipkit evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.options import (
    Batching,
    DataArgument,
    ImageColumn,
    Json,
    LabelColumn,
    ModelOption,
    Overwrite,
    RejectPolicy,
    TableFormat,
    Templates,
    TextColumn,
    open_model,
)
from clipkit.cli.output import print_json, print_metrics, tell
from clipkit.errors import UsageError
from clipkit.prompts import DEFAULT_TEMPLATE


def evaluate(
    data: DataArgument,
    model: ModelOption,
    image: ImageColumn = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column whose members all count as correct.")
    ] = None,
    template: Templates = None,
    *,
    table: TableFormat,
    policy: RejectPolicy,
    batching: Batching,
    to: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure retrieval, and zero-shot classification by labels."""
    import time

    from clipkit import distributed
    from clipkit.data.pairs import load_pairs
    from clipkit.data.reading.rejects import LoadReport
    from clipkit.evaluation.result import build_result
    from clipkit.files import require_free, write_json

    require_free(to, overwrite)
    distributed.start()
    start = time.perf_counter()

    # 1. the pairs; one process lists what cannot be used
    load_report = LoadReport()
    reject_options = vars(policy) | {"rejects": policy.rejects if distributed.is_main() else None}
    columns: dict[str, Any] = {"image": image, "text": text or None, "label": label}
    pairs = load_pairs(data, **columns, **vars(table), ledger=load_report, **reject_options)

    # 2. measure
    opened = open_model(model)
    options = {**vars(batching), "on_bad": policy.on_bad, "progress": not as_json}
    evaluators = _evaluators(pairs, label, group, template, options)
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        metrics |= evaluator(opened)
    undecoded = [reject for evaluator in evaluators for reject in evaluator.rejected]
    if undecoded:
        load_report.refuse(undecoded)
        load_report.settle(data, **reject_options)

    # 3. the result
    result = build_result(opened, metrics, evaluators, 0, time.perf_counter() - start)
    if not distributed.is_main():
        return
    if to:
        write_json(to, result)
    if as_json:
        print_json(result)
    else:
        print_metrics(metrics, result["chance"])


def _evaluators(
    pairs: Any, label: str | None, group: str | None, templates: list[str] | None, options: dict[str, Any]
) -> list[Any]:
    """Retrieval where there are texts, zero-shot classification where there are labels."""
    from clipkit.data.dataset import has_texts, key_values
    from clipkit.evaluation.retrieval import RetrievalEvaluator
    from clipkit.evaluation.zero_shot import ZeroShotEvaluator

    evaluators: list[Any] = []
    if has_texts(pairs):
        evaluators.append(RetrievalEvaluator(pairs, group=group, **options))
    elif group is not None:
        fix = "--text COLUMN, or leave it out"
        raise UsageError("--group belongs to retrieval, and there are no texts to retrieve", fix=fix)
    else:
        tell("the images have labels, but no texts: retrieval is not measured")
    has_labels = "label" in pairs.column_names
    if has_labels and (label or None not in key_values(pairs, "label")):  # unasked only where every row has one
        evaluators.append(ZeroShotEvaluator(pairs, templates=templates or DEFAULT_TEMPLATE, **options))
    return evaluators
