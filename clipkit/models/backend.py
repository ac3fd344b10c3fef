"""What a family of models has to offer so that `DualEncoder` can use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.modality import Modality
from clipkit.models.processor import Processor
from clipkit.models.threads import one_thread


class ParameterPrefixes(NamedTuple):
    """Prefixes of the names of a part's modules and parameters."""

    tower: tuple[str, ...]
    head: tuple[str, ...]


@dataclass(frozen=True)
class Adapted:
    """How one tower is adapted by LoRA."""

    rank: int
    alpha: float
    dropout: float
    layers: tuple[str, ...]  # names below the tower's root


@dataclass
class Lora:
    """What a model remembers while it has LoRA adapters."""

    parts: dict[Modality, Adapted] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)  # parameters that had gradients before
    still: list[nn.Module] = field(default_factory=list)  # frozen BatchNorm, which has to stay in eval mode


class Embeddings(NamedTuple):
    """What `Backend.embed` gives. Scale and bias carry gradients, too."""

    image: Tensor | None  # (n, dim), unit length, fp32
    text: Tensor | None  # (m, dim), unit length, fp32
    scale: Tensor  # exp(logit_scale), no dimensions
    bias: Tensor | None  # no dimensions; None under softmax


class Backend(nn.Module, ABC):
    """The weights of one model. Only `embed` gives embeddings of unit length; all other methods do not normalise.

    Attributes:
        family: "clip", "siglip", "open_clip" or "towers": for people and the fingerprint.
        dim: length of an embedding.
        names: the parameters of both parts.
        lora: how the towers are adapted; None without LoRA.
        fresh: names of parameters that began at random: they learn faster.
    """

    family: str
    dim: int
    names: dict[Modality, ParameterPrefixes]

    def __init__(self) -> None:
        super().__init__()
        self.lora: Lora | None = None
        self.fresh: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        return self.logit_scale_and_bias()[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; the logit scale and bias stay fp32 whatever they are."""
        own = {id(p) for p in self.logit_scale_and_bias() if p is not None}
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and id(p) not in own)

    @property
    def similarity(self) -> Literal["softmax", "sigmoid"]:
        """How logits become probabilities: `sigmoid` for models with a bias (SigLIP), else `softmax`."""
        return "softmax" if self.logit_scale_and_bias()[1] is None else "sigmoid"

    def embed(
        self,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_features: Tensor | None = None,
        **text: Tensor,
    ) -> Embeddings:
        """Embed a batch of tensors; arguments as in `DualEncoder.forward`."""
        if pixel_values is not None:
            image_features = self.image_features(pixel_values.to(self.dtype))
        image = None if image_features is None else self.project_image(image_features.to(self.dtype))
        if input_ids is not None:
            text_features = self.text_features(input_ids, attention_mask, **text)
        words = None if text_features is None else self.project_text(text_features.to(self.dtype))
        scale, bias = self.logit_scale_and_bias()
        return Embeddings(
            None if image is None else _unit(image),
            None if words is None else _unit(words),
            _full(scale).exp().reshape(()),
            None if bias is None else _full(bias).reshape(()),
        )

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
    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        """(n, length) to the tower's pooled output (n, width)."""

    @abstractmethod
    def project_text(self, features: Tensor) -> Tensor:
        """(n, width) to (n, dim)."""

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        """(n, length) to (n, dim)."""
        return self.project_text(self.text_features(input_ids, attention_mask, **inputs))

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


@one_thread()
def check_finite(model: nn.Module, where: object) -> None:
    """Refuse NaN and infinite weights, by name."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        least, most = tensor.aminmax()  # NaN wherever there is one; a tenth of the time of isfinite
        if not (least.isfinite() and most.isfinite()):
            raise ModelError(
                f"weight {name} holds NaN or infinity", where=where, fix="use an earlier checkpoint", topic="weights"
            )


def root_of(backend: Backend, part: Modality) -> str:
    """The name of the smallest module that holds a whole tower."""
    known = {name for name, _ in backend.named_modules()} | {name for name, _ in backend.named_parameters()}
    paths = [prefix.split(".") for prefix in backend.names[part].tower if prefix in known]
    if len(paths) == 1:
        return ".".join(paths[0])
    shared = [level[0] for level in zip(*paths, strict=False) if len(set(level)) == 1]
    return ".".join(shared)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_full(x), dim=-1)
