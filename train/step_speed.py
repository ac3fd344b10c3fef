"""What the Trainer costs beside the bare step: images a second of both, and of open_clip's own loop, in one process.

All three train the same weights of the same open_clip model on the same batches, which lie in memory as tensors, with
the same loss, clipping and optimizer; four steps of one are followed by four of the others, in turn, so that what else
the machine does hits all alike. The first of four is not counted, for it works in memory that another loop has left.
Between two batches the Trainer does all that it always does: learning rates, checks for what is not finite, log,
clocks, signals, and checkpoints, which are counted apart. So is decoding: workers do it beside the step.

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
RATE, DECAY = 1e-4, 0.1
BLOCK = 4  # steps of one loop in a row
WORDS = ["a", "red", "green", "blue", "dog", "cat", "bird", "tree", "house", "road", "on", "under", "near"]


@dataclass
class Times:
    """Seconds of each step, on the clock and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, begin: tuple[float, float]) -> None:
        self.wall.append(time.perf_counter() - begin[0])
        self.cpu.append(time.process_time() - begin[1])


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        native = build(args, Path(folder))
        trainer = set_up(native, args, Path(folder) / "run")
        batches, decoding = in_memory(trainer, args)
        rivals = {"bare step": bare(copy.deepcopy(native)), "open_clip_train": theirs(copy.deepcopy(native), args)}
        found = measure(trainer, rivals, batches, args)
        saved = checkpoint(found.pop("saves"), Path(folder) / "run", trainer.config)
    result = {"model": facts(native, args), **summary(found, args), "checkpoint": saved, "decoding": decoding}
    if args.to:
        write_json(args.to, result)
    print(table(result))


# -- the three steps


def set_up(native: torch.nn.Module, args: argparse.Namespace, folder: Path) -> Trainer:
    """clipkit's Trainer around the model, with everything on that is on by default."""
    preprocess = open_clip.image_transform(args.image_size, is_train=False)
    tokenizer = open_clip.SimpleTokenizer(context_length=args.context_length)
    model = DualEncoder.from_open_clip(copy.deepcopy(native), preprocess, tokenizer, arch=NAME)
    config = TrainConfig(
        str(folder),
        epochs=10**6,
        max_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=RATE,
        weight_decay=DECAY,
        warmup=0.0,
        save_steps=max(2, args.steps // 3),  # in place of the clock, so that some fall into so short a run
        evaluate_every=max(1, args.steps // 3 - 1),  # before the first of them, which then holds best weights, too
        precision="fp32",
    )
    return Trainer(model, pairs(4 * args.batch_size), config, evaluators=[lambda _: {"none": 0.0}])


def bare(model: torch.nn.Module) -> Callable[[dict[str, torch.Tensor]], float]:
    """The step as one writes it by hand."""
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


def theirs(model: torch.nn.Module, args: argparse.Namespace) -> Callable[[dict[str, torch.Tensor]], float]:
    """open_clip_train's `train_one_epoch` over one batch at a time."""
    optimizer, losses = adamw(model), []
    # as its parameters are by default, with the same clipping
    settings = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=1.0,
        horovod=False, rank=0, local_rank=0, log_local=False, log_every_n_steps=100, batch_size=args.batch_size,
        world_size=1, wandb=False,
    )  # fmt: skip
    plain = open_clip.ClipLoss()

    def loss(**given: Any) -> dict[str, torch.Tensor]:
        found = plain(**given)
        losses.append(float(found["contrastive_loss"].detach()))
        return found

    class Batches:
        num_batches, num_samples = 1, args.batch_size

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
    decayed = [each for each in model.parameters() if each.ndim >= 2]
    others = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)


# -- the measurement


