"""Set up Accelerate, and check that it did what the launcher asked for."""

from __future__ import annotations

import logging
import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from clipkit.errors import UsageError, option
from clipkit.training.config.train import TrainConfig

logger = logging.getLogger("clipkit")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return an Accelerator with the precision of a config, on the available devices.

    Raises:
        UsageError: the precision is not available; FSDP or DeepSpeed was asked for and is not active.
    """
    cpu = not torch.accelerator.is_available()
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    AcceleratorState._reset_state()  # or the first Trainer of a process would set the precision of all
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no" if precision == "fp32" else precision)
    except (ValueError, ImportError) as error:
        raise UsageError(f"Accelerate cannot be set up: {error}", fix=option("precision", "fp32")) from error
    _check_sharding(accelerator)
    return accelerator


def _check_sharding(accelerator: Accelerator) -> None:
    """Refuse a fallback: Accelerate goes on with DDP, or one process, where it cannot shard as its config asks."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() != "true":
            continue
        active = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if active.upper() != name:
            raise UsageError(
                f"the launcher asked for {name}, and Accelerate runs as {active}",
                where=f"ACCELERATE_USE_{name}",
                fix="check `accelerate env`; it needs several accelerators, or leave it out of the config",
            )
        logger.warning("%s has not been tested with clipkit: run `clipkit check gradients` under it first", name)
