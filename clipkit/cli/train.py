"""`clipkit train`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clipkit.cli.app import app
from clipkit.cli.inputs import run_config
from clipkit.cli.options import Json
from clipkit.cli.output import print_json, print_metrics, tell
from clipkit.cli.shell import Verb

if TYPE_CHECKING:
    from clipkit.training.result import TrainResult


@app.command(
    cls=Verb,
    epilog="Example: clipkit train model.name=openai/clip-vit-base-patch32 data.train=b.csv train.output_dir=runs/b",
)
def train(
    settings: Annotated[list[str], typer.Argument(help="A YAML file, key=value overrides, or both.")],
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole config, every key of it, and stop.")
    ] = False,
    resume: Annotated[
        Literal["never", "auto"] | None,
        typer.Option(help="auto: go on with the run that the folder holds, or begin; sets train.resume."),
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
    given = [f"train.{name}={value}" for name, value in options.items() if value is not None]
    config = run_config([*settings, *given])
    if print_config:
        typer.echo(config.dump(), nl=False)
        return
    from clipkit import distributed
    from clipkit.training.run import run

    done = run(config)
    if distributed.is_main():
        result = done.result
        written = json.loads((done.folder / "result.json").read_text(encoding="utf-8"))
        if as_json:
            print_json(written)
        else:
            print_metrics(result.metrics, written["chance"])
        tell(f"model:   {done.folder / 'model'}   ({_which(result)})")
        if result.forgetting is not None:
            tell(f"         {done.folder / 'last'}   (step {result.step} of {result.steps}, as it was trained)")
        tell(f"results: {done.folder / 'result.json'}")


def _which(result: TrainResult) -> str:
    step = f"step {result.step} of {result.steps}"
    if result.forgetting is None:
        return step
    if result.forgetting.alpha == 0:
        return "the weights before training: nothing else is within forget_budget"
    return f"{result.forgetting.alpha:g} of the way from the start to {step}"
