"""Started by python or torchrun: three steps with LoRA and gradient checkpointing; rank 0 writes what it saw."""

import sys
from pathlib import Path

import tiny
import torch
from rank_program import first_gradients

from clipkit import RetrievalEvaluator, TrainConfig, Trainer

torch.set_num_threads(1)


def main(out):
    pairs = tiny.make_pairs()
    model = tiny.make_model().add_lora("both", rank=2).gradient_checkpointing()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # as in the midst of training: at 0 the gradients of A are 0, too
            torch.nn.init.normal_(parameter, std=0.2)
    settings = TrainConfig(str(out / "run"), batch_size=9, max_steps=3, log_every=1, progress=False)
    gradients = first_gradients()
    trainer = Trainer(model, pairs, settings, evaluators=[RetrievalEvaluator(pairs)])
    result = trainer.train()
    if trainer.accelerator.is_main_process:
        world = trainer.accelerator.num_processes
        torch.save({"gradients": gradients, "history": result.history, "world": world}, out / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
