"""Started as torchrun or python would: a short run with a budget; rank 0 writes what it chose.

forgetting_program.py FOLDER BUDGET [DIES_AT]

DIES_AT: the evaluation in whose midst the process ends as by SIGKILL.
"""

import os
import sys
from pathlib import Path

import tiny
import torch

from clipkit import TrainConfig, Trainer

torch.set_num_threads(1)


def start():
    """A model as `from_pretrained` gives it: nothing in it began at random."""
    model = tiny.make_model()
    model.fresh = frozenset()
    return model


class Moved:
    """How far the text head went from where it began: grows with alpha, in proportion."""

    def __init__(self, sign=1.0, dies_at=None):
        self.begin = start().backend.text_head.weight.detach().clone()
        self.sign, self.dies_at, self.calls = sign, dies_at, 0

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.dies_at:
            os._exit(137)
        return {"moved": self.sign * float((model.backend.text_head.weight.detach().cpu() - self.begin).norm())}


def config(folder, budget, **changes):
    settings = {"batch_size": 9, "max_steps": 3, "learning_rate": 1e-2, "evaluate_every": 1, "save_steps": 1}
    settings |= {"resume": "auto", "log_every": 1, "augmentation": "crop", "progress": False, **changes}
    return TrainConfig(str(folder), forget_budget=budget, **settings)


def main(folder, budget, dies_at=None):
    domain = Moved(dies_at=dies_at)
    model = start()
    trainer = Trainer(model, tiny.make_pairs(), config(folder, budget), evaluators=[domain], reference=Moved(sign=-1.0))
    forgetting = trainer.train().forgetting
    if trainer.accelerator.is_main_process:
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        world = trainer.accelerator.num_processes
        points = [(p.alpha, p.domain, p.reference) for p in forgetting.points]
        torch.save({"alpha": forgetting.alpha, "points": points, "state": state, "world": world}, folder / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:]))
