"""A model in another library's format, checked against the original before it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipkit.errors import UsageError
from clipkit.files import dump_json
from clipkit.models.backend import Backend
from clipkit.models.backends.quiet import quiet
from clipkit.models.backends.towers import TowersBackend
from clipkit.models.eval_mode import eval_mode
from clipkit.models.exporting import weights as convert
from clipkit.models.exporting.configs import refuse
from clipkit.models.exporting.report import ExportReport
from clipkit.models.fingerprint.golden import (
    FEW,
    GOLDEN_TEXTS,
    GoldenEmbeddings,
    as_fp32_cpu,
    golden_embeddings,
    golden_images,
)
from clipkit.models.loading.load import open_checked
from clipkit.models.processor import Processor, TransformersTexts
from clipkit.models.saving.model_card import Card
from clipkit.models.saving.save import check_place, save

Target = Literal["transformers", "open_clip", "onnx"]
TOLERANCE = 1e-5


def export(
    backend: Backend, processor: Processor, folder: Path, to: Target, overwrite: bool, *, name: str, card: Card
) -> ExportReport:
    """What `DualEncoder.export` documents."""
    if to == "onnx":
        from clipkit.models.exporting.onnx import export_onnx

        return export_onnx(backend, processor, folder, overwrite, name=name, card=card)
    if to not in ("transformers", "open_clip"):
        raise UsageError(f"a model can be exported to transformers, open_clip or onnx, found {to!r}")
    native = "open_clip" if backend.family == "open_clip" else "transformers"
    if native == to:
        raise _nothing_to_convert(backend, processor, to, name)
    check_place(folder, overwrite)
    source = as_fp32_cpu(backend)
    with tempfile.TemporaryDirectory(prefix="clipkit-export-") as room:
        bare = Path(room) / "model"
        bare.mkdir()
        with quiet():
            notes = (_to_open_clip if to == "open_clip" else _to_transformers)(backend, processor, bare)
        target, target_processor, _ = open_checked(f"open_clip:{bare}" if to == "open_clip" else bare)
        tensors = _on_identical_tensors(source, target, processor)
        for side, worst in tensors.items():
            if not worst <= TOLERANCE:
                raise refuse(f"the {side} embeddings of the converted model differ by {worst:.2g}")
        save(target, target_processor, folder, overwrite, name=name, card=card)
    mine = golden_embeddings(source, processor)
    theirs = golden_embeddings(target, target_processor)
    cosines: dict[str, float] = {side: float((mine[side] * theirs[side]).sum(1).min()) for side in mine}
    return ExportReport(folder, to, tensors, cosines, notes)


def _nothing_to_convert(backend: Backend, processor: Processor, to: Target, name: str) -> UsageError:
    from clipkit.models.saving import vision_text as vtde

    reason = None
    if isinstance(backend, TowersBackend):
        with tempfile.TemporaryDirectory(prefix="clipkit-export-") as room:
            reason = vtde.attempt(backend, processor, Path(room), golden_embeddings(backend, processor, FEW))
    if reason is None:
        fix = f"copy its folder ({name}), or model.save_pretrained(FOLDER): that is its format"
        return UsageError(f"this model is one of {to} already", fix=fix)
    message = f"transformers has no class for these joined towers: {reason}"
    fix = (
        "export to onnx; or a saved folder as it is: AutoModel opens its vision/ and text/, without_clipkit.py the rest"
    )
    return UsageError(message, fix=fix)


def _to_open_clip(backend: Backend, processor: Processor, folder: Path) -> list[str]:
    from clipkit.models.exporting import configs as arch_configs
    from clipkit.models.exporting import processors as convert_inputs

    native: Any = getattr(backend, "model", None)
    if backend.family not in ("clip", "siglip") or native is None:
        raise refuse(f"it is {_called(backend.family)}")
    is_clip = native.config.model_type == "clip"
    describe = arch_configs.open_clip_clip if is_clip else arch_configs.open_clip_siglip
    config = describe(native.config)
    image_side: Any = processor.image_side
    text_side: Any = processor.text_side
    images, tokenizer = image_side.image_processor, text_side.tokenizer
    notes = []
    if is_clip and convert_inputs.simple_tokenizer_agrees(tokenizer, processor.context_length):
        notes.append("open_clip's own tokenizer gives the same ids on all probe texts")
    else:
        config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip reads its files from the same folder
        tokenizer.save_pretrained(folder)
        notes.append("the tokenizer of transformers lies beside the weights, and open_clip uses it")
    layers = (native.config.vision_config.num_hidden_layers, native.config.text_config.num_hidden_layers)
    rules = convert.clip_rules(*layers) if is_clip else convert.siglip_rules(*layers)
    save_file(convert.rename(_weights(native), rules, to_open_clip=True), folder / "open_clip_model.safetensors")
    body = {"model_cfg": config, "preprocess_cfg": convert_inputs.open_clip_preprocess(images)}
    (folder / "open_clip_config.json").write_text(dump_json(body), encoding="utf-8")
    return notes


def _weights(native: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in native.state_dict().items()}


def _called(family: str) -> str:
    return "joined of two towers of transformers, which open_clip does not have" if family == "towers" else family


def _to_transformers(backend: Backend, processor: Processor, folder: Path) -> list[str]:
    from transformers import CLIPModel, CLIPProcessor, SiglipModel, SiglipProcessor

    from clipkit.models.exporting import configs as arch_configs
    from clipkit.models.exporting import processors as convert_inputs

    native: Any = getattr(backend, "model", None)
    if backend.family != "open_clip" or native is None:
        raise refuse(f"it is {_called(backend.family)}")
    siglip = hasattr(native.visual, "trunk")
    text = getattr(native, "text", native)
    if not (siglip or hasattr(native.visual, "conv1")) or not hasattr(text, "positional_embedding"):
        raise refuse(f"its towers are {type(native.visual).__name__} and {type(text).__name__}")
    texts: Any = processor.text_side
    tokenizer = convert_inputs.transformers_tokenizer(texts.tokenizer, texts.context_length)
    images = convert_inputs.transformers_images(dict(native.visual.preprocess_cfg), siglip)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = arch_configs.transformers_siglip(native) if siglip else arch_configs.transformers_clip(native, ids)
    weights = _weights(native)
    if not siglip:
        weights = {name.removeprefix("text."): tensor for name, tensor in weights.items()}
    layers = (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    rules = convert.siglip_rules(*layers) if siglip else convert.clip_rules(*layers)
    with torch.device("meta"):
        shell = (SiglipModel if siglip else CLIPModel)(config)
    shell.load_state_dict(convert.rename(weights, rules, to_open_clip=False), assign=True)
    shell.save_pretrained(folder)
    (SiglipProcessor if siglip else CLIPProcessor)(images, tokenizer).save_pretrained(folder)
    return [
        "open_clip repairs HTML entities and wrongly decoded letters before it tokenises; transformers does not",
        "processors of transformers resize on tensors, not with PIL; backend='pil' of AutoProcessor is closer",
    ]


def _on_identical_tensors(backend: Backend, other: Backend, processor: Processor) -> dict[str, float]:
    pixels = processor.images(golden_images())
    ids = torch.cat([_full_length(processor, GOLDEN_TEXTS), _random_ids(backend, processor)])
    mine, theirs = _embed(backend, pixels, ids), _embed(other, pixels, ids)
    return {side: float((mine[side] - theirs[side]).abs().max()) for side in mine}


@torch.no_grad()
def _embed(backend: Backend, pixels: Tensor, ids: Tensor) -> GoldenEmbeddings:
    with eval_mode(backend):
        embeddings = backend.embed(pixel_values=pixels, input_ids=ids)
    assert embeddings.image is not None
    assert embeddings.text is not None
    return {"image": embeddings.image, "text": embeddings.text}


def _full_length(processor: Processor, texts: Sequence[str]) -> Tensor:
    side = processor.text_side
    if isinstance(side, TransformersTexts):
        side = TransformersTexts(side.tokenizer, side.context_length, padding="max_length", mask=False)
    return side(list(texts))["input_ids"]


def _random_ids(backend: Backend, processor: Processor) -> Tensor:
    """Rows with any ids of the vocabulary before the end of text: which token is pooled shows in them."""
    rows = _full_length(processor, GOLDEN_TEXTS[-1:]).repeat(4, 1)
    table = next(parameter for name, parameter in backend.named_parameters() if name.endswith("token_embedding.weight"))
    rows[:, 1:-1] = torch.randint(len(table), (4, rows.shape[1] - 2), generator=torch.Generator().manual_seed(0))
    tokenizer = processor.text_side.tokenizer  # type: ignore[attr-defined]
    end = getattr(tokenizer, "eot_token_id", None) or getattr(tokenizer, "tokenizer", tokenizer).eos_token_id
    rows[:, -1] = rows[:, -1] if end is None else end
    return rows
