from __future__ import annotations

import pytest
import torch
from torch import nn

from clipkit.models.adapting.split_attention import SplitAttention


def causal(length: int) -> torch.Tensor:
    return torch.full((length, length), float("-inf")).triu_(1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["none", "added", "hidden", "each"])
def test_it_computes_what_the_packed_module_does(batch_first: bool, bias: bool, mask: str) -> None:
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first).double()
    x, y = torch.randn(2, 6, 16).double(), torch.randn(2, 6, 16).double()
    masks = {"none": None, "added": causal(6).double(), "hidden": causal(6).bool()}
    masks["each"] = (causal(6) + torch.randn(8, 6, 6)).double()  # one for each head of each sample
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    expected = packed(x, y, y, need_weights=False, attn_mask=masks[mask])[0]
    found, weights = SplitAttention(packed)(x, y, y, need_weights=False, attn_mask=masks[mask])
    assert weights is None
    assert (found - expected).abs().max() < 1e-12


def test_packing_again_gives_the_same_module() -> None:
    packed = nn.MultiheadAttention(16, 4, dropout=0.2, batch_first=True).eval().requires_grad_(False)
    state = torch.get_rng_state()
    again = SplitAttention(packed).packed()
    assert torch.equal(torch.get_rng_state(), state)
    assert list(again.state_dict()) == list(packed.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), packed.parameters(), strict=True))
    assert (again.num_heads, again.dropout, again.batch_first, again.training) == (4, 0.2, True, False)
    assert not any(p.requires_grad for p in again.parameters())
