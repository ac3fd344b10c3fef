"""What a family of models has to offer so that `DualEncoder` can use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from clipkit.models.processor import Processor

Part = Literal["image", "text"]
PARTS: tuple[Part, ...] = ("image", "text")


class Names(NamedTuple):
    """Prefixes of the names of a part's modules and parameters."""

    tower: tuple[str, ...]
    head: tuple[str, ...]


class Backend(nn.Module, ABC):
    """The weights of one model. Embeddings here are not normalised yet."""

    family: str  # "clip", "siglip", "open_clip", "towers": for people and the fingerprint
    dim: int
    names: dict[Part, Names]

    @abstractmethod
    def scalars(self) -> tuple[nn.Parameter, nn.Parameter | None]:
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
    def describe(self, part: Part) -> dict[str, Any]:
        """What else decides about this part's embeddings: activation, pooling."""

    @abstractmethod
    def save(self, folder: Path, processor: Processor) -> None:
        """Write everything the native library needs, the processor's files included."""

    def settings(self) -> dict[str, Any]:
        """What clipkit.json must keep because no native file can say it."""
        return {}

    def owns(self, part: Part, name: str, *, head: bool = True) -> bool:
        """Whether the module or parameter called `name` belongs to a part, with or without its head."""
        prefixes = self.names[part].tower + (self.names[part].head if head else ())
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
