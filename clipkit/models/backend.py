"""What a family of models has to offer so that `DualEncoder` can use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.modality import Modality
from clipkit.models.processor import Processor

if TYPE_CHECKING:
    pass


class ParameterPrefixes(NamedTuple):
    """Prefixes of the names of a part's modules and parameters."""

    tower: tuple[str, ...]
    head: tuple[str, ...]


class Backend(nn.Module, ABC):
    """The weights of one model. Embeddings here are not normalised yet."""

    family: str  # "clip", "siglip", "open_clip", "towers": for people and the fingerprint
    dim: int
    names: dict[Modality, ParameterPrefixes]

    @abstractmethod
    def logit_scale_and_bias(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The logit scale (a logarithm) and the logit bias, as the parameters themselves."""

    @abstractmethod
    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(n, channels, height, width) to the tower's pooled output (n, width)."""

    @abstractmethod
    def project_image(self, features: Tensor) -> Tensor:
        """(n, width) to (n, dim)."""

    @abstractmethod
    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        """(n, length) to (n, dim)."""

    @abstractmethod
    def describe(self, part: Modality) -> dict[str, Any]:
        """What else decides about this part's embeddings: activation, pooling."""

    @abstractmethod
    def save(self, folder: Path, processor: Processor) -> None:
        """Write everything the native library needs, the processor's files included."""

    def settings(self) -> dict[str, Any]:
        """What clipkit.json must keep because no native file can say it."""
        return {}

    def belongs_to(self, part: Modality, name: str, *, head: bool = True) -> bool:
        """Whether the module or parameter called `name` belongs to a part, with or without its head."""
        prefixes = self.names[part].tower + (self.names[part].head if head else ())
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def check_finite(model: nn.Module, where: object) -> None:
    """Refuse NaN and infinite weights, by name."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"weight {name} holds NaN or infinity", where=where, fix="use an earlier checkpoint")


def root_of(backend: Backend, part: Modality) -> str:
    """The name of the smallest module that holds a whole tower."""
    known = {name for name, _ in backend.named_modules()} | {name for name, _ in backend.named_parameters()}
    paths = [prefix.split(".") for prefix in backend.names[part].tower if prefix in known]
    if len(paths) == 1:
        return ".".join(paths[0])
    shared = [level[0] for level in zip(*paths, strict=False) if len(set(level)) == 1]
    return ".".join(shared)


class Embeddings(NamedTuple):
    """What `DualEncoder.forward` gives. Scale and bias carry gradients, too."""

    image: Tensor | None  # (n, dim), unit length, fp32
    text: Tensor | None  # (m, dim), unit length, fp32
    scale: Tensor  # exp(logit_scale), no dimensions
    bias: Tensor | None  # no dimensions; None under softmax


def _full(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_full(x), dim=-1)
