"""Measure what each trick of the trade is worth on the glyphs: the quickstart's job, one change at a time.

Train the small model of `clipkit quickstart` for a few steps, once unchanged and once for each change, on equally many
pairs, and print recall on characters that are not in the training data: the figures of train/README.md.

    python train/tricks.py                          # all, about a minute a line and seed on two cores
    python train/tricks.py --only "sigmoid loss" --seeds 0 --steps 100
"""

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clipkit import DualEncoder, Paired, RetrievalEvaluator, SameGroup, Trainer, Views, average
from clipkit.quickstart.glyphs import Glyphs, glyphs
from clipkit.quickstart.job import RECIPE, build_model, repeat_letters

GROUP = SameGroup("group")


@dataclass(frozen=True)
class Trick:
    """One change to the job."""

    similar: Any = GROUP
    loop: dict[str, Any] = field(default_factory=dict)
    model: Callable[[DualEncoder], None] = lambda model: None
    pairs: Callable[[Any], Any] = lambda pairs: pairs
    build: dict[str, Any] = field(default_factory=dict)
    dim: int | None = None
    after: Callable[..., tuple[DualEncoder, float]] | None = None  # follows an unchanged training


def start_at(scale: float) -> Callable[[DualEncoder], None]:
    def change(model: DualEncoder) -> None:
        model.logit_scale.data.fill_(math.log(scale))

    return change


def other_case(pairs: Any) -> Any:
    """Add each letter's name with the other case, as a caption that is always wrong."""
    swap = {"capital": "small", "small": "capital"}

    def wrong(name: str) -> list[str]:
        words = name.split()
        if not set(words) & set(swap):
            return []
        return [" ".join(swap.get(word, word) for word in words)]

    return pairs.add_column("hard_texts", [wrong(name) for name in pairs["name"]])


class UnseenRecall:
    """Recall on unseen characters, of embeddings cut to `dim`."""

    def __init__(self, data: Glyphs, dim: int | None) -> None:
        self.evaluator = RetrievalEvaluator(data.unseen_characters, name="unseen", group="group")
        self.dim = dim

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        if self.dim is None:
            return self.evaluator(model)
        forward = model.forward

        def cut(**inputs: Any) -> Any:
            out = forward(**inputs)
            for modality in ("image", "text"):
                embedding = getattr(out, modality)
                if embedding is not None:
                    prefix = F.normalize(embedding[:, : self.dim], dim=1)
                    out = out._replace(**{modality: F.pad(prefix, (0, model.dim - self.dim))})
            return out

        model.forward = cut
        try:
            return self.evaluator(model)
        finally:
            del model.forward


def fit(model: DualEncoder, data: Glyphs, trick: Trick, seed: int, steps: int) -> float:
    """Train a model in place on `steps` batches of 128 pairs, or as many pairs in other batches; return the seconds."""
    pairs = repeat_letters(trick.pairs(data.train))
    with tempfile.TemporaryDirectory() as folder:
        loop = replace(RECIPE, output_dir=str(Path(folder) / "run"), seed=seed, progress=False, **trick.loop)
        loop = replace(loop, max_steps=round(steps * RECIPE.batch_size / loop.batch_size), evaluate_every=10**9)
        start = time.perf_counter()
        Trainer(model, pairs, loop, similar=trick.similar).train()
        return time.perf_counter() - start


def once(trick: Trick, data: Glyphs, seed: int, steps: int) -> tuple[dict[str, float], float]:
    """Train one model; return its metrics and the seconds of its own training."""
    model = build_model(data.train["texts"], seed, **trick.build)
    if trick.after:
        fit(model, data, Trick(), seed, steps)
        model, seconds = trick.after(model, data, seed, steps)
        return UnseenRecall(data, None)(model), seconds
    trick.model(model)
    seconds = fit(model, data, trick, seed, steps)
    return UnseenRecall(data, trick.dim)(model), seconds


def locked(model: DualEncoder, data: Glyphs, seed: int, steps: int, **loop: Any) -> tuple[DualEncoder, float]:
    """Train a new text tower against the frozen image tower of a trained model (LiT)."""
    fresh = build_model(data.train["texts"], seed + 100)
    for name in ("vision", "image_head"):
        getattr(fresh.backend, name).load_state_dict(getattr(model.backend, name).state_dict())
    fresh.freeze("image", head=True)
    return fresh, fit(fresh, data, Trick(loop=loop), seed, steps)


def longer(model: DualEncoder, data: Glyphs, seed: int, steps: int, runs: int) -> tuple[DualEncoder, float]:
    """Return the mean of the weights of `runs` trainings that continue one model, each with its own batches."""
    models = [copy.deepcopy(model) for _ in range(runs)]
    seconds = [fit(copied, data, Trick(), seed + 10 + i, steps // 2) for i, copied in enumerate(models)]
    return average(models), sum(seconds)


TRICKS = {
    "as it is": Trick(),
    "temperature stays at 0.07": Trick(loop={"scale_learning_rate": 1e-12}),
    "temperature starts at 0.01": Trick(model=start_at(100.0)),
    "batch of 32": Trick(loop={"batch_size": 32}),
    "batch of 512": Trick(loop={"batch_size": 512}),
    "equal characters are negatives": Trick(similar=Paired()),
    "equal captions and pictures ignored": Trick(similar=Paired(known={"texts": "ignore", "image": "ignore"})),
    "hard negatives: the other case": Trick(pairs=other_case),
    "no augmentation": Trick(loop={"augmentation": "none"}),
    "two views beside the pairs": Trick(similar=[GROUP, Views(weight=0.5)], loop={"view_augmentation": "affine"}),
    "label smoothing 0.1": Trick(loop={"label_smoothing": 0.1}),
    "sigmoid loss": Trick(loop={"loss": "sigmoid"}, build={"logit_bias": -math.log(127)}),
    "heads of two layers": Trick(build={"head": "mlp"}),
    "16 of 128 dimensions": Trick(dim=16),
    "16 of 128 dimensions, Matryoshka": Trick(loop={"matryoshka": (16, 32, 64, 128)}, dim=16),
    "a locked image tower, a new text tower": Trick(after=locked),
    "the same in chunks of 32": Trick(after=partial(locked, micro_batch=32)),
    "half as long again": Trick(after=partial(longer, runs=1)),
    "half as long again, the mean of two": Trick(after=partial(longer, runs=2)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TRICKS, default=list(TRICKS), metavar="TRICK")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200, help="of 128 pairs")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    print("| change | text → image R@1 | image → text R@1 | seconds |\n|---|---|---|---|")
    data = {seed: glyphs(seed) for seed in options.seeds}
    for name in options.only:
        runs = [once(TRICKS[name], data[seed], seed, options.steps) for seed in options.seeds]
        cells = []
        for direction in ("text_to_image", "image_to_text"):
            recalls = [100 * metrics[f"unseen/{direction}_recall@1"] for metrics, _ in runs]
            by_seed = ", ".join(f"{recall:.1f}" for recall in recalls)
            cells.append(f"{sum(recalls) / len(recalls):.1f} ({by_seed})")
        seconds = sum(seconds for _, seconds in runs) / len(runs)
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
