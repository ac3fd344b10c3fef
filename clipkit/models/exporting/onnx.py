"""Both sides of a model as ONNX graphs, checked with onnxruntime against torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.errors import ModelError, UsageError
from clipkit.extras import install_command, missing_packages
from clipkit.files import dump_json, publish
from clipkit.models.backend import Backend
from clipkit.models.eval_mode import eval_mode
from clipkit.models.exporting.report import ExportReport
from clipkit.models.fingerprint.fingerprint import Fingerprint, full_fingerprint, measure_processor
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS, as_fp32_cpu, golden_embeddings, golden_images
from clipkit.models.processor import Processor
from clipkit.models.saving import model_card
from clipkit.models.saving.model_card import Card
from clipkit.models.saving.save import check_place

FACTS = "onnx.json"
TOLERANCE = 1e-4  # other kernels, other orders of summation
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE = 1.5e9  # bytes of weights; a protobuf ends at 2 GB, more goes into a file beside it


class _Side(nn.Module):
    """One side of a model, from its inputs to embeddings of unit length."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend


class _Image(_Side):
    def forward(self, pixel_values: Tensor) -> Tensor:
        embeddings = self.backend.embed(pixel_values=pixel_values).image
        assert embeddings is not None
        return embeddings


class _Text(_Side):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        embeddings = self.backend.embed(input_ids=input_ids, attention_mask=attention_mask).text
        assert embeddings is not None
        return embeddings


def export_onnx(
    backend: Backend, processor: Processor, folder: Path, overwrite: bool, *, name: str, card: Card
) -> ExportReport:
    """image.onnx, text.onnx, tokenizer and transform, onnx.json with all else; see `DualEncoder.export`."""
    if missing := missing_packages(*_PACKAGES):
        raise UsageError(f"ONNX export needs {', '.join(missing)}", fix=install_command("onnx"))
    check_place(folder, overwrite, (FACTS,))
    reports: list[ExportReport] = []
    plain = as_fp32_cpu(backend)
    with eval_mode(plain):
        publish(folder, lambda fresh: reports.append(_write(plain, processor, fresh, folder, name, card)), replace=True)
    return reports[-1]


def _write(backend: Backend, processor: Processor, fresh: Path, folder: Path, name: str, card: Card) -> ExportReport:
    fresh.mkdir()
    inputs = {
        "image": {"pixel_values": processor.images(golden_images()[:3])},
        "text": processor.texts(GOLDEN_TEXTS[:3]),
    }
    tensors = {}
    for side, module in (("image", _Image(backend)), ("text", _Text(backend))):
        _trace(module.eval(), inputs[side], processor, fresh / f"{side}.onnx")
        tensors[side] = _check(backend, processor, side, fresh)
    notes = _save_processor(backend, processor, fresh)
    fingerprint = full_fingerprint(backend, processor)
    facts = _facts(backend, processor, fingerprint, inputs, tensors)
    (fresh / FACTS).write_text(dump_json(facts), encoding="utf-8")
    model_card.write(fresh, card.settled(name, fingerprint), backend, processor, fingerprint, "onnx")
    return ExportReport(folder, "onnx", tensors, _end_to_end(backend, processor, fresh), notes)


