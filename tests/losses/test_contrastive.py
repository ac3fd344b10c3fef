"""info_nce against hand-worked values, float64 and one big batch over uneven ranks."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit import distributed
from clipkit.errors import UsageError
from clipkit.losses.contrastive import EmbeddedBatch, info_nce, matryoshka, prior_bias, sigmoid_loss
from clipkit.losses.similarity import Graded, Paired, SameGroup

ROWS, DIM = 11, 7
GROUPS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, -1, -1, 2])


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, ROWS, DIM, generator=generator, dtype=torch.float64)
    scale = torch.tensor(9.0, dtype=dtype, requires_grad=True)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale


def loss_of(image, text, scale, similar, rows):
    keys = {"row": torch.arange(ROWS)[rows], "group": GROUPS[rows]}
    a, b = (EmbeddedBatch(normalize(each[rows], dim=1), keys) for each in (image, text))
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
    same = EmbeddedBatch(torch.ones(4, 4) / 2, keys)
    assert float(info_nce(same, same, Paired(), torch.tensor(5.0)).loss) == pytest.approx(math.log(4))
    pair = float(info_nce(EmbeddedBatch(eye, keys), EmbeddedBatch(eye, keys), Paired(), torch.tensor(2.0)).loss)
    assert pair == pytest.approx(math.log(math.e**2 + 3) - 2)
    # two positives a row: log-sum-exp less the mean of their logits 2 and 0
    group = float(
        info_nce(EmbeddedBatch(eye, keys), EmbeddedBatch(eye, keys), SameGroup("group"), torch.tensor(2.0)).loss
    )
    assert group == pytest.approx(math.log(math.e**2 + 3) - 1)


def test_the_floor_with_duplicates_is_the_log_of_their_number():
    twice = torch.eye(3).repeat_interleave(2, dim=0)
    keys = {"row": torch.arange(6), "group": torch.arange(3).repeat_interleave(2)}
    for similar in (Paired(), SameGroup("group")):
        value = info_nce(EmbeddedBatch(twice, keys), EmbeddedBatch(twice, keys), similar, torch.tensor(80.0)).loss
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


# --- tiles, targets with more in them


def graded_batch(dtype=torch.float32):
    image, text, scale = batch(dtype)
    feature = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(8))
    return image, text, scale, {"row": torch.arange(ROWS), "group": GROUPS, "f": feature}


@pytest.mark.parametrize("tile", [None, 1, 4, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("similar", [Paired(), SameGroup("group"), Graded("f"), Graded("f", "softmax", softness=0.3)])
def test_smoothed_and_graded_targets(similar, smoothing, tile):
    image, text, scale, keys = graded_batch()
    a, b = (EmbeddedBatch(normalize(each, dim=1), keys) for each in (image, text))
    found = info_nce(a, b, similar, scale, label_smoothing=smoothing, tile=tile)
    found.loss.backward()
    exact = batch(torch.float64)
    logits = exact[2] * normalize(exact[0], dim=1) @ normalize(exact[1], dim=1).T
    affinity = similar.affinity(keys, keys).double()
    halves = []
    for z, each in ((logits, affinity), (logits.T, affinity.T)):
        target = (1 - smoothing) * each / each.sum(1, keepdim=True) + smoothing / ROWS
        halves.append((cross_entropy(z, target), torch.special.entr(target).sum() / ROWS))
    wanted = (halves[0][0] + halves[1][0]) / 2
    wanted.backward()
    assert relative(found.loss, wanted) < 1e-6
    assert float(found.kl) == pytest.approx(float((wanted - (halves[0][1] + halves[1][1]) / 2).detach()), abs=2e-6)
    for ours, theirs in zip((image, text, scale), exact, strict=True):
        assert relative(ours.grad, theirs.grad) < 2e-6


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_of_the_sigmoid(smoothing, tile):
    image, text, scale, keys = graded_batch(torch.float64)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    a, b = (EmbeddedBatch(normalize(each, dim=1), keys) for each in (image, text))
    found = sigmoid_loss(a, b, Graded("f"), scale, bias, label_smoothing=smoothing, tile=tile)
    grads = torch.autograd.grad(found.loss, (image, text, scale, bias), retain_graph=True)
    label = Graded("f").affinity(keys, keys).double() * (1 - smoothing) + smoothing / 2
    logits = scale * a.emb @ b.emb.T + bias
    wanted = binary_cross_entropy_with_logits(logits, label, reduction="sum") / ROWS
    floor = binary_cross_entropy(label, label, reduction="sum") / ROWS
    assert relative(found.loss, wanted) < 1e-7
    assert float(found.kl) == pytest.approx(float((wanted - floor).detach()), rel=1e-6)
    for ours, theirs in zip(grads, torch.autograd.grad(wanted, (image, text, scale, bias)), strict=True):
        assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_a_second_backward_pass_gives_the_same(loss, tile):
    image, text, scale, keys = graded_batch()
    bias = torch.tensor(-2.0, requires_grad=True)
    a, b = (EmbeddedBatch(normalize(each, dim=1), keys) for each in (image, text))
    if loss == "sigmoid":
        value, inputs = sigmoid_loss(a, b, Graded("f"), scale, bias, tile=tile).loss, (image, text, scale, bias)
    else:
        value, inputs = info_nce(a, b, Graded("f"), scale, tile=tile).loss, (image, text, scale)
    first = [each.clone() for each in torch.autograd.grad(value, inputs, retain_graph=True)]
    for one, two in zip(first, torch.autograd.grad(value, inputs), strict=True):
        assert relative(two, one) < 1e-6


class Largest(TorchDispatchMode):
    """The most elements that any tensor had while the block ran."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.most = max(self.most, each.numel())
        return out


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("similar", [Paired(), Graded("f", "softmax"), Paired(known={"f": "ignore"})], ids=str)
def test_no_matrix_of_all_pairs_is_ever_made(loss, similar):
    n, dim, tile = 200, 6, 20
    emb = torch.randn(2, n, dim)
    numbers = similar.numbers
    keys = {"row": torch.arange(n), "f": torch.randn(n, 3) if numbers else torch.arange(n) // 2}

    def most(tile):
        a, b = (EmbeddedBatch(each.clone().requires_grad_(), keys) for each in emb)
        scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
        with Largest() as largest:
            if loss == "sigmoid":
                sigmoid_loss(a, b, similar, scale, bias, label_smoothing=0.1, tile=tile).loss.backward()
            else:
                info_nce(a, b, similar, scale, label_smoothing=0.1, tile=tile).loss.backward()
        return largest.most

    assert most(tile) <= n * dim
    assert most(None) == n * n


def test_matryoshka_is_the_mean_over_its_dimensions():
    image, text, scale, keys = graded_batch()
    a, b = (EmbeddedBatch(normalize(each, dim=1), keys) for each in (image, text))

    def loss(a, b):
        return info_nce(a, b, Paired(), scale)

    each = [loss(*(EmbeddedBatch(normalize(x[:, :dim], dim=1), keys) for x in (image, text))).loss for dim in (2, DIM)]
    assert float(matryoshka(loss, a, b, (2, DIM)).loss.detach()) == pytest.approx(float(sum(each).detach()) / 2)
    with pytest.raises(UsageError, match="between 1 and 7; found 8"):
        matryoshka(loss, a, b, (8,))


def test_the_prior_of_a_fresh_bias_is_one_positive_a_row():
    n = 64
    keys = {"row": torch.arange(n)}
    nothing = EmbeddedBatch(torch.zeros(n, 3), keys)  # logits are the bias alone
    bias = torch.tensor(prior_bias(n), requires_grad=True)
    sigmoid_loss(nothing, nothing, Paired(), torch.tensor(10.0), bias).loss.backward()
    assert abs(float(bias.grad)) < 1e-5


def test_a_row_without_a_positive_is_left_out_of_the_mean():
    keys = {"row": torch.arange(5), "g": torch.tensor([0, 0, 1, 1, 2])}
    emb = normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), dim=1).requires_grad_()
    similar = SameGroup("g", between=("image", "image"), temperature=0.2)
    found = info_nce(EmbeddedBatch(emb, keys), EmbeddedBatch(emb, keys), similar, torch.tensor(5.0), tile=2)
    logits = (5 * emb @ emb.T).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    wanted = cross_entropy(logits[:4], torch.tensor([1, 0, 3, 2]))
    assert relative(found.loss, wanted) < 1e-6
    ours, theirs = (torch.autograd.grad(each, emb)[0] for each in (found.loss, wanted))
    assert relative(ours, theirs) < 1e-6


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

    def own_slot_only(rows, counts):
        found, start = real(rows.detach()), distributed.rows_before(len(rows))
        return torch.cat([found[:start], rows, found[start + len(rows) :]])

    monkeypatch.setattr(distributed, "gather_rows", own_slot_only)
    assert max(errors_over_ranks(CUTS[0], Paired())) > 0.05
