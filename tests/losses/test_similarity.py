"""Notions of similarity: what they call alike, what is known not to be a negative, and how little a new one takes."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipkit import Graded, Paired, SameGroup, Views, info_nce
from clipkit.errors import UsageError
from clipkit.losses.contrastive import EmbeddedBatch
from clipkit.losses.similarity import Similarity, key_columns, target


def keys(**columns):
    n = len(next(iter(columns.values())))
    return {"row": torch.arange(n)} | {name: torch.as_tensor(values) for name, values in columns.items()}


# --- a new notion, as a user would write it


@dataclass(frozen=True, kw_only=True)
class Nearby(Similarity):
    """Photos taken within walking distance are alike: exp(-kilometres)."""

    kilometres: float = 1.0

    @property
    def numbers(self):
        return ("latitude", "longitude")

    def affinity(self, rows, cols):
        points = [torch.stack([each[name] for name in self.numbers], dim=1).deg2rad() for each in (rows, cols)]
        (a, x), (b, y) = (p.T.unsqueeze(axis) for p, axis in zip(points, (2, 1), strict=True))
        inner = ((b - a) / 2).sin() ** 2 + a.cos() * b.cos() * ((y - x) / 2).sin() ** 2
        return (-2 * 6371 * inner.sqrt().asin() / self.kilometres).exp()


def test_a_new_notion_is_one_small_class():
    places = keys(latitude=[48.8584, 48.8606, 40.6892], longitude=[2.2945, 2.3376, -74.0445])
    similar = Nearby(kilometres=5)  # Eiffel tower and Louvre are 3.2 km apart
    assert similar.affinity(places, places)[0].tolist() == pytest.approx([1, math.exp(-3.16 / 5), 0], abs=0.01)
    emb = normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    found = info_nce(EmbeddedBatch(emb, places), EmbeddedBatch(emb, places), similar, torch.tensor(5.0), tile=2)
    wanted = target(similar, places, places)
    wanted = cross_entropy(5 * emb @ emb.T, wanted / wanted.sum(1, keepdim=True))
    assert float(found.loss) == pytest.approx(float(wanted), rel=1e-6)
    assert key_columns([similar]) == ([], ["latitude", "longitude"])


# --- graded


def test_a_hierarchy_counts_the_levels_until_two_samples_part():
    levels = keys(order=[0, 0, 0, 1], family=[0, 0, 1, 0], species=[0, 1, 0, -1])
    found = Graded(("order", "family", "species"), "hierarchy").affinity(levels, levels)
    third = 1 / 3
    wanted = [[1, 2 * third, third, 0], [2 * third, 1, third, 0], [third, third, 1, 0], [0, 0, 0, 1]]
    assert found.equal(torch.tensor(wanted))


def test_the_softmax_of_a_teacher_is_the_target():
    generator = torch.Generator().manual_seed(1)
    image, text = (normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2))
    teacher = keys(image_t=image, text_t=text)
    similar = Graded("image_t", "softmax", against="text_t", softness=0.01)
    found = target(similar, teacher, teacher)
    for axis in (0, 1):
        wanted = (image @ text.T / 0.01).double().softmax(axis)
        assert (found / found.sum(axis, keepdim=True)).allclose(wanted, atol=1e-4)
    # a student that is the teacher has nothing left to learn: KL and gradient are 0
    a, b = (each.clone().requires_grad_() for each in (image, text))
    student = info_nce(EmbeddedBatch(a, teacher), EmbeddedBatch(b, teacher), similar, torch.tensor(100.0))
    student.loss.backward()
    assert abs(float(student.kl)) < 1e-5
    assert max(float(each.grad.abs().max()) for each in (a, b)) < 1e-4
    assert float(student.loss.detach()) > 1e-3


def test_any_function_of_features_will_do():
    price = keys(price=[1.0, 2.0, float("nan")])
    near = Graded("price", lambda a, b: (-(a - b.T).abs()).exp())
    assert near.affinity(price, price)[0, :2].tolist() == pytest.approx([1, math.exp(-1)])


# --- what is known


@pytest.mark.parametrize(("treat", "wanted"), [("positive", 1.0), ("ignore", -1.0), ("negative", 0.0)])
def test_duplicates_are_what_the_user_says(treat, wanted):
    texts = keys(texts=[7, 7, 8, -1, -1])
    found = target(Paired(known={"texts": treat}), texts, texts)
    expected = torch.eye(5)
    expected[0, 1] = expected[1, 0] = wanted
    assert found.equal(expected)


def test_a_hard_negative_that_is_none_is_left_out():
    rows, cols = keys(texts=[7, 8]), {"row": torch.tensor([0, 1, -1, -1]), "texts": torch.tensor([7, 8, 7, 9])}
    hard = torch.tensor([[False, False, True, True]] * 2)
    for treat in ("positive", "ignore"):
        found = target(Paired(known={"texts": treat}), rows, cols, hard)
        assert found.tolist() == [[1, 0, -1, 0], [0, 1, 0, 0]]


def test_ignored_duplicates_leave_the_loss():
    generator = torch.Generator().manual_seed(2)
    a, b = (normalize(torch.randn(4, 5, generator=generator), dim=1) for _ in range(2))
    known = keys(label=[0, 0, 1, 2])
    found = info_nce(
        EmbeddedBatch(a, known), EmbeddedBatch(b, known), Paired(known={"label": "ignore"}), torch.tensor(3.0)
    )
    logits = 3 * a @ b.T
    logits[0, 1] = logits[1, 0] = -torch.inf
    wanted = (cross_entropy(logits, torch.arange(4)) + cross_entropy(logits.T, torch.arange(4))) / 2
    assert float(found.loss) == pytest.approx(float(wanted), rel=1e-6)


def test_scores_weigh_rows():
    generator = torch.Generator().manual_seed(3)
    a, b = (normalize(torch.randn(4, 5, generator=generator), dim=1) for _ in range(2))
    scores = torch.tensor([1.0, 0.0, 2.0, 1.0])
    known = keys(score=scores)
    found = info_nce(EmbeddedBatch(a, known), EmbeddedBatch(b, known), Paired(score="score"), torch.tensor(3.0), tile=3)
    each = [cross_entropy(z, torch.arange(4), reduction="none") for z in (3 * a @ b.T, 3 * b @ a.T)]
    assert float(found.loss) == pytest.approx(float(sum((scores * e).sum() / 4 for e in each) / 2), rel=1e-6)


# --- options that make no sense


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Paired(weight=0), "weight of a notion of similarity is greater than 0"),
        (lambda: Paired(temperature=-1), "a temperature is greater than 0"),
        (lambda: Paired(known={"texts": "positiv"}), "one of positive, ignore, negative; found 'positiv'"),
        (lambda: Paired(between=("image", "sound")), "`between` names two of image, text; found 'sound'"),
        (lambda: Paired(views=2), "views are compared with each other"),
        (lambda: Views(views=1), "views are compared with each other, two or more; found views=1"),
        (lambda: Paired(head="mlp"), "a head of its own projects images"),
        (lambda: SameGroup("g", between=("image", "image"), head="mlp"), "needs a temperature of its own"),
        (lambda: Graded("f", "cosin"), "similarity is one of cosine, softmax, hierarchy"),
        (lambda: Graded("f", "hierarchy", against="g"), "a hierarchy has the same levels on both sides"),
        (lambda: Graded("f", "softmax", softness=0.001), "softness is greater than 0.003"),
        (lambda: key_columns([SameGroup("price"), Graded("price")]), "'price' is wanted as a group and as a number"),
    ],
)
def test_what_is_wrong_is_named(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_affinities_of_a_tile_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(4)
    known = keys(g=[0, 0, 1, 1, -1, 2], f=torch.randn(6, 3, generator=generator))
    for similar in (Paired(), SameGroup("g"), Graded("f"), Graded("f", "softmax"), Views()):
        whole = target(similar, known, known)
        for r, c in itertools.product((slice(0, 2), slice(2, 6)), repeat=2):
            part = target(similar, *({name: each[s] for name, each in known.items()} for s in (r, c)))
            assert part.allclose(whole[r, c], rtol=1e-4, atol=1e-30)
