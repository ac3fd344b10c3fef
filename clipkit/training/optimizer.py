"""AdamW with one group for each kind of weight, and the learning rate at each step."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from clipkit import distributed
from clipkit.errors import ModelError, UsageError
from clipkit.modality import MODALITIES, Modality
from clipkit.models.adapting.lora import MARK
from clipkit.models.backends.layers import parameters_by_depth
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.config.train import TrainConfig

logger = logging.getLogger("clipkit")


ROOT = "backend."  # in the names of a model's parameters


_POSITIONS = ("position_embedding", "positional_embedding", "pos_embed")


_TOKENS = ("cls_token", "class_token", "class_embedding", "dist_token", "reg_token", "register_token")


_NOT_DECAYED = (*_POSITIONS, *_TOKENS)


def parameter_groups(
    model: DualEncoder, config: TrainConfig, heads: torch.nn.Module | None = None
) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and decay.

    Weights with fewer than two dimensions (norms, biases, logit scale and bias), class and register tokens and
    embeddings of positions are never decayed: decay would pull the temperature of CLIP from 100 to 80 in 10,000
    ordinary steps.
    `heads` are what stands beside the model while it learns; they learn as fresh heads do.

    With `layer_decay` the rate of each parameter of a pretrained tower is multiplied by its factor of `layer_factors`.

    Raises:
        UsageError: see `layer_factors`.
    """
    factors = {} if config.layer_decay is None else layer_factors(model, config.layer_decay)
    scalars = {id(model.logit_scale), id(model.logit_bias)}
    of_scale = scale_rate(model, config)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    fresh = model.fresh
    beside = [] if heads is None else [(None, each) for each in heads.parameters()]
    for name, parameter in [*model.named_parameters(), *beside]:
        if not parameter.requires_grad:
            continue
        rate = config.head_learning_rate if name is None or name in fresh else config.learning_rate
        rate = of_scale if id(parameter) in scalars else rate
        rate *= factors.get(name or "", 1.0)
        plain = parameter.ndim < 2 or any(part in (name or "") for part in _NOT_DECAYED)
        groups[rate, 0.0 if plain else config.weight_decay].append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def layer_factors(model: DualEncoder, decay: float) -> dict[str, float]:
    """What the learning rate of each trained parameter of the towers is multiplied by, by its name in the model.

    Block i of a tower's n learns at ``decay ** (n - i)``, what its first block reads (patches, tokens, positions) at
    ``decay ** n``, and the last block with all that comes after it at 1: layer-wise learning-rate decay (Clark et al.
    2020, ELECTRA, section 3.1; Bao et al. 2022, BEiT), for each tower by its own depth. Frozen blocks count, too.
    LoRA decays with the block that it adapts; weights that began at random otherwise, and projections, never do.

    Raises:
        UsageError: no tower has pretrained weights that train, or one that has them has no blocks.
    """
    found: dict[str, float] = {}
    for part in MODALITIES:
        own = [name for name in _decaying(model) if model.backend.belongs_to(part, name.removeprefix(ROOT), head=False)]
        if own:
            factors = _by_depth(model, part, decay)
            found |= {name: factors[name] for name in own}
    if not found:
        raise UsageError(
            "layer_decay is for towers that train from pretrained weights, and there is none",
            where="layer_decay",
            fix="leave it out",
        )
    return found


def _decaying(model: DualEncoder) -> Iterator[str]:
    """Trained weights with a past: pretrained ones, and LoRA, which changes such."""
    trained = (name for name, each in model.named_parameters() if each.requires_grad)
    fresh = model.fresh
    return (name for name in trained if name not in fresh or MARK in name)


def _by_depth(model: DualEncoder, part: Modality, decay: float) -> dict[str, float]:
    try:
        found = parameters_by_depth(model.backend, model.processor, part)
    except ModelError as error:
        raise UsageError(error.message, where="layer_decay", fix="leave it out: one rate for all") from error
    n = len(found.blocks)
    depths = {0: found.before, **{i + 1: names for i, names in enumerate(found.blocks)}}
    factors = {name: decay ** (n - depth) for depth, names in depths.items() for name in names}
    return {f"{ROOT}{name}": factor for name, factor in (factors | dict.fromkeys(found.after, 1.0)).items()}


def scale_rate(model: DualEncoder, config: TrainConfig) -> float:
    """Peak learning rate of the logit scale and bias."""
    fresh_heads = any(MARK not in name for name in model.fresh)  # LoRA is fresh, but says nothing about the scale
    return config.scale_learning_rate or (config.head_learning_rate if fresh_heads else config.learning_rate)


def build_optimizer(model: DualEncoder, config: TrainConfig, heads: torch.nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, one fused kernel a step."""
    groups = parameter_groups(model, config, heads)
    if config.layer_decay is not None and distributed.is_main():
        rates = [group["peak"] for group in groups]
        logger.info(
            "layer_decay %g: %d groups of parameters, at learning rates from %.3g to %.3g",
            *(config.layer_decay, len(groups), min(rates), max(rates)),
        )
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the peak learning rate at `step` of `total`, from 0: linear warm-up, half cosine to 0.

    The optimizer is given this number directly; a scheduler prepared by Accelerate would step once per process.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
