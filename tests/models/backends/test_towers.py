from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
import transformers
from PIL import Image
from tokenizers import Regex, processors
from transformers import AutoModel

from clipkit.errors import ModelError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.image_transform import ImageTransform
from clipkit.models.processor import TransformersImages

Images = list[Image.Image]
Make = Callable[..., DualEncoder]
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8}
TIMM = {
    "architecture": "mobilenetv2_035",
    "model_args": {"in_chans": 3},
    "pretrained_cfg": {
        "input_size": [3, 48, 48],
        "crop_pct": 0.8,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
    },
}

# class, settings of its config, pooling that is chosen, size of the features
VISION: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "ViT": ("ViTModel", PATCHES, "cls", 32),
    "DINOv2": ("Dinov2Model", PATCHES, "pooler", 32),
    "CLIP": ("CLIPVisionModel", PATCHES, "pooler", 32),
    "SigLIP": ("SiglipVisionModel", PATCHES, "pooler", 32),
    "ConvNext": (
        "ConvNextModel",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        "pooler",
        16,
    ),
    "ResNet": ("ResNetModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}, "pooler", 16),
    "DINOv3": ("DINOv3ViTModel", {**PATCHES, "num_register_tokens": 2}, "pooler", 32),
    "Swin": (
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        "pooler",
        32,
    ),
    "timm": ("TimmWrapperModel", TIMM, "pooler", 1280),
}
WORDS = {"vocab_size": 200, "max_position_embeddings": 64}
TEXT: dict[str, tuple[str, dict[str, Any], str]] = {
    "BERT": ("BertModel", {**SMALL, **WORDS}, "mean"),
    "RoBERTa": ("RobertaModel", {**SMALL, **WORDS, "pad_token_id": 0}, "mean"),
    "XLM-R": ("XLMRobertaModel", {**SMALL, **WORDS, "pad_token_id": 0}, "mean"),
    "MiniLM": ("BertModel", {**SMALL, **WORDS, "num_attention_heads": 4, "hidden_dropout_prob": 0.1}, "mean"),
    "DistilBERT": ("DistilBertModel", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, **WORDS}, "mean"),
    "ModernBERT": ("ModernBertModel", {**SMALL, **WORDS, "pad_token_id": 0}, "mean"),
    "T5": (
        "T5EncoderModel",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 200},
        "mean",
    ),
    "GPT-2": ("GPT2Model", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 200}, "last"),
    "SigLIP": ("SiglipTextModel", {**SMALL, "vocab_size": 200, "max_position_embeddings": 20}, "pooler"),
}


def build(class_name: str, settings: dict[str, Any]) -> Any:
    model_class = getattr(transformers, class_name)
    torch.manual_seed(3)
    model = model_class(model_class.config_class(**settings))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that differ from the initial ones
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model


def check_round_trip(model: DualEncoder, images: Images, texts: list[str], folder: Path) -> DualEncoder:
    model.save_pretrained(folder)
    again = DualEncoder.from_pretrained(folder)
    assert torch.equal(again.encode_images(images), model.encode_images(images))
    assert torch.equal(again.encode_texts(texts), model.encode_texts(texts))
    assert again.fingerprint().difference(model.fingerprint()) == []
    frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, again)]
    assert frozen[0] == frozen[1]
    return again


