"""`clipkit train`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clipkit.cli.options import Json, load_config
from clipkit.cli.output import print_json, print_metrics, tell

if TYPE_CHECKING:
    from clipkit.training.result import TrainResult


def train(
    settings: Annotated[list[str], typer.Argument(help="A YAML file, key=value overrides, or both.")],
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole config, every key of it, and stop.")
    ] = False,
    resume: Annotated[
        Literal["never", "auto"] | None,
        typer.Option(help="auto: continue the run in the output folder, or start one; sets train.resume."),
    ] = None,
    forget_budget: Annotated[
        float | None,
        typer.Option(
            help="How much of the reference metric may be lost, such as 0.01; sets train.forget_budget.",
            min=0,
        ),
    ] = None,
    on_bad: Annotated[
        Literal["error", "skip"] | None,
        typer.Option(help="error: stop at what cannot be used; skip: leave it out and list it; sets train.on_bad."),
    ] = None,
    max_bad: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER", help="With skip: how much may be left out, a part or a number; sets train.max_bad."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model on pairs, from a config."""
    options = {"resume": resume, "forget_budget": forget_budget, "on_bad": on_bad, "max_bad": max_bad}
    overrides = [f"train.{name}={value}" for name, value in options.items() if value is not None]
    config = load_config([*settings, *overrides])
    if print_config:
        typer.echo(config.dump(), nl=False)
        return
    from clipkit import distributed
    from clipkit.training.run import run

    finished = run(config)
    if not distributed.is_main():
        return
    result = finished.result
    result_file = finished.folder / "result.json"
    written = json.loads(result_file.read_text(encoding="utf-8"))
    if as_json:
        print_json(written)
    else:
        print_metrics(result.metrics, written["chance"])
    tell(f"model:   {finished.folder / 'model'}   ({_kept_weights(result)})")
    if result.forgetting is not None:
        tell(f"         {finished.folder / 'last'}   (step {result.step} of {result.steps}, as it was trained)")
    tell(f"results: {result_file}")


def _kept_weights(result: TrainResult) -> str:
    """Which weights the model folder holds, in words."""
    step = f"step {result.step} of {result.steps}"
    if result.forgetting is None:
        return step
    if result.forgetting.alpha == 0:
        return "the weights before training: nothing else is within forget_budget"
    return f"{result.forgetting.alpha:g} of the way from the start to {step}"
