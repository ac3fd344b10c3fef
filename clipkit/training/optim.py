"""AdamW with one group for each kind of weight, and the learning rate at each step."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.lora import MARK
from clipkit.training.config import TrainConfig

_NOT_DECAYED = ("position_embedding", "positional_embedding", "pos_embed", "cls_token", "class_embedding")


def parameter_groups(
    model: DualEncoder, config: TrainConfig, heads: torch.nn.Module | None = None
) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and decay.

    Weights with fewer than two dimensions (norms, biases, logit scale and bias), class tokens and embeddings of
    positions are never decayed: decay would pull the temperature of CLIP from 100 to 80 in 10,000 ordinary steps.
    `heads` are what stands beside the model while it learns; they learn as fresh heads do.
    """
    scalars = {id(model.logit_scale), id(model.logit_bias)}
    of_scale = scale_rate(model, config)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    beside = [] if heads is None else [(None, each) for each in heads.parameters()]
    for name, parameter in [*model.named_parameters(), *beside]:
        if not parameter.requires_grad:
            continue
        rate = config.head_learning_rate if name is None or name in model.fresh else config.learning_rate
        rate = of_scale if id(parameter) in scalars else rate
        plain = parameter.ndim < 2 or any(part in (name or "") for part in _NOT_DECAYED)
        groups[rate, 0.0 if plain else config.weight_decay].append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def scale_rate(model: DualEncoder, config: TrainConfig) -> float:
    """Peak learning rate of the logit scale and bias."""
    fresh_heads = any(MARK not in name for name in model.fresh)  # LoRA is fresh, but says nothing about the scale
    return config.scale_learning_rate or (config.head_learning_rate if fresh_heads else config.learning_rate)


def build_optimizer(model: DualEncoder, config: TrainConfig, heads: torch.nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, one fused kernel a step."""
    return torch.optim.AdamW(parameter_groups(model, config, heads), betas=config.betas, eps=config.eps, fused=True)


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the peak learning rate at `step` of `total`, from 0: linear warm-up, half cosine to 0.

    The optimizer is given this number directly; a scheduler prepared by Accelerate would step once per process.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
