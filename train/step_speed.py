"""Measure the speed of the Trainer, of a bare step and of open_clip's own loop, in one process.

All three train the same weights of the same open_clip model on the same batches of tensors in memory, with the same
loss, clipping and optimizer. Four steps of one loop are followed by four of the others, so that other programs on the
machine slow all of them equally. The first of four is not counted: it runs in memory that another loop has used.
Between two batches the Trainer does everything that it does in any run: learning rates, checks for values that are not
finite, log, clocks, signals, and checkpoints. Checkpoints are reported separately; so is decoding, which workers do
during the step.

    python train/step_speed.py
    python train/step_speed.py --steps 60 --batch-size 32 --width 256 --layers 6 --to speed.json
"""

import argparse
import copy
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip_train.train import train_one_epoch
from PIL import Image

from clipkit import DualEncoder, TrainConfig, Trainer
from clipkit.errors import exit_with_message
from clipkit.files import write_json

NAME = "step-speed"
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
BLOCK = 4  # steps of one loop in a row
WORDS = ["a", "red", "green", "blue", "dog", "cat", "bird", "tree", "house", "road", "on", "under", "near"]


@dataclass
class Times:
    """Seconds of each step, by the clock and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, begin: tuple[float, float]) -> None:
        """Add a step that began at these times."""
        self.wall.append(time.perf_counter() - begin[0])
        self.cpu.append(time.process_time() - begin[1])


Step = Callable[[dict[str, torch.Tensor]], float]
"""Trains on a batch's inputs, and returns the loss."""


