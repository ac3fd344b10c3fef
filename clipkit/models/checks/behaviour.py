"""How a model behaves: as when it was saved, differently for different inputs, the same alone and in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipkit.modality import MODALITIES
from clipkit.models.checks.finding import Finding, about, why
from clipkit.models.fingerprint.fingerprint import Fingerprint, words
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS, GoldenEmbeddings, golden_images
from clipkit.models.loading import manifest

if TYPE_CHECKING:
    from clipkit.modality import Modality
    from clipkit.models.dual_encoder import DualEncoder

_COLLAPSED = 1e-6  # of any component between the embeddings of different inputs
_BF16_COSINE = 0.98  # of the same input; tiny random models reach 0.999

_UNDO = (
    "copy or download the model again, or install the library versions it was saved with; "
    "if the change is meant, save it as a new model"
)

_BY_VOCABULARY = ("ids", "case", "start_token", "end_token", "end_when_cut", "pad_token")


def changes(body: dict[str, Any], now: Fingerprint) -> Iterator[Finding]:
    """Report where the fingerprint differs from the saved one, without what follows from another vocabulary."""
    differences = Fingerprint.from_dict(body.get("fingerprint") or {}).changes(now)
    entailed: list[str] = []
    if any(key == "text.tokenizer" for key, _, _ in differences):
        entailed = [f"text.{name}" for name in _BY_VOCABULARY]
    for key, before, after in differences:
        if key.endswith(".class") or key in entailed:
            continue
        name = about(key)
        if name == "weights":
            what = f"{words(key)} are not those that were saved"
            yield Finding(
                "error", "weights", what, "embeddings are those of another model", "copy or download the weights again"
            )
        else:
            what = f"{words(key)} was {before} when the model was saved and is {after} now"
            yield Finding("error", name, what, why(name), _UNDO)


def golden_findings(body: dict[str, Any], embeddings: GoldenEmbeddings) -> Iterator[Finding]:
    try:
        worst = manifest.golden_differences(body, embeddings)
    except (KeyError, TypeError, ValueError) as error:
        yield Finding(
            "error",
            "golden embeddings",
            f"clipkit.json holds none that can be read: {error!r}",
            "the model cannot be compared with them",
            "copy it again",
        )
        return
    for side, value in worst.items():
        if value > manifest.TOLERANCE:
            what = (
                f"{side} embeddings of the built-in {side}s differ by {value:.2g} from those it gave when it was saved"
            )
            reason = f"more than {manifest.TOLERANCE:g} is not rounding: results are not those of the saved model"
            yield Finding(
                "error",
                "golden embeddings",
                what,
                reason,
                "fix what is named above, or install the library versions it was saved with",
            )


def behaviour(model: DualEncoder, embeddings: GoldenEmbeddings) -> Iterator[Finding]:
    for side in MODALITIES:
        apart = (embeddings[side][:, None] - embeddings[side][None]).abs().amax(-1)
        if float(apart.max()) < _COLLAPSED:
            what = f"all {side}s get the same {side} embedding"
            yield Finding(
                "error",
                "collapsed",
                what,
                "nothing can be told apart",
                "take an earlier checkpoint; look at its weights",
            )
    alone = _alone(model)
    for side in MODALITIES:
        worst = float((alone[side] - embeddings[side]).abs().max())
        if not worst <= manifest.TOLERANCE:
            what = f"{side} embeddings differ by {worst:.2g} alone and in a batch of unequal {side}s"
            reason = "an item's embedding depends on what it happens to be batched with"
            yield Finding(
                "error", "batch", what, reason, "give the attention mask, pad to full length, and use eval mode"
            )
    half = {"image": model.encode_images(golden_images(), dtype=torch.bfloat16)}
    half["text"] = model.encode_texts(GOLDEN_TEXTS, dtype=torch.bfloat16)
    for side in MODALITIES:
        cosine = float((half[side] * embeddings[side]).sum(1).min())
        if not cosine >= _BF16_COSINE:
            what = f"{side} embeddings in bfloat16 have a cosine of {cosine:.3f} only to those in float32"
            yield Finding("warning", "bfloat16", what, "half precision changes results", "encode in float32")


def _alone(model: DualEncoder) -> dict[Modality, Tensor]:
    return {
        "image": model.encode_images(golden_images(), batch_size=1, dtype=torch.float32),
        "text": model.encode_texts(GOLDEN_TEXTS, batch_size=1, dtype=torch.float32),
    }
