"""Plans of data sets: what is asked to be distinct, balanced or grouped is so in every global batch, whoever asks."""

import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from clipkit import load_pairs
from clipkit.data.batches import plan as plan_module
from clipkit.data.batches.build_plan import build_plan
from clipkit.data.batches.loader import Loader
from clipkit.data.batches.plan import Draw, Plan, hash64
from clipkit.data.dataset import key_values
from clipkit.errors import DataError, UsageError

WORDS = ["a dog", "a cat", "a dog runs", "two cats"]


def rows(n, seed=0, captions=3):
    """Rows whose captions repeat often, with a product, a class and a group."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(n):
        repeated = [WORDS[i] for i in rng.integers(0, 4, rng.integers(0, captions + 1))]
        own = [f"{row} alone"] if rng.random() < 0.7 or not repeated else []
        kind, group = f"kind {row % 7 % 3}", f"group {row % 8}"
        product = None if row % 9 == 0 else f"{group}: {rng.integers(0, n)}"
        found.append({"image": None, "texts": repeated + own, "product": product, "kind": kind, "group": group})
    return found


def repeats(source, draws, column):
    """How many rows of a batch repeat what another has; written without the plan's own numbers."""
    if column == "texts":
        values = [source[draw.row]["texts"][draw.caption] for draw in draws]
    else:
        values = [source[draw.row][column] for draw in draws if source[draw.row][column] is not None]
    return len(values) - len(set(values))


