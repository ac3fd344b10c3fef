"""The section `model` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from clipkit.errors import ConfigError, option
from clipkit.training.config.train import _STRICT, _as_lists, _as_paths


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the towers; `lora: {}` takes these defaults.

    Attributes:
        part: which tower: ``image``, ``text``, ``both``.
        rank, alpha: the update is alpha / rank * B A.
        dropout: of what A is given.
        targets: names of layers; None: the linear layers of attention and MLP.
    """

    part: Literal["image", "text", "both"] = "both"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _as_lists(self, "targets")
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            found = f"{self.rank}, {self.alpha}, {self.dropout}"
            raise ConfigError(
                f"rank is at least 1, alpha above 0, dropout in [0, 1); found {found}", where="model.lora"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Which model: `name` alone, or `vision` and `text`.

    Attributes:
        name: a folder, ``org/name``, ``open_clip:ARCH/TAG`` or ``open_clip:FOLDER``.
        scratch: whether the weights are drawn at random: of `name` (also ``open_clip:ARCH``) only the architecture,
            the transform and the tokenizer are taken.
        vision, text: two towers to join, folders or names of transformers models.
        tokenizer: of the text tower; None: from `text`.
        dim: of the shared space, where towers are joined.
        head: what joins them.
        freeze: towers that stand still: ``image`` (LiT, Zhai et al. 2022), ``text``.
        freeze_blocks: how many first blocks of a tower stand still, with what lies before them:
            ``{image: 6}``; negative: all but the last so many.
        lora: small matrices in place of whole weights; None: none.
        gradient_checkpointing: less memory for about a third more time.
        patch_dropout: part of the patches that training leaves out (FLIP, Li et al. 2023).
        image_size, context_length: pixels and tokens to resize the model to; None: its own.
    """

    name: str | None = None
    scratch: bool = False
    vision: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    dim: int = 512
    head: Literal["linear", "mlp"] = "linear"
    freeze: tuple[Literal["image", "text"], ...] = ()
    freeze_blocks: dict[Literal["image", "text"], int] = field(default_factory=dict)
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    patch_dropout: float = 0.0
    image_size: int | None = None
    context_length: int | None = None

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _as_lists(self, "freeze")
        _as_paths(self, "name", "vision", "text", "tokenizer")
        self._check_changes()
        towers = (self.vision, self.text)
        if not (all(towers) if self.name is None else not any(towers)):
            raise ConfigError(
                "a model is either `name`, or `vision` and `text`",
                where="model",
                fix=f"{option('model.name', 'openai/clip-vit-base-patch32')}, or both towers",
            )
        if self.scratch and self.name is None:
            raise ConfigError(
                "scratch draws the weights of the model that `name` names; `vision` and `text` are pretrained",
                where="model.scratch",
                fix=f"{option('model.name', 'open_clip:ViT-B-32')}, or leave out {option('model.scratch')}",
            )

    def _check_changes(self) -> None:
        adapted = () if self.lora is None else ("image", "text") if self.lora.part == "both" else (self.lora.part,)
        for part in ("image", "text"):
            ways = [part in self.freeze, part in self.freeze_blocks, part in adapted]
            if sum(ways) > 1:
                message = f"the {part} tower is named by more than one of freeze, freeze_blocks and lora"
                raise ConfigError(message, where="model", fix="keep one of them for each tower")
        if not 0 <= self.patch_dropout < 1:
            raise ConfigError(f"patch_dropout is a part of the patches, from 0 to below 1; found {self.patch_dropout}")
        for name in ("image_size", "context_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
