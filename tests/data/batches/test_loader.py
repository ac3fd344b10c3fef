"""The loader: the plan's rows, whole and in order, for any number of ranks and workers."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data.batches.augment import augment
from clipkit.data.batches.loader import Loader
from clipkit.data.batches.plan import Plan
from clipkit.data.dataset import column_codes
from clipkit.errors import BadImage, UsageError

N, SIZE = 23, 6


class Transform:
    """Stands where a model's processor stands; a picture's level and a text's number tell which they were."""

    def images(self, images):
        arrays = [np.array(image.resize((8, 8))) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()

    def texts(self, texts):
        return {"input_ids": torch.tensor([[int(word) for word in text.split()] for text in texts])}


def png(level):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(n=N, broken=()):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    columns = {
        "image": [{"bytes": png(row)[: 20 if row in broken else None], "path": None} for row in range(n)],
        "texts": [[f"{row} {i}" for i in range(3)] for row in range(n)],
        "kind": [None if row == 4 else "ab"[row % 2] for row in range(n)],
    }
    features = {"image": ImageFeature(decode=False), "texts": List(Value("string")), "kind": Value("string")}
    return Dataset.from_dict(columns, features=Features(features))


def loader(source=None, **options):
    return Loader(
        source or pairs(), Transform(), Plan([3] * N, batch_size=SIZE, seed=3), columns=["kind", "row"], **options
    )


def everything(batches):
    return [
        (b.inputs["pixel_values"][:, 0, 0, 0].tolist(), b.inputs["input_ids"].tolist(), b.keys["kind"].tolist())
        for b in batches
    ]


def test_image_text_and_keys_stay_together():
    kinds = {row: -1 if row == 4 else row % 2 for row in range(N)}
    for batch in loader().batches(0, 8):
        rows = batch.keys["row"].tolist()
        assert len(rows) == SIZE
        assert batch.inputs["pixel_values"][:, 0, 0, 0].tolist() == rows
        assert batch.inputs["input_ids"][:, 0].tolist() == rows
        assert batch.keys["kind"].tolist() == [kinds[row] for row in rows]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_global_batches(world):
    whole = everything(loader().batches(0, 5))
    parts = [everything(loader(rank=rank, world_size=world).batches(0, 5)) for rank in range(world)]
    for step in range(5):
        joined = tuple([each for part in parts for each in part[step][i]] for i in range(3))
        assert joined == whole[step]


def test_workers_and_the_place_of_a_restart_change_nothing():
    whole = everything(loader(augmentation="crop").batches(0, 7))
    assert everything(loader(augmentation="crop", workers=2).batches(0, 7)) == whole
    assert everything(loader(augmentation="crop").batches(4, 7)) == whole[4:]


def test_codes_are_given_once_for_the_whole_data():
    values = ["b", "a", None, "b", " ", "", [1, 2], [1, 2]]
    assert column_codes({"kind": values}, "kind").tolist() == [0, 1, -1, 0, -1, -1, 2, 2]
    with pytest.raises(UsageError, match=r"no column 'knid'(?s:.)*did you mean 'kind'"):
        column_codes(pairs(), "knid")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_or_is_left_out_and_listed(workers):
    with pytest.raises(BadImage, match=r"TRUNCATED|CORRUPT"):
        list(loader(pairs(broken=[5]), workers=workers).batches(0, 3))
    batches = list(loader(pairs(broken=[5]), workers=workers, on_bad="skip").batches(0, 6))
    rejected = [row for batch in batches for row in batch.rejected]
    assert {row["row"] for row in rejected} == {5}
    assert all(row["code"] in ("TRUNCATED", "CORRUPT") for row in rejected)
    # rows in = used + rejected
    assert sum(len(b.keys["row"]) for b in batches) + len(rejected) == 6 * SIZE


def test_features_of_a_locked_tower_stand_in_for_images():
    source = pairs().add_column("image_features", [[float(row), 1.0] for row in range(N)])
    for batch in loader(source).batches(0, 3):
        assert "pixel_values" not in batch.inputs
        assert batch.inputs["image_features"][:, 0].tolist() == batch.keys["row"].tolist()


@pytest.mark.parametrize("name", ["crop", "crop+flip", "affine"])
def test_augmentation_is_a_function_of_its_seed(name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    seeds = [random.Random(9).randrange(2**64) for _ in range(2)]
    assert augment(noise, name, seeds[0]).tobytes() == augment(noise, name, seeds[1]).tobytes()
    assert len({augment(noise, name, seed).tobytes() for seed in range(20)}) > 15
    assert augment(noise, "none", 1) is noise


def test_crop_keeps_at_least_nine_tenths_of_the_area():
    image = Image.new("RGB", (300, 200))
    for seed in range(200):
        width, height = augment(image, "crop", seed).size
        assert 0.89 * 300 * 200 <= width * height <= 300 * 200


def test_affine_fills_with_the_ground():
    white = Image.new("RGB", (32, 32), "white")
    assert all(augment(white, "affine", seed).tobytes() == white.tobytes() for seed in range(50))
