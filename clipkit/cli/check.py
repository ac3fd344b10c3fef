"""`clipkit check data | model | gradients`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.app import check
from clipkit.cli.inputs import open_model, run_config
from clipkit.cli.options import Encoding, ImageColumn, Json, LabelColumn, Quoting, Rejects, Separator, Split, TextColumn
from clipkit.cli.output import print_json, say
from clipkit.cli.shell import Verb


@check.command("gradients", cls=Verb, epilog="Example: torchrun --nproc_per_node 2 -m clipkit check gradients run.yaml")
def check_gradients_command(
    settings: Annotated[list[str], typer.Argument(help="A YAML file, key=value overrides, or both, as for train.")],
    as_json: Json = False,
) -> None:
    """Compare a launch's first gradients with those of one process."""
    import tempfile
    from dataclasses import replace

    from clipkit import distributed
    from clipkit.training.run import check_run_gradients

    config = run_config(settings)
    with tempfile.TemporaryDirectory() as folder:  # each process its own: nothing of a run is written
        found = check_run_gradients(replace(config, train=replace(config.train, output_dir=folder, progress=False)))
    if distributed.is_main():
        if as_json:
            print_json(found.as_dict())
        else:
            say("\n".join(found.lines()))
    if not found.same:
        raise typer.Exit(1)


@check.command("data", cls=Verb, epilog="Example: clipkit check data birds.csv --image file --text caption")
def check_data_command(
    data: Annotated[str, typer.Argument(help="A table, a folder, or a data set of the hub.")],
    image: ImageColumn = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    split: Split = "train",
    separator: Separator = None,
    encoding: Encoding = "utf-8-sig",
    quoting: Quoting = "double",
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="Count tokens with this model's tokenizer.")
    ] = None,
    rejects: Rejects = Path("rejects.jsonl"),
    as_json: Json = False,
) -> None:
    """Open every image and caption, and tell what is wrong."""
    from clipkit.data.check import check_data
    from clipkit.data.pairs import load_pairs
    from clipkit.data.reading.rejects import LoadReport, write_rejects

    ledger = LoadReport()  # every bad row is to be listed, however many there are
    columns: dict[str, Any] = {"image": image, "text": text or None, "label": label, "split": split}
    columns |= {"separator": separator, "encoding": encoding, "quoting": quoting}
    pairs = load_pairs(data, **columns, on_bad="skip", max_bad=1.0, ledger=ledger)
    processor = open_model(model).processor if model else None
    report = check_data(pairs, processor=processor, ledger=ledger, progress=not as_json)
    write_rejects(rejects, report.rejects)
    if as_json:
        print_json(report.as_dict())
    else:
        say(str(report))
    raise typer.Exit(report.exit_code)


@check.command("model", cls=Verb, epilog="Example: clipkit check model runs/birds/model")
def check_model_command(
    model: Annotated[str, typer.Argument(help="A folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER.")],
    other: Annotated[str | None, typer.Argument(help="A second model: tell why the two disagree.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model run Python code that it brings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what is wrong with a model, or why two disagree."""
    from clipkit.models.checks.check_model import Report, check_model
    from clipkit.models.checks.compare_models import Comparison, compare_models

    found: Report | Comparison = (
        compare_models(model, other, trust_remote_code=trust_remote_code)
        if other
        else check_model(model, trust_remote_code=trust_remote_code)
    )
    if as_json:
        print_json(found.as_dict())
    else:
        say(str(found))
    raise typer.Exit(found.exit_code)
