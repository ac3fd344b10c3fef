"""The arguments and options that several verbs share, each declared once, and what they open.

Options that belong together are the fields of a dataclass. A verb takes the dataclass as one keyword argument, and
`with_option_groups` declares a command line option for each field.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from clipkit.errors import UsageError

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder
    from clipkit.training.config.run import RunConfig

_MODEL_HELP = "A folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER."

DataArgument = Annotated[str, typer.Argument(help="A table, a folder, or a data set of the hub.")]
ModelArgument = Annotated[str, typer.Argument(help=_MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL_HELP)]

ImageColumn = Annotated[
    str | None, typer.Option("--image", metavar="COLUMN", help="Column of the image; found by itself if obvious.")
]
TextColumn = Annotated[
    list[str] | None, typer.Option("--text", metavar="COLUMN", help="Column of the text; repeat for several.")
]
LabelColumn = Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="Column of the class.")]
Templates = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="TEXT", help="Prompt with {} for the class; repeat to average several."),
]
Rejects = Annotated[Path, typer.Option(help="Where images and rows that cannot be used are listed, if there are any.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file that --to names.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]

DEFAULT_REJECTS = Path("rejects.jsonl")


def parse_max_bad(typed: str | float) -> int | float:
    """Return `20` as a number of rows, `0.2` as a fraction of them, and `1.0` as all."""
    try:
        return int(typed) if isinstance(typed, str) else typed
    except ValueError:
        return float(typed)


def parse_workers(typed: str | int) -> int | Literal["auto"]:
    """Return `auto`, or a number of processes."""
    if typed == "auto":
        return "auto"
    number = int(typed)
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number


@dataclass(frozen=True)
class TableFormat:
    """How a table or a data set of the hub is read."""

    split: Annotated[str, typer.Option(help="Of a data set of the hub.")] = "train"
    separator: Annotated[
        str | None,
        typer.Option(help="Of a CSV file: a character, or comma, semicolon, tab, bar; a tab in .tsv files."),
    ] = None
    encoding: Annotated[str, typer.Option(help="Of text files, such as cp1252; UTF-16 is recognised by its mark.")] = (
        "utf-8-sig"
    )
    quoting: Annotated[
        Literal["double", "backslash", "none"],
        typer.Option(help='How a quotation mark within a quoted cell is written: "" or \\"; none: nothing is quoted.'),
    ] = "double"


@dataclass(frozen=True)
class RejectPolicy:
    """What happens to images and rows that cannot be used."""

    on_bad: Annotated[
        Literal["error", "skip"],
        typer.Option(help="error: stop at what cannot be used; skip: leave it out and list it."),
    ] = "error"
    max_bad: Annotated[
        float,
        typer.Option(
            parser=parse_max_bad,
            metavar="NUMBER",
            help="With skip: how much may be left out, a part (0.1) or a number (20).",
        ),
    ] = 0.1
    rejects: Rejects = DEFAULT_REJECTS


@dataclass(frozen=True)
class Batching:
    """How many items are embedded at once, and what decodes images."""

    batch_size: Annotated[int, typer.Option(help="Items embedded at once.", min=1)] = 64
    workers: Annotated[
        Any,
        typer.Option(
            parser=parse_workers,
            metavar="auto|NUMBER",
            help="What decodes images: threads, or so many processes.",
        ),
    ] = "auto"


_GROUPS = (TableFormat, RejectPolicy, Batching)


def with_option_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb for Typer: each argument that is a group of options is replaced by the options of the group."""
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in _GROUPS}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(verb)
    def run(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
        verb(**options)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer reads both
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters_of(group: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        assert field.default is not MISSING
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )


def open_model(model: str) -> DualEncoder:
    """Open the model that was typed, on the device of this process."""
    logging.getLogger("clipkit").info("opening %s", model)
    from clipkit import distributed
    from clipkit.models.dual_encoder import DualEncoder

    return DualEncoder.from_pretrained(model, device=distributed.start())


def load_config(settings: Sequence[str]) -> RunConfig:
    """Return the config of a run, from the YAML file and the key=value overrides that were typed.

    Raises:
        UsageError: there is more than one file.
        ConfigError: an unknown key, or a value that does not fit.
    """
    from clipkit.training.config.errors import is_override
    from clipkit.training.config.run import RunConfig

    files = [setting for setting in settings if not is_override(setting)]
    overrides = [setting for setting in settings if is_override(setting)]
    if len(files) > 1:
        raise UsageError(f"expected one YAML file, found {len(files)}: {', '.join(files)}")
    return RunConfig.load(files[0] if files else None, overrides)
