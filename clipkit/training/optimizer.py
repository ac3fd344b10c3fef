"""AdamW with groups of parameters, the learning rate at each step, and the clipping of gradients."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator

from clipkit import distributed
from clipkit.errors import ModelError, UsageError
from clipkit.modality import MODALITIES, Modality
from clipkit.models.adapting.lora import MARK
from clipkit.models.backends.layers import parameters_by_depth
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.config.train import TrainConfig

logger = logging.getLogger("clipkit")

ROOT = "backend."  # first part of the names of a model's parameters
_POSITIONS = ("position_embedding", "positional_embedding", "pos_embed")
_TOKENS = ("cls_token", "class_token", "class_embedding", "dist_token", "reg_token", "register_token")
_NOT_DECAYED = (*_POSITIONS, *_TOKENS)


def parameter_groups(
    model: DualEncoder, config: TrainConfig, heads: torch.nn.Module | None = None
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups of equal learning rate and weight decay.

    Weights with fewer than two dimensions (norms, biases, logit scale and bias), class and register tokens and
    embeddings of positions are never decayed: decay would pull the temperature of CLIP from 100 to 80 in 10,000
    ordinary steps. With `layer_decay` the rate of each parameter of a pretrained tower is multiplied by its factor of
    `layer_factors`.

    Args:
        model: its parameters are grouped.
        config: gives the rates and the decay.
        heads: heads that the model has only while it trains; they learn at the rate of fresh heads.

    Raises:
        UsageError: see `layer_factors`.
    """
    factors = {} if config.layer_decay is None else layer_factors(model, config.layer_decay)
    scale_and_bias = {id(model.logit_scale), id(model.logit_bias)}
    fresh = model.fresh
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in scale_and_bias:
            rate = scale_rate(model, config)
        else:
            rate = config.head_learning_rate if name in fresh else config.learning_rate
        rate *= factors.get(name, 1.0)
        groups[rate, _weight_decay(name, parameter, config)].append(parameter)
    for parameter in () if heads is None else heads.parameters():
        if parameter.requires_grad:
            groups[config.head_learning_rate, _weight_decay("", parameter, config)].append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _weight_decay(name: str, parameter: torch.nn.Parameter, config: TrainConfig) -> float:
    is_exempt = parameter.ndim < 2 or any(part in name for part in _NOT_DECAYED)
    return 0.0 if is_exempt else config.weight_decay


def layer_factors(model: DualEncoder, decay: float) -> dict[str, float]:
    """Return the factor of the learning rate for each trained parameter of the towers, by its name in the model.

    Block i of a tower's n learns at ``decay ** (n - i)``, what its first block reads (patches, tokens, positions) at
    ``decay ** n``, and the last block with all that comes after it at 1: layer-wise learning-rate decay (Clark et al.
    2020, ELECTRA, section 3.1; Bao et al. 2022, BEiT), for each tower by its own depth. Frozen blocks count, too.
    LoRA decays with the block that it adapts; weights that began at random otherwise, and projections, never do.

    Raises:
        UsageError: no tower has pretrained weights that train, or one that has them has no blocks.
    """
    factors: dict[str, float] = {}
    for modality in MODALITIES:
        names = []
        for name in _pretrained_names(model):
            if model.backend.belongs_to(modality, name.removeprefix(ROOT), head=False):
                names.append(name)
        if names:
            factors_of_tower = _factors_by_depth(model, modality, decay)
            factors |= {name: factors_of_tower[name] for name in names}
    if not factors:
        raise UsageError(
            "layer_decay is for towers that train from pretrained weights, and there is none",
            where="layer_decay",
            fix="leave it out",
        )
    return factors


def _pretrained_names(model: DualEncoder) -> list[str]:
    """Return the names of trained weights that were pretrained, or are LoRA, which changes pretrained ones."""
    fresh = model.fresh
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name in trained if name not in fresh or MARK in name]


def _factors_by_depth(model: DualEncoder, modality: Modality, decay: float) -> dict[str, float]:
    """Return the factor for each parameter of a tower, by its name in the model."""
    try:
        depths = parameters_by_depth(model.backend, model.processor, modality)
    except ModelError as error:
        raise UsageError(error.message, where="layer_decay", fix="leave it out: one rate for all") from error
    n = len(depths.blocks)
    factors = dict.fromkeys(depths.before, decay**n)
    for i, names in enumerate(depths.blocks, 1):
        factors |= dict.fromkeys(names, decay ** (n - i))
    factors |= dict.fromkeys(depths.after, 1.0)
    return {f"{ROOT}{name}": factor for name, factor in factors.items()}


def scale_rate(model: DualEncoder, config: TrainConfig) -> float:
    """Return the peak learning rate of the logit scale and bias."""
    fresh_heads = any(MARK not in name for name in model.fresh)  # LoRA is fresh, but says nothing about the scale
    if config.scale_learning_rate is not None:
        return config.scale_learning_rate
    return config.head_learning_rate if fresh_heads else config.learning_rate


def build_optimizer(model: DualEncoder, config: TrainConfig, heads: torch.nn.Module | None = None) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`, with one fused kernel a step."""
    groups = parameter_groups(model, config, heads)
    if config.layer_decay is not None and distributed.is_main():
        rates = [group["peak"] for group in groups]
        message = "layer_decay %g: %d groups of parameters, at learning rates from %.3g to %.3g"
        logger.info(message, config.layer_decay, len(groups), min(rates), max(rates))
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def schedule(step: int, total: int, warmup: float) -> float:
    """Return the factor of the peak learning rate at `step` of `total`, from 0: linear warm-up, half cosine to 0.

    The loop sets the rate from it directly; a scheduler prepared by Accelerate would step once per process.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def clip_gradients(
    accelerator: Accelerator, wrapped: torch.nn.Module, module: torch.nn.Module, limit: float | None
) -> float:
    """Return the norm of the gradient, and clip the gradient if the norm is finite.

    A NaN is not clipped, because it would spread to every parameter.

    Args:
        accelerator: computed the gradients.
        wrapped: the module as Accelerate wrapped it.
        module: the module itself.
        limit: largest norm; None: no limit.
    """
    limit = math.inf if limit is None else limit
    if accelerator.distributed_type == "FSDP":  # only the wrapper knows all shards
        return float(accelerator.clip_grad_norm_(wrapped.parameters(), limit))
    accelerator.unscale_gradients()
    trained = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if limit < math.inf and bool(norm.isfinite()):
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return float(norm)
