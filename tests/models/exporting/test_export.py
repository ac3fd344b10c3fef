from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from plain import run_plain
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import ViTImageProcessor

from clipkit.errors import ModelError, UsageError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.exporting import processors as convert_inputs
from clipkit.models.exporting import weights as convert
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS, golden_images

Make = Callable[..., DualEncoder]
LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = "vit_tiny_patch8_siglip_32"


def timm_tower(act: str) -> Callable[..., Any]:
    def vit_tiny_patch8_siglip_32(pretrained: bool = False, **kwargs: Any) -> Any:
        kwargs = {"num_classes": 0, "global_pool": "map", **kwargs}
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(key, None)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 3}
        model = VisionTransformer(**shape, class_token=False, act_layer=act, **kwargs)
        model.default_cfg = {"input_size": (3, 32, 32)}
        model.pretrained_cfg = model.default_cfg
        return model

    return vit_tiny_patch8_siglip_32


@pytest.fixture
def tiny_timm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives timm a SigLIP tower of tiny size, with the activation that is asked for."""

    def register(act: str) -> None:
        monkeypatch.setitem(timm.models._registry._model_entrypoints, TINY, timm_tower(act))
        monkeypatch.setitem(timm.models._registry._model_to_module, TINY, "vision_transformer")
        cfg = timm.models.PretrainedCfg(input_size=(3, 32, 32))
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, TINY, cfg)
        monkeypatch.setattr(timm, "list_models", lambda pattern: [TINY])

    return register


def clip(act: str = "quick_gelu", eos: int = 49407, **text: Any) -> DualEncoder:
    """A CLIP of transformers with the vocabulary that all published ones have."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = convert_inputs._as_clip_tokenizer(open_clip.SimpleTokenizer())
    tokenizer.model_max_length = 24
    if text.get("vocab_size", 0) > 49408:
        tokenizer.add_tokens(["<bird>"])
    config = CLIPConfig(
        text_config={**LAYERS, "vocab_size": 49408, "max_position_embeddings": 24, "hidden_act": act}
        | {"eos_token_id": eos, "bos_token_id": 49406, "pad_token_id": 1, **text},
        vision_config={**LAYERS, "image_size": 32, "patch_size": 8, "hidden_act": act},
        projection_dim=16,
    )
    torch.manual_seed(0)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return stirred(DualEncoder.from_transformers(CLIPModel(config), CLIPProcessor(images, tokenizer)))


def siglip(siglip_folder: Path, act: str) -> DualEncoder:
    from transformers import AutoProcessor, SiglipConfig, SiglipModel

    text = {**LAYERS, "vocab_size": 300, "max_position_embeddings": 16, "hidden_act": act, "pad_token_id": 0}
    vision = {**LAYERS, "image_size": 32, "patch_size": 8, "hidden_act": act}
    torch.manual_seed(1)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    return stirred(DualEncoder.from_transformers(model, AutoProcessor.from_pretrained(siglip_folder)))


