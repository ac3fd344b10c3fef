"""What a batch carries beside its pairs: views, hard negatives, hashes of contents, numbers."""

import io

import pytest
import torch
from PIL import Image

from clipkit import load_pairs
from clipkit.data.batches.loader import Loader
from clipkit.data.batches.plan import Plan
from clipkit.data.dataset import number_values
from clipkit.errors import BadImage, DataError, UsageError

N, SIZE = 9, 4


class Transform:
    """Gives what reaches it: the red of the middle, the words as numbers."""

    def images(self, images):
        middles = [image.convert("RGB").getpixel((image.width // 2, image.height // 2)) for image in images]
        return torch.tensor([float(red) for red, _, _ in middles]).reshape(-1, 1, 1, 1)

    def texts(self, texts):
        return {"input_ids": torch.tensor([[int(word) for word in text.split()] for text in texts])}


def png(level, broken=False):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()[: 20 if broken else None], "path": None}


def source(**more):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    image = ImageFeature(decode=False)
    columns = {"image": [png(10 * (row // 2)) for row in range(N)], "texts": [[f"{row // 3} 7"] for row in range(N)]}
    kinds = {"image": image, "texts": List(Value("string")), "hard_texts": List(Value("string"))}
    kinds |= {"hard_images": List(image), "price": Value("float64"), "vector": List(Value("float32"))}
    columns |= more
    return Dataset.from_dict(columns, features=Features({name: kinds[name] for name in columns}))


def loader(data=None, **options):
    return Loader(data or source(), Transform(), Plan([1] * N, batch_size=SIZE, seed=3), **options)


def first(*args, **options):
    return next(iter(loader(*args, **options).batches(0, 1)))


def test_views_come_after_the_images_and_are_a_function_of_the_seed():
    batch = first(views=2, view_augmentation="simclr")
    again = first(views=2, view_augmentation="simclr", workers=1)
    rows = batch.rows["image"].keys
    assert rows["view"].tolist() == [0] * SIZE + [1] * SIZE + [2] * SIZE
    assert rows["row"].tolist() == batch.keys["row"].tolist() * 3
    pixels = batch.inputs["pixel_values"].flatten()
    assert pixels[:SIZE].tolist() == [10.0 * (row // 2) for row in batch.keys["row"].tolist()]
    assert pixels.equal(again.inputs["pixel_values"].flatten())
    assert len(batch.inputs["input_ids"]) == SIZE == len(batch) == len(batch.rows["text"].keys["row"])
    other = next(iter(loader(views=2, view_augmentation="simclr").batches(N // SIZE, N // SIZE + 1)))
    assert not pixels[SIZE:].equal(other.inputs["pixel_values"].flatten()[SIZE:])


def test_views_of_ranks_are_those_of_one_process():
    whole = first(views=2, view_augmentation="simclr")
    parts = [first(views=2, view_augmentation="simclr", rank=rank, world_size=2) for rank in range(2)]
    for view in range(3):
        mine = whole.inputs["pixel_values"].flatten()[view * SIZE : (view + 1) * SIZE]
        joined = torch.cat([part.inputs["pixel_values"].flatten()[view * len(part) :][: len(part)] for part in parts])
        assert joined.equal(mine)


def test_one_side_alone_and_views_alone():
    batch = first(sides=["image"], base=False, views=2)
    assert list(batch.inputs) == ["pixel_values"]
    assert batch.rows["image"].keys["view"].tolist() == [1] * SIZE + [2] * SIZE
    assert list(first(sides=["text"]).inputs) == ["input_ids"]


def test_hard_negatives_stand_behind_the_samples_and_are_no_anchors():
    texts = [[f"{50 + row} {i}" for i in range(row % 3)] for row in range(N)]
    images = [[png(200)] * (row % 2) for row in range(N)]
    batch = first(source(hard_texts=texts, hard_images=images), columns=["texts", "image"])
    rows = batch.keys["row"].tolist()
    side = batch.rows["text"]
    assert batch.inputs["input_ids"][SIZE:, 0].tolist() == [50 + row for row in rows for _ in range(row % 3)]
    assert side.anchor.tolist() == [True] * SIZE + [False] * (len(side.anchor) - SIZE)
    assert set(side.keys["row"][SIZE:].tolist()) == {-1}
    assert (side.keys["texts"] >= 0).all()
    pictures = batch.rows["image"]
    assert batch.inputs["pixel_values"].flatten()[SIZE:].tolist() == [200.0] * sum(row % 2 for row in rows)
    assert len(set(pictures.keys["image"][SIZE:].tolist())) == 1
    assert set(pictures.keys["texts"][SIZE:].tolist()) == {-1}


def test_contents_that_are_the_same_have_the_same_key():
    for batch in loader(columns=["texts", "image"], augmentation="crop").batches(0, 2):
        rows = batch.keys["row"]
        for name, size in (("image", 2), ("texts", 3)):
            group, key = rows // size, batch.keys[name]
            assert ((key[:, None] == key) == (group[:, None] == group)).all()
            assert (key >= 0).all()


def test_numbers_are_carried_as_they_are():
    data = source(price=[None, *map(float, range(1, N))], vector=[[float(row), 1.0] for row in range(N)])
    for batch in loader(data, numbers=["price", "vector"]).batches(0, 2):
        rows = batch.keys["row"].float()
        assert batch.keys["price"].nan_to_num(0).equal(rows)
        assert batch.keys["vector"][:, 0].equal(rows)
    with pytest.raises(UsageError, match=r"expected numbers(?s:.)*'texts'"):
        number_values(data, "texts")
    with pytest.raises(UsageError, match="expected numbers"):
        number_values({"ragged": [[1.0], [1.0, 2.0]]}, "ragged")


def test_a_broken_hard_image_takes_its_sample_along():
    data = source(hard_images=[[png(1, broken=row == 5)] for row in range(N)])
    with pytest.raises(BadImage):
        list(loader(data).batches(0, 4))
    batches = list(loader(data, on_bad="skip").batches(0, 4))
    rejected = [each["row"] for batch in batches for each in batch.rejected]
    assert set(rejected) == {5}
    assert sum(map(len, batches)) + len(rejected) == 4 * SIZE
    assert all(len(batch.inputs["pixel_values"]) == 2 * len(batch) for batch in batches)


def test_what_a_locked_tower_cannot_have_is_refused():
    data = source().remove_columns("image").add_column("image_features", [[1.0, 2.0]] * N)
    with pytest.raises(UsageError, match="views and hard images need pixels"):
        loader(data, views=2)


def test_hard_texts_are_texts():
    data = {"image": source()["image"], "texts": [["1"]] * N, "hard_texts": [[3]] * N}

    class Source(list):
        column_names = ("image", "texts", "hard_texts")

    rows = Source({name: values[i] for name, values in data.items()} for i in range(N))
    with pytest.raises(DataError, match="expected texts; found int 3"):
        first(rows)


def test_paths_of_hard_images_start_at_the_table(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("image,text,hard_images\na.png,1,c.png\nb.png,2,\n")
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "text": "1", "hard_images": ["b.png", "c.png"]}\n')
    monkeypatch.chdir("/")
    assert load_pairs(tmp_path / "t.csv")["hard_images"] == [str(tmp_path / "c.png"), ""]
    assert load_pairs(tmp_path / "t.jsonl")["hard_images"] == [[str(tmp_path / "b.png"), str(tmp_path / "c.png")]]


def features(cells, kind):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    types = {"image": ImageFeature(decode=False), "texts": List(Value("string")), "image_features": kind}
    columns = {"image": [png(9, broken=cell is None) for cell in cells], "texts": [["1 7"]] * len(cells)}
    return Dataset.from_dict(columns | {"image_features": cells}, features=Features(types))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("empty", [(), (0, 4, 8)])
def test_features_are_read_from_arrow_as_from_rows(several, empty):
    from datasets import List, Value

    vector = List(Value("float64"))
    cells = [[[row + 0.1, draw + 0.2, 3.0] for draw in range(3)] for row in range(N)]
    if not several:
        cells = [versions[0] for versions in cells]
    cells = [None if row in empty else cell for row, cell in enumerate(cells)]
    data = features(cells, List(vector) if several else vector)
    shuffled = data.select([*range(N)[::-1]]).select([*range(N)[::-1]])  # by an index, as split_pairs gives them
    options = {"columns": ["image"], "on_bad": "skip"}
    batches = [list(loader(rows, **options).batches(0, 2)) for rows in (data, shuffled, list(data))]
    for one, other, plain in zip(*batches, strict=True):
        assert one.inputs["image_features"].equal(plain.inputs["image_features"])
        assert one.inputs["image_features"].equal(other.inputs["image_features"])
        assert one.keys["image"].equal(plain.keys["image"])
        assert one.keys["row"].equal(plain.keys["row"])
        assert [reject["row"] for reject in one.rejected] == [reject["row"] for reject in plain.rejected]
        assert {reject["code"] for reject in one.rejected} <= {"TRUNCATED"}


def test_a_batch_reads_no_other_columns(monkeypatch):
    from datasets import Dataset

    data = source(price=[1.0] * N)
    read = []
    fetch = Dataset.__getitems__
    monkeypatch.setattr(Dataset, "__getitems__", lambda rows, keys: read.append(rows.column_names) or fetch(rows, keys))
    first(data, numbers=["price"])
    assert read == [["image", "texts"]]
