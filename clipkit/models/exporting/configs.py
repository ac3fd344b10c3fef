"""The config of a model's architecture in the other library: CLIP with a ViT, and SigLIP.

What open_clip built is read off its modules, not its config: overrides at creation are in no config.
"""

from __future__ import annotations

from typing import Any

import timm
import torch

from clipkit.errors import ModelError

CONVERTS = "CLIP with a ViT (CLIPModel; open_clip's ViT-B-32, B-16, L-14 …) and SigLIP convert"


def refuse(reason: str) -> ModelError:
    return ModelError(
        f"this model cannot be converted: {reason}", fix=f"{CONVERTS}; save_pretrained keeps its own format"
    )


def open_clip_clip(config: Any) -> dict[str, Any]:
    """model_cfg for a CLIPConfig."""
    vision, text = config.vision_config, config.text_config
    quick = {vision.hidden_act == "quick_gelu", text.hidden_act == "quick_gelu"}
    if len(quick) == 2:
        raise refuse("one tower computes QuickGELU and the other does not, open_clip has one switch for both")
    if vision.num_channels != 3:
        raise refuse(f"open_clip's ViT takes 3 channels, this one {vision.num_channels}")
    pool = {"pool_type": "eos", "eos_id": text.eos_token_id}
    if text.eos_token_id in (2, text.vocab_size - 1):  # 2: transformers takes the highest id, as open_clip does
        pool = {"pool_type": "argmax"}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": quick.pop(),
        "vision_cfg": {
            **_open_clip_blocks(vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": {**_open_clip_text(text), **pool},
    }


def open_clip_siglip(config: Any) -> dict[str, Any]:
    """model_cfg for a SiglipConfig; the vision tower is the one of timm's that computes the same."""
    vision, text = config.vision_config, config.text_config
    return {
        "embed_dim": vision.hidden_size,
        "custom_text": True,
        "init_logit_bias": -10.0,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": _timm_siglip(vision),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {**_open_clip_text(text), "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    }


def _open_clip_text(text: Any) -> dict[str, Any]:
    heads = {"heads": text.num_attention_heads, "vocab_size": text.vocab_size}
    return {**_open_clip_blocks(text), **heads, "context_length": text.max_position_embeddings}


def _open_clip_blocks(config: Any) -> dict[str, Any]:
    width, inner = config.hidden_size, config.intermediate_size
    ratio = inner / width
    blocks = {"width": width, "layers": config.num_hidden_layers}
    blocks["mlp_ratio"] = ratio if int(width * ratio) == inner else (inner + 0.5) / width  # open_clip rounds down
    if config.layer_norm_eps != 1e-5:
        blocks["norm_kwargs"] = {"eps": config.layer_norm_eps}
    if config.hidden_act == "gelu_pytorch_tanh":
        blocks["act_kwargs"] = {"approximate": "tanh"}
    elif config.hidden_act not in ("gelu", "quick_gelu"):
        raise refuse(f"open_clip has no activation {config.hidden_act!r}")
    return blocks


def _timm_siglip(vision: Any) -> str:
    """Name of the ViT of timm that pools by attention and has this shape and activation."""
    expected = _shape(vision)
    near: set[str] = set()
    for name in timm.list_models("*siglip*"):
        cfg = timm.get_pretrained_cfg(name)
        if cfg is None or cfg.input_size[-1] != vision.image_size:
            continue
        with torch.device("meta"):
            shape = timm_shape(timm.create_model(name, pretrained=False, num_classes=0))
        if shape == expected:
            return str(name)
        if shape is not None and shape | {"hidden_act": expected["hidden_act"]} == expected:
            near.add(f"{name} computes {shape['hidden_act']}")
    known = f"; the nearest, {', '.join(sorted(near))}" if near else ""
    sizes = ", ".join(f"{key} {value}" for key, value in expected.items())
    raise refuse(f"timm, which open_clip takes its SigLIP towers from, has none with {sizes}{known}")


def _shape(vision: Any) -> dict[str, Any]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size")
    return {key: getattr(vision, key) for key in (*keys, "layer_norm_eps", "hidden_act")}


def timm_shape(trunk: Any) -> dict[str, Any] | None:
    """Return what a SiglipVisionConfig says of a ViT of timm; None for a tower of another kind."""
    pool = getattr(trunk, "attn_pool", None)
    if pool is None or getattr(trunk, "num_prefix_tokens", 1) != 0:
        return None
    if not hasattr(trunk, "blocks") or not hasattr(trunk, "patch_embed"):  # NaFlex has the first alone
        return None
    mlp = trunk.blocks[0].mlp
    return {
        **_transformers_blocks(trunk.embed_dim, trunk.blocks, mlp.fc1, mlp.act, trunk.norm),
        "patch_size": trunk.patch_embed.patch_size[0],
        "image_size": trunk.patch_embed.img_size[0],
    }


def transformers_siglip(model: Any) -> Any:
    """SiglipConfig for a CustomTextCLIP of open_clip with a SigLIP tower of timm."""
    from transformers import SiglipConfig

    shape = timm_shape(model.visual.trunk)
    if shape is None or len(model.visual.head) or model.text.pool_type != "last" or model.text.attn_mask is not None:
        raise refuse("its image tower is timm's, and not that of SigLIP")
    text = {**_transformers_text(model.text), "projection_size": model.text.text_projection.out_features}
    return SiglipConfig(vision_config=shape, text_config=text)


def transformers_clip(model: Any, ids: dict[str, int | None]) -> Any:
    """CLIPConfig for a CLIP of open_clip; `ids` are the tokenizer's bos_token_id, eos_token_id and pad_token_id."""
    from transformers import CLIPConfig

    visual, text = model.visual, getattr(model, "text", model)
    odd = {
        "its image tower pools by attention": visual.attn_pool is not None,
        "its image tower pools otherwise than at the class token": visual.pool_type != "tok",
        "its image tower normalises after pooling": visual.final_ln_after_pool,
        "its text tower is not causal": text.attn_mask is None,
    }
    for reason, holds in odd.items():
        if holds:
            raise refuse(reason)
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    end = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
    if pool not in ("argmax", "eos"):
        raise refuse(f"its text tower pools the {pool} token")
    if pool == "argmax":
        # 2 makes transformers take the highest id, which is what argmax does
        end = ids["eos_token_id"] if ids["eos_token_id"] == model.vocab_size - 1 else 2
    vision = {
        **_open_clip_tower(visual.transformer, visual.ln_post),
        "patch_size": visual.conv1.kernel_size[0],
        "image_size": visual.image_size[0],
    }
    return CLIPConfig(
        vision_config=vision,
        text_config={**_transformers_text(text), **ids, "eos_token_id": end},
        projection_dim=visual.proj.shape[1],
    )


def _transformers_text(text: Any) -> dict[str, Any]:
    positions = len(text.positional_embedding)
    vocabulary = text.token_embedding.num_embeddings
    blocks = _open_clip_tower(text.transformer, text.ln_final)
    return {**blocks, "max_position_embeddings": positions, "vocab_size": vocabulary}


def _open_clip_tower(transformer: Any, norm: Any) -> dict[str, Any]:
    mlp = transformer.resblocks[0].mlp
    return _transformers_blocks(transformer.width, transformer.resblocks, mlp.c_fc, mlp.gelu, norm)


def _transformers_blocks(width: int, blocks: Any, mlp_input: Any, mlp_activation: Any, norm: Any) -> dict[str, Any]:
    """Return what a config of transformers says of a tower's blocks: timm and open_clip name them differently."""
    return {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": mlp_input.out_features,
        "layer_norm_eps": norm.eps,
        "hidden_act": activation(mlp_activation),
    }


def activation(module: Any) -> str:
    """Return the name that transformers has for an activation of open_clip or timm."""
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    tanh = getattr(module, "approximate", "none") == "tanh" or type(module).__name__ == "GELUTanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"