def stirred(model: DualEncoder) -> DualEncoder:
    """No bias, norm or position is at the value that it starts with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def check_return(model: DualEncoder, there: Path, back: Path, final: Path) -> None:
    """A to B to A: identical weights."""
    first = {"transformers": "open_clip", "open_clip": "transformers"}
    home = "open_clip" if model.backend.family == "open_clip" else "transformers"
    report = model.export(there, to=first[home])  # type: ignore[arg-type]
    assert max(report.tensors.values()) < 1e-5
    assert max(report.pipeline.values()) <= 1.0001
    model.save_pretrained(back)
    DualEncoder.from_pretrained(there).export(final, to=home)  # type: ignore[arg-type]
    mine, theirs = weights_of(back), weights_of(final)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_clip_of_transformers_goes_to_open_clip_and_back(act: str, tmp_path: Path) -> None:
    check_return(clip(act), tmp_path / "there", tmp_path / "mine", tmp_path / "back")
    config = json.loads((tmp_path / "there" / "open_clip_config.json").read_text())["model_cfg"]
    assert config["quick_gelu"] == (act == "quick_gelu")
    assert "hf_tokenizer_name" not in config["text_cfg"]  # open_clip's own gives the same ids


@pytest.mark.parametrize("changes", [{}, {"quick_gelu": True}, {"custom_text": True}])
def test_a_clip_of_open_clip_goes_to_transformers_and_back(
    changes: dict[str, Any], open_clip_arch: Callable[..., str], tmp_path: Path
) -> None:
    arch = open_clip_arch("tiny-export-" + "-".join(changes), **changes)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(arch)
    mine = stirred(DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch))
    if "custom_text" in changes:  # comes back under open_clip's other names
        assert max(mine.export(tmp_path / "there", to="transformers").tensors.values()) < 1e-5
    else:
        check_return(mine, tmp_path / "there", tmp_path / "mine", tmp_path / "back")


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_siglip_goes_there_and_back(
    act: str, siglip_folder: Path, tiny_timm: Callable[[str], None], tmp_path: Path
) -> None:
    tiny_timm({"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}[act])
    check_return(siglip(siglip_folder, act), tmp_path / "there", tmp_path / "mine", tmp_path / "back")
    config = json.loads((tmp_path / "there" / "open_clip_config.json").read_text())["model_cfg"]
    assert config["vision_cfg"]["timm_model_name"] == TINY


def test_an_activation_that_timms_tower_lacks_is_refused(
    siglip_folder: Path, tiny_timm: Callable[[str], None], tmp_path: Path
) -> None:
    tiny_timm("gelu")
    with pytest.raises(ModelError, match="nearest, vit_tiny_patch8_siglip_32 computes gelu"):
        siglip(siglip_folder, "gelu_pytorch_tanh").export(tmp_path / "there", to="open_clip")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(("eos", "pool"), [(49407, "eos"), (2, "eos")])
def test_the_pooled_token_stays_the_same_with_added_tokens(eos: int, pool: str, tmp_path: Path) -> None:
    model = clip(eos=eos, vocab_size=49409)
    report = model.export(tmp_path / "there", to="open_clip")
    assert report.tensors["text"] < 1e-5
    text = json.loads((tmp_path / "there" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text["pool_type"] == pool
    back = DualEncoder.from_pretrained(tmp_path / "there").export(tmp_path / "back", to="transformers")
    assert back.tensors["text"] < 1e-5


def test_another_vocabulary_takes_its_tokenizer_along(clip_folder: Path, tmp_path: Path) -> None:
    model = DualEncoder.from_pretrained(clip_folder)
    report = model.export(tmp_path / "there", to="open_clip")
    assert "lies beside the weights" in report.notes[0]
    assert report.pipeline["text"] > 0.9999
    DualEncoder.from_pretrained(tmp_path / "there").export(tmp_path / "back", to="transformers")
    again = DualEncoder.from_pretrained(tmp_path / "back")
    assert (again.encode_texts(list(GOLDEN_TEXTS)) - model.encode_texts(list(GOLDEN_TEXTS))).abs().max() < 1e-5


def test_what_open_clip_cleans_before_its_tokenizer_is_cleaned_by_the_tokenizer(word_tokenizer: Any) -> None:
    from types import SimpleNamespace

    for clean in ("canonicalize", "lower", "whitespace"):
        clean_fn = open_clip.tokenizer.get_clean_fn(clean)

        def call(texts: list[str], context_length: int, clean_fn: Any = clean_fn) -> Tensor:
            rows = word_tokenizer([clean_fn(t) for t in texts], padding="max_length", truncation=True,
                                  max_length=context_length, return_tensors="pt")  # fmt: skip
            return rows["input_ids"]

        class Wrapped(SimpleNamespace):
            __call__ = staticmethod(call)

        found = convert_inputs.transformers_tokenizer(Wrapped(tokenizer=word_tokenizer, clean_fn=clean_fn), 12)
        assert found.model_max_length == 12


def test_the_difference_of_the_preprocessing_is_told_apart(tmp_path: Path) -> None:
    model = clip()
    report = model.export(tmp_path / "there", to="open_clip")
    assert report.tensors["image"] < 1e-5
    assert report.pipeline["image"] < 0.99999  # the golden images have odd sizes
    assert report.pipeline["text"] > 0.99999
    assert f"smallest cosine {report.pipeline['image']:.6f}" in str(report)


NATIVE = """
import json, torch
from pathlib import Path
from PIL import Image
texts = json.loads(Path("texts.json").read_text())
images = [Image.open(f"{i}.png") for i in range(4)]
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("hf").eval(), AutoProcessor.from_pretrained("hf")
inputs = processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")
import open_clip
other, preprocess = open_clip.create_model_from_pretrained("local-dir:oc")
tokenizer = open_clip.get_tokenizer("local-dir:oc")
from safetensors.torch import save_file
with torch.no_grad():
    output, other = model(**inputs), other.eval()
    found = {"hf image": output.image_embeds, "hf text": output.text_embeds,
             "oc image": other.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True),
             "oc text": other.encode_text(tokenizer(texts), normalize=True),
             "same image": other.encode_image(inputs["pixel_values"], normalize=True)}
