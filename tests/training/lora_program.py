"""Started by python or torchrun: three steps with LoRA and gradient checkpointing; rank 0 writes what it saw."""

import sys
from pathlib import Path

import tiny
import torch
from rank_program import Recording

from clipkit import RetrievalEvaluator, TrainConfig

torch.set_num_threads(1)


def main(out):
    pairs = tiny.make_pairs()
    model = tiny.make_model().add_lora("both", rank=2).gradient_checkpointing()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # as in the midst of training: at 0 the gradients of A are 0, too
            torch.nn.init.normal_(parameter, std=0.2)
    settings = TrainConfig(str(out / "run"), batch_size=9, max_steps=3, log_every=1, progress=False)
    trainer = Recording(model, pairs, settings, evaluators=[RetrievalEvaluator(pairs)])
    result = trainer.train()
    if trainer.accelerator.is_main_process:
        history = [{k: v for k, v in line.items() if "second" not in k} for line in result.history]
        world = trainer.accelerator.num_processes
        torch.save({"gradients": trainer.gradients, "history": history, "world": world}, out / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
