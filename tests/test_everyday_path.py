"""The everyday path at real size: a CLIP in ViT-B/32's shape, forty real photos, and the commands that a user types.

    PHOTOS=folder pytest -m slow tests/test_everyday_path.py

Expected values come from transformers, open_clip, sentence-transformers and NumPy. The weights are random, so that
nothing is downloaded; the figures are as exact as those of a trained model, only bad. Nothing is timed: what may take
long is counted, and the weights, 605 MB, are hashed once a command.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Done, clipkit
from PIL import Image

PHOTOS = Path(os.environ.get("PHOTOS") or Path(__file__).parents[2] / "shared" / "data")
CLASSES = ["Dress", "Hat", "Pants", "Shirt", "Shoes"]
COCO = 25  # photos with captions
PER_CLASS = 3  # other photos of each class: forty in all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.photos,
    pytest.mark.skipif(
        not all((PHOTOS / name).is_file() for name in ("coco_fullsize/captions.jsonl", "clothing/labels.csv")),
        reason="needs real photos: PHOTOS=folder with coco_fullsize and clothing, or ../shared/data",
    ),
    # torch, transformers and sentence-transformers, of each other
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/coco, photos/clothing, captions.csv, labels.csv, classes.txt, and clip/, as transformers writes it."""
    desk = tmp_path_factory.mktemp("desk")
    captions, labels = [], []
    lines = (PHOTOS / "coco_fullsize" / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:COCO]
    for photo in map(json.loads, lines):
        path = take("coco_fullsize", photo["image"], desk / "photos" / "coco")
        captions += [(path, text) for text in photo["captions"][:2]]
    assert len({text for _, text in captions}) == 2 * COCO
    with (PHOTOS / "clothing" / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in CLASSES:
        for row in [row for row in rows if row["label"] == name][:PER_CLASS]:
            labels.append((take("clothing", row["image"], desk / "photos" / "clothing"), name))
    write_csv(desk / "captions.csv", ("file", "caption"), captions)
    write_csv(desk / "labels.csv", ("file", "label"), labels)
    (desk / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    write_clip(desk / "clip")
    return desk


def take(source: str, name: str, folder: Path) -> str:
    """Copy a photo; its path as the tables name it."""
    folder.mkdir(parents=True, exist_ok=True)
    return str(Path(shutil.copy(PHOTOS / source / name, folder)).relative_to(folder.parents[1]))


def write_csv(path: Path, head: tuple[str, ...], rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def write_clip(folder: Path) -> None:
    """CLIPConfig's defaults are ViT-B/32's; the 49,408 tokens are those that open_clip carries in its package."""
    import torch
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    source = SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {ends.get(token, token): number for token, number in source.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(source.bpe_ranks), model_max_length=77)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig()).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)


class Native:
    """Embeddings of unit length by transformers alone."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoProcessor

        self.model = AutoModel.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def images(self, paths: list[Path]) -> Any:
        pictures = [Image.open(path).convert("RGB") for path in paths]
        return self._unit(self.model.get_image_features, self.processor(images=pictures, return_tensors="pt"))

    def texts(self, texts: list[str]) -> Any:
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        return self._unit(self.model.get_text_features, self.processor(text=texts, **options))

    def _unit(self, features: Callable[..., Any], inputs: Any) -> Any:
        import torch

        with torch.inference_mode():
            outputs = features(**inputs)
        vectors = getattr(outputs, "pooler_output", outputs).double().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Hashed:
    """How many times over a command hashed the weights with SHA-256. Each begins like a process of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from clipkit.models.fingerprint import fingerprint

        self.bytes, original = 0, fingerprint.sha256

        def counting(weights: dict[str, Any]) -> str:
            self.bytes += sum(weight.numel() * weight.element_size() for weight in weights.values())
            return original(weights)

        monkeypatch.setattr(fingerprint, "sha256", counting)
        self.forget = lambda: monkeypatch.setattr(fingerprint, "_hashed", {})

    def times(self, model: Path) -> float:
        return self.bytes / (model / "model.safetensors").stat().st_size

    def run(self, *arguments: object) -> Done:
        self.bytes = 0
        self.forget()
        done = clipkit(*arguments)
        assert done.code == 0, (arguments, done)
        return done


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    return Hashed(monkeypatch)


def test_the_everyday_path(desk: Path, hashed: Hashed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    clip = Path("clip")
    before = Native(clip)
    look(hashed, clip, before)
    measure(hashed, clip, before)
    train(hashed, clip)
    open_elsewhere(hashed, Path("run/model"), before)


# ------------------------------------------------------------------------------- check, index, update, search, label


def look(hashed: Hashed, clip: Path, native: Native) -> None:
    # 1. check
    done = hashed.run("check", "data", "captions.csv", "--image", "file", "--text", "caption", "--json")
    assert json.loads(done.out)["images"] == COCO

    # 2. index, with one photo not there yet
    late = sorted(Path("photos/coco").iterdir())[3]
    aside = Path(shutil.move(late, "."))
    hashed.run("index", "photos", "--model", clip, "--to", "photos.index")
    assert hashed.times(clip) <= 1.001

    # 3. update: one photo comes, one goes
    shutil.move(aside, late)
    gone = sorted(Path("photos/coco").iterdir())[7]
    shutil.move(gone, ".")
    done = hashed.run("index", "photos", "--model", clip, "--to", "photos.index")
    assert re.search(r"39 images \(1 new, .*, 1 deleted, 38 as before\)", done.out + done.err)
    assert hashed.times(clip) <= 1.001
    shutil.move(gone.name, gone)

    # 4. search by text and by image
    paths = sorted(path for path in Path("photos").rglob("*.jpg") if path != gone)
    vectors = native.images(paths)
    for query, vector in ("two dogs on a beach", native.texts(["two dogs on a beach"])), (paths[5], vectors[5:6]):
        hits = json.loads(hashed.run("search", "photos.index", query, "-k", 39, "--json").out)
        assert hashed.times(clip) <= 1.001
        expected = dict(zip(map(str, paths), (vectors @ vector.T)[:, 0], strict=True))
        scores = {os.path.relpath(hit["path"]): hit["score"] for hit in hits}
        assert scores == pytest.approx(expected, abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert os.path.relpath(hits[0]["path"]) == str(paths[5])

    # 5. label with a file of classes
    clothes = sorted(Path("photos/clothing").iterdir())
    hashed.run("label", "photos/clothing", "--model", clip, "--classes", "classes.txt", "--to", "found.csv")
    with Path("found.csv").open(encoding="utf-8", newline="") as file:
        rows = {os.path.relpath(row["image"]): row["label"] for row in csv.DictReader(file)}
    assert rows == dict(zip(map(str, clothes), guessed(native, clothes), strict=True))


def guessed(native: Native, paths: list[Path]) -> list[str]:
    prompts = native.texts([f"a photo of a {name}." for name in CLASSES])
    return [CLASSES[best] for best in (native.images(paths) @ prompts.T).argmax(axis=1)]


# ------------------------------------------------------------------------------------------------------ two tables


def measure(hashed: Hashed, clip: Path, native: Native) -> None:
    # 6. a table of captions
    columns = ("--image", "file", "--text", "caption")
    done = hashed.run("evaluate", "captions.csv", *columns, "--model", clip, "--json", "--to", "retrieval.json")
    assert hashed.times(clip) <= 1.001
    metrics = json.loads(done.out)["metrics"]
    with Path("captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    files = list(dict.fromkeys(row["file"] for row in rows))
    scores = native.texts([row["caption"] for row in rows]) @ native.images([Path(file) for file in files]).T
    own = np.array([files.index(row["file"]) for row in rows])
    for k in (1, 5):
        ranks = (scores > scores[np.arange(len(rows)), own][:, None]).sum(axis=1)  # images that go before its own
        assert metrics[f"retrieval/text_to_image_recall@{k}"] == pytest.approx((ranks < k).mean())
        best = [scores[own == column, column].max() for column in range(COCO)]
        ranks = [(scores[own != column, column] > best[column]).sum() for column in range(COCO)]
        assert metrics[f"retrieval/image_to_text_recall@{k}"] == pytest.approx((np.array(ranks) < k).mean())

    # 7. a table of labels alone
    done = hashed.run("evaluate", "labels.csv", "--image", "file", "--label", "label", "--model", clip, "--json")
    assert hashed.times(clip) <= 1.001
    with Path("labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    guesses = guessed(native, [Path(row["file"]) for row in rows])
    right = np.mean([label == row["label"] for label, row in zip(guesses, rows, strict=True)])
    assert json.loads(done.out)["metrics"]["zero_shot/top1"] == pytest.approx(right)


# ----------------------------------------------------------------------------------------------- train, kill, resume


def train(hashed: Hashed, clip: Path) -> None:
    # 8. three steps of the last block of each tower, killed after the first
    settings = [
        f"model.name={clip}",
        "model.freeze_blocks={image: -1, text: -1}",
        "data.train=captions.csv",
        "data.image=file",
        "data.text=caption",
        "data.test=5",
        "train.output_dir=run",
        "train.batch_size=8",
        "train.max_steps=3",
        "train.evaluate_every=3",
        "train.save_steps=1",
        "train.log_every=1",
        "train.trackers=[tensorboard]",
        "train.resume=auto",
    ]
    with Path("killed.log").open("wb") as log:
        child = subprocess.Popen([sys.executable, "-m", "clipkit", "train", *settings], stdout=log, stderr=log)
        for _ in range(60_000):  # ten minutes at the most, for a machine that does much else
            if Path("run/checkpoints/step_00000001").is_dir() or child.poll() is not None:
                break
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, Path("killed.log").read_text(encoding="utf-8")
    assert not Path("run/result.json").exists()

    # 9. resumed
    hashed.run("train", *settings)
    assert hashed.times(clip) <= 2.001  # those that stand still, to know the run again, and all that are saved
    begins = [line["begins_after_step"] for line in read_lines("run/attempts.jsonl") if "begins_after_step" in line]
    assert begins in ([0, 1], [0, 2])
    lines = read_lines("run/metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in losses] == [1, 2, 3]
    assert losses[0][1] == pytest.approx(np.log(8), abs=0.2)  # random weights cannot tell eight pairs apart
    assert tensorboard(Path("run"), "loss") == pytest.approx(dict(losses))
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    recall = "retrieval/text_to_image_recall@1"
    assert tensorboard(Path("run"), recall) == pytest.approx({3: result["metrics"][recall]})


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def tensorboard(run: Path, key: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {scalar.step: scalar.value for scalar in events.Scalars(key)}


# ---------------------------------------------------------------------------------------------------------- elsewhere


def open_elsewhere(hashed: Hashed, saved: Path, before: Native) -> None:
    from clipkit import DualEncoder

    # 10. the best weights, opened by transformers and by sentence-transformers
    photos, texts = sorted(Path("photos/coco").iterdir())[:4], ["two dogs on a beach", "Eine Straße bei Nacht"]
    model = DualEncoder.from_pretrained(saved)
    images, words = model.encode_images(photos).numpy(), model.encode_texts(texts).numpy()
    native = Native(saved)
    assert np.abs(native.images(photos) - images).max() < 1e-5
    assert np.abs(native.texts(texts) - words).max() < 1e-5
    assert np.abs(native.texts(texts) - before.texts(texts)).max() > 1e-5  # it has learnt something
    from sentence_transformers import SentenceTransformer

    sentences = SentenceTransformer(str(saved), device="cpu")
    pictures = [Image.open(path).convert("RGB") for path in photos]
    assert np.abs(sentences.encode(texts, normalize_embeddings=True) - words).max() < 1e-5
    assert np.abs(sentences.encode(pictures, normalize_embeddings=True) - images).max() < 1e-5

    # 11. exported, and opened by open_clip
    hashed.run("export", saved, "exported", "--to", "open_clip")
    import open_clip
    import torch

    other, _ = open_clip.create_model_from_pretrained("local-dir:exported")
    with torch.inference_mode():
        exported = other.encode_text(open_clip.get_tokenizer("local-dir:exported")(texts), normalize=True).numpy()
    assert np.abs(exported - words).max() < 1e-5
