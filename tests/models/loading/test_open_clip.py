"""Folders that open_clip itself wrote, one tiny model of each of its families; pickles; the hub's cache."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.fingerprint import tower_hash

Images = list[Image.Image]
Family = Callable[[str], Path]

VISION = {"image_size": 48, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
PLAIN: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}

# What differs from a plain CLIP; `tokenizer` is the family of transformers whose tokenizer was trained for it.
FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {},
    "quickgelu": {"quick_gelu": True},
    "custom_text": {"custom_text": True},
    "eos": {"tokenizer": "metaclip_2", "text_cfg": {"pool_type": "eos", "eos_id": 2}},
    "coca": {
        "custom_text": True,
        "vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    },
    "siglip": {
        "custom_text": True,
        "embed_dim": 96,  # SigLIP's image tower ends without a projection
        "init_logit_bias": -10.0,
        "tokenizer": "siglip",
        "vision_cfg": {"timm_model_name": "test_vit3", "image_size": 160, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {**SIGLIP_TEXT, "tokenizer_kwargs": {"clean": "canonicalize"}},
    },
    "siglip2": {
        "custom_text": True,
        "init_logit_bias": -10.0,
        "tokenizer": "siglip2",
        "text_cfg": {**SIGLIP_TEXT, "tokenizer_kwargs": {"clean": "canonicalize"}},
    },
    "hf_text": {"tokenizer": "metaclip_2", "text_cfg": {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}},
}


def write_text_tower(folder: Path, vocabulary: int) -> str:
    """The config of a tiny XLM-R, as `hf_model_name` points to one."""
    from transformers import XLMRobertaConfig

    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    XLMRobertaConfig(**layers, vocab_size=vocabulary, max_position_embeddings=26).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def family(
    open_clip_arch: Callable[..., str], family_folder: Family, tmp_path_factory: pytest.TempPathFactory
) -> Family:
    """A folder that open_clip wrote, of one of its families."""
    root = tmp_path_factory.mktemp("open_clip_families")

    def find(name: str) -> Path:
        folder = root / name
        if folder.exists():
            return folder
        changes = dict(FAMILIES[name])
        trained = changes.pop("tokenizer", None)
        text = {**TEXT, **changes.pop("text_cfg", {})}
        tokenizer: Any = SimpleTokenizer(context_length=20)
        if trained:
            text["hf_tokenizer_name"] = str(family_folder(trained))
            options = text.get("tokenizer_kwargs", {})
            tokenizer = HFTokenizer(text["hf_tokenizer_name"], context_length=20, **options)
            text["vocab_size"] = len(tokenizer.tokenizer)
        if name == "hf_text":
            text["hf_model_name"] = write_text_tower(root / "xlm_roberta", text["vocab_size"])
        vision = {**VISION, **changes.pop("vision_cfg", {})}
        arch = open_clip_arch(f"family-{name}", **{**PLAIN, **changes, "vision_cfg": vision, "text_cfg": text})
        torch.manual_seed(0)
        model = open_clip.create_model(arch, pretrained_text=False)
        if name == "coca":  # open_clip allocates this and never fills it
            torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
        native = tokenizer if trained else HFTokenizer(str(family_folder("clip")))  # only that kind is written
        save_for_hf(model, native, open_clip.get_model_config(arch), folder, safe_serialization=True)
        if not trained:
            for path in folder.glob("*token*"):
                path.unlink()
        return folder

    return find


def native(folder: Path, images: Images, texts: list[str]) -> tuple[Tensor, Tensor]:
    """open_clip alone, as its documentation shows it."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        return image, model.encode_text(tokenizer(texts), normalize=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_open_clips_own_embeddings(
    name: str, family: Family, images: Images, texts: list[str], tmp_path: Path
) -> None:
    folder = family(name)
    image, text = native(folder, images, texts)
    model = DualEncoder.from_pretrained(f"open_clip:{folder}")
    assert (model.encode_images(images) - image).abs().max() < 1e-5
    assert (model.encode_texts(texts) - text).abs().max() < 1e-5
    assert model.similarity == ("sigmoid" if name.startswith("siglip") else "softmax")
    assert model.fresh == frozenset()

    with torch.no_grad():
        model.logit_scale.add_(0.25)
    model.save_pretrained(tmp_path / "saved")
    for mine, theirs in zip((image, text), native(tmp_path / "saved", images, texts), strict=True):
        assert (mine - theirs).abs().max() < 1e-5
    again = DualEncoder.from_pretrained(tmp_path / "saved")
    assert again.fingerprint().difference(model.fingerprint()) == []
    assert torch.equal(again.encode_texts(texts), model.encode_texts(texts))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trained_parameter_has_one_owner_and_a_gradient(
    name: str, family: Family, images: Images, texts: list[str]
) -> None:
    model = DualEncoder.from_pretrained(f"open_clip:{family(name)}")
    found = model(pixel_values=model.processor.images(images), **model.processor.texts(texts))
    (found.scale * found.image @ found.text.T).logsumexp(1).sum().backward()
    lacking = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert lacking <= {"backend.model.logit_bias"}  # a softmax reads none
    scalars = {id(p) for p in model.backend.logit_scale_and_bias()}
    for key, parameter in model.backend.named_parameters():
        owners = [part for part in ("image", "text") if model.backend.belongs_to(part, key)]
        if id(parameter) not in scalars and not key.startswith("model.text_decoder."):
            assert len(owners) == 1, key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_text_keeps_its_end(name: str, family: Family, texts: list[str]) -> None:
    processor = DualEncoder.from_pretrained(f"open_clip:{family(name)}").processor
    side: Any = processor.text_side
    cut = processor.texts(texts)["input_ids"][3]
    assert len(cut) == processor.context_length == 20 < processor.token_counts(texts)[3]
    assert cut[-1] == side.eos_token_id


