"""Architectures of their published size, on the meta device: config, names and shapes on both sides of a conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from clipkit.errors import ModelError
from clipkit.models.exporting import configs as arch_configs
from clipkit.models.exporting import weights as convert

IDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
L_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
L_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
EXACT = {"hidden_act": "gelu"}

# open_clip's name, and in what its config of transformers differs from the default, which is CLIP ViT-B/32
# (openai/clip-vit-base-patch32) and SigLIP ViT-B/16 (google/siglip-base-patch16-224).
CLIP: dict[str, dict[str, Any]] = {
    "ViT-B-32-quickgelu": {},
    "ViT-B-32": {"vision_config": EXACT, "text_config": EXACT},
    "ViT-B-16-quickgelu": {"vision_config": {"patch_size": 16}},
    "ViT-B-16": {"vision_config": {"patch_size": 16, **EXACT}, "text_config": EXACT},
    "ViT-L-14-quickgelu": {
        "vision_config": {**L_VISION, "patch_size": 14},
        "text_config": L_TEXT,
        "projection_dim": 768,
    },
    "ViT-L-14-336-quickgelu": {
        "vision_config": {**L_VISION, "patch_size": 14, "image_size": 336},
        "text_config": L_TEXT,
        "projection_dim": 768,
    },
}
SIGLIP: dict[str, dict[str, Any]] = {
    "ViT-B-16-SigLIP": {"vision_config": EXACT, "text_config": EXACT},
    "ViT-B-16-SigLIP-384": {"vision_config": {"image_size": 384, **EXACT}, "text_config": EXACT},
    "ViT-L-16-SigLIP-256": {
        "vision_config": {**L_VISION, "image_size": 256, **EXACT},
        "text_config": {**L_VISION, "projection_size": 1024, **EXACT},
    },
    "ViT-SO400M-14-SigLIP-384": {
        "vision_config": {**SO400M, "patch_size": 14, "image_size": 384, **EXACT},
        "text_config": {**SO400M, "projection_size": 1152, **EXACT},
    },
    "ViT-B-16-SigLIP2": {"vision_config": EXACT, "text_config": {"vocab_size": 256000}},
    "ViT-SO400M-16-SigLIP2-256": {  # timm's tower computes the approximate GELU, too
        "vision_config": {**SO400M, "image_size": 256},
        "text_config": {**SO400M, "projection_size": 1152, "vocab_size": 256000},
    },
}
READ = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"),
    *("layer_norm_eps", "hidden_act", "vocab_size", "max_position_embeddings", "projection_size"),
)


def facts(config: Any) -> dict[str, Any]:
    sides = {"vision": config.vision_config, "text": config.text_config}
    return {f"{side} {key}": getattr(each, key) for side, each in sides.items() for key in READ if hasattr(each, key)}


def shapes(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in weights.items()}


@pytest.fixture
def on_meta(without_numbers: Any) -> Callable[[str], Any]:
    def make(arch: str) -> Any:
        with without_numbers(), torch.device("meta"):
            return open_clip.create_model(arch, device="meta", load_weights=False, pretrained_text=False)

    return make


@pytest.mark.parametrize("arch", [*CLIP, *SIGLIP])
def test_a_published_architecture_has_its_twin(
    arch: str, on_meta: Callable[[str], Any], without_numbers: Any, open_clip_arch: Callable[..., str]
) -> None:
    siglip = arch in SIGLIP
    native = on_meta(arch)
    expected = (SiglipConfig if siglip else CLIPConfig)(**(SIGLIP if siglip else CLIP)[arch])
    config = arch_configs.transformers_siglip(native) if siglip else arch_configs.transformers_clip(native, IDS)
    assert facts(config) == facts(expected)
    assert siglip or config.projection_dim == expected.projection_dim

    with without_numbers(), torch.device("meta"):
        twin = (SiglipModel if siglip else CLIPModel)(expected)
    layers = (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    rules = convert.siglip_rules if siglip else convert.clip_rules
    weights = native.state_dict()
    there = convert.rename(weights, rules(*layers), to_open_clip=False)
    assert shapes(there) == shapes(twin.state_dict())
    assert shapes(convert.rename(twin.state_dict(), rules(*layers), to_open_clip=True)) == shapes(weights)

    back = (arch_configs.open_clip_siglip if siglip else arch_configs.open_clip_clip)(expected)
    again = on_meta(open_clip_arch(f"again-{arch}", **back))
    assert shapes(again.state_dict()) == shapes(weights)
    same = (arch_configs.transformers_siglip(again) if siglip else arch_configs.transformers_clip(again, IDS)).to_dict()
    assert same == config.to_dict()


def test_googles_siglip_base_has_no_twin_for_its_activation() -> None:
    # trained with the approximate GELU; timm's tower of this shape, and so open_clip's, computes the exact one
    with pytest.raises(ModelError, match="vit_base_patch16_siglip_224 computes gelu"):
        arch_configs.open_clip_siglip(SiglipConfig())
