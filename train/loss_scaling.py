"""Memory and time of the contrastive loss as the batch grows: plain, tiled, and open_clip's; and of a cached step.

Forward and backward of the loss alone, on unit vectors. Each measurement is a process of its own. Memory is the
peak above the two inputs (their gradients are in it); time is the least of several runs, in CPU seconds of all
threads, which other programs on the machine hardly change; the ratio is to the plain loss at the same size, measured
just before. Sizes that would not fit into free memory are left out, by name.

With --step, the last table is of a whole step: a model with random weights, all at once and cached in chunks.

    python train/loss_scaling.py
    python train/loss_scaling.py --sizes 1024 4096 16384 65536 --dim 512 --to scaling.svg
    python train/loss_scaling.py --sizes --step open_clip:ViT-S-32 --batch-size 64 --micro-batch 8
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import psutil
import torch
from open_clip.loss import SigLipLoss

from clipkit import DualEncoder, Paired, info_nce, sigmoid_loss
from clipkit.data.batches.batch import Batch, RowKeys
from clipkit.losses.contrastive import TILE, EmbeddedBatch
from clipkit.training.step import backward

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
    sides = EmbeddedBatch(a, keys), EmbeddedBatch(b, keys)
    if what == "sigmoid":
        return sigmoid_loss(*sides, Paired(), scale, bias, tile=tile).loss
    return info_nce(*sides, Paired(), scale, tile=tile).loss


def measure(kind: str, n: int, dim: int, repeats: int) -> dict[str, float]:
    """Peak bytes above the inputs, and the least CPU seconds of `repeats` runs."""
    torch.manual_seed(0)
    small = [torch.nn.functional.normalize(torch.randn(64, dim), dim=-1).requires_grad_() for _ in range(2)]
    loss(kind, *small).backward()  # libraries and thread buffers are there before the inputs
    a, b = (torch.nn.functional.normalize(torch.randn(n, dim), dim=-1).requires_grad_() for _ in range(2))
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = []
    for _ in range(repeats):
        a.grad = b.grad = None
        start = time.process_time()
        loss(kind, a, b).backward()
        seconds.append(time.process_time() - start)
    return {"bytes": _resident("VmHWM") - before, "seconds": min(seconds)}


def _resident(field: str = "VmRSS") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_step(name: str, n: int, micro_batch: int, repeats: int) -> dict[str, float]:
    """The least CPU seconds of a whole step of n pairs, at once and in chunks, in turn."""
    torch.manual_seed(0)
    model = (DualEncoder.from_pretrained(name) if Path(name).is_dir() else DualEncoder.from_config(name)).train()
    size = model.processor.image_size
    inputs = {"pixel_values": torch.randn(n, 3, size, size), **model.processor.texts([f"pair {i}" for i in range(n)])}
    rows = RowKeys({"row": torch.arange(n)})
    batch = Batch(inputs, {"image": rows, "text": rows}, n)
    seconds: dict[str, list[float]] = {"at once": [], "cached": []}
    for _ in range(repeats):
        for how, micro in (("at once", None), ("cached", micro_batch)):
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            backward(model, batch, [Paired()], micro_batch=micro)
            seconds[how].append(time.process_time() - start)
    return {how: min(each) for how, each in seconds.items()}


def in_own_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What a function gives in a fork of this process, in which no tensor was ever made."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(function(*arguments)))
    child.start()
    send.close()
    try:
        found: dict[str, float] = receive.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} ended early: out of memory?") from None
    child.join()
    return found


def draw(found: dict[str, dict[int, dict[str, float]]], to: Path) -> None:
    """Two curves over N, both logarithmic: GB and seconds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (key, unit, factor) in zip(
        figure.subplots(1, 2),
        [("bytes", "memory above the inputs, GB", 1e-9), ("seconds", "CPU seconds", 1.0)],
        strict=True,
    ):
        for kind, sizes in found.items():
            style = {"plain": "-", "tiled": "--"}.get(kind.rpartition(" ")[2], ":")
            colour = "tab:orange" if "igmoid" in kind or "SigLip" in kind else "tab:blue"
            axes.plot(list(sizes), [each[key] * factor for each in sizes.values()], style, color=colour, label=kind)
        axes.set(xscale="log", yscale="log", xlabel="rows of the batch", ylabel=unit)
        axes.set_xticks(list(sizes), [f"{n:,}" for n in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384], help="rows of a batch")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--to", type=Path, help="picture (svg, png or pdf)")
    parser.add_argument("--step", metavar="MODEL", help="time a whole step: a folder, or open_clip:ARCH")
    parser.add_argument("--batch-size", type=int, default=64, help="of the step")
    parser.add_argument("--micro-batch", type=int, default=8, help="of the cached step")
    options = parser.parse_args()
    if options.sizes:
        losses(options)
    if options.step:
        step(options)


def losses(options: argparse.Namespace) -> None:
    found: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in KINDS}
    print("| loss | N | GB above the inputs | CPU seconds | time, to plain |\n|---|---|---|---|---|")
    for n in options.sizes:
        for kind in KINDS:
            if "tiled" not in kind and MATRICES * 4 * n * n > psutil.virtual_memory().available:
                print(f"| {kind} | {n:,} | left out: up to {MATRICES * 4 * n * n / 1e9:,.0f} GB | | |", flush=True)
                continue
            each = found[kind][n] = in_own_process(measure, kind, n, options.dim, options.repeats)
            plain = found["sigmoid, plain" if "ig" in kind else "info_nce, plain"].get(n)
            ratio = f"{each['seconds'] / plain['seconds']:.2f}" if plain else ""
            print(f"| {kind} | {n:,} | {each['bytes'] / 1e9:.3f} | {each['seconds']:.3f} | {ratio} |", flush=True)
    if options.to:
        draw({kind: sizes for kind, sizes in found.items() if sizes}, options.to)


def step(options: argparse.Namespace) -> None:
    found = in_own_process(measure_step, options.step, options.batch_size, options.micro_batch, options.repeats)
    chunks = -(-options.batch_size // options.micro_batch)
    print("\n| step | pairs | CPU seconds | time, to one at once |\n|---|---|---|---|")
    for how, seconds in found.items():
        run = f"{how}, {chunks} chunks" if how == "cached" else how
        print(f"| {run} | {options.batch_size} | {seconds:.2f} | {seconds / found['at once']:.2f} |")


if __name__ == "__main__":
    main()