def test_cocas_decoder_is_kept_and_left_alone(family: Family, tmp_path: Path) -> None:
    model = DualEncoder.from_pretrained(f"open_clip:{family('coca')}")
    decoder = {n: p for n, p in model.named_parameters() if "text_decoder" in n}
    assert decoder
    assert not any(p.requires_grad for p in decoder.values())
    before = model.fingerprint()
    with torch.no_grad():
        next(iter(decoder.values())).add_(1)
    assert model.fingerprint().difference(before) == []
    model.save_pretrained(tmp_path / "saved")
    saved = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'saved'}", return_transform=False)
    for key, parameter in decoder.items():
        assert torch.equal(saved.get_parameter(key.removeprefix("backend.model.")), parameter)


def test_a_locked_open_clip_tower_is_named_by_its_weights(family: Family) -> None:
    model = DualEncoder.from_pretrained(f"open_clip:{family('siglip')}").freeze("image")
    before = tower_hash(model.backend, model.processor)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.1)
    assert tower_hash(model.backend, model.processor) == before


def test_a_saved_text_tower_needs_no_other_folder(family: Family, texts: list[str], tmp_path: Path) -> None:
    copy = shutil.copytree(family("hf_text"), tmp_path / "original")
    config = json.loads((copy / "open_clip_config.json").read_text())
    elsewhere = shutil.copytree(config["model_cfg"]["text_cfg"]["hf_model_name"], tmp_path / "xlm_roberta")
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(elsewhere)
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    model = DualEncoder.from_pretrained(f"open_clip:{copy}")
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    shutil.rmtree(elsewhere)
    again = DualEncoder.from_pretrained(tmp_path / "moved")
    assert torch.equal(again.encode_texts(texts), model.encode_texts(texts))
    with pytest.raises(ModelError, match=r"needs the config of .*xlm_roberta"):
        DualEncoder.from_pretrained(f"open_clip:{copy}")


def test_a_padding_that_the_tower_does_not_mask_is_refused(family: Family, tmp_path: Path) -> None:
    copy = shutil.copytree(family("hf_text"), tmp_path / "copy")
    config = json.loads((copy / "open_clip_config.json").read_text())
    tower = shutil.copytree(config["model_cfg"]["text_cfg"]["hf_model_name"], tmp_path / "tower")
    changed = json.loads((tower / "config.json").read_text()) | {"pad_token_id": 0}
    (tower / "config.json").write_text(json.dumps(changed))
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(tower)
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="takes 0 for padding, the tokenizer pads with 1"):
        DualEncoder.from_pretrained(f"open_clip:{copy}")


