"""Memory and time of the contrastive loss as the batch grows: plain, tiled, and open_clip's; and of a cached step.

Forward and backward of the loss alone, on unit vectors, each measured in its own process. Memory is the peak above
the two inputs, and includes their gradients; time is the least of several runs, in CPU seconds of all threads, which
other programs on the machine hardly change; the ratio is to the plain loss at the same size, measured just before.
Sizes that would not fit into free memory are left out, and the table says so.

With --step, the last table is of a whole step: a model with random weights, at once and cached in chunks.

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

LOSSES = {
    "info_nce, plain": ("info_nce", None),
    "info_nce, tiled": ("info_nce", TILE),
    "open_clip ClipLoss": ("open_clip", None),
    "sigmoid, plain": ("sigmoid", None),
    "sigmoid, tiled": ("sigmoid", TILE),
    "open_clip SigLipLoss": ("open_clip_sigmoid", None),
}
MATRICES = 5  # of N x N numbers, which a plain loss holds at its peak: so much memory has to be free


def loss(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return one loss of the batch, ready for backward."""
    function, tile = LOSSES[name]
    scale = torch.tensor(20.0, requires_grad=True)
    bias = torch.tensor(-10.0, requires_grad=True)
    if function == "open_clip":
        return open_clip.ClipLoss()(a, b, scale)
    if function == "open_clip_sigmoid":
        return SigLipLoss()(a, b, scale, bias)
    keys = {"row": torch.arange(len(a))}
    sides = EmbeddedBatch(a, keys), EmbeddedBatch(b, keys)
    if function == "sigmoid":
        return sigmoid_loss(*sides, Paired(), scale, bias, tile=tile).loss
    return info_nce(*sides, Paired(), scale, tile=tile).loss


def measure(name: str, n: int, dim: int, repeats: int) -> dict[str, float]:
    """Return the peak bytes above the inputs, and the least CPU seconds of `repeats` runs."""
    torch.manual_seed(0)
    small = [torch.nn.functional.normalize(torch.randn(64, dim), dim=-1).requires_grad_() for _ in range(2)]
    loss(name, *small).backward()  # libraries and thread buffers are allocated before the inputs
    a, b = (torch.nn.functional.normalize(torch.randn(n, dim), dim=-1).requires_grad_() for _ in range(2))
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = []
    for _ in range(repeats):
        a.grad = b.grad = None
        start = time.process_time()
        loss(name, a, b).backward()
        seconds.append(time.process_time() - start)
    return {"bytes": _resident("VmHWM") - before, "seconds": min(seconds)}


def _resident(field: str = "VmRSS") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_step(name: str, n: int, micro_batch: int, repeats: int) -> dict[str, float]:
    """Return the least CPU seconds of a whole step of n pairs, at once and in chunks, run in turn."""
    torch.manual_seed(0)
    model = DualEncoder.from_pretrained(name) if Path(name).is_dir() else DualEncoder.from_config(name)
    model.train()
    size = model.processor.image_size
    inputs = {"pixel_values": torch.randn(n, 3, size, size), **model.processor.texts([f"pair {i}" for i in range(n)])}
    rows = RowKeys({"row": torch.arange(n)})
    batch = Batch(inputs, {"image": rows, "text": rows}, n)
    seconds: dict[str, list[float]] = {"at once": [], "cached": []}
    for _ in range(repeats):
        for mode, micro in (("at once", None), ("cached", micro_batch)):
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            backward(model, batch, [Paired()], micro_batch=micro)
            seconds[mode].append(time.process_time() - start)
    return {mode: min(times) for mode, times in seconds.items()}


def in_own_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Return the result of a function in a fork of this process, which has never allocated a tensor."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(function(*arguments)))
    child.start()
    send.close()
    try:
        result: dict[str, float] = receive.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} ended early: out of memory?") from None
    child.join()
    return result


def draw(results: dict[str, dict[int, dict[str, float]]], to: Path) -> None:
    """Write a figure of GB and of seconds over N, both logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (key, unit, factor) in zip(
        figure.subplots(1, 2),
        [("bytes", "memory above the inputs, GB", 1e-9), ("seconds", "CPU seconds", 1.0)],
        strict=True,
    ):
        for name, by_size in results.items():
            style = {"plain": "-", "tiled": "--"}.get(name.rpartition(" ")[2], ":")
            colour = "tab:orange" if is_sigmoid(name) else "tab:blue"
            values = [result[key] * factor for result in by_size.values()]
            axes.plot(list(by_size), values, style, color=colour, label=name)
        axes.set(xscale="log", yscale="log", xlabel="rows of the batch", ylabel=unit)
        axes.set_xticks(list(by_size), [f"{n:,}" for n in by_size])
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


def is_sigmoid(name: str) -> bool:
    return "sigmoid" in name or "SigLip" in name


def losses(options: argparse.Namespace) -> None:
    """Print the table of the losses, and draw it if asked."""
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in LOSSES}
    print("| loss | N | GB above the inputs | CPU seconds | time, to plain |\n|---|---|---|---|---|")
    for n in options.sizes:
        for name in LOSSES:
            needed = MATRICES * 4 * n * n  # bytes
            if "tiled" not in name and needed > psutil.virtual_memory().available:
                print(f"| {name} | {n:,} | left out: up to {needed / 1e9:,.0f} GB | | |", flush=True)
                continue
            result = in_own_process(measure, name, n, options.dim, options.repeats)
            results[name][n] = result
            plain = results["sigmoid, plain" if is_sigmoid(name) else "info_nce, plain"].get(n)
            ratio = f"{result['seconds'] / plain['seconds']:.2f}" if plain else ""
            print(f"| {name} | {n:,} | {result['bytes'] / 1e9:.3f} | {result['seconds']:.3f} | {ratio} |", flush=True)
    if options.to:
        draw({name: by_size for name, by_size in results.items() if by_size}, options.to)


def step(options: argparse.Namespace) -> None:
    """Print the table of a whole step."""
    results = in_own_process(measure_step, options.step, options.batch_size, options.micro_batch, options.repeats)
    chunks = -(-options.batch_size // options.micro_batch)
    print("\n| step | pairs | CPU seconds | time, to one at once |\n|---|---|---|---|")
    for mode, seconds in results.items():
        name = f"{mode}, {chunks} chunks" if mode == "cached" else mode
        print(f"| {name} | {options.batch_size} | {seconds:.2f} | {seconds / results['at once']:.2f} |")


if __name__ == "__main__":
    main()
