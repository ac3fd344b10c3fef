"""The recipes: each takes two steps on a tiny real model, and says of each of its numbers where it comes from."""

import dataclasses
import json
import re
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
from command import clipkit
from models.conftest import LAYERS, _xlm_roberta_tokenizer, write_clip, write_siglip2
from open_clip.push_to_hf_hub import save_for_hf

from clipkit import DualEncoder
from clipkit.training.config.model import LoraConfig, ModelConfig
from clipkit.training.config.run import RunConfig
from clipkit.training.config.sections import DataConfig
from clipkit.training.config.train import TrainConfig
from clipkit.training.config.yaml_file import read_yaml

FOLDER = Path(__file__).parents[3] / "train" / "recipes"
RECIPES = ["full", "lit", "lora", "multilingual", "scratch", "siglip", "small_gpu"]
SECTIONS = {"model": ModelConfig, "model.lora": LoraConfig, "data": DataConfig, "train": TrainConfig}
NEEDED = ["data.train=birds.csv", "train.output_dir=runs/birds"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Squares with captions, and models that transformers and open_clip wrote."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny.write_pairs(folder)
    torch.manual_seed(0)
    write_clip(folder / "clip")
    write_siglip2(folder / "siglip")
    write_vision(folder / "vit")
    write_text(folder / "xlm-roberta")
    write_open_clip(folder)
    return folder


def write_vision(folder):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    ViTModel(ViTConfig(**LAYERS, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def write_text(folder):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    tokenizer = _xlm_roberta_tokenizer()
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 26, "pad_token_id": tokenizer.pad_token_id}
    XLMRobertaModel(XLMRobertaConfig(**LAYERS, **size), add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_open_clip(folder):
    """A checkpoint in open_clip's form, and the architecture alone under the name tiny-recipe."""
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    arch = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-recipe.json").write_text(json.dumps(arch))
    open_clip.add_model_config(folder / "tiny-recipe.json")
    model, tokenizer = open_clip.create_model("tiny-recipe"), open_clip.tokenizer.HFTokenizer(str(folder / "clip"))
    save_for_hf(model, tokenizer, arch, folder / "open_clip", safe_serialization=True)
    for path in (folder / "open_clip").glob("*token*"):  # its own tokenizer is open_clip's, which needs no files
        path.unlink()


def model_of(recipe, world):
    if recipe in ("lit", "multilingual"):
        return [f"model.vision={world / 'vit'}", f"model.text={world / 'xlm-roberta'}"]
    names = {"siglip": world / "siglip", "scratch": "open_clip:tiny-recipe", "full": f"open_clip:{world / 'open_clip'}"}
    return [f"model.name={names.get(recipe, world / 'clip')}"]


def trained(recipe, world, out):
    """What two steps of a recipe saved, and the lines of its log."""
    small = ["train.batch_size=8", "train.max_steps=2", "train.log_every=1", "train.progress=false", "data.test=0.25"]
    small += ["train.micro_batch=4"] if recipe == "small_gpu" else []
    data = [f"data.train={world / 'pairs.jsonl'}", f"train.output_dir={out}"]
    done = clipkit("train", FOLDER / f"{recipe}.yaml", *model_of(recipe, world), *data, *small)
    assert done.code == 0, done.err
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_all_are_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe, world, tmp_path):
    lines = trained(recipe, world, tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines if "loss" in line)
    assert DualEncoder.from_pretrained(tmp_path / "run" / "model").encode_texts(["a red square"]).isfinite().all()
    model = RunConfig.load(tmp_path / "run" / "config.yaml").model
    assert model.freeze == (("image",) if recipe in ("lit", "multilingual") else ())
    assert model.scratch == (recipe == "scratch")


def test_a_small_gpu_takes_the_steps_of_a_large_one(world, tmp_path):
    small = trained("small_gpu", world, tmp_path / "small")
    config = RunConfig.load(tmp_path / "small" / "config.yaml")
    whole = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, gradient_checkpointing=False),
        train=dataclasses.replace(config.train, micro_batch=None, output_dir=str(tmp_path / "large")),
    )
    (tmp_path / "large.yaml").write_text(whole.dump())
    assert clipkit("train", tmp_path / "large.yaml").code == 0
    large = [json.loads(line) for line in (tmp_path / "large" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in small if "loss" in line] == pytest.approx(
        [line["loss"] for line in large if "loss" in line], rel=1e-5
    )


def test_scratch_draws_other_weights_and_all_are_fresh(world):
    from clipkit.training.run import open_model

    first = open_model(ModelConfig(name=str(world / "clip"), scratch=True))
    kept = open_model(ModelConfig(name=str(world / "clip")))
    assert (len(kept.fresh), first.fresh) == (0, {name for name, _ in first.named_parameters()})
    ours, theirs = first.state_dict(), kept.state_dict()
    assert not any(
        ours[name].equal(theirs[name])
        for name, weight in ours.items()
        if weight.ndim > 1 and weight.is_floating_point()
    )


def test_scratch_is_of_a_named_model(world):
    done = clipkit("train", FOLDER / "scratch.yaml", *model_of("lit", world), *NEEDED)
    assert done.code == 2
    assert "model.scratch" in done.err
    assert "fix:   model.name=open_clip:ViT-B-32" in done.err


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_is_a_key_and_says_where_it_comes_from(recipe):
    text = (FOLDER / f"{recipe}.yaml").read_text()
    stated = dict(_numbers(read_yaml(FOLDER / f"{recipe}.yaml")))
    told = {}
    for key, numbers, source in re.findall(r"^#   ([a-z_.]+) ((?:[\d.e-]+ ?)+) +(\S.*)$", text, flags=re.MULTILINE):
        section, _, name = key.rpartition(".")
        assert name in {field.name for field in dataclasses.fields(SECTIONS[section])}, key
        told[key] = [float(number) for number in numbers.split()]
        assert len(source) > 5, key
    assert told == stated
    config = RunConfig.load(FOLDER / f"{recipe}.yaml", [*_placeholder(recipe), *NEEDED])
    for key, values in stated.items():
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        assert list(value if isinstance(value, tuple) else [value]) == values, key
    assert re.search(rf"clipkit train train/recipes/{recipe}\.yaml model\.", text)
    assert re.search(r"^# When: ", text, flags=re.MULTILINE)
    assert set(re.findall(r"\w+\.yaml", text)) <= {f"{recipe}.yaml" for recipe in RECIPES}


def _placeholder(recipe):
    return ["model.vision=a/b", "model.text=c/d"] if recipe in ("lit", "multilingual") else ["model.name=a/b"]


def _numbers(values, path=""):
    """Dotted key -> numbers, for all that is a number or a list of numbers."""
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        listed = [getattr(item, "value", item) for item in (value if isinstance(value, list) else [value])]
        if isinstance(value, dict):
            yield from _numbers(value, name)
        elif all(isinstance(item, int | float) and not isinstance(item, bool) for item in listed):
            yield name, [float(item) for item in listed]
