"""Weights of one architecture under the names of two libraries: transformers' on the left, open_clip's on the right.

CLIP with a ViT, and SigLIP (timm's ViT with attention pooling) exist in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.errors import ModelError

Weights = Mapping[str, Tensor]


class Rule(NamedTuple):
    """Some tensors here are some tensors there: `there(*left)` gives the right ones, `back(*right)` the left ones."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    there: Callable[..., tuple[Tensor, ...]]
    back: Callable[..., tuple[Tensor, ...]]


def clip_rules(vision_layers: int, text_layers: int) -> Iterator[Rule]:
    """CLIPModel and open_clip's CLIP with its own VisionTransformer."""
    yield _same("logit_scale", "logit_scale")
    yield _same("text_model.embeddings.token_embedding.weight", "token_embedding.weight")
    yield _same("text_model.embeddings.position_embedding.weight", "positional_embedding")
    yield from _affine("text_model.final_layer_norm", "ln_final")
    yield _turned("text_projection.weight", "text_projection")
    yield from _open_clip_blocks("text_model.encoder.layers", "transformer.resblocks", text_layers)
    yield _same("vision_model.embeddings.class_embedding", "visual.class_embedding")
    yield _same("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight")
    yield _same("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding")
    yield from _affine("vision_model.pre_layrnorm", "visual.ln_pre")
    yield from _affine("vision_model.post_layernorm", "visual.ln_post")
    yield _turned("visual_projection.weight", "visual.proj")
    yield from _open_clip_blocks("vision_model.encoder.layers", "visual.transformer.resblocks", vision_layers)


def siglip_rules(vision_layers: int, text_layers: int) -> Iterator[Rule]:
    """SiglipModel and open_clip's CustomTextCLIP over a ViT of timm that pools by attention."""
    for name in ("logit_scale", "logit_bias"):
        yield Rule((name,), (name,), lambda x: (x.reshape(()),), lambda x: (x.reshape(1),))
    yield _same("text_model.embeddings.token_embedding.weight", "text.token_embedding.weight")
    yield _same("text_model.embeddings.position_embedding.weight", "text.positional_embedding")
    yield from _affine("text_model.final_layer_norm", "text.ln_final")
    yield from _affine("text_model.head", "text.text_projection")
    yield from _open_clip_blocks("text_model.encoder.layers", "text.transformer.resblocks", text_layers)
    ours, theirs = "vision_model", "visual.trunk"
    yield from _affine(f"{ours}.embeddings.patch_embedding", f"{theirs}.patch_embed.proj")
    positions = f"{ours}.embeddings.position_embedding.weight"
    yield Rule((positions,), (f"{theirs}.pos_embed",), lambda x: (x[None],), lambda x: (x[0],))
    yield from _affine(f"{ours}.post_layernorm", f"{theirs}.norm")
    for layer in range(vision_layers):
        block, other = f"{ours}.encoder.layers.{layer}", f"{theirs}.blocks.{layer}"
        yield from _fused(f"{block}.self_attn", f"{other}.attn.qkv.{{}}")
        names = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
        for left, right in {**names, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
            yield from _affine(f"{block}.{left}", f"{other}.{right}")
    yield from _attention_pool(f"{ours}.head", f"{theirs}.attn_pool")


def _attention_pool(head: str, pool: str) -> Iterator[Rule]:
    yield _same(f"{head}.probe", f"{pool}.latent")
    for parameter in ("weight", "bias"):
        right = (f"{pool}.q.{parameter}", f"{pool}.kv.{parameter}")
        yield Rule((f"{head}.attention.in_proj_{parameter}",), right, _query_apart, lambda q, kv: (torch.cat([q, kv]),))
    names = {"attention.out_proj": "proj", "layernorm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for left, right_name in names.items():
        yield from _affine(f"{head}.{left}", f"{pool}.{right_name}")


def _query_apart(qkv: Tensor) -> tuple[Tensor, ...]:
    third = len(qkv) // 3
    return qkv[:third], qkv[third:]


def _open_clip_blocks(left: str, right: str, layers: int) -> Iterator[Rule]:
    names = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    for layer in range(layers):
        yield from _fused(f"{left}.{layer}.self_attn", f"{right}.{layer}.attn.in_proj_{{}}")
        for ours, theirs in {**names, "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}.items():
            yield from _affine(f"{left}.{layer}.{ours}", f"{right}.{layer}.{theirs}")


def _fused(left: str, right: str) -> Iterator[Rule]:
    for parameter in ("weight", "bias"):
        apart = tuple(f"{left}.{part}_proj.{parameter}" for part in "qkv")
        yield Rule(apart, (right.format(parameter),), lambda *qkv: (torch.cat(qkv),), lambda x: x.chunk(3))


def _affine(left: str, right: str) -> Iterator[Rule]:
    yield _same(f"{left}.weight", f"{right}.weight")
    yield _same(f"{left}.bias", f"{right}.bias")


def _same(left: str, right: str) -> Rule:
    return Rule((left,), (right,), lambda x: (x,), lambda x: (x,))


def _turned(left: str, right: str) -> Rule:
    return Rule((left,), (right,), lambda x: (x.T,), lambda x: (x.T,))


def rename(weights: Weights, rules: Iterator[Rule], *, to_open_clip: bool) -> dict[str, Tensor]:
    """All weights under the other library's names.

    Raises:
        ModelError: a weight that the rules ask for is missing, or one that they do not know is left.
    """
    left: dict[str, Tensor] = dict(weights)
    renamed: dict[str, Tensor] = {}
    for rule in rules:
        names, others, turn = (
            (rule.left, rule.right, rule.there) if to_open_clip else (rule.right, rule.left, rule.back)
        )
        missing = [name for name in names if name not in left]
        if missing:
            raise ModelError(f"it has no weight {missing[0]}, which the other library's architecture asks for")
        tensors = turn(*(left.pop(name) for name in names))
        renamed |= {name: tensor.contiguous().clone() for name, tensor in zip(others, tensors, strict=True)}
    if left:
        some = ", ".join(sorted(left)[:3])
        raise ModelError(f"the other library's architecture has no place for {len(left)} weights: {some}")
    return renamed