def measure(trainer: Trainer, rivals: dict[str, Any], batches: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """The times of each kind of step, taken while the Trainer waits for its next batch."""
    found = {name: Times() for name in ("clipkit Trainer", *rivals)}
    losses: dict[str, list[float]] = {name: [] for name in rivals}

    def one_after_the_other(start: int, stop: int) -> Iterator[Any]:
        for step in range(start, stop):
            if step % BLOCK == 0:
                for name in list(rivals)[:: 1 if step % (2 * BLOCK) else -1]:
                    for ahead in range(step, min(step + BLOCK, stop)):
                        begin = now()
                        losses[name].append(rivals[name](batches[ahead % len(batches)].inputs))
                        found[name].add(begin)
            begin = now()
            yield batches[step % len(batches)]
            found["clipkit Trainer"].add(begin)

    trainer.loader.batches = one_after_the_other  # type: ignore[method-assign]
    history = trainer.train().history
    ours = history[0]["loss"]
    for name, values in losses.items():
        if abs(values[0] - ours) > 1e-4 * ours:
            raise SystemExit(f"{name} does not do the same work: its first loss is {values[0]}, the Trainer's {ours}")
    times = found["clipkit Trainer"]
    saving, evaluating = (
        {step for step in range(args.warmup, len(times.wall)) if (step + 1) % (every or 1) == 0}
        for every in (trainer.config.save_steps, trainer.config.evaluate_every)
    )
    usual = statistics.median(times.wall)
    saves = [times.wall[step] - usual for step in sorted(saving - evaluating)]
    first = {step for step in range(len(times.wall)) if step < args.warmup or step % BLOCK == 0}
    return {"times": found, "skip": first | saving | evaluating, "saves": saves}


def summary(found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Images a second of each, and the Trainer's share of the others' speed, step by step."""
    kept = [step for step in range(len(found["times"]["clipkit Trainer"].wall)) if step not in found["skip"]]
    wall = {name: np.array(each.wall)[kept] for name, each in found["times"].items()}
    cpu = {name: np.array(each.cpu)[kept] for name, each in found["times"].items()}
    rows = {}
    for name in wall:
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
    return {"steps": len(kept), "batch_size": args.batch_size, "loops": rows}


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % of the median, by 2,000 resamples of the paired steps."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def checkpoint(seconds: list[float], folder: Path, config: TrainConfig) -> dict[str, Any]:
    """One save: what the steps with a checkpoint took longer, and its bytes on the disk."""
    (newest,) = (folder / "checkpoints").glob("step_*")
    size = sum(path.stat().st_size for path in newest.iterdir())
    took, every = statistics.mean(seconds) if seconds else 0.0, 60 * TrainConfig("x").save_minutes
    return {
        "saves": len(seconds),
        "seconds": round(took, 3),
        "bytes": size,
        "default_interval_seconds": every,
        "share_of_run_time": round(took / (every + took), 5),
    }


# -- the data


def pairs(count: int) -> list[dict[str, Any]]:
    """Smooth noise as JPEG, 320 by 240, and captions of ten words."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append({"image": buffer.getvalue(), "texts": [" ".join(rng.choice(WORDS, 10))]})
    return found


def in_memory(trainer: Trainer, args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Four batches as the loader makes them, and how many images a second one process decodes, crops and resizes."""
    begin = time.perf_counter()
    batches = list(trainer.loader.batches(0, 4))
    rate = 4 * args.batch_size / (time.perf_counter() - begin)
    return batches, {"images_per_second_of_one_process": round(rate, 1), "jpeg": "320 x 240", "to": args.image_size}


def build(args: argparse.Namespace, folder: Path) -> torch.nn.Module:
    """open_clip's CLIP with a ViT, of a size of our own."""
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
        "parameters": sum(each.numel() for each in model.parameters()),
        "image_size": args.image_size,
        "patch_size": 8,
        "width": args.width,
        "layers": [args.layers, max(1, args.layers // 2)],
        "context_length": args.context_length,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": [round(each, 1) for each in os.getloadavg()],
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def table(result: dict[str, Any]) -> str:
    """For reading; the same figures as the JSON."""
    model, saved, decoding = result["model"], result["checkpoint"], result["decoding"]
    lines = [
        f"{model['parameters'] / 1e6:.1f} M parameters, {model['image_size']} px, batch {result['batch_size']}, fp32, "
        f"{model['threads']} thread(s) of {model['cores']} cores, load average {model['load_average'][0]}, "
        f"{result['steps']} paired steps",
        "",
        "| loop | images/s | s/step | CPU s/step | Trainer's speed of it (95 %) | by CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in result["loops"].items():
        low, high = each["trainer_speed_of_this_95"]
        lines.append(
            f"| {name} | {each['images_per_second']:.1f} | {each['seconds_per_step']:.3f} | "
            f"{each['cpu_seconds_per_step']:.3f} | {each['trainer_speed_of_this']:.3f} ({low:.3f}–{high:.3f}) | "
            f"{each['trainer_cpu_speed_of_this']:.3f} |"
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
