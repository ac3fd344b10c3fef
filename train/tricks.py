"""What each trick of the trade is worth on the glyphs: the quickstart's job, one change at a time.

Trains the small model of `clipkit quickstart` for a few steps, once as it is and once for each change, with the
same pairs seen, and prints recall on characters it has never seen: the figures of train/README.md.

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
    """One change. `batch` changes the number of steps, so that as many pairs are seen."""

    similar: Any = GROUP
    loop: dict[str, Any] = field(default_factory=dict)
    model: Callable[[DualEncoder], None] = lambda model: None
    pairs: Callable[[Any], Any] = lambda pairs: pairs
    build: dict[str, Any] = field(default_factory=dict)
    dim: int | None = None
    after: Callable[..., tuple[DualEncoder, float]] | None = None  # what follows a training as it is


def start_at(scale: float) -> Callable[[DualEncoder], None]:
    def change(model: DualEncoder) -> None:
        model.logit_scale.data.fill_(math.log(scale))

    return change


def other_case(pairs: Any) -> Any:
    """Each letter's own name with the other case, as a caption that is always wrong."""
    swap = {"capital": "small", "small": "capital"}

    def wrong(name: str) -> list[str]:
        words = name.split()
        return [" ".join(swap.get(word, word) for word in words)] if set(words) & set(swap) else []

    return pairs.add_column("hard_texts", [wrong(name) for name in pairs["name"]])


class Measured:
    """Recall on unseen characters, of embeddings cut to `dim`."""

    def __init__(self, data: Glyphs, dim: int | None) -> None:
        self.evaluator, self.dim = RetrievalEvaluator(data.unseen_characters, name="unseen", group="group"), dim

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        if self.dim is None:
            return self.evaluator(model)
        forward = model.forward

        def cut(**inputs: Any) -> Any:
            out = forward(**inputs)
            sides = {
                s: F.normalize(e[:, : self.dim], dim=1) for s in ("image", "text") if (e := getattr(out, s)) is not None
            }
            return out._replace(**{side: F.pad(e, (0, model.dim - e.shape[1])) for side, e in sides.items()})

        model.forward = cut
        try:
            return self.evaluator(model)
        finally:
            del model.forward


def fit(model: DualEncoder, data: Glyphs, trick: Trick, seed: int, steps: int) -> float:
    """Train a model in place on `steps` batches of 128 pairs, or as many pairs in other batches; the seconds."""
    pairs = repeat_letters(trick.pairs(data.train))
    with tempfile.TemporaryDirectory() as folder:
        loop = replace(RECIPE, output_dir=str(Path(folder) / "run"), seed=seed, progress=False, **trick.loop)
        loop = replace(loop, max_steps=round(steps * RECIPE.batch_size / loop.batch_size), evaluate_every=10**9)
        start = time.perf_counter()
        Trainer(model, pairs, loop, similar=trick.similar).train()
        return time.perf_counter() - start


def once(trick: Trick, data: Glyphs, seed: int, steps: int) -> tuple[dict[str, float], float]:
    """Train one model; its metrics and the seconds that its own training took."""
    model = build_model(data.train["texts"], seed, **trick.build)
    if trick.after:
        fit(model, data, Trick(), seed, steps)
        model, seconds = trick.after(model, data, seed, steps)
        return Measured(data, None)(model), seconds
    trick.model(model)
    seconds = fit(model, data, trick, seed, steps)
    return Measured(data, trick.dim)(model), seconds


def locked(model: DualEncoder, data: Glyphs, seed: int, steps: int, **loop: Any) -> tuple[DualEncoder, float]:
    """A new text tower learns to read the image tower of a trained model, which stands still (LiT)."""
    fresh = build_model(data.train["texts"], seed + 100)
    for name in ("vision", "image_head"):
        getattr(fresh.backend, name).load_state_dict(getattr(model.backend, name).state_dict())
    fresh.freeze("image", head=True)
    return fresh, fit(fresh, data, Trick(loop=loop), seed, steps)


def longer(model: DualEncoder, data: Glyphs, seed: int, steps: int, runs: int) -> tuple[DualEncoder, float]:
    """The mean of the weights of `runs` trainings that go on from one model, each with its own batches."""
    models = [copy.deepcopy(model) for _ in range(runs)]
    seconds = [fit(each, data, Trick(), seed + 10 + i, steps // 2) for i, each in enumerate(models)]
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
        found = [once(TRICKS[name], data[seed], seed, options.steps) for seed in options.seeds]
        cells = []
        for way in ("text_to_image", "image_to_text"):
            each = [100 * metrics[f"unseen/{way}_recall@1"] for metrics, _ in found]
            cells.append(f"{sum(each) / len(each):.1f} ({', '.join(f'{value:.1f}' for value in each)})")
        print(f"| {name} | {' | '.join(cells)} | {sum(s for _, s in found) / len(found):.0f} |", flush=True)


if __name__ == "__main__":
    main()
