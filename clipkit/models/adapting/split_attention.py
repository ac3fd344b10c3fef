"""torch's MultiheadAttention taken apart, so that each of its four projections is a layer of its own.

LoRA needs this: peft 0.21 adapts the packed module by adding to its weights before each forward pass and
subtracting after it. That adds the output projection's update twice (measured: 2.00 times), with the gradient
of one, and lets the frozen weights drift by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitAttention(nn.Module):
    """Computes what a packed `nn.MultiheadAttention` does, from four linear layers."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.dropout, self.batch_first = packed.num_heads, packed.dropout, packed.batch_first
        biases = [None] * 3 if packed.in_proj_bias is None else packed.in_proj_bias.detach().chunk(3)
        weights = packed.in_proj_weight.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(packed.out_proj.weight.detach(), _detached(packed.out_proj.bias))
        self.requires_grad_(packed.in_proj_weight.requires_grad).train(packed.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """(n, length, width) each, or (length, n, width) as `batch_first` says; the mask is added, or True hides."""
        if not self.batch_first:
            query, key, value = (sequence.transpose(0, 1) for sequence in (query, key, value))
        q, k, v = (
            layer(sequence).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, sequence in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if attn_mask is not None and attn_mask.ndim == 3:  # (n * heads, length, length)
            attn_mask = attn_mask.reshape(-1, self.heads, *attn_mask.shape[1:])
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype is torch.bool else attn_mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout if self.training else 0.0)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def packed(self) -> nn.MultiheadAttention:
        """The module it was made from, with the weights as they are now."""
        width, bias = self.q_proj.in_features, self.q_proj.bias is not None
        options = {"dropout": self.dropout, "bias": bias, "batch_first": self.batch_first}
        whole = nn.MultiheadAttention(width, self.heads, **options, device="meta")
        apart = (self.q_proj, self.k_proj, self.v_proj)
        with torch.no_grad():
            whole.in_proj_weight = nn.Parameter(torch.cat([layer.weight for layer in apart]))
            whole.out_proj.weight = nn.Parameter(self.out_proj.weight.clone())
            if bias:
                whole.in_proj_bias = nn.Parameter(torch.cat([layer.bias for layer in apart]))
                whole.out_proj.bias = nn.Parameter(self.out_proj.bias.clone())
        return whole.requires_grad_(self.q_proj.weight.requires_grad).train(self.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
