"""A model in another library's format, checked against the original before it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipkit.errors import UsageError
from clipkit.files import dump_json
from clipkit.models.backends.quiet import quiet
from clipkit.models.eval_mode import evaluating
from clipkit.models.exporting import weights as convert
from clipkit.models.exporting.configs import refuse
from clipkit.models.fingerprint.golden import (
    GOLDEN_TEXTS,
    GoldenEmbeddings,
    as_fp32_cpu,
    golden_embeddings,
    golden_images,
)
from clipkit.models.processor import TransformersTexts
from clipkit.models.saving.save import check_place

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder

Target = Literal["transformers", "open_clip", "onnx"]


TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExportReport:
    """What an export was checked for.

    Attributes:
        folder, to: where it stands, and in which format.
        tensors: largest difference of an embedding's component on identical pixels and token ids, by `image` and
            `text`. It is at most 1e-5 (ONNX: 1e-4), or nothing would have been written.
        pipeline: smallest cosine between both models' embeddings of the same photos and captions, each model with
            its own preprocessing. It falls below 1 where the other library resizes or crops otherwise.
        notes: what else to know.
    """

    folder: Path
    to: str
    tensors: dict[str, float]
    pipeline: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.to}"]
        lines += [f"  identical tensors, {side}: largest difference {each:.1e}" for side, each in self.tensors.items()]
        lines += [f"  own preprocessing, {side}: smallest cosine {each:.6f}" for side, each in self.pipeline.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def export(model: DualEncoder, folder: Path, to: Target, overwrite: bool) -> ExportReport:
    """What `DualEncoder.export` documents."""
    if to == "onnx":
        from clipkit.models.exporting.onnx import export_onnx

        return export_onnx(model, folder, overwrite)
    if to not in ("transformers", "open_clip"):
        raise UsageError(f"a model can be exported to transformers, open_clip or onnx, found {to!r}")
    native = "open_clip" if model.backend.family == "open_clip" else "transformers"
    if native == to:
        raise _nothing_to_convert(model, to)
    check_place(folder, overwrite)
    source = as_fp32_cpu(model)
    with tempfile.TemporaryDirectory(prefix="clipkit-export-") as room:
        bare = Path(room) / "model"
        bare.mkdir()
        with quiet():
            notes = (_to_open_clip if to == "open_clip" else _to_transformers)(model, bare)
        target = type(model).from_pretrained(f"open_clip:{bare}" if to == "open_clip" else bare)
        tensors = _on_identical_tensors(source, target)
        for side, worst in tensors.items():
            if not worst <= TOLERANCE:
                raise refuse(f"the {side} embeddings of the converted model differ by {worst:.2g}")
        target.name, target.card = model.name, model.card
        target.save_pretrained(folder, overwrite=overwrite)
    return ExportReport(folder, to, tensors, _end_to_end(source, target), notes)


def _nothing_to_convert(model: DualEncoder, to: Target) -> UsageError:
    from clipkit.models.backends.towers import TowersBackend
    from clipkit.models.saving import vision_text as vtde

    reason = None
    if isinstance(model.backend, TowersBackend):
        with tempfile.TemporaryDirectory(prefix="clipkit-export-") as room:
            reason = vtde.attempt(model.backend, model.processor, Path(room), golden_embeddings(model))
    if reason is None:
        fix = f"copy its folder ({model.name}), or model.save_pretrained(FOLDER): that is its format"
        return UsageError(f"this model is one of {to} already", fix=fix)
    message = f"transformers has no class for these joined towers: {reason}"
    fix = (
        "export to onnx; or a saved folder as it is: AutoModel opens its vision/ and text/, without_clipkit.py the rest"
    )
    return UsageError(message, fix=fix)


def _to_open_clip(model: DualEncoder, folder: Path) -> list[str]:
    from clipkit.models.exporting import configs as arch_configs
    from clipkit.models.exporting import processors as convert_inputs

    native, processor = _transformers_parts(model)
    kind = native.config.model_type
    config = (arch_configs.open_clip_clip if kind == "clip" else arch_configs.open_clip_siglip)(native.config)
    images = processor.image_side.image_processor
    tokenizer, notes = processor.text_side.tokenizer, []
    if kind == "clip" and convert_inputs.simple_tokenizer_agrees(tokenizer, processor.context_length):
        notes.append("open_clip's own tokenizer gives the same ids on all probe texts")
    else:
        config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip reads its files from the same folder
        tokenizer.save_pretrained(folder)
        notes.append("the tokenizer of transformers lies beside the weights, and open_clip uses it")
    layers = (native.config.vision_config.num_hidden_layers, native.config.text_config.num_hidden_layers)
    rules = convert.clip_rules(*layers) if kind == "clip" else convert.siglip_rules(*layers)
    save_file(convert.rename(_weights(native), rules, to_open_clip=True), folder / "open_clip_model.safetensors")
    body = {"model_cfg": config, "preprocess_cfg": convert_inputs.open_clip_preprocess(images)}
    (folder / "open_clip_config.json").write_text(dump_json(body), encoding="utf-8")
    return notes


def _weights(native: Any) -> dict[str, Tensor]:
    return {name: each.detach().cpu() for name, each in native.state_dict().items()}


def _transformers_parts(model: DualEncoder) -> tuple[Any, Any]:
    backend = model.backend
    native = getattr(backend, "model", None)
    if backend.family not in ("clip", "siglip") or native is None:
        raise refuse(f"it is {_called(backend.family)}")
    return native, model.processor


def _called(family: str) -> str:
    return "joined of two towers of transformers, which open_clip does not have" if family == "towers" else family


def _to_transformers(model: DualEncoder, folder: Path) -> list[str]:
    from transformers import CLIPModel, CLIPProcessor, SiglipModel, SiglipProcessor

    from clipkit.models.exporting import configs as arch_configs
    from clipkit.models.exporting import processors as convert_inputs

    native = getattr(model.backend, "model", None)
    if model.backend.family != "open_clip" or native is None:
        raise refuse(f"it is {_called(model.backend.family)}")
    siglip = hasattr(native.visual, "trunk")
    text = getattr(native, "text", native)
    if not (siglip or hasattr(native.visual, "conv1")) or not hasattr(text, "positional_embedding"):
        raise refuse(f"its towers are {type(native.visual).__name__} and {type(text).__name__}")
    texts: Any = model.processor.text_side
    tokenizer = convert_inputs.transformers_tokenizer(texts.tokenizer, texts.context_length)
    images = convert_inputs.transformers_images(dict(native.visual.preprocess_cfg), siglip)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = arch_configs.transformers_siglip(native) if siglip else arch_configs.transformers_clip(native, ids)
    weights = {name.removeprefix("text.") if not siglip else name: each for name, each in _weights(native).items()}
    layers = (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    rules = convert.siglip_rules(*layers) if siglip else convert.clip_rules(*layers)
    with torch.device("meta"):
        shell = (SiglipModel if siglip else CLIPModel)(config)
    shell.load_state_dict(convert.rename(weights, rules, to_open_clip=False), assign=True)
    shell.save_pretrained(folder)
    (SiglipProcessor if siglip else CLIPProcessor)(images, tokenizer).save_pretrained(folder)
    return [
        "open_clip mends HTML entities and wrongly decoded letters before it tokenises; transformers does not",
        "processors of transformers resize on tensors, not with PIL; backend='pil' of AutoProcessor is closer",
    ]


def _on_identical_tensors(model: DualEncoder, other: DualEncoder) -> dict[str, float]:
    pixels = model.processor.images(golden_images())
    ids = torch.cat([_full_length(model, GOLDEN_TEXTS), _random_ids(model)])
    mine, theirs = (_embed(each, pixels, ids) for each in (model, other))
    return {side: float((mine[side] - theirs[side]).abs().max()) for side in mine}


@torch.no_grad()
def _embed(model: DualEncoder, pixels: Tensor, ids: Tensor) -> GoldenEmbeddings:
    with evaluating(model):
        found = model(pixel_values=pixels, input_ids=ids)
    return {"image": found.image, "text": found.text}


def _full_length(model: DualEncoder, texts: Sequence[str]) -> Tensor:
    side = model.processor.text_side
    if isinstance(side, TransformersTexts):
        side = TransformersTexts(side.tokenizer, side.context_length, padding="max_length", mask=False)
    return side(list(texts))["input_ids"]


def _random_ids(model: DualEncoder) -> Tensor:
    """Rows with any ids of the vocabulary before the end of text: which token is pooled shows in them."""
    rows = _full_length(model, GOLDEN_TEXTS[-1:]).repeat(4, 1)
    table = next(each for name, each in model.named_parameters() if name.endswith("token_embedding.weight"))
    rows[:, 1:-1] = torch.randint(len(table), (4, rows.shape[1] - 2), generator=torch.Generator().manual_seed(0))
    tokenizer = model.processor.text_side.tokenizer  # type: ignore[attr-defined]
    end = getattr(tokenizer, "eot_token_id", None) or getattr(tokenizer, "tokenizer", tokenizer).eos_token_id
    rows[:, -1] = rows[:, -1] if end is None else end
    return rows


def _end_to_end(model: DualEncoder, other: DualEncoder) -> dict[str, float]:
    mine, theirs = golden_embeddings(model), golden_embeddings(other)
    return {side: float((mine[side] * theirs[side]).sum(1).min()) for side in mine}
