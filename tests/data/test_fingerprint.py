"""The identity of data: the same for the same, another for any change that training would read."""

from itertools import count
from pathlib import Path

import pytest
from PIL import Image

from clipkit import load_pairs
from clipkit.data import fingerprint
from clipkit.data.batches.augment import augment
from clipkit.data.batches.build_plan import build_plan
from clipkit.data.fingerprint import data_fingerprint
from clipkit.errors import UsageError
from clipkit.images.load import load_image


@pytest.fixture
def table(tmp_path):
    for row in range(6):
        Image.new("RGB", (8, 8), (40 * row, 0, 0)).save(tmp_path / f"{row}.png")
    lines = [f"{row}.png,a red of {row},{'ab'[row % 2]}" for row in range(6)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,text,kind", *lines]) + "\n")
    return tmp_path / "pairs.csv"


def edited(table, old, new):
    table.write_text(table.read_text().replace(old, new))
    return load_pairs(table)


def test_the_same_table_read_twice_or_elsewhere_is_the_same_data(table, tmp_path_factory):
    pairs = load_pairs(table)
    first = data_fingerprint(pairs, ["kind"])
    assert first == data_fingerprint(load_pairs(table), ["kind"]) == data_fingerprint(list(pairs), ["kind"])
    elsewhere = tmp_path_factory.mktemp("other") / "data"
    table.parent.rename(elsewhere)
    assert data_fingerprint(load_pairs(elsewhere / table.name), ["kind"]) == first
    assert data_fingerprint(pairs, ["kind"]) != first  # whose files are gone


@pytest.mark.parametrize(
    ("old", "new"),
    [("a red of 3", "a red of 8"), ("a red of 3,b", "a red of 3,a"), ("5.png,a red of 5,b\n", "")],
    ids=["caption", "label", "row"],
)
def test_any_change_of_a_row_is_another_identity(table, old, new):
    before = data_fingerprint(load_pairs(table), ["kind"])
    assert data_fingerprint(edited(table, old, new), ["kind"]) != before


def test_order_and_images_count_and_columns_that_are_not_named_do_not(table):
    pairs = load_pairs(table)
    before = data_fingerprint(pairs)
    assert data_fingerprint(pairs.select([1, 0, 2, 3, 4, 5])) != before
    assert data_fingerprint(edited(table, "a red of 3,b", "a red of 3,a")) == before
    other = bytearray((table.parent / "3.png").read_bytes())
    other[-20] ^= 1  # of the same length
    (table.parent / "3.png").write_bytes(other)
    assert data_fingerprint(pairs) != before


def test_large_files_are_known_by_length_and_three_windows(tmp_path):
    path = tmp_path / "large.bmp"
    content = bytearray(300_000)
    rows = [{"image": str(path), "texts": ["x"]}]

    def identity(at=None, length=0):
        changed = bytearray(content) + bytes(length)
        if at is not None:
            changed[at] = 1
        path.write_bytes(changed)
        return data_fingerprint(rows)

    whole = identity()
    assert len({whole, identity(0), identity(150_000), identity(-1), identity(length=1)}) == 5
    assert identity(60_000) == whole  # what the first lines of the module say is not seen


def test_of_very_many_files_some_are_read_and_all_are_measured(table, monkeypatch):
    pairs = load_pairs(table)
    before = data_fingerprint(pairs)
    monkeypatch.setattr(fingerprint, "_READ_ALL", 5)
    monkeypatch.setattr(fingerprint, "_READ_OF_MORE", 2)  # the first and the last row

    def changed(row, edit):
        path = table.parent / f"{row}.png"
        content = path.read_bytes()
        path.write_bytes(edit(content))
        identity = data_fingerprint(pairs)
        path.write_bytes(content)
        return identity

    sampled = data_fingerprint(pairs)
    assert sampled == data_fingerprint(list(pairs)) != before
    assert changed(2, lambda content: content[:-1] + b"x") == sampled
    others = {changed(5, lambda content: content[:-1] + b"x"), changed(2, lambda content: content + b"x")}
    assert len(others | {sampled}) == 3


def test_embedded_and_decoded_images_and_features_are_seen_as_they_are(table):
    from datasets import Image as ImageFeature

    rows = load_pairs(table)
    packed = rows.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
    before = data_fingerprint(packed)
    assert data_fingerprint(packed.cast_column("image", ImageFeature(decode=True))) == before  # without decoding
    assert data_fingerprint(packed.select([0, 1, 2, 3, 5, 4])) != before
    features = rows.add_column("image_features", [[float(row), 1.0] for row in range(6)])
    changed = rows.add_column("image_features", [[float(row), 1.0 + (row == 4)] for row in range(6)])
    assert len({data_fingerprint(each) for each in (rows, features, changed)}) == 3


class Opening:
    """Rows that open their images themselves, some of them as nobody asked them to: anew each time."""

    def __init__(self, table, random):
        self.rows, self.random = list(table), random

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        image = load_image(self.rows[row]["image"])
        return {**self.rows[row], "image": augment(image, "simclr", next(self.random)) if self.random else image}


def test_images_that_rows_open_are_seen_unless_they_change_at_every_look(table):
    pairs = load_pairs(table)
    changed = pairs.select([0, 1, 2, 3, 5, 4]).remove_columns("texts").add_column("texts", pairs["texts"])
    assert data_fingerprint(Opening(pairs, None)) == data_fingerprint(Opening(pairs, None))
    assert data_fingerprint(Opening(pairs, None)) != data_fingerprint(Opening(changed, None))
    assert data_fingerprint(Opening(pairs, count())) == data_fingerprint(Opening(pairs, count(100)))
    with pytest.raises(UsageError, match="same at every look"):  # or ranks would plan other batches
        build_plan(Opening(pairs, count()), batch_size=2, distinct=["image"])
    assert build_plan(Opening(pairs, None), batch_size=2, distinct=["image"]).steps_per_epoch == 3


def test_where_one_caption_ends_counts(table):
    one = [{"image": None, "texts": ["a", "b"]}, {"image": None, "texts": ["c"]}]
    two = [{"image": None, "texts": ["a"]}, {"image": None, "texts": ["b", "c"]}]
    three = [{"image": None, "texts": ["ab"]}, {"image": None, "texts": ["c"]}]
    assert len({data_fingerprint(each) for each in (one, two, three)}) == 3
    assert data_fingerprint([{"k": 1}], ["k"]) != data_fingerprint([{"k": "1"}], ["k"])


def test_a_column_that_is_not_there_is_refused(table):
    with pytest.raises(UsageError, match=r"no column 'knid'(?s:.)*did you mean 'kind'"):
        data_fingerprint(load_pairs(table), ["knid"])
