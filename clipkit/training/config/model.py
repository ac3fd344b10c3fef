"""The section `model` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from clipkit.errors import ConfigError, option
from clipkit.modality import MODALITIES, Modality
from clipkit.training.config.fields import STRICT, FractionBelow1, as_lists, as_paths, check_fields


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the towers; `lora: {}` takes these defaults.

    Attributes:
        part: which tower: ``image``, ``text``, ``both``.
        rank, alpha: the update is alpha / rank * B A.
        dropout: of the input of A, in [0, 1).
        targets: names of layers; None: the linear layers of attention and MLP.
    """

    part: Literal["image", "text", "both"] = "both"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: FractionBelow1 = 0.0
    targets: tuple[str, ...] | None = None

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        as_lists(self, "targets")
        check_fields(self)


@dataclass(frozen=True)
class ModelConfig:
    """Which model: `name` alone, or `vision` and `text`.

    Attributes:
        name: a folder, ``org/name``, ``open_clip:ARCH/TAG`` or ``open_clip:FOLDER``.
        scratch: whether the weights begin at random: `name` (also ``open_clip:ARCH``) gives only the architecture,
            the transform and the tokenizer.
        vision, text: two towers to join, folders or names of transformers models.
        tokenizer: of the text tower; None: from `text`.
        dim: of the shared space of joined towers.
        head: the projections that join them.
        freeze: towers that are frozen: ``image`` (LiT, Zhai et al. 2022), ``text``.
        freeze_blocks: how many first blocks of a tower are frozen, with the embeddings before them:
            ``{image: 6}``; negative: all but the last so many.
        lora: train small matrices in place of the weights; None: no.
        gradient_checkpointing: less memory for about a third more time.
        patch_dropout: part of the patches that training leaves out, in [0, 1) (FLIP, Li et al. 2023).
        image_size, context_length: pixels and tokens to resize the model to; None: its own.
    """

    name: str | None = None
    scratch: bool = False
    vision: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    dim: int = 512
    head: Literal["linear", "mlp"] = "linear"
    freeze: tuple[Modality, ...] = ()
    freeze_blocks: dict[Modality, int] = field(default_factory=dict)
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    patch_dropout: FractionBelow1 = 0.0
    image_size: PositiveInt | None = None
    context_length: PositiveInt | None = None

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        as_lists(self, "freeze")
        as_paths(self, "name", "vision", "text", "tokenizer")
        check_fields(self)
        self._check_changes()
        towers = [tower for tower in (self.vision, self.text) if tower]
        if len(towers) != (2 if self.name is None else 0):
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
        """Refuse a tower that is frozen or adapted in more than one way."""
        adapted: tuple[str, ...] = ()
        if self.lora is not None:
            adapted = ("image", "text") if self.lora.part == "both" else (self.lora.part,)
        for modality in MODALITIES:
            changes = [modality in self.freeze, modality in self.freeze_blocks, modality in adapted]
            if changes.count(True) > 1:
                message = f"the {modality} tower is named by more than one of freeze, freeze_blocks and lora"
                raise ConfigError(message, where="model", fix="keep one of them for each tower")
