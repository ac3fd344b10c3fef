"""Out of memory: what the step needed, and what would fit."""

import ctypes
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from clipkit import TrainConfig, Trainer
from clipkit.errors import ResourceError, exit_with_message
from clipkit.training import update
from clipkit.training.checks.memory import MemoryEstimate, advice

GB = 2**30


def test_the_advice_is_arithmetic():
    needs = MemoryEstimate(
        weights=2 * GB, training=6 * GB, allocated=0, sample=0.1 * GB, checkpointed=0.01 * GB, free=10 * GB
    )
    error = advice(needs, 256, TrainConfig("x", batch_size=512), "CUDA out of memory")
    assert "besides 2.00 GiB of weights it needs about 31.60 GiB (6.00 GiB of gradients and optimizer" in error.message
    assert "10.00 GiB were free" in error.message
    assert "micro_batch=16: about 7.60 GiB" in error.fix  # (0.9 x 10 - 6) / 0.1 = 30
    assert "the 512 pairs of the global batch, stay what they are" in error.fix
    assert "gradient checkpointing (model.gradient_checkpointing()): about 8.56 GiB;" in error.fix
    assert "LoRA (model.add_lora()): hardly any gradients and moments, fits with micro_batch=64" in error.fix
    later = replace(needs, allocated=4 * GB, free=6 * GB)  # the same room, after the moments are allocated
    assert "micro_batch=32: about" in advice(later, 256, TrainConfig("x"), "x").fix  # (0.9 x 6 - 2) / 0.1 = 34
    assert "LoRA" not in advice(replace(needs, lora=True), 256, TrainConfig("x"), "x").fix
    assert 'precision="bf16"' in advice(needs, 256, TrainConfig("x", precision="fp32"), "x").fix
    nothing = MemoryEstimate(2 * GB, 6 * GB, 0, 0.1 * GB, None, 0)
    assert "take a smaller model" in advice(nothing, 256, TrainConfig("x"), "x").fix
    assert "micro_batch=128 or less" in advice(None, 256, TrainConfig("x"), "x").fix


def wide_trainer(folder, batch_size=32, **changes):
    """A trainer whose activations are large: patches of four pixels in images of 256."""
    from transformers import ViTConfig, ViTModel

    from clipkit import DualEncoder

    base, pairs = tiny.make_model(), tiny.make_pairs()
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256}
    vision = ViTModel(ViTConfig(image_size=128, patch_size=4, **size))
    model = DualEncoder.from_towers(
        vision, base.backend.text, base.processor.text_side.tokenizer, dim=16, context_length=8
    )
    settings = {"max_steps": 1, "augmentation": "none", "progress": False, **changes}
    return Trainer(model, pairs, TrainConfig(str(folder), batch_size=batch_size, **settings))


def train_within(limit: int, folder: str, **changes):
    """Train with so many bytes of address space beyond what the process holds when training begins.

    Only in a fresh process: malloc fills what earlier work has freed before it asks the system, so in a process that
    has run other tests a step would fit into any limit.
    """
    max_arenas, mmap_threshold = -8, -3  # malloc.h
    libc = ctypes.CDLL(None)
    assert libc.mallopt(max_arenas, 1)  # not a heap of 64 MiB for each thread that meets another one in malloc
    assert libc.mallopt(mmap_threshold, 2**18)
    trainer = wide_trainer(folder, batch_size=16, **changes)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + limit, held + limit))
    exit_with_message(trainer.train)


def run_with_limit(folder, **changes):
    program = f"import test_memory; test_memory.train_within(150 * 2**20, {str(folder)!r}, **{changes!r})"
    paths = [str(Path(__file__).parent), *sys.path]  # the step needs 270 MiB
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)


def test_a_real_limit_is_told_and_the_advice_fits(tmp_path):
    failed = run_with_limit(tmp_path / "whole")
    assert failed.returncode == 5, failed.stdout + failed.stderr
    assert "the training step ran out of memory: besides" in failed.stderr
    advised = re.search(r"micro_batch=(\d+): about", failed.stderr)
    assert advised, failed.stderr
    fits = run_with_limit(tmp_path / "micro", micro_batch=int(advised[1]))
    assert fits.returncode == 0, fits.stdout + fits.stderr


def test_any_other_error_stays_what_it_is(tmp_path, make_model, pairs, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(update, "backward", fail)
    settings = {"batch_size": 8, "progress": False}
    said = "size mismatch"
    with pytest.raises(RuntimeError, match="size mismatch"):
        Trainer(make_model(), pairs, TrainConfig(str(tmp_path / "a"), **settings)).train()
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
    with pytest.raises(ResourceError, match="the training step ran out of memory"):
        Trainer(make_model(), pairs, TrainConfig(str(tmp_path / "b"), **settings)).train()
    assert torch.is_grad_enabled()
