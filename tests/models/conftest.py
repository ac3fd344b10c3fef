"""Tiny models with random weights, written by transformers and open_clip themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.overrides import TorchFunctionMode

from clipkit.models.dual_encoder import DualEncoder

torch.set_num_threads(1)

TEXTS = [
    "a photo of a cat",
    "TWO Dogs on a Beach!",
    "naïve café: latin small letter e with acute",
    "a sentence of many words that goes on " * 10,
]
IMAGE_SIZES = [(45, 71), (97, 33), (32, 32), (301, 223)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    small = [generator.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in IMAGE_SIZES]
    return [Image.fromarray(a).resize(s, Image.Resampling.BICUBIC) for a, s in zip(small, IMAGE_SIZES, strict=True)]


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    fast = CLIPTokenizer().backend_tokenizer
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS, trainer)
    model = json.loads(fast.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=24)


def _siglip_tokenizer(folder: Path) -> Any:
    """SentencePiece, as the first SigLIP: canonical texts, the end of text for padding."""
    import sentencepiece
    from transformers import SiglipTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower() for text in TEXTS]),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)


def _gemma_tokenizer(folder: Path) -> Any:
    """As the SigLIP 2 checkpoints of fixed resolution bring it: it keeps the case."""
    from tokenizers import processors
    from transformers import GemmaTokenizer

    fast = GemmaTokenizer().backend_tokenizer
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, max_token_length=4, show_progress=False)
    fast.train_from_iterator([*TEXTS, *(text.lower() for text in TEXTS)], trainer)
    model = json.loads(fast.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    post = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    sides = {"padding_side": "right", "model_max_length": 16}
    ends: dict[str, Any] = {"post_processor": post, "add_bos_token": False, "add_eos_token": True}
    return GemmaTokenizer(vocab=model["vocab"], merges=merges, **ends, **sides)


def _bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    fast = BertTokenizer().backend_tokenizer
    fast.train_from_iterator(TEXTS, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    return BertTokenizer(vocab=fast.get_vocab(), model_max_length=24)


def _xlm_roberta_tokenizer() -> Any:
    from transformers import XLMRobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    fast = XLMRobertaTokenizer().backend_tokenizer
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    fast.train_from_iterator(TEXTS, trainer)
    vocabulary = [(token, score) for token, score in json.loads(fast.to_str())["model"]["vocab"]]
    return XLMRobertaTokenizer(vocab=vocabulary, model_max_length=24)


LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES: dict[str, Any] = {**LAYERS, "image_size": 32, "patch_size": 8}
CROP: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUASH: dict[str, Any] = {"size": {"height": 32, "width": 32}}


def _special_ids(tokenizer: Any) -> dict[str, Any]:
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


def write_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = _clip_tokenizer()
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **_special_ids(tokenizer)}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=PATCHES, projection_dim=16))
    _write(model, CLIPProcessor(CLIPImageProcessor(**CROP), tokenizer), folder)


def write_metaclip_2(folder: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPProcessor, MetaClip2Config, MetaClip2Model

    tokenizer = _xlm_roberta_tokenizer()
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **_special_ids(tokenizer)}
    model = MetaClip2Model(MetaClip2Config(text_config=text, vision_config=PATCHES, projection_dim=16))
    _write(model, CLIPProcessor(CLIPImageProcessor(**CROP), tokenizer), folder)


def write_altclip(folder: Path) -> None:
    from transformers import AltCLIPConfig, AltCLIPModel, AltCLIPProcessor, CLIPImageProcessor

    tokenizer = _xlm_roberta_tokenizer()
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 26, "project_dim": 24}
    text |= {**_special_ids(tokenizer), "type_vocab_size": 1}
    model = AltCLIPModel(AltCLIPConfig(text_config=text, vision_config=PATCHES, projection_dim=16))
    _write(model, AltCLIPProcessor(CLIPImageProcessor(**CROP), tokenizer), folder)


def write_chinese_clip(folder: Path) -> None:
    from transformers import ChineseCLIPConfig, ChineseCLIPImageProcessor, ChineseCLIPModel, ChineseCLIPProcessor

    tokenizer = _bert_tokenizer()
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=PATCHES, projection_dim=16))
    _write(model, ChineseCLIPProcessor(ChineseCLIPImageProcessor(**CROP), tokenizer), folder)


def write_align(folder: Path) -> None:
    from transformers import AlignConfig, AlignModel, AlignProcessor, EfficientNetImageProcessor

    tokenizer = _bert_tokenizer()
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    one = {"kernel_sizes": [3], "in_channels": [32], "out_channels": [16], "strides": [2], "expand_ratios": [1]}
    vision = {"image_size": 32, "num_block_repeats": [1], **one, "depthwise_padding": [], "hidden_dim": 64}
    vision |= {"squeeze_expansion_ratio": 0.25, "width_coefficient": 1.0}
    model = AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.temperature.data.fill_(0.037)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that differ from the initial ones
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    sides = {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    _write(model, AlignProcessor(EfficientNetImageProcessor(**sides), tokenizer), folder)


def write_siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    folder.mkdir(parents=True)
    tokenizer = _siglip_tokenizer(folder)
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=PATCHES))
    _write(model, SiglipProcessor(SiglipImageProcessor(**SQUASH), tokenizer), folder)


def write_siglip2(folder: Path) -> None:
    """The fixed-size SigLIP 2: the classes of SigLIP, the tokenizer of Gemma."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    tokenizer = _gemma_tokenizer(folder)
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 0}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=PATCHES))
    model.logit_bias.data.fill_(-3.0)
    _write(model, SiglipProcessor(SiglipImageProcessor(**SQUASH), tokenizer), folder)


