"""Memory and time of the contrastive loss as the batch grows: plain, tiled, and open_clip's.

Forward and backward of the loss alone, on unit vectors. Each measurement is a process of its own. Memory is the
peak above the two inputs (their gradients are in it); time is the best of several runs, and the ratio is to the plain
loss at the same size, measured just before. Sizes that would not fit into free memory are left out, by name.

    python train/loss_scaling.py
    python train/loss_scaling.py --sizes 1024 4096 16384 65536 --dim 512 --to scaling.svg
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import open_clip
import psutil
import torch
from open_clip.loss import SigLipLoss

from clipkit import Paired, info_nce, sigmoid_loss
from clipkit.losses.contrastive import TILE, Embedded

KINDS = {
    "info_nce, plain": ("info_nce", None),
    "info_nce, tiled": ("info_nce", TILE),
    "open_clip ClipLoss": ("open_clip", None),
    "sigmoid, plain": ("sigmoid", None),
    "sigmoid, tiled": ("sigmoid", TILE),
    "open_clip SigLipLoss": ("open_clip_sigmoid", None),
}
MATRICES = 5  # N x N, which a plain loss holds at its worst: what has to be free


def loss(kind: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One loss of the batch, ready for backward."""
    what, tile = KINDS[kind]
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    if what == "open_clip":
        return open_clip.ClipLoss()(a, b, scale)
    if what == "open_clip_sigmoid":
        return SigLipLoss()(a, b, scale, bias)
    keys = {"row": torch.arange(len(a))}
    sides = Embedded(a, keys), Embedded(b, keys)
    if what == "sigmoid":
        return sigmoid_loss(*sides, Paired(), scale, bias, tile=tile).loss
    return info_nce(*sides, Paired(), scale, tile=tile).loss


def measure(kind: str, n: int, dim: int, repeats: int) -> dict[str, float]:
    """Peak bytes above the inputs, and the best seconds of `repeats` runs."""
    torch.manual_seed(0)
    small = [torch.nn.functional.normalize(torch.randn(64, dim), dim=-1).requires_grad_() for _ in range(2)]
    loss(kind, *small).backward()  # libraries and thread buffers are there before the inputs
    a, b = (torch.nn.functional.normalize(torch.randn(n, dim), dim=-1).requires_grad_() for _ in range(2))
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = []
    for _ in range(repeats):
        a.grad = b.grad = None
        start = time.perf_counter()
        loss(kind, a, b).backward()
        seconds.append(time.perf_counter() - start)
    return {"bytes": _resident("VmHWM") - before, "seconds": min(seconds)}


def _resident(field: str = "VmRSS") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_own_process(kind: str, n: int, dim: int, repeats: int) -> dict[str, float]:
    """`measure` in a fork of this process, in which no tensor was ever made."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(measure(kind, n, dim, repeats)))
    child.start()
    send.close()
    try:
        found: dict[str, float] = receive.recv()
    except EOFError:
        raise SystemExit(f"{kind} at {n:,} rows ended early: out of memory?") from None
    child.join()
    return found


def draw(found: dict[str, dict[int, dict[str, float]]], to: Path) -> None:
    """Two curves over N, both logarithmic: GB and seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (key, unit, factor) in zip(
        figure.subplots(1, 2),
        [("bytes", "memory above the inputs, GB", 1e-9), ("seconds", "seconds", 1.0)],
        strict=True,
    ):
        for kind, sizes in found.items():
            style = {"plain": "-", "tiled": "--"}.get(kind.rpartition(" ")[2], ":")
            colour = "tab:orange" if "igmoid" in kind or "SigLip" in kind else "tab:blue"
            axes.plot(list(sizes), [each[key] * factor for each in sizes.values()], style, color=colour, label=kind)
        axes.set(xscale="log", yscale="log", xlabel="rows of the batch", ylabel=unit)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="rows of a batch")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--to", type=Path, help="picture (svg, png or pdf)")
    options = parser.parse_args()

    found: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in KINDS}
    print("| loss | N | GB above the inputs | seconds | time, to plain |\n|---|---|---|---|---|")
    for n in options.sizes:
        for kind in KINDS:
            if "tiled" not in kind and MATRICES * 4 * n * n > psutil.virtual_memory().available:
                print(f"| {kind} | {n:,} | left out: up to {MATRICES * 4 * n * n / 1e9:,.0f} GB | | |", flush=True)
                continue
            each = found[kind][n] = in_own_process(kind, n, options.dim, options.repeats)
            plain = found["sigmoid, plain" if "ig" in kind else "info_nce, plain"].get(n)
            ratio = f"{each['seconds'] / plain['seconds']:.2f}" if plain else ""
            print(f"| {kind} | {n:,} | {each['bytes'] / 1e9:.3f} | {each['seconds']:.3f} | {ratio} |", flush=True)
    if options.to:
        draw({kind: sizes for kind, sizes in found.items() if sizes}, options.to)


if __name__ == "__main__":
    main()
