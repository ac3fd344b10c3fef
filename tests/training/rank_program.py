"""Started by python or torchrun: three steps and an evaluation; rank 0 writes what it saw.

torchrun --nproc_per_node 2 rank_program.py FOLDER [micro-batch]
"""

import sys
from pathlib import Path

import tiny
import torch

from clipkit import RetrievalEvaluator, SameGroup, TrainConfig, Trainer

torch.set_num_threads(1)


class Recording(Trainer):
    gradients = None

    def _clip(self, model):
        if self.gradients is None:
            named = model.named_parameters()
            self.gradients = {name: each.grad.clone() for name, each in named if each.grad is not None}
        return super()._clip(model)


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
    trainer = Recording(
        tiny.make_model(), pairs, settings, similar=SameGroup("colour"), evaluators=[RetrievalEvaluator(pairs)]
    )
    result = trainer.train()
    if trainer.accelerator.is_main_process:
        history = [{k: v for k, v in line.items() if "second" not in k} for line in result.history]
        torch.save(
            {"gradients": trainer.gradients, "history": history, "world": trainer.accelerator.num_processes},
            out / "seen.pt",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