def now() -> tuple[float, float]:
    """Return the time by the clock and of the processor."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(args, Path(folder))
        trainer = build_trainer(model, args, Path(folder) / "run")
        batches, decoding = load_batches(trainer, args)
        other_steps = {
            "bare step": bare_step(copy.deepcopy(model)),
            "open_clip_train": open_clip_step(copy.deepcopy(model), args),
        }
        measurement = measure(trainer, other_steps, batches, args)
        saved = checkpoint(measurement.save_seconds, Path(folder) / "run")
    result = {"model": facts(model, args), **summary(measurement, args), "checkpoint": saved, "decoding": decoding}
    if args.to:
        write_json(args.to, result)
    print(table(result))


# -- the three loops


def build_trainer(model: torch.nn.Module, args: argparse.Namespace, folder: Path) -> Trainer:
    """Return clipkit's Trainer for a copy of the model, with its default checks."""
    preprocess = open_clip.image_transform(args.image_size, is_train=False)
    tokenizer = open_clip.SimpleTokenizer(context_length=args.context_length)
    dual_encoder = DualEncoder.from_open_clip(copy.deepcopy(model), preprocess, tokenizer, arch=NAME)
    config = TrainConfig(
        str(folder),
        epochs=10**6,
        max_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        warmup=0.0,
        save_steps=max(2, args.steps // 3),  # by steps and not by the clock: the run is short
        evaluate_every=max(1, args.steps // 3 - 1),  # before the first checkpoint, which then has best weights, too
        precision="fp32",
    )
    return Trainer(dual_encoder, make_pairs(4 * args.batch_size), config, evaluators=[lambda _: {"none": 0.0}])


def bare_step(model: torch.nn.Module) -> Step:
    """Return a training step as one writes it by hand."""
    model.train()
    optimizer = adamw(model)

    def step(inputs: dict[str, torch.Tensor]) -> float:
        optimizer.zero_grad()
        out = model(inputs["pixel_values"], inputs["input_ids"])
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def open_clip_step(model: torch.nn.Module, args: argparse.Namespace) -> Step:
    """Return a step by open_clip_train's `train_one_epoch`, over one batch at a time."""
    optimizer = adamw(model)
    losses = []
    # its default parameters, with the same clipping
    settings = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=1.0,
        horovod=False, rank=0, local_rank=0, log_local=False, log_every_n_steps=100, batch_size=args.batch_size,
        world_size=1, wandb=False,
    )  # fmt: skip
    clip_loss = open_clip.ClipLoss()

    def loss(**outputs: Any) -> dict[str, torch.Tensor]:
        named_losses = clip_loss(**outputs)
        losses.append(float(named_losses["contrastive_loss"].detach()))
        return named_losses

    class Batches:
        num_batches = 1
        num_samples = args.batch_size

        def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
            self.inputs = inputs

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield self.inputs["pixel_values"], self.inputs["input_ids"]

    def step(inputs: dict[str, torch.Tensor]) -> float:
        data = {"train": SimpleNamespace(dataloader=Batches(inputs), set_epoch=lambda epoch: None)}
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, settings)
        return losses[-1]

    return step


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """Return the optimizer that the Trainer builds: no weight decay on vectors and scalars."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)


# -- the measurement


@dataclass
class Measurement:
    """What the three loops took.

    Attributes:
        times: of every step of each loop.
        skipped: the steps that are not counted.
        save_seconds: what the Trainer's steps with a checkpoint took longer than others.
    """

    times: dict[str, Times]
    skipped: set[int]
    save_seconds: list[float]


def measure(
    trainer: Trainer, other_steps: dict[str, Step], batches: list[Any], args: argparse.Namespace
) -> Measurement:
    """Train with the Trainer, and run the other loops while it waits for its next batch."""
    times = {name: Times() for name in ("clipkit Trainer", *other_steps)}
    losses: dict[str, list[float]] = {name: [] for name in other_steps}

    def run_others(start: int, stop: int, names: list[str]) -> None:
        for name in names:
            for step in range(start, stop):
                begin = now()
                losses[name].append(other_steps[name](batches[step % len(batches)].inputs))
                times[name].add(begin)

    def interleaved(start: int, stop: int) -> Iterator[Any]:
        for step in range(start, stop):
            if step % BLOCK == 0:
                names = list(other_steps)
                if step % (2 * BLOCK) == 0:  # in alternating order
                    names.reverse()
                run_others(step, min(step + BLOCK, stop), names)
            begin = now()
            yield batches[step % len(batches)]
            times["clipkit Trainer"].add(begin)

    trainer.loader.batches = interleaved  # type: ignore[method-assign]
    first_loss = trainer.train().history[0]["loss"]
    for name, values in losses.items():
        if abs(values[0] - first_loss) > 1e-4 * first_loss:
            raise SystemExit(
                f"{name} does not do the same work: its first loss is {values[0]}, the Trainer's {first_loss}"
            )
    wall = times["clipkit Trainer"].wall
    steps = range(len(wall))
    saving = {step for step in steps if step >= args.warmup and (step + 1) % trainer.config.save_steps == 0}
    evaluating = {step for step in steps if step >= args.warmup and (step + 1) % trainer.config.evaluate_every == 0}
    usual = statistics.median(wall)
    save_seconds = [wall[step] - usual for step in sorted(saving - evaluating)]
    first = {step for step in steps if step < args.warmup or step % BLOCK == 0}
    return Measurement(times, first | saving | evaluating, save_seconds)


def summary(measurement: Measurement, args: argparse.Namespace) -> dict[str, Any]:
    """Return the images a second of each loop, and the Trainer's share of the others' speed, step by step."""
    times = measurement.times
    counted = [step for step in range(len(times["clipkit Trainer"].wall)) if step not in measurement.skipped]
    wall = {name: np.array(loop_times.wall)[counted] for name, loop_times in times.items()}
    cpu = {name: np.array(loop_times.cpu)[counted] for name, loop_times in times.items()}
    rows = {}
    for name in times:
        ratios = wall[name] / wall["clipkit Trainer"]
        low, high = interval(ratios)
        rows[name] = {
            "images_per_second": round(args.batch_size / float(np.median(wall[name])), 2),
            "seconds_per_step": round(float(np.median(wall[name])), 4),
            "cpu_seconds_per_step": round(float(np.median(cpu[name])), 4),
            "trainer_speed_of_this": round(float(np.median(ratios)), 4),
            "trainer_speed_of_this_95": [round(low, 4), round(high, 4)],
            "trainer_cpu_speed_of_this": round(float(np.median(cpu[name] / cpu["clipkit Trainer"])), 4),
        }
    return {"steps": len(counted), "batch_size": args.batch_size, "loops": rows}


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the median, by 2,000 resamples of the paired steps."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def checkpoint(save_seconds: list[float], folder: Path) -> dict[str, Any]:
    """Return the mean seconds of a save, its bytes on the disk, and its share of a run."""
    (newest,) = (folder / "checkpoints").glob("step_*")
    size = sum(path.stat().st_size for path in newest.iterdir())
    seconds = statistics.mean(save_seconds) if save_seconds else 0.0
    default_interval = 60 * TrainConfig("x").save_minutes
    return {
        "saves": len(save_seconds),
        "seconds": round(seconds, 3),
        "bytes": size,
        "default_interval_seconds": default_interval,
        "share_of_run_time": round(seconds / (default_interval + seconds), 5),
    }


# -- the data


def make_pairs(count: int) -> list[dict[str, Any]]:
    """Return smooth noise as JPEG, 320 by 240, with captions of ten words."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        pairs.append({"image": buffer.getvalue(), "texts": [" ".join(rng.choice(WORDS, 10))]})
    return pairs


