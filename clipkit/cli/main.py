"""The command line: every verb, and how it ends. Verbs import late, so that `clipkit --help` answers at once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from clipkit.cli.check import check_data_command, check_gradients_command, check_model_command
from clipkit.cli.env import env
from clipkit.cli.evaluate import evaluate
from clipkit.cli.export import export
from clipkit.cli.index import index, search
from clipkit.cli.label import label
from clipkit.cli.options import with_option_groups
from clipkit.cli.output import replace_unencodable_characters
from clipkit.cli.quickstart import quickstart
from clipkit.cli.shell import Verb
from clipkit.cli.train import train
from clipkit.errors import exit_with_message

app = typer.Typer(
    help="Train, measure and use text-image dual encoders.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
check = typer.Typer(help="Look for what is wrong.", no_args_is_help=True, rich_markup_mode=None)


def _add(parent: typer.Typer, name: str, verb: Callable[..., None], example: str) -> None:
    parent.command(name, cls=Verb, epilog=f"Example: {example}")(with_option_groups(verb))


# in the order of the help
_add(app, "quickstart", quickstart, "clipkit quickstart --output runs/quickstart")
_add(
    app, "train", train,
    "clipkit train model.name=openai/clip-vit-base-patch32 data.train=b.csv train.output_dir=runs/b",
)  # fmt: skip
_add(app, "evaluate", evaluate, "clipkit evaluate birds.csv --model runs/birds/model --image file --text caption")
_add(
    app, "label", label,
    "clipkit label photos/ --model runs/birds/model --class robin --class crow --to labels.csv",
)  # fmt: skip
_add(app, "index", index, "clipkit index photos/ --model runs/birds/model --to photos.index")
_add(app, "search", search, 'clipkit search photos.index "two dogs on a beach" -k 5')
_add(app, "export", export, "clipkit export runs/birds/model birds-open-clip --to open_clip")
_add(app, "env", env, "clipkit env --json")
_add(check, "gradients", check_gradients_command, "torchrun --nproc_per_node 2 -m clipkit check gradients run.yaml")
_add(check, "data", check_data_command, "clipkit check data birds.csv --image file --text caption")
_add(check, "model", check_model_command, "clipkit check model runs/birds/model")
app.add_typer(check, name="check")


def main() -> NoReturn:
    """Run the console script; exit codes as in `clipkit.errors`."""
    replace_unencodable_characters()
    # OpenMP threads that spin while they wait make a step ten times slower once another program needs their core;
    # threads that never spin make it a fifth slower when none does
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("clipkit").setLevel(logging.INFO)  # and no other library's: they would fill the screen
    if not sys.stderr.isatty():  # progress bars would fill a log
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    exit_with_message(app)
    sys.exit(0)
