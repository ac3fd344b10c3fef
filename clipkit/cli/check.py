"""`clipkit check data | model | gradients`."""

from __future__ import annotations

from typing import Annotated

import typer

from clipkit.cli.options import (
    DEFAULT_REJECTS,
    DataArgument,
    ImageColumn,
    Json,
    LabelColumn,
    ModelArgument,
    Rejects,
    TableFormat,
    TextColumn,
    load_config,
    open_model,
)
from clipkit.cli.output import print_json, say


def check_gradients_command(
    settings: Annotated[list[str], typer.Argument(help="A YAML file, key=value overrides, or both, as for train.")],
    as_json: Json = False,
) -> None:
    """Compare a launch's first gradients with those of one process."""
    import tempfile
    from dataclasses import replace

    from clipkit import distributed
    from clipkit.training.run import check_run_gradients

    config = load_config(settings)
    with tempfile.TemporaryDirectory() as folder:  # one for each process: none of them writes a run
        train = replace(config.train, output_dir=folder, progress=False)
        comparison = check_run_gradients(replace(config, train=train))
    if distributed.is_main():
        if as_json:
            print_json(comparison.as_dict())
        else:
            say("\n".join(comparison.lines()))
    if not comparison.same:
        raise typer.Exit(1)


def check_data_command(
    data: DataArgument,
    image: ImageColumn = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    *,
    table: TableFormat,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="Count tokens with this model's tokenizer.")
    ] = None,
    rejects: Rejects = DEFAULT_REJECTS,
    as_json: Json = False,
) -> None:
    """Open every image and caption, and report what is wrong."""
    from clipkit.data.check import check_data
    from clipkit.data.pairs import load_pairs
    from clipkit.data.reading.rejects import LoadReport, write_rejects

    load_report = LoadReport()
    pairs = load_pairs(
        data,
        image=image,
        text=text or None,
        label=label,
        **vars(table),
        on_bad="skip",  # and lists every bad row, however many there are
        max_bad=1.0,
        ledger=load_report,
        progress=not as_json,
    )
    processor = open_model(model).processor if model else None
    report = check_data(pairs, processor=processor, ledger=load_report, progress=not as_json)
    write_rejects(rejects, report.rejects)
    if as_json:
        print_json(report.as_dict())
    else:
        say(str(report))
    raise typer.Exit(report.exit_code)


def check_model_command(
    model: ModelArgument,
    other: Annotated[str | None, typer.Argument(help="A second model: report why the two disagree.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model run Python code that it brings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Report what is wrong with a model, or why two disagree."""
    from clipkit.models.checks.check_model import Report, check_model
    from clipkit.models.checks.compare_models import Comparison, compare_models

    report: Report | Comparison
    if other:
        report = compare_models(model, other, trust_remote_code=trust_remote_code)
    else:
        report = check_model(model, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(report.as_dict())
    else:
        say(str(report))
    raise typer.Exit(report.exit_code)