def load_batches(trainer: Trainer, args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Return four batches of the loader, and how many images a second one process decodes, crops and resizes."""
    begin = time.perf_counter()
    batches = list(trainer.loader.batches(0, 4))
    rate = 4 * args.batch_size / (time.perf_counter() - begin)
    return batches, {"images_per_second_of_one_process": round(rate, 1), "jpeg": "320 x 240", "to": args.image_size}


def build_model(args: argparse.Namespace, folder: Path) -> torch.nn.Module:
    """Return open_clip's CLIP with a ViT of the size that was asked for, with random weights."""
    vision = {"image_size": args.image_size, "layers": args.layers, "width": args.width, "patch_size": 8}
    vision["head_width"] = min(64, args.width)
    heads = max(1, args.width // 64)
    text = {"context_length": args.context_length, "vocab_size": 49408, "width": args.width, "heads": heads}
    arch = {"embed_dim": args.width, "vision_cfg": vision, "text_cfg": {**text, "layers": max(1, args.layers // 2)}}
    (folder / f"{NAME}.json").write_text(json.dumps(arch), encoding="utf-8")
    open_clip.add_model_config(folder / f"{NAME}.json")
    return open_clip.create_model(NAME, output_dict=True)


def facts(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": args.image_size,
        "patch_size": 8,
        "width": args.width,
        "layers": [args.layers, max(1, args.layers // 2)],
        "context_length": args.context_length,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures of the JSON as Markdown."""
    model, saved, decoding = result["model"], result["checkpoint"], result["decoding"]
    lines = [
        f"{model['parameters'] / 1e6:.1f} M parameters, {model['image_size']} px, batch {result['batch_size']}, fp32, "
        f"{model['threads']} thread(s) of {model['cores']} cores, load average {model['load_average'][0]}, "
        f"{result['steps']} paired steps",
        "",
        "| loop | images/s | s/step | CPU s/step | Trainer's speed of it (95 %) | by CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, loop in result["loops"].items():
        low, high = loop["trainer_speed_of_this_95"]
        lines.append(
            f"| {name} | {loop['images_per_second']:.1f} | {loop['seconds_per_step']:.3f} | "
            f"{loop['cpu_seconds_per_step']:.3f} | {loop['trainer_speed_of_this']:.3f} ({low:.3f}–{high:.3f}) | "
            f"{loop['trainer_cpu_speed_of_this']:.3f} |"
        )
    lines += [
        "",
        f"a checkpoint: {saved['seconds']:.2f} s, {saved['bytes'] / 1e6:.1f} MB (mean of {saved['saves']}); at one "
        f"every {saved['default_interval_seconds']:.0f} s that is {100 * saved['share_of_run_time']:.2f} % of its time",
        f"decoding: {decoding['images_per_second_of_one_process']:.0f} images/s a worker ({decoding['jpeg']} JPEG to "
        f"{decoding['to']} px)",
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=BLOCK, help="first steps that are not counted")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6, help="of the image tower; the text tower has half as many")
    parser.add_argument("--context-length", type=int, default=16)
    parser.add_argument("--to", type=Path, default=None, help="write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_message(main)
