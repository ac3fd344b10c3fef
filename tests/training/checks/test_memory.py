"""Out of memory: what the step needed, and what would fit."""

import ctypes
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import tiny
import torch

from clipkit import TrainConfig, Trainer
from clipkit.errors import ResourceError
from clipkit.training import loop
from clipkit.training.checks.memory import MemoryEstimate, advice

GB = 2**30


def test_the_advice_is_arithmetic():
    needs = MemoryEstimate(
        weights=2 * GB, training=6 * GB, held=0, sample=0.1 * GB, checkpointed=0.01 * GB, free=10 * GB
    )
    error = advice(needs, 256, TrainConfig("x", batch_size=512), "CUDA out of memory")
    assert "beside 2.00 GiB of weights it needs about 31.60 GiB (6.00 GiB of gradients and optimizer" in error.message
    assert "10.00 GiB were free" in error.message
    assert "micro_batch=16: about 7.60 GiB" in error.fix  # (0.9 x 10 - 6) / 0.1 = 30
    assert "the 512 pairs of the global batch, stay what they are" in error.fix
    assert "gradient checkpointing (model.gradient_checkpointing()): about 8.56 GiB;" in error.fix
    assert "LoRA (model.add_lora()): hardly any gradients and moments, fits with micro_batch=64" in error.fix
    later = replace(needs, held=4 * GB, free=6 * GB)  # the same room, after the moments have come to be
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


def every_large_tensor_counts():
    """Make malloc ask the system for each, and never for a heap of 64 MiB a thread.

    Else what the tests before this one have freed adds to the limit, and the heaps that threads get when they meet in
    malloc, as on a busy machine, take from it.
    """
    max_arenas, mmap_threshold = -8, -3  # malloc.h
    libc = ctypes.CDLL(None)
    assert libc.mallopt(max_arenas, 1)
    assert libc.mallopt(mmap_threshold, 2**18)


def test_a_real_limit_is_told_and_the_advice_fits(tmp_path):
    limit = 150 * 2**20  # the step needs 270

    def work(**changes):
        every_large_tensor_counts()
        trainer = wide_trainer(tmp_path / f"run{len(changes)}", batch_size=16, **changes)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + limit, held + limit))
        trainer.train()

    log = tmp_path / "log"
    assert runs.wait(runs.fork(work, log), seconds=600) == 5, log.read_text()
    said = log.read_text()
    assert "the training step ran out of memory: beside" in said
    found = re.search(r"micro_batch=(\d+): about", said)
    assert found, said
    again = tmp_path / "again"
    assert runs.wait(runs.fork(lambda: work(micro_batch=int(found[1])), again), seconds=600) == 0, again.read_text()


def test_any_other_error_stays_what_it_is(tmp_path, make_model, pairs, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(loop, "backward", fail)
    settings = {"batch_size": 8, "progress": False}
    said = "size mismatch"
    with pytest.raises(RuntimeError, match="size mismatch"):
        Trainer(make_model(), pairs, TrainConfig(str(tmp_path / "a"), **settings)).train()
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
    with pytest.raises(ResourceError, match="the training step ran out of memory"):
        Trainer(make_model(), pairs, TrainConfig(str(tmp_path / "b"), **settings)).train()
    assert torch.is_grad_enabled()
