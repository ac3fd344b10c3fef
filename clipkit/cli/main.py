"""The verbs. Bodies import late, so that `clipkit --help` answers at once."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from clipkit.cli.shell import Verb, never_fail_on_a_name
from clipkit.errors import UsageError, exit_with_message
from clipkit.paths import show
from clipkit.prompts import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder
    from clipkit.training.config.run import RunConfig
    from clipkit.training.loop import TrainResult

app = typer.Typer(
    help="Train, measure and use text-image dual encoders.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


check = typer.Typer(help="Look for what is wrong.", no_args_is_help=True, rich_markup_mode=None)


app.add_typer(check, name="check")


Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]


ModelName = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="A folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER."),
]


ImageColumn = Annotated[
    str | None, typer.Option("--image", metavar="COLUMN", help="Column of the image; found by itself if obvious.")
]


TextColumn = Annotated[
    list[str] | None, typer.Option("--text", metavar="COLUMN", help="Column of the text; repeat for several.")
]


Separator = Annotated[
    str | None, typer.Option(help="Of a CSV file: a character, or comma, semicolon, tab, bar; a tab in .tsv files.")
]


Encoding = Annotated[str, typer.Option(help="Of text files, such as cp1252; UTF-16 is seen by its mark.")]


Quoting = Annotated[
    Literal["double", "backslash", "none"],
    typer.Option(help='How a quotation mark within a quoted cell is written: "" or \\"; none: nothing is quoted.'),
]


LabelColumn = Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="Column of the class.")]


OnBad = Annotated[
    Literal["error", "skip"], typer.Option(help="error: stop at what cannot be used; skip: leave it out and list it.")
]


def _budget(typed: str | float) -> int | float:
    """`20` is a number of rows, `0.2` a part of them, and `1.0` all."""
    try:
        return int(typed) if isinstance(typed, str) else typed
    except ValueError:
        return float(typed)


MaxBad = Annotated[
    float,
    typer.Option(
        parser=_budget, metavar="NUMBER", help="With skip: how much may be left out, a part (0.1) or a number (20)."
    ),
]


Split = Annotated[str, typer.Option(help="Of a data set of the hub.")]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file that --to names.")]


BatchSize = Annotated[int, typer.Option(help="Items embedded at once.", min=1)]


Rejects = Annotated[Path, typer.Option(help="Where images and rows that cannot be used are listed, if there are any.")]


Workers = Annotated[int, typer.Option(help="Processes that decode images; 0: this one.", min=0)]


Templates = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="TEXT", help="Prompt with {} for the class; repeat to average several."),
]


@app.command(cls=Verb, epilog="Example: clipkit quickstart --output runs/quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/quickstart"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of an earlier quickstart.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the unseen characters, the weights and the batches.")] = 0,
    max_steps: Annotated[int | None, typer.Option(help="Stop early, to try the command out.", min=1)] = None,
) -> None:
    """Do the main job on embedded data, from pairs to a report."""
    from clipkit.quickstart.job import main

    main(output, overwrite=overwrite, seed=seed, max_steps=max_steps)


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
    config = _run_config([*settings, *given])
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
            _print_json(written)
        else:
            _print_metrics(result.metrics, written["chance"])
        _tell(f"model:   {done.folder / 'model'}   ({_which(result)})")
        if result.forgetting is not None:
            _tell(f"         {done.folder / 'last'}   (step {result.step} of {result.steps}, as it was trained)")
        _tell(f"results: {done.folder / 'result.json'}")


def _which(result: TrainResult) -> str:
    step = f"step {result.step} of {result.steps}"
    if result.forgetting is None:
        return step
    if result.forgetting.alpha == 0:
        return "the weights before training: nothing else is within forget_budget"
    return f"{result.forgetting.alpha:g} of the way from the start to {step}"


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
    opened = _open(model)
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
        _tell("the images have labels, but no texts: retrieval is not measured")
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
        _print_json(result)
    else:
        _print_metrics(metrics, result["chance"])


@app.command(
    cls=Verb,
    epilog="Example: clipkit label photos/ --model runs/birds/model --class robin --class crow --to labels.csv",
)
def label(
    images: Annotated[
        str, typer.Argument(help="A folder of images, an image, a table that names images, or a data set of the hub.")
    ],
    model: ModelName,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", "-c", metavar="NAMES", help="A class, in words; repeat, or put commas between several."
        ),
    ] = None,
    class_file: Annotated[
        Path | None, typer.Option("--classes", help="A file of classes, one a line; commas are part of their names.")
    ] = None,
    template: Templates = None,
    top: Annotated[int, typer.Option(help="Classes to give for each image, best first.", min=1)] = 1,
    image: ImageColumn = None,
    split: Split = "train",
    separator: Separator = None,
    encoding: Encoding = "utf-8-sig",
    quoting: Quoting = "double",
    on_bad: OnBad = "error",
    max_bad: MaxBad = 0.1,
    rejects: Rejects = Path("rejects.jsonl"),
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    to: Annotated[
        Path | None,
        typer.Option(help="Write a CSV file: image, label, score; with --top 2 also label_2, score_2; and so on."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Name what is on each image, out of the classes you give."""
    from clipkit import distributed
    from clipkit.data.listed_images import load_images, names_images
    from clipkit.data.reading.rejects import LoadReport
    from clipkit.files import require_free
    from clipkit.labelling.classifier import ZeroShotClassifier
    from clipkit.search.listing import list_images

    require_free(to, overwrite)
    names = _class_names(classes or [], class_file)
    policy: dict[str, Any] = {"on_bad": on_bad, "max_bad": max_bad, "rejects": rejects}
    if names_images(images, separator):
        form: dict[str, Any] = {"separator": separator, "encoding": encoding, "quoting": quoting}
        ledger = LoadReport()
        paths, items = load_images(images, image=image, split=split, ledger=ledger, **form, **policy)
    else:
        listing = list_images(images, on_bad=on_bad)
        paths, items, ledger = list(map(str, listing.files)), list(listing.files), listing.ledger()
    classify = ZeroShotClassifier(_open(model), names, templates=template or DEFAULT_TEMPLATE, progress=not as_json)
    found = classify.label(
        items, top_k=top, on_bad=on_bad, batch_size=batch_size, workers=workers, progress=not as_json
    )
    if not distributed.is_main():
        return
    ledger.refuse(found.rejected)
    ledger.settle(images, **policy)
    rows = [(paths[each.row], each.top) for each in found.predictions]
    if to:
        heads = [
            f"{name}_{place}" if place > 1 else name
            for place in range(1, 1 + len(rows[0][1]))
            for name in ("label", "score")
        ]
        cells = [[path, *(cell for name, score in best for cell in (name, f"{score:.4f}"))] for path, best in rows]
        _write_csv(to, ["image", *heads], cells)
    if as_json:
        warnings = {
            name: [notice.as_dict() for notice in classify.notices if name in notice.texts]
            for name in classify.class_names
        }
        _print_json(
            [
                {"image": path, "label": best[0][0], "score": best[0][1], "top": best, "warnings": warnings[best[0][0]]}
                for path, best in rows
            ]
        )
    elif not to:
        for path, best in rows:
            _say(f"{show(path)}\t" + "\t".join(f"{name} {score:.2f}" for name, score in best))


