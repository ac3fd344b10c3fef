"""The main job on the embedded glyphs, by the same public functions as with your own data.

pairs > model > train > evaluate > label > index > search > report
"""

from __future__ import annotations

import csv
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clipkit.errors import UsageError, as_python, speaking
from clipkit.evaluation.result import build_result
from clipkit.evaluation.retrieval import RetrievalEvaluator
from clipkit.evaluation.zero_shot import ZeroShotEvaluator
from clipkit.files import write_json, write_text
from clipkit.labelling.classifier import ZeroShotClassifier
from clipkit.losses.similarity import SameGroup
from clipkit.models.dual_encoder import DualEncoder
from clipkit.quickstart.glyphs import CASES, SCRIPTS, Glyphs, glyphs
from clipkit.quickstart.report import Job, page, plain_name
from clipkit.search.index import EmbeddingIndex
from clipkit.training.config.train import TrainConfig
from clipkit.training.config.yaml_file import dump_yaml
from clipkit.training.trainer import Trainer

RECIPE = TrainConfig(
    output_dir="runs/quickstart",
    epochs=1000,
    max_steps=600,
    batch_size=128,
    learning_rate=2e-3,
    head_learning_rate=2e-3,
    scale_learning_rate=2e-3,
    weight_decay=0.05,
    augmentation="affine",
    evaluate_every=100,
)
IMAGE_SIZE = 64
DIM = 128
TOKENS = 48
REPEATS = 8  # of each letter in an epoch: the tests ask for letters, which are a third of all characters

TEMPLATES = {"script": "a {} letter", "case": "a {} letter", "accent": "a letter with {}"}
QUERIES = ["a letter with acute", "a cyrillic capital letter"]  # and some names of the test


def main(output: Path, *, overwrite: bool = False, seed: int = 0, max_steps: int | None = None) -> Job:
    """Run the whole job and write it under `output`.

    Writes `model/`, `config.yaml`, `metrics.jsonl`, `result.json`, `report.html`, the unseen characters as PNG
    files in `glyphs/` and their index `glyphs.index`.

    Args:
        output: folder; it must not exist, unless `overwrite` is set and an earlier quickstart wrote it.
        overwrite: whether it may be replaced.
        seed: draws the unseen characters, the weights and the batches.
        max_steps: fewer steps than the recipe has, to try the job out.

    Returns:
        Everything that the report shows.

    Raises:
        UsageError: the output folder exists and may not be replaced.
    """
    console = Console(stderr=True, highlight=False)
    start = time.perf_counter()
    _clear_output(output, overwrite)
    config = replace(RECIPE, output_dir=str(output), seed=seed, max_steps=max_steps or RECIPE.max_steps)

    console.print("[bold]1. pairs[/bold]: drawing the characters of matplotlib's fonts")
    data = glyphs(seed)
    console.print(
        f"   {len(data.train):,} images to learn from, {len(data.unseen_characters)} unseen characters, "
        f"{len(data.unseen_face)} characters of an unseen face"
    )

    console.print("[bold]2. model[/bold]: two small towers of transformers, from scratch")
    model = build_model(data.train["texts"], seed)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(f"   {model.name}, {millions:.1f} million weights, {model.processor.context_length} tokens at most")

    console.print(f"[bold]3. training[/bold]: {config.max_steps} steps of {config.batch_size} pairs")
    # The tests are measured once, at the end: the best weights are chosen by other characters.
    validation = RetrievalEvaluator(data.validation, name="validation/retrieval", group="group")
    train = repeat_letters(data.train)
    trainer = Trainer(model, train, config, similar=SameGroup("group"), evaluators=[validation])
    write_text(output / "config.yaml", dump_yaml({"data": "glyphs", "similar": "group", "train": vars(config)}))
    with speaking(as_python):  # its advice names fields of RECIPE: the quickstart has no options for them
        trained = trainer.train()
    console.print(f"   {trained.seconds:.0f} s; the weights of step {trained.step} were best on validation characters")

    console.print("[bold]4. evaluation[/bold]: characters and a face that were not in the training data")
    unseen = RetrievalEvaluator(data.unseen_characters, name="unseen_characters/retrieval", group="group")
    face = RetrievalEvaluator(data.unseen_face, name="unseen_face/retrieval", group="group")
    ideas = {idea: _idea_evaluator(data, idea) for idea in TEMPLATES}
    evaluators: list[Any] = [unseen, face, *ideas.values()]
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        metrics |= evaluator(model)

    console.print("[bold]5. use[/bold]: label, index and search the unseen characters")
    folder = _write_images(data.unseen_characters, output / "glyphs")
    _label(model, folder, console)
    names = data.unseen_characters["name"]
    four_names = names[:: len(names) // 4][:4]
    searches = _search(model, folder, output / "glyphs.index", [*four_names, *QUERIES], console)

    result = build_result(model, metrics, evaluators, seed, time.perf_counter() - start, step=trained.step)
    write_json(output / "result.json", result)
    job = Job(config, model, data, trained, unseen, face, ideas, result, searches)
    write_text(output / "report.html", page(job).html())
    _print_summary(job, output, time.perf_counter() - start)
    return job


def build_model(captions: Sequence[Sequence[str]], seed: int, **options: Any) -> DualEncoder:
    """Build a dual encoder of a small convolutional image tower and a small text transformer, with random weights.

    Args:
        captions: the tokenizer learns its words from these alone.
        seed: of the weights.
        options: other arguments of `DualEncoder.from_towers`, such as ``head="mlp"``.
    """
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

    tokenizer = build_tokenizer(text for texts in captions for text in texts)
    torch.manual_seed(seed)
    vision = ResNetModel(
        ResNetConfig(
            num_channels=1, embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic"
        )
    ).to(memory_format=torch.channels_last)  # a third faster on a CPU
    text = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=TOKENS,
        ),
        add_pooling_layer=False,
    )
    return DualEncoder.from_towers(
        vision,
        text,
        tokenizer,
        dim=DIM,
        image_size=IMAGE_SIZE,
        channels=1,
        image_mean=[0.85],
        image_std=[0.3],
        context_length=TOKENS,
        **options,
    )


