"""Any vision tower and any text tower of transformers, joined by two projection heads.

Saved as a VisionTextDualEncoder where that class can hold them (`vtde`), else as `vision/` and `text/`, which
transformers opens, and `heads.safetensors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.models.backend import Backend, Names, Part
from clipkit.models.names import find_folder
from clipkit.models.open_tower import (
    activation_of,
    image_side_for,
    open_tokenizer,
    open_tower,
    positions_of,
    saved_transform,
    trained_pooling,
)
from clipkit.models.plain_torch import program
from clipkit.models.pooling import Pooling, pool_image, pool_text
from clipkit.models.probe import probe_image, probe_text
from clipkit.models.processor import Processor, TransformersTexts
from clipkit.models.transform import Resize
from clipkit.models.weights import quiet

Head = Literal["linear", "mlp"]
LN_1_OVER_007 = math.log(1 / 0.07)  # the starting temperature of Radford et al. 2021, section 2.5


@dataclass(frozen=True)
class Joint:
    """How two towers are joined: all that heads.safetensors does not say."""

    dim: int
    head: Head
    image_pooling: str
    text_pooling: str
    context_length: int
    padding: Literal["longest", "max_length"]
    attention_mask: bool
    eos_token_id: int | None

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Joint:
        """Out of what `TowersBackend.settings` gave."""
        return cls(**{key: value for key, value in settings.items() if key != "classes"})


class TowersBackend(Backend):
    """Two towers and their heads. Parameters that the pooling never reads are frozen (DDP would wait for them)."""

    family = "towers"
    names = {  # noqa: RUF012
        "image": Names(("vision",), ("image_head",)),
        "text": Names(("text",), ("text_head",)),
    }

    def __init__(
        self, vision: Any, text: Any, joint: Joint, widths: tuple[int, int], scale: float, bias: float | None
    ) -> None:
        super().__init__()
        self.vision, self.text, self.joint, self.dim = vision, text, joint, joint.dim
        self.image_head = _head(joint.head, widths[0], joint.dim)
        self.text_head = _head(joint.head, widths[1], joint.dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def scalars(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.logit_scale, self.logit_bias

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return pool_image(self.vision(pixel_values=pixel_values), self.joint.image_pooling)

    def project_image(self, features: Tensor) -> Tensor:
        projected: Tensor = self.image_head(features)
        return projected

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.text(input_ids=input_ids, **given, **inputs)
        joint = self.joint
        pooled = pool_text(output, joint.text_pooling, input_ids, attention_mask, joint.eos_token_id)
        projected: Tensor = self.text_head(pooled)
        return projected

    def describe(self, part: Part) -> dict[str, Any]:
        tower, pooling = (
            (self.vision, self.joint.image_pooling) if part == "image" else (self.text, self.joint.text_pooling)
        )
        about = {"class": type(tower).__name__, "activation": activation_of(tower.config)}
        return {**about, "pooling": pooling, "head": self.joint.head}

    def save(self, folder: Path, processor: Processor) -> None:
        with quiet():
            self.vision.save_pretrained(folder / "vision")
            self.text.save_pretrained(folder / "text")
        towers = ("vision.", "text.")
        heads = {name: t.contiguous() for name, t in self.state_dict().items() if not name.startswith(towers)}
        save_file(heads, folder / "heads.safetensors")
        processor.save(folder)
        (folder / "without_clipkit.py").write_text(program(self.joint, processor, *self.classes()), encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """What clipkit.json keeps of a joint model; `open_towers` takes it back."""
        return {**asdict(self.joint), "classes": dict(zip(("vision", "text"), self.classes(), strict=True))}

    def classes(self) -> tuple[str, str]:
        """The transformers classes of the towers: T5's encoder alone, for one, is not what AutoModel would open."""
        return type(self.vision).__name__, type(self.text).__name__


def _head(kind: Head, width: int, dim: int) -> nn.Module:
    if kind == "linear":
        head = nn.Linear(width, dim, bias=False)
        nn.init.normal_(head.weight, std=width**-0.5)  # as CLIP's projections begin
        return head
    if kind == "mlp":
        hidden = max(width, dim)
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim))
    raise ModelError(f"head must be 'linear' or 'mlp', found {kind!r}")


