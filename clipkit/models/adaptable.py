"""What can be changed of a model: which parameters train, LoRA, memory, the sizes of its inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from torch import nn

from clipkit.modality import MODALITIES, Modality
from clipkit.models.adapting import lora
from clipkit.models.adapting import lora_files as adapter_files
from clipkit.models.adapting.freezing import checkpoint_gradients, freeze
from clipkit.models.adapting.patch_dropout import PatchDropout, drop_patches
from clipkit.models.adapting.resize import resize
from clipkit.models.backend import Backend, Lora
from clipkit.models.processor import Processor


class AdaptableModel(nn.Module):
    """A backend and its processor, which can be frozen, adapted and resized.

    Args:
        backend: the weights, of one family.
        processor: what prepares images and texts for them.
        name: where the model came from; for messages and reports.
    """

    def __init__(self, backend: Backend, processor: Processor, name: str) -> None:
        super().__init__()
        self.backend, self.processor, self.name = backend, processor, name
        self._in_eval: list[nn.Module] = []  # frozen towers
        self._patches: PatchDropout | None = None

    @property
    def lora(self) -> Lora | None:
        """How the towers are adapted; None without LoRA."""
        return self.backend.lora

    def freeze(self, part: Modality, *, head: bool = False, blocks: int | None = None) -> Self:
        """Lock a tower: no gradients, and eval mode even while the rest trains (BatchNorm, dropout).

        Args:
            part: `image` or `text`.
            head: whether its projection is locked as well. With it, the embeddings of that side stay
                what they are (an index of images stays valid); without it, the tower's features do.
            blocks: lock only the first so many blocks (transformer layers, stages) and what lies before
                them: patches or tokens, and positions. Negative: all but the last so many.
        """
        self._in_eval += freeze(self.backend, self.processor, part, head=head, first=blocks)
        return self

    def train(self, mode: bool = True) -> Self:
        """Training or eval mode, for all but the frozen towers."""
        super().train(mode)
        for module in [*self._in_eval, *(self.lora.still if self.lora else ())]:
            module.training = False  # the list holds their children, too
        return self

    def add_lora(
        self,
        part: Literal["image", "text", "both"] = "both",
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
    ) -> Self:
        """Train small matrices beside frozen weights (LoRA, Hu et al. 2021; needs peft).

        The tower is frozen, its BatchNorm stays in eval mode. Its head trains along if it is fresh (from
        `from_towers`), else it is frozen, too. Logit scale and bias train as before, and so does the other
        tower. The matrices learn at `TrainConfig.head_learning_rate`, for they begin at random.
        `save_pretrained` writes the merged model, `save_adapter` the adapter alone.

        Args:
            part: which tower.
            rank, alpha: the update is alpha / rank * B A with A of `rank` rows; it begins at 0.
            dropout: of what A is given, in training.
            targets: names of layers, as peft takes them (`["q_proj", "v_proj"]`); all linear layers of
                attention and MLP if None. Packed attention of open_clip has q_proj, k_proj, v_proj, out_proj.

        Raises:
            UsageError: peft is not installed; the tower has LoRA already.
            ModelError: no such layers.
        """
        lora.add(self.backend, MODALITIES if part == "both" else (part,), rank, alpha, dropout, targets)
        return self

    def merge_lora(self) -> Self:
        """Add the updates to the weights, in place; what could train before `add_lora` can train again."""
        if self.lora is not None:
            lora.merge_in_place(self.backend)
        return self

    def save_adapter(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the LoRA adapter alone: peft's files for each tower, and all else that was trained.

        Raises:
            UsageError: there is no adapter, or something stands at `folder`.
            ModelError: weights that are not finite.
        """
        adapter_files.save(self.backend, self.processor, Path(folder), overwrite, name=self.name)

    def load_adapter(self, folder: str | os.PathLike[str]) -> Self:
        """Put an adapter of `save_adapter` on its base model; it can be trained on, or merged.

        Raises:
            ModelMismatch: this is not the model that it was trained on; what differs is named.
            CorruptArtefact: a file is missing or damaged.
        """
        adapter_files.load(self.backend, self.processor, Path(folder))
        return self

    def gradient_checkpointing(self, on: bool = True) -> Self:
        """Compute each block again in the backward pass, for less memory and about a third more time.

        The gradients are the same, with dropout, too.

        Raises:
            ModelError: a tower that trains cannot: its library has no such switch, or it has BatchNorm.
        """
        checkpoint_gradients(self.backend, on)
        return self

    def patch_dropout(self, rate: float) -> Self:
        """In training, show the image tower a random part of the patches (FLIP, Li et al. 2023).

        Class and register tokens always stay. Eval mode, and a frozen tower, see the whole image.

        Args:
            rate: part of the patches to leave out of each image, in [0, 1); 0 turns it off.

        Raises:
            ModelError: the image tower needs all of its patches.
        """
        self._patches = drop_patches(self.backend, self.processor, rate, self._patches)
        return self

    def resize(self, *, image_size: int | None = None, context_length: int | None = None) -> Self:
        """Take other images or longer texts, for good: positions are interpolated, the processor follows.

        Image positions are resampled as a grid, bicubic with antialias, as open_clip and timm do it; class tokens
        keep theirs. Text positions are interpolated linearly for a longer context and cut for a shorter one. Both
        need training to be as good as before. Make the optimizer afterwards: position weights are new parameters.

        Args:
            image_size: pixels.
            context_length: tokens, special ones included.

        Raises:
            ModelError: the positions cannot be interpolated; the message says why.
        """
        self.processor = resize(self.backend, self.processor, image_size, context_length, lora=self.lora is not None)
        return self
