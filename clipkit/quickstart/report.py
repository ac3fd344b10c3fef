"""The quickstart's report: curves, bars against chance, mistakes, and galleries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.evaluation.retrieval import RetrievalEvaluator
from clipkit.evaluation.zero_shot import ZeroShotEvaluator
from clipkit.html_report import Choice, Figure, Gallery, Page, Section, Table, Tile, bar_chart, line_chart, thumbnail
from clipkit.images.load import load_image
from clipkit.models.dual_encoder import DualEncoder
from clipkit.quickstart.glyphs import Glyphs
from clipkit.training.config.train import TrainConfig
from clipkit.training.result import TrainResult

HEADLINE_METRICS = [
    "unseen_characters/retrieval/text_to_image_recall@1",
    "unseen_characters/retrieval/text_to_image_recall@5",
    "unseen_face/retrieval/text_to_image_recall@1",
    "unseen_face/retrieval/text_to_image_recall@5",
]


@dataclass(frozen=True)
class Job:
    """Everything that the report shows."""

    config: TrainConfig
    model: DualEncoder
    data: Glyphs
    trained: TrainResult
    unseen: RetrievalEvaluator
    face: RetrievalEvaluator
    ideas: dict[str, ZeroShotEvaluator]
    result: dict[str, Any]
    searches: list[tuple[str, list[Path]]]


def page(job: Job) -> Page:
    """Return the report of a finished job."""
    metrics, chance, n = job.result["metrics"], job.result["chance"], job.result["n"]
    return Page(
        title="clipkit quickstart: glyphs and their names",
        lead=(
            f"Two towers learnt from {len(job.data.train):,} images of characters which Unicode name belongs to which "
            f"image. Similarity was defined by bitmap: characters that look exactly alike form one group. The model is "
            f"measured on {n['unseen_characters/retrieval/images']} characters that were in no face of the training "
            f"data, and on {n['unseen_face/retrieval/images']} known ones in a new face."
        ),
        figures={
            plain_name(key): (f"{100 * metrics[key]:.1f} %", f"chance {100 * chance[key]:.1f} %")
            for key in HEADLINE_METRICS
        },
        sections=[
            _curves(job),
            _recalls(job),
            _ideas(job),
            _searches(job),
            _names(job),
            _mistakes(job),
        ],
        facts=_facts(job),
    )


def plain_name(key: str) -> str:
    """Return a metric's key in words: "unseen face, text → image R@1"."""
    test, _, metric = key.partition("/")
    metric = metric.removeprefix("retrieval/").replace("_to_", " → ").replace("_recall", " R")
    metric = metric.removeprefix("zero_shot_").replace("/top1", " by prompt, top-1")
    return f"{test.replace('_', ' ')}, {metric}"


def _curves(job: Job) -> Section:
    lines = job.trained.history
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    key = "validation/retrieval/text_to_image_recall@1"
    recalls = [(line["step"], 100 * line[key]) for line in lines if key in line]
    loss = line_chart({"loss": _columns(losses)}, "step", "InfoNCE loss")
    recall = line_chart({"recall": _columns(recalls)}, "step", "validation R@1, %")
    return Section(
        "Training",
        [
            Figure(loss, f"Loss over {losses[-1][0]} steps of {job.config.batch_size} pairs."),
            Figure(recall, f"Text → image R@1 on 100 other held-out characters; step {job.trained.step} was kept."),
        ],
    )


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _recalls(job: Job) -> Section:
    metrics, chance = job.result["metrics"], job.result["chance"]
    bars = {}
    for test in ("unseen_characters", "unseen_face"):
        for direction in ("text_to_image", "image_to_text"):
            for k in (1, 5, 10):
                key = f"{test}/retrieval/{direction}_recall@{k}"
                bars[plain_name(key)] = (metrics[key], chance[key])
    caption = "Share of queries with a right answer among the first k, beside chance."
    return Section(
        "Retrieval",
        [Figure(bar_chart(bars, "recall, %"), caption)],
        "Any image, or any name, of the query's group is a right answer.",
    )


def _ideas(job: Job) -> Section:
    result = job.result
    rows = []
    for idea, evaluator in job.ideas.items():
        top1 = f"{evaluator.name}/top1"
        images = result["n"][f"{evaluator.name}/images"]
        mean_per_class = result["metrics"][f"{evaluator.name}/mean_per_class"]
        fractions = [result["metrics"][top1], result["chance"][top1], result["majority"][top1], mean_per_class]
        rows.append([idea, str(images), *(f"{100 * fraction:.1f} %" for fraction in fractions)])
    return Section(
        "Zero-shot classification by an idea",
        [Table(["idea", "images", "top-1", "chance", "majority class", "mean per class"], rows)],
        "The unseen characters, classified by prompts that name no character: “a cyrillic letter”, “a capital "
        "letter”. Majority is the accuracy of always naming the most frequent class.",
    )


def _searches(job: Job) -> Section:
    groups = dict(zip(job.data.unseen_characters["name"], job.data.unseen_characters["group"], strict=True))

    def tile(query: str, path: Path) -> Tile:
        name = path.stem[6:]
        good = groups[query] == groups[name] if query in groups else None
        return Tile(thumbnail(load_image(path)), name, good)

    rows = [(query, [tile(query, path) for path in paths]) for query, paths in job.searches]
    text = "The nearest unseen characters, from the index on disk; green is right."
    return Section("Text queries", [Gallery(rows)], text)


def _names(job: Job) -> Section:
    last = job.unseen.last
    assert last is not None
    pairs = job.data.unseen_characters
    rows: list[tuple[str | Tile, list[Choice]]] = []
    for image in range(0, len(last.images), max(1, len(last.images) // 8)):
        row = pairs[last.images[image]]
        names = [last.texts[i] for i in last.image_to_text.top[image, :3].tolist()]
        rows.append((Tile(_thumbnail(row)), [Choice(name, name in row["texts"]) for name in names]))
    return Section("Images and their names", [Gallery(rows)], "The three nearest of all the names of the test.")


def _mistakes(job: Job) -> Section:
    rows = _confused(job.unseen, job.data.unseen_characters)
    rows += _confused(job.face, job.data.unseen_face)
    text = "The name on the left found the image with the red frame; the right one has the green frame."
    return Section("The most confident mistakes", [Gallery(rows)], text)


def _confused(evaluator: RetrievalEvaluator, pairs: Any) -> list[tuple[str | Tile, list[Tile]]]:
    last = evaluator.last
    assert last is not None
    rows: list[tuple[str | Tile, list[Tile]]] = []
    for confusion in last.most_confused("text_to_image", 6):
        own = pairs[last.images[last.image_of_text[confusion.query]]]
        wrong = pairs[last.images[confusion.found]]
        tiles = [Tile(_thumbnail(wrong), wrong["name"], False), Tile(_thumbnail(own), "", True)]
        rows.append((last.texts[confusion.query], tiles))
    return rows


def _thumbnail(row: Any) -> str:
    return thumbnail(load_image(row["image"]))


def _facts(job: Job) -> dict[str, str]:
    result = job.result
    return {
        "seed": str(result["seed"]),
        "training": f"{job.trained.seconds:.0f} s of {result['seconds']:.0f} s",
        "model": f"{result['model']}, fingerprint {job.model.fingerprint().hash}",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "platform": result["system"]["platform"],
    }
