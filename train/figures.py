"""Draw the figures of train/README.md from the losses themselves.

python train/figures.py                     # writes train/figures/scale.svg and floor.svg
python train/figures.py --to somewhere
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from clipkit import Paired, info_nce
from clipkit.losses.contrastive import EmbeddedBatch
from clipkit.losses.lower_bound import info_nce_floor

N = 256  # pairs of the batch
DIM = 64


def pushes(scale: float) -> np.ndarray:
    """Return how strongly one image is pushed from each other text of a batch, the strongest first; sums to 1."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(N, DIM), dim=1) for _ in range(2))
    image = F.normalize(image + 0.5 * text, dim=1)  # as after some training
    logits = (scale * image @ text.T).requires_grad_()
    F.cross_entropy(logits, torch.arange(N)).backward()
    negatives = logits.grad[0][torch.arange(N) != 0]
    return (negatives / negatives.sum()).sort(descending=True).values.numpy()


def draw_scale(to: Path) -> None:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for scale in (1, 10, 100):
        axes.plot(np.arange(1, N), np.cumsum(pushes(scale)), label=f"scale {scale} (temperature {1 / scale:g})")
    axes.set(xscale="log", xlabel="negatives of one image, the most similar first", ylabel="share of the push")
    axes.set_title("A higher scale looks at fewer negatives", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc=(0.33, 0.66))
    figure.savefig(to)


def floor_of(n: int, classes: int) -> float:
    """Return the lowest loss of a batch of n pairs with one caption a class."""
    image, text = torch.arange(n), torch.arange(n) % classes
    paired = torch.eye(n)
    return info_nce_floor(lambda rows, cols: paired[rows][:, cols], image, text)


def start_of(n: int) -> float:
    """Return the loss of embeddings that are all equal."""
    keys = {"row": torch.arange(n)}
    same = EmbeddedBatch(F.normalize(torch.ones(n, 2), dim=1), keys)
    return float(info_nce(same, same, Paired(), torch.tensor(10.0)).loss)


def draw_floor(to: Path) -> None:
    sizes = [8, 16, 32, 64, 128, 256, 512, 1024]
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(sizes, [start_of(n) for n in sizes], "k--", label="the first loss, ln N")
    for classes in (10, 100, 1000):
        axes.plot(sizes, [floor_of(n, classes) for n in sizes], label=f"the floor with {classes} captions")
    axes.set(xscale="log", xlabel="pairs of a batch", ylabel="loss", xticks=sizes, xticklabels=map(str, sizes))
    axes.set_title("Where captions repeat, the loss cannot reach zero", fontsize=10)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("figures"), help="folder")
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    draw_scale(folder / "scale.svg")
    draw_floor(folder / "floor.svg")


if __name__ == "__main__":
    main()