def _class_names(typed: Sequence[str], file: Path | None) -> list[str]:
    """The classes that were typed, and those of a file."""
    from clipkit.data.reading.tables import read_text

    names = []
    for each in typed:
        parts = [part.strip() for part in each.split(",") if part.strip()]
        names += parts or [each]
        if len(parts) > 1:
            _tell(f"-c {shlex.quote(each)}: {len(parts)} classes, {', '.join(map(repr, parts))}; "
                  "a name with a comma goes into a file: --classes FILE")  # fmt: skip
    if file is not None:
        names += [line.strip() for line in read_text(file, "utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise UsageError("there is no class to choose from", where=file, fix="-c robin -c crow, or --classes FILE")
    return names


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
    from clipkit.search.index import EmbeddingIndex
    from clipkit.search.standing import index_of_folder

    standing = None if overwrite else index_of_folder(to, folder)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": not as_json}
    options |= {"on_bad": on_bad, "max_bad": max_bad, "rejects": rejects}
    changes = None
    if standing is None:
        standing = EmbeddingIndex.build(_open(model), folder, to, overwrite=overwrite, **options)
    else:
        changes = standing.update(_open(model), verify=verify, **options)
    if not distributed.is_main():
        return
    if as_json:
        counts = changes.counts() if changes else None
        _print_json({"index": to, "images": len(standing), "rejected": len(standing.rejected), "changes": counts})
        return
    _tell(f"{show(to)}: {len(standing)} images" + (f" ({changes})" if changes else ""))
    _tell(f'next: clipkit search {shlex.quote(show(to))} "what you look for"')


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
    from clipkit.search.query import kind_of

    kind_of(query)  # what cannot be asked is told before anything is opened
    opened = EmbeddingIndex.open(index, model=model, root=root)
    hits = opened.search(query, k=k, missing=missing)
    if as_json:
        notices = text_notices(opened.model.processor, [query]) if kind_of(query) == "text" else []
        warnings = [notice.as_dict() for notice in notices]
        _print_json(
            [{"path": hit.path, "score": hit.score, "missing": hit.missing, "warnings": warnings} for hit in hits]
        )
        return
    for hit in hits:
        _say(f"{hit.score:.3f}  {show(hit.path)}" + ("  (missing)" if hit.missing else ""))


@app.command(cls=Verb, epilog="Example: clipkit export runs/birds/model birds-open-clip --to open_clip")
def export(
    model: Annotated[str, typer.Argument(help="A folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[Literal["transformers", "open_clip", "onnx"], typer.Option(help="The format.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model in another library's format, and compare the two."""
    from dataclasses import asdict

    from clipkit.models.dual_encoder import DualEncoder

    report = DualEncoder.from_pretrained(model).export(folder, to=to, overwrite=overwrite)
    if as_json:
        _print_json(asdict(report))
    else:
        _say(str(report))


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

    config = _run_config(settings)
    with tempfile.TemporaryDirectory() as folder:  # each process its own: nothing of a run is written
        found = check_run_gradients(replace(config, train=replace(config.train, output_dir=folder, progress=False)))
    if distributed.is_main():
        if as_json:
            _print_json(found.as_dict())
        else:
            _say("\n".join(found.lines()))
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
    processor = _open(model).processor if model else None
    report = check_data(pairs, processor=processor, ledger=ledger, progress=not as_json)
    write_rejects(rejects, report.rejects)
    if as_json:
        _print_json(report.as_dict())
    else:
        _say(str(report))
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
        _print_json(found.as_dict())
    else:
        _say(str(found))
    raise typer.Exit(found.exit_code)


@app.command(cls=Verb, epilog="Example: clipkit env --json")
def env(as_json: Json = False) -> None:
    """Versions, devices and threads: what to put into a bug report."""
    from clipkit.evaluation.result import environment

    facts = environment()
    if as_json:
        _print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        _say(f"{name:<{width}}  {value}")


def _run_config(settings: Sequence[str]) -> RunConfig:
    from clipkit.training.config.errors import is_override
    from clipkit.training.config.run import RunConfig

    files = [each for each in settings if not is_override(each)]
    if len(files) > 1:
        raise UsageError(f"expected one YAML file, found {len(files)}: {', '.join(files)}")
    return RunConfig.load(files[0] if files else None, [each for each in settings if is_override(each)])


def _open(model: str) -> DualEncoder:
    logging.getLogger("clipkit").info("opening %s", model)
    from clipkit import distributed
    from clipkit.models.dual_encoder import DualEncoder

    return DualEncoder.from_pretrained(model, device=distributed.start())


def _say(text: str) -> None:
    """A line of the result, on standard output."""
    typer.echo(_harmless(text))


def _tell(text: str) -> None:
    """A message to who waits, on standard error."""
    typer.echo(_harmless(text), err=True)


def _harmless(text: str) -> str:
    # control characters in names and captions could rewrite the terminal
    return "".join(c if c.isprintable() or c in "\t\n" else f"\\x{ord(c):02x}" for c in text)


def _print_json(value: Any) -> None:
    from clipkit.files import dump_json

    typer.echo(dump_json(value), nl=False)


def _print_metrics(metrics: dict[str, float], chance: dict[str, float] | None = None) -> None:
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        beside = f"   chance {chance[name]:.4f}" if chance and name in chance else ""
        _say(f"{name:<{width}}  {value:.4f}{beside}")


def _write_csv(path: Path, head: list[str], rows: list[list[str]]) -> None:
    import csv
    import io

    from clipkit.files import write_text

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
    _tell(f"{show(path)}: {len(rows)} rows")


def main() -> NoReturn:
    """The console script: exit codes as in `clipkit.errors`."""
    never_fail_on_a_name()
    # OpenMP threads that spin while they wait make a step ten times slower once another program wants their core;
    # threads that never spin make it a fifth slower when none does
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("clipkit").setLevel(logging.INFO)  # and no other library: theirs would fill the screen
    if not sys.stderr.isatty():  # or their bars would fill a log
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    exit_with_message(app)
    sys.exit(0)
