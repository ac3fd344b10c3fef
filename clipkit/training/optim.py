"""AdamW with one group for each kind of weight, and the learning rate at each step."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from clipkit.errors import ModelError, UsageError
from clipkit.models.backend import PARTS
from clipkit.models.blocks import layers
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
    depth = {} if config.layer_decay is None else layer_factors(model, config.layer_decay)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    beside = [] if heads is None else [(None, each) for each in heads.parameters()]
    for name, parameter in [*model.named_parameters(), *beside]:
        if not parameter.requires_grad:
            continue
        fresh = name is None or name in model.fresh
        rate = config.head_learning_rate if fresh else config.learning_rate * depth.get(name or "", 1.0)
        rate = of_scale if id(parameter) in scalars else rate
        plain = parameter.ndim < 2 or any(part in (name or "") for part in _NOT_DECAYED)
        groups[rate, 0.0 if plain else config.weight_decay].append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def layer_factors(model: DualEncoder, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each weight of a tower, by name: layer-wise decay (Clark et al. 2020, ELECTRA).

    As BEiT counts (Bao et al. 2021): of n blocks the last has ``decay``, the first ``decay ** n``, and what lies before
    it ``decay ** (n + 1)``; what lies after the last block, and the heads, learn at the full rate.

    Raises:
        UsageError: a trained tower has no blocks that could be told apart.
    """
    found: dict[str, float] = {}
    backend = model.backend
    for part in PARTS:
        if not any(p.requires_grad and backend.owns(part, n, head=False) for n, p in backend.named_parameters()):
            continue
        try:
            tower = layers(backend, model.processor, part)
        except ModelError as error:
            raise UsageError(error.message, where="layer_decay", fix="leave out layer_decay") from error
        steps = len(tower.blocks)
        for i, names in enumerate([tower.before, *tower.blocks]):
            found |= {f"backend.{name}": decay ** (steps + 1 - i) for name in names}
    return found


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