save_file({name: each.contiguous() for name, each in found.items()}, "found.safetensors")
"""


def test_both_libraries_open_an_export_without_clipkit(tmp_path: Path) -> None:
    model = clip()
    model.export(tmp_path / "oc", to="open_clip")
    DualEncoder.from_pretrained(tmp_path / "oc").export(tmp_path / "hf", to="transformers")
    for index, image in enumerate(golden_images()):
        image.save(tmp_path / f"{index}.png")
    (tmp_path / "texts.json").write_text(json.dumps(GOLDEN_TEXTS))
    run_plain(NATIVE, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    for folder in ("hf", "oc"):
        opened = DualEncoder.from_pretrained(tmp_path / folder)
        assert (opened.encode_images(golden_images()) - found[f"{folder} image"]).abs().max() < 1e-5
        assert (opened.encode_texts(list(GOLDEN_TEXTS)) - found[f"{folder} text"]).abs().max() < 1e-5
    assert (model.encode_images(golden_images()) - found["same image"]).abs().max() < 1e-5


def test_towers_do_not_convert(towers: DualEncoder, make_towers: Callable[..., DualEncoder], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="joined of two towers"):
        towers.export(tmp_path / "there", to="open_clip")
    with pytest.raises(UsageError, match=r"no class for these joined towers: .*pooling is 'cls'") as refused:
        towers.export(tmp_path / "there", to="transformers")
    assert "without_clipkit.py" in refused.value.fix
    images = ViTImageProcessor(size={"height": 32, "width": 32})
    poolers = make_towers(image_pooling="pooler", text_pooling="pooler", image_processor=images)
    with pytest.raises(UsageError, match="one of transformers already"):
        poolers.export(tmp_path / "there", to="transformers")
    assert poolers.save_pretrained(tmp_path / "there").form == "vision-text-dual-encoder"


def test_an_unlike_architecture_is_refused_with_the_reason(
    open_clip_arch: Callable[..., str], clip_folder: Path, tmp_path: Path
) -> None:
    vision = {"image_size": 48, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
    for change, words in (
        ({"pool_type": "avg"}, "otherwise than at the class token"),
        ({"no_ln_pre": True}, "no weight visual.ln_pre"),
        ({"ls_init_value": 0.1}, "no place for"),
    ):
        arch = open_clip_arch("tiny-" + "-".join(change), vision_cfg={**vision, **change})
        model, _, preprocess = open_clip.create_model_and_transforms(arch)
        mine = DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch)
        with pytest.raises(ModelError, match=words):
            mine.export(tmp_path / "there", to="transformers")
    with pytest.raises(UsageError, match="save_pretrained"):
        DualEncoder.from_pretrained(clip_folder).export(tmp_path / "there", to="transformers")
    with pytest.raises(UsageError, match="found 'tensorflow'"):
        DualEncoder.from_pretrained(clip_folder).export(tmp_path / "there", to="tensorflow")  # type: ignore[arg-type]


def test_a_wrong_conversion_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = convert.rename

    def swapped(weights: Any, rules: Any, *, to_open_clip: bool) -> dict[str, Tensor]:
        found = rename(weights, rules, to_open_clip=to_open_clip)
        first, second = ("visual.ln_pre.bias", "visual.ln_post.bias")
        return found | {first: found[second], second: found[first]}

    monkeypatch.setattr(convert, "rename", swapped)
    with pytest.raises(ModelError, match="image embeddings of the converted model differ"):
        clip().export(tmp_path / "there", to="open_clip")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"shortest_edge": 36}}, "resizes to the size that it crops"),
        ({"resample": 1}, "bicubic and bilinear"),
        ({"do_normalize": False}, "do_normalize"),
    ],
)
def test_a_transform_that_open_clip_lacks_is_refused(changes: dict[str, Any], words: str) -> None:
    from transformers import CLIPImageProcessor

    options = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **changes}
    with pytest.raises(ModelError, match=words):
        convert_inputs.open_clip_preprocess(CLIPImageProcessor(**options))