@pytest.mark.parametrize("custom", [False, True])
def test_added_tokens_do_not_take_the_end_of_texts_place(
    custom: bool, open_clip_arch: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = {**TEXT, "vocab_size": 49410, "tokenizer_kwargs": {"additional_special_tokens": ["<zebra>", "<quagga>"]}}
    arch = open_clip_arch(f"tiny-added-{custom}", text_cfg=text, custom_text=custom)
    torch.manual_seed(0)
    model = DualEncoder.from_config(f"open_clip:{arch}")
    assert "stands above the end of text" in caplog.text
    seen = model.encode_texts(["one <zebra> far away", "one <zebra> far too near"])
    assert not torch.allclose(*seen)  # open_clip itself pools both at the zebra, before what differs
    model.save_pretrained(tmp_path / "saved")
    _, theirs = native(tmp_path / "saved", [Image.new("RGB", (9, 9))], ["one <zebra> far away"])
    assert (seen[:1] - theirs).abs().max() < 1e-5


def test_without_an_end_of_text_the_highest_id_is_no_place_to_pool(
    open_clip_arch: Callable[..., str], word_tokenizer: Any, tmp_path: Path
) -> None:
    word_tokenizer.save_pretrained(tmp_path)
    text = {**TEXT, "vocab_size": 200, "hf_tokenizer_name": str(tmp_path)}
    with pytest.raises(ModelError, match="no end-of-text token"):
        DualEncoder.from_config(f"open_clip:{open_clip_arch('tiny-no-end', text_cfg=text)}")


Change = Callable[[dict[str, Tensor]], Any]


def only_pickle(folder: Path, name: str, change: Change = dict, cut: int = 0) -> Path:
    path = folder / "open_clip_model.safetensors"
    torch.save(change(load_file(path)), folder / name)
    path.unlink()
    if cut:
        (folder / name).write_bytes((folder / name).read_bytes()[:-cut])
    return folder / name


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.pt", "epoch_3.pt"])
def test_a_pickle_of_tensors_opens(name: str, family: Family, texts: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(family("clip"), tmp_path / "copy")

    def training(weights: dict[str, Tensor]) -> Any:
        return {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in weights.items()}, "optimizer": {}}

    path = only_pickle(folder, name, training if name == "epoch_3.pt" else dict)
    expected = DualEncoder.from_pretrained(f"open_clip:{family('clip')}").encode_texts(texts)
    assert torch.equal(DualEncoder.from_pretrained(f"open_clip:{folder}").encode_texts(texts), expected)
    by_file = DualEncoder.from_pretrained(f"open_clip:family-clip/{path}")  # the architecture by name, from a run
    assert torch.equal(by_file.encode_texts(texts), expected)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("owned",)


PICKLES: dict[str, tuple[Change, int, type[Exception], str]] = {
    "code": (lambda w: {**w, "x": Evil()}, 0, ModelError, "more than tensors: .*print"),
    "cut": (dict, 100, CorruptArtefact, "not a readable pickle"),
    "missing key": (lambda w: {k: v for k, v in w.items() if k != "visual.proj"}, 0, ModelError, "Missing key"),
    "shape": (lambda w: w | {"visual.proj": torch.zeros(3, 3)}, 0, ModelError, r"visual.proj has shape \(3, 3\)"),
    "positions": (
        lambda w: w | {"visual.positional_embedding": torch.zeros(17, 32)},
        0,
        ModelError,
        r"positional_embedding has shape \(17, 32\)",
    ),
    "NaN": (lambda w: w | {"visual.proj": torch.full_like(w["visual.proj"], torch.nan)}, 0, ModelError, "NaN"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_broken_pickle_is_refused(case: str, family: Family, tmp_path: Path) -> None:
    change, cut, error, words = PICKLES[case]
    folder = shutil.copytree(family("clip"), tmp_path / "copy")
    only_pickle(folder, "open_clip_pytorch_model.bin", change, cut)
    with pytest.raises(error, match=words):
        DualEncoder.from_pretrained(f"open_clip:{folder}")


def test_safetensors_are_preferred_to_a_pickle(family: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(family("clip"), tmp_path / "copy")
    torch.save({"x": Evil()}, folder / "open_clip_pytorch_model.bin")
    DualEncoder.from_pretrained(f"open_clip:{folder}")


def test_positions_of_another_length_are_not_stretched_in_silence(family: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(family("clip"), tmp_path / "copy")
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file(weights | {"positional_embedding": torch.zeros(30, 16)}, folder / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=r"positional_embedding has shape \(30, 16\), the config asks for \(20, 16\)"):
        DualEncoder.from_pretrained(f"open_clip:{folder}")


def cached(folder: Path, repository: str) -> None:
    """Put a model where the hub's client keeps what it downloaded."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    assert str(place).startswith(os.environ["HF_HOME"])  # never the user's own
    commit = "0123456789" * 4
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)


@pytest.mark.parametrize("name", ["siglip2", "clip"])
def test_a_hub_model_opens_from_the_cache(name: str, family: Family, texts: list[str]) -> None:
    repository = f"test-org/open-clip-{name}"
    cached(family(name), repository)
    expected = DualEncoder.from_pretrained(f"open_clip:{family(name)}").encode_texts(texts)
    for asked in (f"open_clip:hf-hub:{repository}", repository):
        assert torch.equal(DualEncoder.from_pretrained(asked).encode_texts(texts), expected)
    fresh = DualEncoder.from_config(f"open_clip:hf-hub:{repository}")
    assert fresh.fresh == {n for n, _ in fresh.named_parameters()}
    with pytest.raises(ModelError, match="cache"):
        DualEncoder.from_pretrained(f"open_clip:hf-hub:{repository}", revision="v2")
