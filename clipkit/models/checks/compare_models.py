"""`clipkit check model A B`: why two models disagree, in preprocessing or in weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit.errors import ClipkitError, CorruptArtefact
from clipkit.models.adapting import lora
from clipkit.models.checks.finding import about, why
from clipkit.models.checks.folder import damaged
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.fingerprint import words
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS, as_fp32_cpu, golden_embeddings, golden_images
from clipkit.models.loading import manifest
from clipkit.models.loading.hub import model_of_run
from clipkit.models.loading.load import OPEN_CLIP, open_model

_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError)


@dataclass
class Comparison:
    """What `compare_models` measured. ``str(comparison)`` is for people, `as_dict` for machines."""

    names: tuple[str, str]
    differences: list[tuple[str, Any, Any]] = field(default_factory=list)
    """(key of the fingerprint, the first model's, the second's)."""
    inputs: dict[str, str] = field(default_factory=dict)
    """For `image` and `text`: whether both processors give the same tensors, in words."""
    same_inputs: dict[str, bool] = field(default_factory=dict)
    weights: dict[str, float | None] = field(default_factory=dict)
    """Largest difference of embeddings of the very same tensors; None where one model cannot take the other's."""
    embeddings: dict[str, float | None] = field(default_factory=dict)
    """Largest difference of the whole way, from image and text to embedding; None if their lengths differ."""
    cosine: dict[str, float | None] = field(default_factory=dict)
    """The lowest cosine between the two models' embeddings of one input."""
    damage: dict[str, dict[str, str]] = field(default_factory=dict)
    """For `A` and `B`: the files that are not what was saved, with a sentence about every file."""

    @property
    def ok(self) -> bool:
        """Whether both give the same embeddings, their logits the same scale, and neither is damaged."""
        same = all(_within(value) for value in self.embeddings.values())
        return same and not self.damage and not any(key.startswith("logit") for key, _, _ in self.differences)

    @property
    def exit_code(self) -> int:
        """0, or 6: they are not one model."""
        return 0 if self.ok else 6

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        differences = [{"what": words(key), "a": a, "b": b} for key, a, b in self.differences]
        return {
            "a": self.names[0],
            "b": self.names[1],
            "ok": self.ok,
            "damage": self.damage,
            "differences": differences,
            "same_inputs": self.same_inputs,
            "same_tensors_max_difference": self.weights,
            "max_difference": self.embeddings,
            "min_cosine": self.cosine,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def compare_models(
    a: str | os.PathLike[str] | DualEncoder,
    b: str | os.PathLike[str] | DualEncoder,
    *,
    trust_remote_code: bool = False,
) -> Comparison:
    """Compare the fingerprints of two models, and their embeddings of the built-in images and texts step by step.

    A folder with files that are not what was saved is compared as it is, and its damage is reported.

    Args:
        a, b: names as `DualEncoder.from_pretrained` takes them, or models that are open.
        trust_remote_code: whether a model may run Python code that it brings along.

    Raises:
        ModelError: one of them does not exist.
        CorruptArtefact: one of them is there, but cannot be opened.
    """
    first = _opened(a, trust_remote_code)
    second = _opened(b, trust_remote_code)
    comparison = Comparison((first.name, second.name))
    for letter, model in (("A", a), ("B", b)):
        files = _damaged(model)
        if files:
            comparison.damage[letter] = files
    comparison.differences = first.fingerprint().changes(second.fingerprint())
    _compare_inputs(comparison, first, second)
    _compare_weights(comparison, first, second)
    others = golden_embeddings(second.backend, second.processor)
    for side, one in golden_embeddings(first.backend, first.processor).items():
        other = others[side]
        same = one.shape == other.shape
        comparison.embeddings[side] = float((one - other).abs().max()) if same else None
        comparison.cosine[side] = float((one * other).sum(1).min()) if same else None
    return comparison


def _opened(model: str | os.PathLike[str] | DualEncoder, trust_remote_code: bool) -> DualEncoder:
    if isinstance(model, DualEncoder):
        return DualEncoder(as_fp32_cpu(lora.merged(model.backend)), model.processor, model.name)
    try:
        backend, processor, _, _ = open_model(model, None, trust_remote_code)
    except ClipkitError as error:
        if not _path(model).is_dir():
            raise
        fix = f"clipkit check model {os.fspath(model)} tells more"
        message = f"the model does not open: {error.message}"
        files = "; ".join(_damaged(model).values())
        raise CorruptArtefact(f"{message} ({files})" if files else message, where=_path(model), fix=fix) from error
    return DualEncoder(backend, processor, os.fspath(model)).eval()


def _damaged(model: str | os.PathLike[str] | DualEncoder) -> dict[str, str]:
    return {} if isinstance(model, DualEncoder) or not _path(model).is_dir() else damaged(_path(model))


def _path(model: str | os.PathLike[str]) -> Path:
    return model_of_run(Path(os.fspath(model).removeprefix(OPEN_CLIP)).expanduser())


def _compare_inputs(comparison: Comparison, a: DualEncoder, b: DualEncoder) -> None:
    images = golden_images()
    mine = a.processor.images(images)
    theirs = b.processor.images(images)
    if mine.shape != theirs.shape:
        comparison.same_inputs["image"] = False
        comparison.inputs["image"] = f"other shapes: {tuple(mine.shape[1:])} and {tuple(theirs.shape[1:])}"
    else:
        worst = float((mine - theirs).abs().max())
        # one level of 255 after normalisation is about 0.015: libraries may round a resized pixel either way
        comparison.same_inputs["image"] = worst < 0.02
        comparison.inputs["image"] = "the same pixels" if worst < 0.02 else f"pixels differ by up to {worst:.2g}"
    rows = [_rows(model, GOLDEN_TEXTS) for model in (a, b)]
    changed = [text for text, x, y in zip(GOLDEN_TEXTS, *rows, strict=True) if x != y]
    comparison.same_inputs["text"] = not changed
    comparison.inputs["text"] = f"other ids, first for {changed[0][:40]!r}" if changed else "the same ids"
    if not changed and not _equal(a.processor.texts(GOLDEN_TEXTS), b.processor.texts(GOLDEN_TEXTS)):
        comparison.inputs["text"] = "the same ids, other padding or mask"


def _rows(model: DualEncoder, texts: tuple[str, ...]) -> list[list[int]]:
    """Return the ids of every text without padding."""
    from clipkit.models.fingerprint.tokenizer import unpadded

    return [unpadded(model.processor.text_side, text) for text in texts]


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def _compare_weights(comparison: Comparison, a: DualEncoder, b: DualEncoder) -> None:
    inputs = {
        "image": {"pixel_values": a.processor.images(golden_images())},
        "text": a.processor.texts(GOLDEN_TEXTS),
    }
    for side, tensors in inputs.items():
        comparison.weights[side] = None
        try:
            one, other = (getattr(model(**tensors), side) for model in (a, b))
        except _FAILURES:
            continue
        if one.shape == other.shape:
            comparison.weights[side] = float((one - other).abs().max())


def _lines(comparison: Comparison) -> Iterator[str]:
    yield f"A  {comparison.names[0]}"
    yield f"B  {comparison.names[1]}"
    yield ""
    for letter, files in comparison.damage.items():
        yield from (f"{letter} is damaged: {what}" for what in files.values())
        yield f"    clipkit check model {comparison.names['AB'.index(letter)]} tells more"
        yield ""
    shown = [difference for difference in comparison.differences if not difference[0].endswith(".class")]
    if shown:
        noun = "difference" if len(shown) == 1 else "differences"
        yield f"{len(shown)} {noun}:"
    else:
        yield "no recorded fact differs"
    for key, a, b in shown:
        yield f"- {words(key)}: {a} in A, {b} in B"
        if not key.endswith(".weights"):
            yield f"    {why(about(key))}"
    for side in ("image", "text"):
        yield ""
        yield f"{side}s"
        yield f"  preprocessing  {comparison.inputs[side]}"
        yield f"  weights        {_same_tensors(comparison.weights[side])}"
        yield f"  together       {_together(comparison.embeddings[side], comparison.cosine[side])}"
    yield ""
    yield _verdict(comparison)


def _same_tensors(worst: float | None) -> str:
    if worst is None:
        return "one cannot take the other's tensors, or embeddings have another length"
    if worst <= manifest.TOLERANCE:
        return f"the same tensors give the same embeddings (to {worst:.1g})"
    return f"the same tensors give embeddings that differ by up to {worst:.2g}"


def _together(worst: float | None, cosine: float | None) -> str:
    if worst is None or cosine is None:
        return "embeddings of another length: they cannot be compared"
    if worst <= manifest.TOLERANCE:
        return f"the same embeddings (to {worst:.1g})"
    return f"embeddings differ by up to {worst:.2g}, cosine down to {cosine:.4f}"


def _verdict(comparison: Comparison) -> str:
    if comparison.ok:
        return "the same embeddings: either can stand in for the other"
    damage = " and ".join(comparison.damage)
    damage = f"{damage} is not what was saved: do not use it before that is fixed. " if damage else ""
    causes = [
        f"{side}s: {_cause(comparison, side)}" for side in ("image", "text") if not _within(comparison.embeddings[side])
    ]
    if any(key.startswith("logit") for key, _, _ in comparison.differences):
        causes.append("logits: scale or bias")
    return damage + (f"they disagree. Where: {'; '.join(causes)}" if causes else "Their embeddings are the same")


def _cause(comparison: Comparison, side: str) -> str:
    """Preprocessing, the model behind it, or both."""
    if _within(comparison.weights[side]):
        return "preprocessing alone"
    model = "weights, activation or pooling"
    return model if comparison.same_inputs[side] else f"preprocessing, and {model}"


def _within(value: float | None) -> bool:
    return value is not None and value <= manifest.TOLERANCE