def batches(plan, epochs=3):
    return [plan.batch(epoch, k) for epoch in range(epochs) for k in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("n", [60, 101, 400])
@pytest.mark.parametrize("size", [2, 8, 15])
@pytest.mark.parametrize("distinct", [["texts"], ["product"], ["texts", "product"]], ids="+".join)
def test_nothing_distinct_is_twice_in_a_batch_and_what_is_left_out_is_known(n, size, distinct):
    for seed in range(3):
        source = rows(n, seed)
        plan = build_plan(source, batch_size=size, seed=seed, distinct=distinct)
        for draws in batches(plan):
            assert len(draws) == size
            assert not any(repeats(source, draws, column) for column in distinct)
        for epoch in range(3):
            seen = Counter(draw.row for k in range(plan.steps_per_epoch) for draw in plan.batch(epoch, k))
            assert max(seen.values()) == 1
            assert set(plan.left_out(epoch)) == set(range(n)) - set(seen)
            assert f"{n - len(seen):,} of {n} rows are left out an epoch" in plan.notes[0]


def test_without_the_demand_the_same_check_fails(monkeypatch):
    source = rows(400)
    plain = build_plan(source, batch_size=15)
    assert sum(repeats(source, draws, "texts") for draws in batches(plain)) > 100
    # and with it, if the plan forgets either half: units apart, or another caption of who can give way
    bound = [{**row, "texts": WORDS[i % 4 : i % 4 + 1]} if i % 20 == 0 else row for i, row in enumerate(source)]
    monkeypatch.setattr(plan_module, "joined", lambda keys, n: np.arange(n))
    assert any(
        repeats(bound, draws, "texts") for draws in batches(build_plan(bound, batch_size=15, distinct=["texts"]))
    )
    monkeypatch.undo()
    monkeypatch.setattr(plan_module._Texts, "choose", lambda self, rows, turns: [0] * len(rows))
    assert any(
        repeats(source, draws, "texts") for draws in batches(build_plan(source, batch_size=15, distinct=["texts"]))
    )


def test_all_captions_are_still_shown_in_turn():
    source = [{"image": None, "texts": [f"{row} {i}" for i in range(3)]} for row in range(8)]
    plan = build_plan(source, batch_size=8, distinct=["texts"])
    shown = {row: set() for row in range(8)}
    for epoch in range(3):
        for draw in plan.batch(epoch, 0):
            shown[draw.row].add(draw.caption)
    assert all(captions == {0, 1, 2} for captions in shown.values())


def test_rows_left_out_are_others_each_epoch():
    source = [{"image": None, "texts": ["same" if row < 20 else f"{row}"]} for row in range(60)]
    plan = build_plan(source, batch_size=6, distinct=["texts"])
    assert plan.steps_per_epoch == 8  # 40 + 8 >= 8 x 6, and 40 + 9 < 9 x 6
    shown = sum(plan.shown(epoch) for epoch in range(60))
    assert all(len(plan.left_out(epoch)) == 12 for epoch in range(60))
    assert (shown[20:] == 60).all()
    assert shown[:20].min() > 10  # 24 expected


@pytest.mark.parametrize("options", [{"distinct": ["texts"]}, {"balanced": "kind"}, {"grouped": "group"}, {}])
def test_a_batch_is_a_function_of_seed_epoch_and_number(options):
    source, size = rows(120), 8
    one, two = (build_plan(source, batch_size=size, seed=5, **options) for _ in range(2))
    asked = [(3, 2), (0, 1), (3, 0), (1, 9)]
    assert [two.batch(*each) for each in reversed(asked)] == [one.batch(*each) for each in asked][::-1]
    assert pickle.loads(pickle.dumps(one)).batch(2, 3) == one.batch(2, 3)
    other = build_plan(source, batch_size=size, seed=6, **options)
    assert other.batch(0, 0) != one.batch(0, 0) != one.batch(1, 0)


def test_the_plain_plan_is_what_it_was():
    # a run that was interrupted under an older release goes on with the same batches
    draws = Plan([3] * 10, batch_size=4, seed=7).batch(2, 1)
    order = np.random.Generator(np.random.Philox(hash64(7, 2))).permutation(10)[4:8].tolist()
    assert draws == [Draw(row, (hash64(7, row) + 2) % 3, hash64(7, 2, row)) for row in order]


class Words:
    """Stands where a processor stands: a text's letters as numbers, so that the test can read it back."""

    def images(self, images):
        raise AssertionError("no image is opened")

    def texts(self, texts):
        import torch

        rows = [list(hashlib.sha256(text.encode()).digest()[:6]) for text in texts]
        return {"input_ids": torch.tensor(rows)}


@pytest.mark.parametrize(("world", "workers", "chunks"), [(1, 0, 3), (2, 0, 2), (2, 1, 3), (5, 0, 1)])
def test_ranks_workers_and_cached_chunks_share_one_batch_without_repeats(world, workers, chunks):
    source = rows(130)
    plan = build_plan(source, batch_size=13, seed=1, distinct=["texts", "product"])
    options = {"columns": ["product"], "sides": ["text"], "world_size": world, "workers": workers}
    ranks = [list(Loader(source, Words(), plan, rank=rank, **options).batches(2, 14)) for rank in range(world)]
    alone = list(Loader(source, Words(), plan, columns=["product"], sides=["text"]).batches(2, 14))
    for step, whole in enumerate(alone):
        parts = [part["input_ids"].tolist() for rank in ranks for part in rank[step].split(chunks)]
        together = [tuple(each) for part in parts for each in part]
        assert together == [tuple(each) for each in whole.inputs["input_ids"].tolist()]
        assert len(set(together)) == 13
        products = [code for rank in ranks for code in rank[step].keys["product"].tolist() if code >= 0]
        assert len(set(products)) == len(products)


def test_images_are_distinct_by_their_bytes(tmp_path):
    lines = ["image,text"]
    for row in range(24):
        name = f"{row}.png"
        Image.new("RGB", (8, 8), (row // 3 * 20, 0, 0)).save(tmp_path / name)  # three files of each picture
        lines.append(f"{name},{row} text")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    table = load_pairs(tmp_path / "pairs.csv")
    packed = [{**row, "image": (tmp_path / f"{i}.png").read_bytes()} for i, row in enumerate(table)]
    opened = [{**row, "image": Image.new("RGB", (8, 8), (i // 3 * 20, 0, 0))} for i, row in enumerate(table)]
    found = []
    for source in (table, packed, opened):
        plan = build_plan(source, batch_size=6, distinct=["image"])
        found.append(batches(plan, epochs=4))
        assert plan.steps_per_epoch == 4
        assert all(len({draw.row // 3 for draw in draws}) == 6 for draws in found[-1])
    assert found[0] == found[1] == found[2]
    plain = build_plan(table, batch_size=6)
    assert any(len({draw.row // 3 for draw in draws}) < 6 for draws in batches(plain, epochs=4))


def test_an_impossible_demand_names_the_column_the_figures_and_the_way_out():
    source = [{"image": None, "texts": ["a photo" if row < 600 else f"{row}"]} for row in range(1000)]
    with pytest.raises(UsageError, match=r"can show 256 of 1,000 rows(?s:.)*`texts` stands in 600 rows") as caught:
        build_plan(source, batch_size=256, distinct=["texts"])
    assert "row 0" in caught.value.where
    size = int(caught.value.fix.split("batch_size=")[1].split(",")[0])
    plan = build_plan(source, batch_size=size, distinct=["texts"])  # the fix is one
    assert len(plan.left_out(0)) <= 500
    with pytest.raises(UsageError, match="no column 'knid'"):
        build_plan(rows(20), batch_size=4, distinct=["knid"])


# -- balanced


@pytest.mark.parametrize(("n", "size"), [(60, 4), (97, 10), (200, 33)])
def test_balanced_classes_are_shown_equally_often_and_so_are_their_rows(n, size):
    counts = [n - 3 * n // 10 - n // 20, 3 * n // 10, n // 20]
    source = [{"texts": [f"{k}"], "kind": k} for k, count in enumerate(counts) for _ in range(count)]
    kinds = np.array(key_values(source, "kind"))
    plan = build_plan(source, batch_size=size, balanced="kind")
    assert plan.steps_per_epoch == n // size
    total = np.zeros(n, dtype=int)
    for epoch in range(9):
        shown = plan.shown(epoch)
        total += shown
        assert shown.sum() == plan.steps_per_epoch * size
        by_class = np.bincount(kinds, weights=total)
        assert by_class.max() - by_class.min() <= 1
        for kind in range(3):
            assert np.ptp(total[kinds == kind]) <= 1
        for k in range(plan.steps_per_epoch):
            draws = plan.batch(epoch, k)
            each = np.bincount(kinds[[draw.row for draw in draws]], minlength=3)
            assert np.ptp(each) <= 2
            assert len({draw.seed for draw in draws}) == size  # a row that comes again is augmented anew
            most = max(Counter(draw.row for draw in draws).values())
            assert most == 1 or each.max() > min(counts)
    assert f"3 classes of {min(counts)} to {max(counts)} rows" in plan.notes[0]


def test_a_row_meets_itself_only_where_its_class_is_too_small():
    source = [{"texts": ["x"], "kind": int(row < 5)} for row in range(100)]
    plan = build_plan(source, batch_size=10, balanced="kind")
    for draws in batches(plan):
        assert len({draw.row for draw in draws}) == 10  # five of five rare rows, five common ones
    assert "themselves" not in plan.notes[0]
    small = build_plan(source, batch_size=20, balanced="kind")
    assert all(max(Counter(draw.row for draw in draws).values()) == 2 for draws in batches(small))
    assert "rows of the rarest meet themselves in a batch" in small.notes[0]


def test_balanced_and_distinct_together():
    source = [{"texts": [f"{row // 2}"], "kind": int(row < 20)} for row in range(100)]
    plan = build_plan(source, batch_size=10, balanced="kind", distinct=["texts"])
    for draws in batches(plan):
        assert not repeats(source, draws, "texts")
        assert sum(draw.row < 20 for draw in draws) == 5
    templates = [{"texts": [f"a photo of {row % 5}"], "kind": row % 5} for row in range(100)]
    assert not any(
        repeats(templates, draws, "texts")
        for draws in batches(build_plan(templates, batch_size=5, balanced="kind", distinct=["texts"]))
    )
    with pytest.raises(UsageError, match=r"they would meet(?s:.)*batch_size=5 \(the number of classes\)"):
        build_plan(templates, batch_size=8, balanced="kind", distinct=["texts"])
    crossing = [{"texts": ["x"], "kind": row % 2} for row in range(8)]
    with pytest.raises(UsageError, match="rows 0 and 1 are not, but share a value"):
        build_plan(crossing, batch_size=4, balanced="kind", distinct=["texts"])


# -- grouped


@pytest.mark.parametrize("distinct", [[], ["product"]], ids=["plain", "distinct"])
def test_grouped_batches_hold_p_groups_of_k_rows(distinct):
    source = [
        {
            "texts": ["x"],
            "group": row % 20 if row < 180 else row,
            "product": f"{row % 20 + row // 180 * row} {row // 40}",
        }
        for row in range(190)
    ]
    plan = build_plan(source, batch_size=12, grouped="group", group_size=3, distinct=distinct)
    assert plan.steps_per_epoch * 12 >= 0.9 * 180 if not distinct else plan.steps_per_epoch > 8
    total = 0
    for epoch in range(12):
        total += plan.shown(epoch)
        assert plan.shown(epoch).max() == 1
        for k in range(plan.steps_per_epoch):
            draws = plan.batch(epoch, k)
            groups = [source[draw.row]["group"] for draw in draws]
            assert sorted(Counter(groups).values()) == [3] * 4
            assert all(len(set(groups[at : at + 3])) == 1 for at in range(0, 12, 3))
            assert not any(repeats(source, draws, column) for column in distinct)
    assert (total[:180] > 0).all()
    assert (total[180:] == 0).all()
    assert "10 of them always" in plan.notes[0]


def test_groups_that_cannot_be_had_are_refused_with_figures():
    source = [{"texts": ["x"], "group": row % 3 or None} for row in range(60)]
    with pytest.raises(DataError, match=r"20 of 60 cells are empty(?s:.)*'group', row 0"):
        build_plan(source, batch_size=8, grouped="group")
    source = [{"texts": ["x"], "group": row % 3} for row in range(60)]
    with pytest.raises(UsageError, match=r"batches of 4 groups with 4 rows each can show 0 of 60 rows(?s:.)*3 groups"):
        build_plan(source, batch_size=16, grouped="group")
    with pytest.raises(UsageError, match="multiple of group_size"):
        build_plan(source, batch_size=10, grouped="group", group_size=4)
    with pytest.raises(UsageError, match="either balanced or grouped"):
        build_plan(source, batch_size=8, grouped="group", balanced="group")


@pytest.mark.parametrize(
    "options",
    [{}, {"distinct": ("texts",)}, {"balanced": "kind"}, {"grouped": "group", "group_size": 4}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_every_plan_tells_how_many_rows_an_epoch_leaves_out(options):
    found = build_plan(rows(103), batch_size=8, seed=3, **options)
    shown = {draw.row for k in range(found.steps_per_epoch) for draw in found.batch(0, k)}
    left = 103 - len(shown)
    assert left > 0
    assert f" {left} of 103 rows" in f" {' '.join(found.notes)}"


def test_nothing_is_said_where_an_epoch_shows_every_row():
    assert build_plan(rows(96), batch_size=8).notes == ()
