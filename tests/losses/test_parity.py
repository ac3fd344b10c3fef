"""The engine's values and gradients beside those of the field's libraries, on random inputs, in one process."""

import open_clip.loss
import pytest
import torch
from torch.nn.functional import normalize

from clipkit import Paired, SameGroup, info_nce, sigmoid_loss
from clipkit.losses.contrastive import EmbeddedBatch

N, DIM = 24, 16
LABELS = torch.arange(N) % 7  # every class has several members


def inputs():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, N, DIM, generator=generator, dtype=torch.float64)
    return [each.clone().requires_grad_() for each in raw]


def same(ours, theirs):
    """Values and gradients agree to 1e-6 of their size."""
    found = []
    for loss in (ours, theirs):
        tensors = inputs()
        value = loss(*(normalize(each, dim=1) for each in tensors))
        value.backward()
        found.append([value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in tensors)])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm().clamp(min=1e-12)) < 1e-6


def sides(*embeddings):
    keys = {"row": torch.arange(N), "label": LABELS}
    return [EmbeddedBatch(each, keys) for each in embeddings]


@pytest.mark.parametrize("tile", [None, 7])
def test_open_clip_clip_loss(tile):
    scale = torch.tensor(14.3, dtype=torch.float64)
    theirs = open_clip.loss.ClipLoss()
    same(lambda a, b: info_nce(*sides(a, b), Paired(), scale, tile=tile).loss, lambda a, b: theirs(a, b, scale))


@pytest.mark.parametrize("tile", [None, 7])
def test_open_clip_siglip_loss(tile):
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    theirs = open_clip.loss.SigLipLoss()
    same(
        lambda a, b: sigmoid_loss(*sides(a, b), Paired(), scale, bias, tile=tile).loss,
        lambda a, b: theirs(a, b, scale, bias),
    )


def test_sentence_transformers_multiple_negatives_ranking_loss():
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    directions = ("query_to_doc", "doc_to_query")
    theirs = MultipleNegativesRankingLoss(None, scale=20.0, directions=directions, partition_mode="per_direction")
    scale = torch.tensor(20.0, dtype=torch.float64)
    same(
        lambda a, b: info_nce(*sides(a, b), Paired(), scale).loss,
        lambda a, b: theirs.compute_loss_from_embeddings([a, b], None),
    )


@pytest.mark.parametrize("tile", [None, 7])
def test_pytorch_metric_learning_sup_con(tile):
    from pytorch_metric_learning.losses import SupConLoss

    similar = SameGroup("label", between=("image", "image"), temperature=0.1)
    theirs, scale = SupConLoss(temperature=0.1), torch.tensor(10.0, dtype=torch.float64)

    def ours(a, _):
        (side,) = sides(a)
        return info_nce(side, side, similar, scale, tile=tile).loss

    same(ours, lambda a, _: theirs(a, LABELS))