def join_towers(
    vision: Any,
    text: Any,
    tokenizer: Any = None,
    *,
    dim: int = 512,
    image_size: int | None = None,
    image_processor: Any = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    channels: int | None = None,
    resize: Resize | None = None,
    head: Head = "linear",
    image_pooling: Pooling = "auto",
    text_pooling: Pooling = "auto",
    context_length: int | None = None,
    logit_scale: float = LN_1_OVER_007,
    logit_bias: float | None = None,
    trust_remote_code: bool = False,
) -> tuple[TowersBackend, Processor]:
    """The parts of `DualEncoder.from_towers`, which documents the arguments."""
    if tokenizer is None and not isinstance(text, str | Path):
        raise ModelError("a text tower given as a model needs tokenizer= beside it")
    tokenizer = open_tokenizer(text if tokenizer is None else tokenizer, trust_remote_code)
    folder = find_folder(vision) if isinstance(vision, str | Path) else None
    vision = open_tower(vision, "image", image_pooling, trust_remote_code)
    image_side = image_side_for(
        vision,
        folder,
        image_processor,
        image_size=image_size,
        mean=image_mean,
        std=image_std,
        channels=channels,
        resize=resize,
        trust_remote_code=trust_remote_code,
    )
    text_pooling = trained_pooling(text, text_pooling)
    text = open_tower(text, "text", text_pooling, trust_remote_code)
    siglip = str(text.config.model_type).startswith("siglip")  # pools the last position, trained on full padding
    length = _context_length(context_length, text, tokenizer)
    text_side = TransformersTexts(tokenizer, length, padding="max_length" if siglip else "longest", mask=not siglip)
    _check_vocabulary(text, tokenizer)
    image_by, image_width = probe_image(vision, image_side, image_pooling)
    text_by, text_width = probe_text(text, text_side, text_pooling)
    joint = Joint(dim, head, image_by, text_by, length, text_side.padding, text_side.mask, tokenizer.eos_token_id)
    backend = TowersBackend(vision, text, joint, (image_width, text_width), logit_scale, logit_bias)
    return backend, Processor(image_side, text_side)


def open_towers(
    folder: Path, settings: dict[str, Any], trust_remote_code: bool = False
) -> tuple[TowersBackend, Processor]:
    """What `TowersBackend.save` wrote, with the settings that clipkit.json keeps."""
    classes = settings["classes"]
    joint = Joint.from_settings(settings)
    vision = open_tower(folder / "vision", "image", joint.image_pooling, trust_remote_code, classes["vision"])
    text = open_tower(folder / "text", "text", joint.text_pooling, trust_remote_code, classes["text"])
    weights = load_file(folder / "heads.safetensors")
    first = {
        side: weights.get(f"{side}_head.weight", weights.get(f"{side}_head.0.weight")) for side in ("image", "text")
    }
    if first["image"] is None or first["text"] is None or "logit_scale" not in weights:
        raise CorruptArtefact("heads.safetensors lacks a head or the logit scale", where=folder)
    widths = (first["image"].shape[1], first["text"].shape[1])
    bias = float(weights["logit_bias"]) if "logit_bias" in weights else None
    backend = TowersBackend(vision, text, joint, widths, 0.0, bias)
    missing = backend.load_state_dict(weights, strict=False)
    lost = [name for name in missing.missing_keys if not name.startswith(("vision.", "text."))]
    if lost or missing.unexpected_keys:
        raise CorruptArtefact(f"heads.safetensors does not fit: {lost + missing.unexpected_keys}", where=folder)
    text_side = TransformersTexts(
        open_tokenizer(folder, trust_remote_code),
        joint.context_length,
        padding=joint.padding,
        mask=joint.attention_mask,
    )
    image_side = saved_transform(folder, trust_remote_code)
    if image_side is None:
        raise CorruptArtefact("preprocessor_config.json is missing", where=folder)
    probe_image(vision, image_side, joint.image_pooling)
    probe_text(text, text_side, joint.text_pooling)
    return backend, Processor(image_side, text_side)


def _context_length(asked: int | None, text: nn.Module, tokenizer: Any) -> int:
    longest = min(positions_of(text, tokenizer.pad_token_id), int(tokenizer.model_max_length))
    if asked is not None and asked > longest:
        fix = f"context_length={longest} or less"
        raise ModelError(f"context_length={asked}, but the text tower or its tokenizer ends at {longest}", fix=fix)
    return min(asked or 77, longest)


def _check_vocabulary(text: Any, tokenizer: Any) -> None:
    highest, known = max(tokenizer.get_vocab().values()), text.config.vocab_size
    if highest >= known:
        fix = f"vocab_size={highest + 1} in the tower's config, or the tokenizer that belongs to the tower"
        raise ModelError(f"the tokenizer gives ids up to {highest}, the text tower knows {known} tokens", fix=fix)