WRITE = {
    "clip": write_clip,
    "metaclip_2": write_metaclip_2,
    "altclip": write_altclip,
    "chinese_clip": write_chinese_clip,
    "align": write_align,
    "siglip": write_siglip,
    "siglip2": write_siglip2,
}


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders that transformers wrote, one tiny model of each family of dual encoders."""
    root = tmp_path_factory.mktemp("families")

    def find(family: str) -> Path:
        if not (root / family / "config.json").is_file():
            torch.manual_seed(0)
            WRITE[family](root / family)
        return root / family

    return find


@pytest.fixture(scope="session")
def clip_folder(family_folder: Callable[[str], Path]) -> Path:
    """A CLIP that transformers wrote: non-square images are cropped, texts cut at 24 tokens."""
    return family_folder("clip")


@pytest.fixture(scope="session")
def siglip_folder(family_folder: Callable[[str], Path]) -> Path:
    """A SigLIP 2 of fixed size that transformers wrote."""
    return family_folder("siglip2")


def _write(model: Any, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def open_clip_arch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Registers a tiny architecture with open_clip and gives its name."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip_configs")

    def register(name: str, **changes: Any) -> str:
        vision = {"image_size": 48, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
        text = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **changes}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(path)
        return name

    return register


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """Whole words, lower case, no end-of-text token."""
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def make_towers(word_tokenizer: Any) -> Callable[..., DualEncoder]:
    """A ViT beside a BERT, or what is given; the same weights each time."""

    def make(vision: Any = None, text: Any = None, **options: Any) -> DualEncoder:
        from transformers import BertConfig, BertModel, ViTConfig, ViTModel

        torch.manual_seed(2)
        vision = vision or ViTModel(ViTConfig(**LAYERS, image_size=32, patch_size=8))
        text = text or BertModel(BertConfig(**LAYERS, vocab_size=200))
        return DualEncoder.from_towers(vision, text, options.pop("tokenizer", word_tokenizer), dim=12, **options)

    return make


@pytest.fixture
def towers(make_towers: Callable[..., DualEncoder]) -> DualEncoder:
    return make_towers()


@pytest.fixture
def photo_paths(images: list[Image.Image], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths


@pytest.fixture(params=["clip", "siglip", "open_clip", "towers"])
def any_model(request: pytest.FixtureRequest) -> DualEncoder:
    """A fresh tiny model of each backend and kind of text tower."""
    if request.param == "towers":
        found: DualEncoder = request.getfixturevalue("towers")
        return found
    if request.param == "open_clip":
        import open_clip

        arch = request.getfixturevalue("open_clip_arch")("tiny-any")
        torch.manual_seed(5)
        model, _, preprocess = open_clip.create_model_and_transforms(arch)
        return DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch)
    return DualEncoder.from_pretrained(request.getfixturevalue(f"{request.param}_folder"))


def reopen(model: DualEncoder, folder: Path) -> DualEncoder:
    """The model as its saved folder gives it back."""
    model.save_pretrained(folder)
    return DualEncoder.from_pretrained(f"open_clip:{folder}" if model.backend.family == "open_clip" else folder)


@pytest.fixture(name="reopen")
def reopen_fixture() -> Callable[[DualEncoder, Path], DualEncoder]:
    return reopen


@pytest.fixture
def vision_tower() -> Callable[[str], Any]:
    """Tiny vision towers by kind; a name of timm's stands for itself."""

    def make(kind: str) -> Any:
        import transformers as t

        torch.manual_seed(6)
        if kind == "swin":
            size = {"image_size": 32, "patch_size": 4, "window_size": 4}
            return t.SwinModel(t.SwinConfig(**size, embed_dim=8, depths=[1, 1], num_heads=[2, 2]))
        if kind == "convnext":
            return t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=32))
        if kind == "dinov2":
            return t.Dinov2Model(t.Dinov2Config(**LAYERS, image_size=32, patch_size=8))
        if kind == "beit":
            return t.BeitModel(t.BeitConfig(**LAYERS, image_size=32, patch_size=8, use_relative_position_bias=True))
        if kind == "dinov3":
            return t.DINOv3ViTModel(t.DINOv3ViTConfig(**LAYERS, image_size=32, patch_size=8))
        settings = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
        small = {"img_size": 32, "depth": 2} if kind.startswith("vit") else None
        return t.TimmWrapperModel(t.TimmWrapperConfig(architecture=kind, pretrained_cfg=settings, model_args=small))

    return make


class WithoutNumbers(TorchFunctionMode):
    """Weights on the meta device have no numbers: drawing them only takes time, minutes for all architectures."""

    METHODS = ("normal_", "uniform_", "trunc_normal_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_")
    INIT = (
        "normal_",
        "uniform_",
        "trunc_normal_",
        "kaiming_uniform_",
        "xavier_uniform_",
        "zeros_",
        "ones_",
        "constant_",
    )
    DRAWS = frozenset(
        [getattr(torch.Tensor, name) for name in METHODS if hasattr(torch.Tensor, name)]
        + [getattr(torch.nn.init, name) for name in INIT]
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if drawn.is_meta:
                return drawn
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_numbers() -> type[WithoutNumbers]:
    return WithoutNumbers
