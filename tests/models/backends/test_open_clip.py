from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit.errors import ModelError
from clipkit.models.dual_encoder import DualEncoder

Images = list[Image.Image]
SIGLIP = {"custom_text": True, "init_logit_bias": -10.0, "init_logit_scale": 2.3}


def pipeline(model: Any, preprocess: Any, tokenizer: Any, images: Images, texts: list[str]) -> tuple[Tensor, Tensor]:
    """open_clip alone, as its documentation shows it."""
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        return image, model.encode_text(tokenizer(texts), normalize=True)


def create(arch: str, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(arch, **options)
    return model, preprocess, open_clip.get_tokenizer(arch)


@pytest.mark.parametrize("changes", [{}, {"quick_gelu": True}, SIGLIP], ids=["clip", "quick_gelu", "siglip"])
def test_embeddings_equal_open_clips_own_and_survive_saving(
    changes: dict[str, Any], open_clip_arch: Callable[..., str], images: Images, texts: list[str], tmp_path: Path
) -> None:
    arch = open_clip_arch("tiny-" + "-".join(changes), **changes)
    parts = create(arch)
    image, text = pipeline(*parts, images, texts)
    model = DualEncoder.from_open_clip(*parts, arch=arch)
    assert (model.encode_images(images) - image).abs().max() < 1e-5
    assert (model.encode_texts(texts) - text).abs().max() < 1e-5
    assert model.similarity == ("sigmoid" if "init_logit_bias" in changes else "softmax")

    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    native = (
        *open_clip.create_model_from_pretrained(f"local-dir:{folder}"),
        open_clip.get_tokenizer(f"local-dir:{folder}"),
    )
    for mine, theirs in zip((image, text), pipeline(*native, images, texts), strict=True):
        assert (mine - theirs).abs().max() < 1e-5

    for name in (f"open_clip:{folder}", folder):
        again = DualEncoder.from_pretrained(name)
        assert again.fingerprint().difference(model.fingerprint()) == []
        assert torch.equal(again.encode_texts(texts), model.encode_texts(texts))


def test_overrides_given_at_creation_are_saved(
    open_clip_arch: Callable[..., str], images: Images, tmp_path: Path
) -> None:
    arch = open_clip_arch("tiny-overridden")
    parts = create(arch, force_image_size=64, image_mean=(0.5, 0.4, 0.3), image_resize_mode="squash")
    model = DualEncoder.from_open_clip(*parts, arch=arch)
    model.save_pretrained(tmp_path / "saved")
    again = DualEncoder.from_pretrained(tmp_path / "saved")
    assert again.processor.image_size == 64
    assert torch.equal(again.encode_images(images), model.encode_images(images))


def test_the_processor_crosses_processes(open_clip_arch: Callable[..., str], images: Images, texts: list[str]) -> None:
    model = DualEncoder.from_open_clip(*create(open_clip_arch("tiny-pickled")))
    copy = pickle.loads(pickle.dumps(model.processor))
    assert torch.equal(copy.images(images), model.processor.images(images))
    assert copy.token_counts(texts)[:2] == [7, 8]
    assert copy.texts(texts)["input_ids"].shape == (4, 20)


def test_an_architecture_that_does_not_fit_is_not_published(open_clip_arch: Callable[..., str], tmp_path: Path) -> None:
    plain, quick = open_clip_arch("tiny-plain"), open_clip_arch("tiny-quick", quick_gelu=True)
    model = DualEncoder.from_open_clip(*create(plain), arch=quick)  # same weights fit, embeddings differ
    with pytest.raises(ModelError, match="does not open as it was"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ModelError, match="arch="):
        DualEncoder.from_open_clip(*create(plain)).save_pretrained(tmp_path / "saved")


def test_a_locked_image_tower_moves_nothing_of_the_text_side(open_clip_arch: Callable[..., str]) -> None:
    model = DualEncoder.from_open_clip(*create(open_clip_arch("tiny-locked"))).freeze("image")
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    text = {"token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "logit_scale"}
    assert trained == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ViT-B-33/openai", "Did you mean ViT-B-32"),
        ("ViT-B-32/opnai", "Did you mean openai"),
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-B-32/openai", "open_clip cannot open it"),
        ("hf-hub:no/such", "not in the cache"),
    ],
)
def test_an_unknown_name_is_an_error_with_a_hint(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        DualEncoder.from_pretrained(f"open_clip:{name}")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no config", "open_clip_config.json is missing"),
        ("no weights", "no weights"),
        ("missing key", "Missing key"),
        ("missing bias", "logit_bias"),
        ("NaN", "NaN"),
    ],
)
def test_a_broken_folder_is_refused(case: str, words: str, open_clip_arch: Callable[..., str], tmp_path: Path) -> None:
    arch = open_clip_arch("tiny-broken", **SIGLIP)
    DualEncoder.from_open_clip(*create(arch), arch=arch).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "clipkit.json").unlink()  # as open_clip itself would have written it
    path = tmp_path / "saved" / "open_clip_model.safetensors"
    weights = load_file(path)
    if case == "missing key":
        weights.pop("visual.proj")
    if case == "missing bias":
        weights.pop("logit_bias")
    if case == "NaN":
        weights["visual.proj"][0, 0] = torch.nan
    save_file(weights, path)
    if case == "no weights":
        path.unlink()
    if case == "no config":
        (tmp_path / "saved" / "open_clip_config.json").unlink()
    with pytest.raises(ModelError, match=words):
        DualEncoder.from_pretrained(f"open_clip:{tmp_path / 'saved'}")


