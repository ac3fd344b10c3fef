"""Started by python or torchrun: three steps and an evaluation; rank 0 writes what it saw.

torchrun --nproc_per_node 2 rank_program.py FOLDER [micro-batch]
"""

import sys
from pathlib import Path

import tiny
import torch

from clipkit import RetrievalEvaluator, SameGroup, TrainConfig, Trainer
from clipkit.training import update

torch.set_num_threads(1)


def first_gradients():
    """Filled at the first step that this process takes: the gradients, by name, before they are clipped."""
    clip, seen = update.clip_gradients, {}

    def remember(accelerator, wrapped, module, limit):
        if not seen:
            trained = ((name, weight) for name, weight in module.named_parameters() if weight.grad is not None)
            seen.update((name, weight.grad.clone()) for name, weight in trained)
        return clip(accelerator, wrapped, module, limit)

    update.clip_gradients = remember
    return seen


def main(out, micro_batch=None):
    pairs = tiny.make_pairs()
    settings = TrainConfig(
        str(out / "run"),
        batch_size=9,
        micro_batch=micro_batch,
        max_steps=3,
        learning_rate=1e-3,
        augmentation="crop",
        log_every=1,
        progress=False,
    )
    gradients = first_gradients()
    trainer = Trainer(
        tiny.make_model(), pairs, settings, similar=SameGroup("colour"), evaluators=[RetrievalEvaluator(pairs)]
    )
    result = trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save(
            {"gradients": gradients, "history": result.history, "world": trainer.accelerator.num_processes},
            out / "seen.pt",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