def check_every_trained_parameter_gets_a_gradient(model: DualEncoder, images: Images, texts: list[str]) -> None:
    inputs = {"pixel_values": model.processor.images(images), **model.processor.texts(texts)}
    found = model(**inputs)
    (found.scale * found.image @ found.text.T).logsumexp(1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.logit_scale.grad is not None


@pytest.mark.parametrize("kind", VISION)
def test_any_vision_tower(kind: str, make_towers: Make, images: Images, texts: list[str], tmp_path: Path) -> None:
    class_name, settings, pooling, width = VISION[kind]
    size = {} if kind == "timm" else {"image_size": 32}
    model = make_towers(build(class_name, settings), **size)
    assert model.backend.settings()["image_pooling"] == pooling
    assert model.vision_features(model.processor.images(images)).shape == (4, width)
    check_round_trip(model, images, texts, tmp_path / "saved")
    AutoModel.from_pretrained(tmp_path / "saved" / "vision")
    check_every_trained_parameter_gets_a_gradient(model, images, texts)


@pytest.mark.parametrize("kind", TEXT)
def test_any_text_tower(kind: str, make_towers: Make, images: Images, texts: list[str], tmp_path: Path) -> None:
    class_name, settings, pooling = TEXT[kind]
    model = make_towers(text=build(class_name, settings))
    assert model.backend.settings()["text_pooling"] == pooling
    check_round_trip(model, images, texts, tmp_path / "saved")
    check_every_trained_parameter_gets_a_gradient(model, images, texts)
    together, alone = model.encode_texts(texts), torch.cat([model.encode_texts([text]) for text in texts])
    assert (together - alone).abs().max() < 1e-5  # padding changes nothing


def test_clips_own_text_tower_reads_the_end_of_text(
    make_towers: Make, clip_folder: Path, images: Images, texts: list[str], tmp_path: Path
) -> None:
    model = make_towers(text=str(clip_folder), tokenizer=None)  # half of a dual encoder, by name
    assert type(model.backend.text).__name__ == "CLIPTextModel"
    assert model.processor.context_length == 24
    check_round_trip(model, images, texts, tmp_path / "saved")


def test_the_end_of_text_that_the_tower_pools_must_be_the_tokenizers(make_towers: Make) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(CLIPTextConfig(**SMALL, vocab_size=200, eos_token_id=7))
    with pytest.raises(ModelError, match="pools at token 7"):
        make_towers(text=text)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("text_pooling", ["mean", "cls", "last", "pooler"])
def test_the_saved_program_gives_the_similarity_without_clipkit(
    head: str,
    text_pooling: str,
    make_towers: Make,
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {"image_mean": [0.3], "image_std": [0.2], "resize": "shortest"} if head == "mlp" else {}
    vision = build("ViTModel", {**PATCHES, "num_channels": len(options.get("image_mean", "rgb"))})
    model = make_towers(vision, head=head, text_pooling=text_pooling, **options)
    model.save_pretrained(tmp_path / "saved")
    images[0].save(tmp_path / "photo.png")
    expected = model.encode_images([images[0]]) @ model.encode_texts(["Two dogs"]).T

    monkeypatch.setitem(sys.modules, "clipkit", None)  # `import clipkit` fails
    program = str(tmp_path / "saved" / "without_clipkit.py")
    monkeypatch.setattr(sys, "argv", [program, str(tmp_path / "photo.png"), "Two dogs"])
    runpy.run_path(program)
    assert float(capsys.readouterr().out) == pytest.approx(expected.item(), abs=1e-5)


def test_heads_scale_and_bias_are_saved(make_towers: Make, images: Images, texts: list[str], tmp_path: Path) -> None:
    model = make_towers(head="mlp", logit_scale=2.0, logit_bias=-10.0)
    with torch.no_grad():
        model.logit_scale.add_(0.123)
    again = check_round_trip(model, images, texts, tmp_path / "saved")
    assert again.similarity == "sigmoid"
    assert torch.equal(again.logit_scale, torch.tensor(2.0) + 0.123)
    assert again.logit_bias is not None
    assert again.logit_bias.item() == -10


def test_t5_by_name_is_its_encoder(make_towers: Make, word_tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    whole = build("T5ForConditionalGeneration", TEXT["T5"][1]).eval()
    whole.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    model = make_towers(text=str(tmp_path), tokenizer=None)
    assert type(model.backend.text).__name__ == "T5EncoderModel"
    inputs = model.processor.texts(texts)
    with torch.no_grad():
        expected = whole.get_encoder()(**inputs).last_hidden_state
        assert torch.equal(model.backend.text(**inputs).last_hidden_state, expected)


def test_a_tower_opens_from_a_pickle_of_tensors(make_towers: Make, images: Images, tmp_path: Path) -> None:
    vision = build("ViTModel", PATCHES)
    vision.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(vision.state_dict(), tmp_path / "pytorch_model.bin")
    model = make_towers(tmp_path, image_size=32)
    assert torch.equal(model.encode_images(images), make_towers(vision).encode_images(images))


def ending_tokenizer(post: bool) -> Any:
    """Ends each text with `</s>`: after truncation, as is usual, or within the text, where truncation drops it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["<pad>", "</s>", "word", "other", "[UNK]"]
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post:
        fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    else:
        fast.normalizer = normalizers.Replace(Regex("$"), " </s>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="[UNK]"
    )


@pytest.mark.parametrize("post", [True, False])
def test_a_cut_text_keeps_its_end(post: bool, make_towers: Make, images: Images, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": ending_tokenizer(post), "text_pooling": "eos", "context_length": 6}
    model = make_towers(text=build("GPT2Model", TEXT["GPT-2"][1]), **options)
    ids = model.processor.texts(["word " * 9, "word other"])["input_ids"]
    assert ids.tolist() == [[2, 2, 2, 2, 2, 1], [2, 3, 1, 0, 0, 0]]
    assert model.processor.token_counts(["word " * 9]) == [10]
    check_round_trip(model, images, ["word " * 9, "word other"], tmp_path / "saved")


def test_pooling_at_an_end_that_no_text_has_is_refused(make_towers: Make) -> None:
    tokenizer = ending_tokenizer(True)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(ModelError, match="ends each text"):
        make_towers(text=build("GPT2Model", TEXT["GPT-2"][1]), tokenizer=tokenizer, text_pooling="eos")


def test_clips_text_tower_of_an_old_config_pools_at_the_end(
    make_towers: Make, clip_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, CLIPTextModel

    tower, tokenizer = CLIPTextModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    tower.eos_token_id = tower.config.eos_token_id = 2
    model = make_towers(text=tower, tokenizer=tokenizer)
    assert tower.eos_token_id == model.backend.text.config.eos_token_id == 1


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("fraction", [1.0, 0.8])
def test_timms_crop_modes_are_timms(
    mode: str, fraction: float, make_towers: Make, images: Images, tmp_path: Path
) -> None:
    config = {**TIMM, "pretrained_cfg": {**TIMM["pretrained_cfg"], "crop_mode": mode, "crop_pct": fraction}}
    model = make_towers(build("TimmWrapperModel", config))
    native = timm.data.create_transform(**timm.data.resolve_data_config(config["pretrained_cfg"]), is_training=False)
    for image in images:
        assert (model.processor.image(image) - native(image)).abs().max() < 1e-6
    check_round_trip(model, images, ["a cat"], tmp_path / "saved")


def test_timms_border_is_refused(make_towers: Make) -> None:
    config = {**TIMM, "pretrained_cfg": {**TIMM["pretrained_cfg"], "crop_mode": "border"}}
    with pytest.raises(ModelError, match="'border'"):
        make_towers(build("TimmWrapperModel", config))


def test_timms_transform_is_timms(images: Images, make_towers: Make) -> None:
    model = make_towers(build("TimmWrapperModel", TIMM))
    native = timm.data.create_transform(**timm.data.resolve_data_config(TIMM["pretrained_cfg"]), is_training=False)
    for image in images:
        assert (model.processor.image(image) - native(image)).abs().max() < 1e-6


def test_a_tower_by_name_brings_its_transform(
    make_towers: Make, clip_folder: Path, images: Images, texts: list[str], tmp_path: Path
) -> None:
    build("TimmWrapperModel", TIMM).save_pretrained(tmp_path / "timm")
    model = make_towers(tmp_path / "timm")
    assert model.processor.image_side == ImageTransform(
        48, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "shortest", 60, "bilinear"
    )
    model = make_towers(clip_folder)
    assert isinstance(model.processor.image_side, TransformersImages)
    check_round_trip(model, images, texts, tmp_path / "saved")


def test_a_missing_tanh_pooler_is_no_missing_weight(make_towers: Make, images: Images, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**PATCHES), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    model = make_towers(tmp_path / "vit", image_size=32)
    check_round_trip(model, images, ["a cat"], tmp_path / "saved")
    with pytest.raises(ModelError, match=r"pooler\.dense"):
        make_towers(tmp_path / "vit", image_size=32, image_pooling="pooler")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_length": 1000}, "ends at 512"),
        ({"text_pooling": "eos"}, "end-of-text"),
        ({"head": "cubic"}, "linear"),
        ({"image_mean": [0.5, 0.5], "image_std": [1, 1]}, "1 or 3 values"),
        ({"vision": 7}, "a transformers model"),
        ({"tokenizer": None}, "tokenizer="),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str, make_towers: Make) -> None:
    with pytest.raises(ModelError, match=words):
        make_towers(**options)


def test_a_tokenizer_bigger_than_the_tower_is_refused(make_towers: Make) -> None:
    with pytest.raises(ModelError, match="vocab_size="):
        make_towers(text=build("BertModel", {**SMALL, "vocab_size": 5}))


@pytest.mark.photos
def test_the_real_mobilenet(make_towers: Make, images: Images, tmp_path: Path) -> None:
    folder = Path(os.environ.get("PHOTOS", "")) / "mobilenetv2_timm"
    if not (folder / "config.json").is_file():
        pytest.skip("PHOTOS=folder with mobilenetv2_timm")
    model = make_towers(folder)
    assert model.processor.image_size == 224
    features = model.vision_features(model.processor.images(images))
    native = AutoModel.from_pretrained(folder).eval()(pixel_values=model.processor.images(images)).pooler_output
    assert features.shape == (4, 1280)
    assert (features - native).abs().max() < 1e-5