def test_a_tokenizer_of_transformers_is_saved_beside_the_weights(
    open_clip_arch: Callable[..., str], clip_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    arch = open_clip_arch(
        "tiny-hf-tokens", text_cfg={"context_length": 20, "vocab_size": 700, "width": 16, "heads": 2, "layers": 2}
    )
    model, preprocess, _ = create(arch)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(clip_folder), context_length=20)
    encoder = DualEncoder.from_open_clip(model, preprocess, tokenizer, arch=arch)
    encoder.save_pretrained(tmp_path / "saved")
    again = DualEncoder.from_pretrained(f"open_clip:{tmp_path / 'saved'}")
    assert torch.equal(again.encode_texts(texts), encoder.encode_texts(texts))
    config = json.loads((tmp_path / "saved" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]


PUBLISHED = sorted(path.stem for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json"))


def test_every_architecture_resolves_or_says_what_it_needs(
    without_numbers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = functools.lru_cache(maxsize=None)(open_clip.SimpleTokenizer)  # it unpacks its vocabulary each time
    monkeypatch.setattr(open_clip.factory, "SimpleTokenizer", once)
    assert set(PUBLISHED) <= set(open_clip.list_models())
    assert len(PUBLISHED) >= 144
    opened = 0
    for arch in PUBLISHED:
        config = open_clip.get_model_config(arch)
        needs = {config["text_cfg"].get(key) for key in ("hf_tokenizer_name", "hf_model_name")} - {None}
        if needs:
            with pytest.raises(ModelError, match=r"it needs the tokenizer of .* from the hub") as caught:
                DualEncoder.from_config(f"open_clip:{arch}", device="meta")
            assert all(name in caught.value.message for name in needs)
            continue
        with without_numbers():
            model = DualEncoder.from_config(f"open_clip:{arch}", device="meta")
        size = model.processor.image_size
        assert model.dim == config["embed_dim"]
        assert model.processor.image(Image.new("RGB", (31, 47))).shape == (3, size, size)
        assert model.processor.texts(["a cat"])["input_ids"].shape == (1, model.processor.context_length)
        opened += 1
    assert opened == 95 or len(PUBLISHED) != 144  # of the 144 of open_clip 3.3, 49 need files of the hub


def test_an_architecture_with_random_weights(
    open_clip_arch: Callable[..., str], images: Images, tmp_path: Path
) -> None:
    name = f"open_clip:{open_clip_arch('tiny-random')}"
    torch.manual_seed(3)
    model = DualEncoder.from_config(name)
    assert model.fresh == {parameter for parameter, _ in model.named_parameters()}
    torch.manual_seed(3)
    assert torch.equal(DualEncoder.from_config(name).encode_images(images), model.encode_images(images))
    model.save_pretrained(tmp_path / "saved")
    assert DualEncoder.from_pretrained(tmp_path / "saved").fresh == frozenset()
    other = DualEncoder.from_config(f"open_clip:{tmp_path / 'saved'}")
    assert not torch.equal(other.encode_images(images), model.encode_images(images))
    (tmp_path / "saved" / "open_clip_model.safetensors").unlink()
    DualEncoder.from_config(f"open_clip:{tmp_path / 'saved'}")
    with pytest.raises(ModelError, match="Did you mean tiny-random"):
        DualEncoder.from_config("open_clip:tiny-randon")
