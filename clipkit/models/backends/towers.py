"""Any vision tower and any text tower of transformers, joined by two projection heads.

Saved as a VisionTextDualEncoder where that class can hold them (`vtde`), else as `vision/` and `text/`, which
transformers opens, and `heads.safetensors`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.modality import Modality
from clipkit.models.backend import Backend, ParameterPrefixes
from clipkit.models.backends.families import activation_of
from clipkit.models.backends.pooling import pool_image, pool_text
from clipkit.models.backends.quiet import quiet
from clipkit.models.processor import Processor

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
        "image": ParameterPrefixes(("vision",), ("image_head",)),
        "text": ParameterPrefixes(("text",), ("text_head",)),
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

    def logit_scale_and_bias(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.logit_scale, self.logit_bias

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return pool_image(self.vision(pixel_values=pixel_values), self.joint.image_pooling)

    def project_image(self, features: Tensor) -> Tensor:
        projected: Tensor = self.image_head(features)
        return projected

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.text(input_ids=input_ids, **given, **inputs)
        joint = self.joint
        return pool_text(output, joint.text_pooling, input_ids, attention_mask, joint.eos_token_id)

    def project_text(self, features: Tensor) -> Tensor:
        projected: Tensor = self.text_head(features)
        return projected

    def describe(self, part: Modality) -> dict[str, Any]:
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