def _trace(module: nn.Module, inputs: Mapping[str, Tensor], processor: Processor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    axes: dict[int, Any] = {0: batch}
    if path.stem == "text" and measure_processor(processor)["text"]["padding"] == "longest":
        axes[1] = torch.export.Dim("length", max=processor.context_length)
    size = sum(parameter.numel() * 4 for parameter in module.parameters())
    with _calm():
        torch.onnx.export(
            module,
            kwargs=dict(inputs),
            f=path,
            dynamo=True,
            dynamic_shapes={name: axes if name != "pixel_values" else {0: batch} for name in inputs},
            input_names=list(inputs),
            output_names=[f"{path.stem}_embeds"],  # as transformers calls them
            external_data=size > _ONE_FILE,
            verbose=False,
        )


@contextmanager
def _calm() -> Iterator[None]:
    """Silence the exporter's messages about its own steps: axes, constants it does not fold, weights it merges."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [exporter.level for exporter in loggers]
    for exporter in loggers:
        exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
            yield
    finally:
        for exporter, level in zip(loggers, levels, strict=True):
            exporter.setLevel(level)


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def _check(backend: Backend, processor: Processor, side: str, folder: Path) -> float:
    """Largest difference from torch, over batches of one and of three, short texts and over-long ones.

    Raises:
        ModelError: it is above 1e-4.
    """
    session, worst = _session(folder / f"{side}.onnx"), 0.0
    for rows in (slice(0, 1), slice(0, 3), slice(3, 4), slice(1, 4)):
        if side == "image":
            inputs = {"pixel_values": processor.images(golden_images()[rows])}
        else:
            inputs = processor.texts(GOLDEN_TEXTS[rows])
        with torch.no_grad():
            expected = getattr(backend.embed(**inputs), side)
        worst = max(worst, float((expected - _run(session, inputs)).abs().max()))
    if not worst <= TOLERANCE:
        raise ModelError(f"the {side} side gives other embeddings as an ONNX graph, by up to {worst:.2g}")
    return worst


def _save_processor(backend: Backend, processor: Processor, folder: Path) -> list[str]:
    """Files that AutoTokenizer and AutoImageProcessor of transformers open, in open_clip's stead, too."""
    if backend.family != "open_clip":
        processor.save(folder)
        return []
    from clipkit.models.exporting import processors as convert_inputs

    native: Any = backend
    texts: Any = processor.text_side
    try:
        convert_inputs.transformers_tokenizer(texts.tokenizer, texts.context_length).save_pretrained(folder)
        images = convert_inputs.transformers_images(dict(native.model.visual.preprocess_cfg), False)
        images.save_pretrained(folder)
    except ModelError as error:
        return [f"no tokenizer or transform was written: {error.message}"]
    return []


def _facts(
    backend: Backend,
    processor: Processor,
    fingerprint: Fingerprint,
    inputs: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, float],
) -> dict[str, Any]:
    scale, bias = backend.logit_scale_and_bias()
    return {
        "fingerprint": fingerprint.as_dict(),
        "dim": backend.dim,
        "image_size": processor.image_size,
        "context_length": processor.context_length,
        "similarity": backend.similarity,
        "scale": float(scale.detach().exp().reshape(())),
        "bias": None if bias is None else float(bias.detach().reshape(())),
        "inputs": {side: list(arguments) for side, arguments in inputs.items()},
        "outputs": {side: f"{side}_embeds" for side in inputs},
        "preprocessing": measure_processor(processor),
        "largest_difference_from_torch": dict(tensors),
    }


def _end_to_end(backend: Backend, processor: Processor, folder: Path) -> dict[str, float]:
    """Smallest cosine to the model itself where transformers' own readers of the files prepare the inputs."""
    from transformers import AutoImageProcessor, AutoTokenizer

    golden = golden_embeddings(backend, processor)
    pipeline: dict[str, float] = {}
    if (folder / "preprocessor_config.json").is_file():
        images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        pixels = images(images=golden_images(), return_tensors="pt")["pixel_values"].float()
        theirs = _run(_session(folder / "image.onnx"), {"pixel_values": pixels})
        pipeline["image"] = _smallest(golden["image"], theirs)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = tokenizer(
            list(GOLDEN_TEXTS),
            padding=measure_processor(processor)["text"]["padding"],
            truncation=True,
            max_length=processor.context_length,
            return_tensors="pt",
        )
        session = _session(folder / "text.onnx")
        inputs = {argument.name: tokens[argument.name] for argument in session.get_inputs()}
        pipeline["text"] = _smallest(golden["text"], _run(session, inputs))
    return pipeline


def _smallest(mine: Tensor, theirs: Tensor) -> float:
    return float((mine * theirs).sum(1).min())