def repeat_letters(pairs: Any) -> Any:
    """Return `pairs` with each row of a Latin, Greek or Cyrillic letter `REPEATS` times."""
    letters = [row for row, name in enumerate(pairs["name"]) if name.split()[0] in SCRIPTS]
    return pairs.select([*range(len(pairs)), *letters * (REPEATS - 1)])


def build_tokenizer(captions: Any) -> Any:
    """Return a tokenizer of whole words: the names of characters consist of a few hundred."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=TOKENS
    )


def _clear_output(output: Path, overwrite: bool) -> None:
    """Delete the folder of an earlier quickstart, if it may be replaced; refuse any other that is not empty."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    config = output / "config.yaml"
    is_quickstart = config.is_file() and config.read_text(encoding="utf-8").startswith("data: glyphs\n")
    if overwrite and is_quickstart:
        shutil.rmtree(output)
        return
    fix = "--overwrite replaces it" if is_quickstart else "--output ANOTHER: no quickstart wrote this one"
    raise UsageError("the output folder exists", where=output, fix=fix)


def _idea_evaluator(data: Glyphs, idea: str) -> ZeroShotEvaluator:
    return ZeroShotEvaluator(
        data.by_idea(data.unseen_characters, idea),
        templates=TEMPLATES[idea],
        name=f"unseen_characters/zero_shot_{idea}",
    )


def _write_images(pairs: Any, folder: Path) -> Path:
    """Write the images as files to `folder`, and a table of them with every name to `folder`.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "text", "group"])
        for row in pairs:
            path = folder / f"{ord(row['char']):05X} {row['name']}.png"
            path.write_bytes(row["image"]["bytes"])
            table.writerows([f"{folder.name}/{path.name}", text, row["group"]] for text in row["texts"])
    return folder


def _label(model: DualEncoder, folder: Path, console: Console) -> None:
    """Label three of the images, and print the labels."""
    files = sorted(folder.iterdir())
    some_files = files[:: max(1, len(files) // 3)][:3]
    classify = ZeroShotClassifier(model, CASES, templates=TEMPLATES["case"])
    for path, prediction in zip(some_files, classify(some_files), strict=True):
        console.print(f"   {path.stem[6:]}: {prediction.label} {prediction.score:.2f}", markup=False)


def _search(
    model: DualEncoder, folder: Path, path: Path, queries: Sequence[str], console: Console
) -> list[tuple[str, list[Path]]]:
    """Index the images at `path`, and return the six nearest to each query; print two of the answers."""
    EmbeddingIndex.build(model, folder, path)
    index = EmbeddingIndex.open(path)  # as in a later session: the index opens its model by itself
    searches = [(query, [hit.path for hit in index.search(query, k=6)]) for query in queries]
    for query, images in searches[:2]:
        console.print(f"   {query!r} finds {images[0].stem[6:]}", markup=False)
    return searches


def _print_summary(job: Job, output: Path, seconds: float) -> None:
    console = Console(highlight=False)
    table = Table(title="On characters and a face that were not in the training data", title_justify="left")
    for name in ("", "model", "chance", "majority"):
        table.add_column(name, justify="left" if not name else "right")
    chance, majority = job.result["chance"], job.result["majority"]
    for key, value in job.result["metrics"].items():
        if key.endswith(("@1", "@5", "top1")):
            table.add_row(plain_name(key), _percent(value), _percent(chance.get(key)), _percent(majority.get(key)))
    console.print(table)
    console.print(f"{seconds:.0f} s in all. The report, for a browser: {output / 'report.html'}", soft_wrap=True)
    console.print("\nTry next:")
    for line in next_commands(output):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def next_commands(folder: Path) -> list[str]:
    """Return the commands to try next; a test runs each of them."""
    output = shlex.quote(str(folder))
    model = f"--model {output}/model"
    return [
        f'clipkit search {output}/glyphs.index "a greek letter with varia" -k 5',
        f"clipkit label {output}/glyphs {model} --class capital --class small --template 'a {{}} letter'",
        f"clipkit evaluate {output}/glyphs.csv {model} --group group",
        f"clipkit check data {output}/glyphs.csv",
    ]
