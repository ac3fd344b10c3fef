"""info_nce against hand-worked values, float64 and one big batch over uneven ranks."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy, normalize

from clipkit import distributed
from clipkit.losses.contrastive import Embedded, info_nce
from clipkit.losses.similar import Paired, SameGroup

ROWS, DIM = 11, 7
GROUPS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, -1, -1, 2])


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, ROWS, DIM, generator=generator, dtype=torch.float64)
    scale = torch.tensor(9.0, dtype=dtype, requires_grad=True)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale


def loss_of(image, text, scale, similar, rows):
    keys = {"row": torch.arange(ROWS)[rows], "group": GROUPS[rows]}
    a, b = (Embedded(normalize(each[rows], dim=1), keys) for each in (image, text))
    return info_nce(a, b, similar, scale).loss


def reference(image, text, scale, similar):
    """The same mathematics, written with float64 target matrices and torch's own cross-entropy."""
    logits = scale * normalize(image, dim=1) @ normalize(text, dim=1).T
    same = torch.eye(ROWS, dtype=torch.bool)
    if isinstance(similar, SameGroup):
        same |= (GROUPS[:, None] == GROUPS[None]) & (GROUPS >= 0)[:, None]
    target = same.double()
    rows = cross_entropy(logits, target / target.sum(1, keepdim=True))
    cols = cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (rows + cols) / 2


def relative(found, wanted):
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("similar", [Paired(), SameGroup("group")], ids=["paired", "group"])
def test_value_and_gradients_are_the_float64_ones(similar):
    inputs, exact = batch(), batch(torch.float64)
    loss, wanted = loss_of(*inputs, similar, slice(None)), reference(*exact, similar)
    loss.backward()
    wanted.backward()
    assert relative(loss, wanted) < 1e-6
    for ours, theirs in zip(inputs, exact, strict=True):
        assert relative(ours.grad, theirs.grad) < 1e-6


def test_known_values():
    eye = torch.eye(4)
    keys = {"row": torch.arange(4), "group": torch.tensor([0, 0, 1, 1])}
    same = Embedded(torch.ones(4, 4) / 2, keys)
    assert float(info_nce(same, same, Paired(), torch.tensor(5.0)).loss) == pytest.approx(math.log(4))
    pair = float(info_nce(Embedded(eye, keys), Embedded(eye, keys), Paired(), torch.tensor(2.0)).loss)
    assert pair == pytest.approx(math.log(math.e**2 + 3) - 2)
    # two positives a row: log-sum-exp less the mean of their logits 2 and 0
    group = float(info_nce(Embedded(eye, keys), Embedded(eye, keys), SameGroup("group"), torch.tensor(2.0)).loss)
    assert group == pytest.approx(math.log(math.e**2 + 3) - 1)


def test_the_floor_with_duplicates_is_the_log_of_their_number():
    twice = torch.eye(3).repeat_interleave(2, dim=0)
    keys = {"row": torch.arange(6), "group": torch.arange(3).repeat_interleave(2)}
    for similar in (Paired(), SameGroup("group")):
        value = info_nce(Embedded(twice, keys), Embedded(twice, keys), similar, torch.tensor(80.0)).loss
        assert float(value) == pytest.approx(math.log(2), abs=1e-5)  # fp32 near 80: 8e-6


def test_missing_groups_match_only_themselves():
    affinity = SameGroup("group").affinity(
        {"row": torch.arange(3), "group": torch.tensor([-1, -1, 5])},
        {"row": torch.arange(3), "group": torch.tensor([-1, -1, 5])},
    )
    assert affinity.equal(torch.eye(3))


class IgnoreNeighbour(Paired):
    def affinity(self, rows, cols):
        found = super().affinity(rows, cols)
        return found.masked_fill(rows["row"][:, None] + 1 == cols["row"][None], -1)


def test_ignored_columns_leave_the_softmax():
    image, text, scale = batch()
    loss_of(image, text, scale, IgnoreNeighbour(), slice(None)).backward()
    assert torch.isfinite(image.grad).all()
    logits = (scale * normalize(image, dim=1) @ normalize(text, dim=1).T).detach()
    barred = torch.diag(torch.ones(ROWS - 1), 1).bool()
    ids = torch.arange(ROWS)
    rows = cross_entropy(logits.masked_fill(barred, -torch.inf), ids)
    cols = cross_entropy(logits.T.masked_fill(barred.T, -torch.inf), ids)
    found = loss_of(image, text, scale, IgnoreNeighbour(), slice(None))
    assert found.detach() == pytest.approx(float(rows + cols) / 2, rel=1e-6)


def test_bf16_autocast_leaves_the_logits_in_fp32():
    image, text, scale = batch()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of(image, text, scale, Paired(), slice(None))
    assert inside.dtype is torch.float32
    assert inside.equal(loss_of(image, text, scale, Paired(), slice(None)))


# --- over ranks: rank r owns the rows of CUTS[r]; DDP's mean over ranks is written out

CUTS = [[slice(0, 4), slice(4, ROWS)], [slice(0, 8), slice(8, 8), slice(8, ROWS)]]  # uneven; one rank empty


def _on_rank(rank, store, cuts, similar, per_rank_mean, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, len(cuts)), rank=rank, world_size=len(cuts))
    image, text, scale = batch()
    loss = loss_of(image, text, scale, similar, cuts[rank])
    if per_rank_mean:  # the usual mistake: each rank divides by its own number of rows
        own = cuts[rank].stop - cuts[rank].start
        loss = loss * ROWS / (len(cuts) * own)
    loss.backward()
    value, grads = loss.detach().clone(), [each.grad.clone() for each in (image, text, scale)]
    for each in (value, *grads):
        dist.all_reduce(each)
        each /= len(cuts)
    if rank == 0:
        torch.save((value, grads), out)
    dist.destroy_process_group()


def over_ranks(cuts, similar, *, per_rank_mean=False):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.pt"
        args = (str(Path(folder) / "store"), cuts, similar, per_rank_mean, str(out))
        mp.start_processes(_on_rank, args, nprocs=len(cuts), start_method="fork")
        return torch.load(out)


def errors_over_ranks(cuts, similar, **kwargs):
    exact = batch(torch.float64)
    wanted = reference(*exact, similar)
    wanted.backward()
    value, grads = over_ranks(cuts, similar, **kwargs)
    return [relative(value, wanted), *(relative(g, e.grad) for g, e in zip(grads, exact, strict=True))]


@pytest.mark.parametrize("cuts", CUTS, ids=["two uneven", "three, one empty"])
@pytest.mark.parametrize("similar", [Paired(), SameGroup("group")], ids=["paired", "group"])
def test_any_ranks_give_the_big_batch(cuts, similar):
    assert max(errors_over_ranks(cuts, similar)) < 1e-6


def test_a_mean_per_rank_would_not():
    assert max(errors_over_ranks(CUTS[0], Paired(), per_rank_mean=True)) > 0.05


def test_a_gather_without_gradient_would_not(monkeypatch):
    real = distributed.gather_rows

    def own_slot_only(rows):
        found, start = real(rows.detach()), distributed.rows_before(len(rows))
        return torch.cat([found[:start], rows, found[start + len(rows) :]])

    monkeypatch.setattr(distributed, "gather_rows", own_slot_only)
    assert max(errors_over_ranks(CUTS[0], Paired())) > 0.05
