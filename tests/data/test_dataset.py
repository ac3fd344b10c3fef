"""Anything with `len` and `source[i]` trains as the table of the same rows does; streams are sent away."""

import io
import pickle

import pytest
import tiny
import torch
from PIL import Image

from clipkit import SameGroup, TrainConfig, Trainer
from clipkit.data.dataset import MapStyleDataset, as_dataset, caption_counts, column_codes, number_values
from clipkit.data.fingerprint import data_fingerprint
from clipkit.embedding.image_features import with_image_features
from clipkit.errors import DataError, UsageError


class Decoding(torch.utils.data.Dataset):
    """A map-style Dataset as people write it: it opens its images itself, and knows no columns."""

    def __init__(self, rows):
        self.rows, self.reads = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads += 1
        row = self.rows[index]
        return {**row, "image": Image.open(io.BytesIO(row["image"]["bytes"]))}


class Shards:
    """Rows that lie in several lists; not a Dataset of any library."""

    def __init__(self, *parts):
        self.parts = parts

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, index):
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


@pytest.fixture(scope="module")
def rows():
    return list(tiny.make_pairs())


def losses(folder, pairs, **changes):
    settings = {"batch_size": 8, "max_steps": 3, "log_every": 1, "augmentation": "crop", "progress": False}
    config = TrainConfig(str(folder), **{**settings, **changes})
    return [
        line["loss"] for line in Trainer(tiny.make_model(), pairs, config, similar=SameGroup("colour")).train().history
    ]


def test_every_kind_of_rows_trains_as_the_table_does(tmp_path, rows):
    wanted = losses(tmp_path / "table", tiny.make_pairs())
    assert losses(tmp_path / "list", rows) == wanted
    assert losses(tmp_path / "torch", Decoding(rows), workers=1) == wanted
    assert losses(tmp_path / "shards", Shards(rows[:10], rows[10:])) == wanted


def test_rows_are_read_once_for_all_columns_and_images_are_not_opened(rows):
    shut = as_dataset([{**row, "image": {"bytes": b"no image", "path": None}} for row in rows])
    assert column_codes(shut, "colour").equal(column_codes(tiny.make_pairs(), "colour"))
    source = Decoding(rows)
    table = as_dataset(source)
    assert as_dataset(table) is table
    assert caption_counts(table) == [2] * 32
    assert column_codes(table, "place").equal(column_codes(tiny.make_pairs(), "place"))
    assert source.reads == 32
    assert len(pickle.dumps(table)) < len(pickle.dumps(source)) + 1000  # what was kept stays here


def test_a_column_that_few_rows_have_is_empty_elsewhere():
    table = as_dataset([{"texts": ["a"], "image": None}, {"texts": ["b"], "image": None, "price": 2.0}])
    assert table.column_names == ["texts", "image", "price"]
    assert number_values(table, "price").isnan().tolist() == [True, False]
    with pytest.raises(UsageError, match="did you mean 'price'"):
        column_codes(table, "prise")


def test_features_of_a_locked_tower_come_beside_any_rows(rows):
    model = tiny.make_model()
    model.freeze("image")
    wanted = with_image_features(model, tiny.make_pairs())["image_features"]
    found = with_image_features(model, Decoding(rows))
    assert "image_features" in found.column_names
    assert torch.tensor(found[3]["image_features"]).equal(torch.tensor(wanted[3]))
    assert "image_features" not in rows[3]


def streams(rows):
    from datasets import Dataset

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

        def __len__(self):
            return len(rows)

    return [iter(rows), (row for row in rows), Stream(), Dataset.from_list(rows).to_iterable_dataset()]


@pytest.mark.parametrize("kind", range(4))
def test_a_stream_is_sent_away_with_the_line_that_packs_it(tmp_path, rows, kind):
    stream = streams(rows)[kind]
    with pytest.raises(UsageError, match=r"found a stream(?s:.)*pack it first: pairs = list\(stream\)") as caught:
        Trainer(tiny.make_model(), stream, TrainConfig(str(tmp_path / "run"), batch_size=8))
    space = {"stream": stream}
    exec(caught.value.fix.removeprefix("pack it first: ").split(",")[0], space)  # what it says to type
    assert data_fingerprint(space["pairs"], ["colour"]) == data_fingerprint(rows, ["colour"])


def test_the_second_line_packs_a_stream_too(rows):
    from datasets import Dataset

    stream = streams(rows)[3]
    packed = Dataset.from_generator(lambda: (yield from stream))
    assert data_fingerprint(packed, ["colour"]) == data_fingerprint(rows, ["colour"])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"image": [1], "texts": [["a"]]}, r"expected rows(?s:.)*from_dict"),
        ([("image", "text")], r"map columns to cells; found tuple(?s:.)*row 0"),
    ],
)
def test_what_is_no_rows_is_refused_in_words(source, words):
    with pytest.raises(UsageError, match=words):
        MapStyleDataset(source)


@pytest.mark.parametrize(("texts", "fix"), [("a cat", r"\[caption\]"), ([], "leave it out"), ([None], "leave it out")])
def test_captions_are_lists_of_texts(texts, fix):
    with pytest.raises(DataError, match=rf"list of at least one caption(?s:.)*row 1(?s:.)*{fix}"):
        caption_counts(as_dataset([{"texts": ["a"]}, {"texts": texts}]))
