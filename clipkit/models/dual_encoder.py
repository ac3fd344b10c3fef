"""DualEncoder: images and texts in one space, whatever library the weights come from."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipkit.models import artefact
from clipkit.models.adapters import freeze
from clipkit.models.backend import Backend, Part
from clipkit.models.encode import encode, image_chunks, listed, text_chunks
from clipkit.models.fingerprint import Fingerprint, facts, take
from clipkit.models.processor import Processor
from clipkit.models.saving import golden, save
from clipkit.models.transform import Resize

logger = logging.getLogger(__name__)


class Embeddings(NamedTuple):
    """What `DualEncoder.forward` gives. Scale and bias carry gradients, too."""

    image: Tensor | None  # (n, dim), unit length, fp32
    text: Tensor | None  # (m, dim), unit length, fp32
    scale: Tensor  # exp(logit_scale), no dimensions
    bias: Tensor | None  # no dimensions; None under softmax


class DualEncoder(nn.Module):
    """A model with an image side and a text side that embed into one space.

    Open one with `from_pretrained`, wrap one that is loaded already with `from_transformers` or
    `from_open_clip`, or join two towers with `from_towers`.

    Args:
        backend: the weights, of one family.
        processor: what prepares images and texts for them.
        name: where the model came from; for messages and reports.
    """

    def __init__(self, backend: Backend, processor: Processor, name: str) -> None:
        super().__init__()
        self.backend, self.processor, self.name = backend, processor, name
        self.verified = False  # whether it was opened from a folder whose clipkit.json it still fits
        self._in_eval: list[nn.Module] = []  # frozen towers
        self.fresh: frozenset[str] = frozenset()  # names of parameters that began at random: they learn faster

    # -- what it is ---------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.backend.dim

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; the logit scale and bias stay fp32 whatever they are."""
        own = {id(p) for p in self.backend.scalars() if p is not None}
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and id(p) not in own)

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the scale of the logits, as a parameter."""
        return self.backend.scalars()[0]

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """What is added to the logits, as a parameter; None where the model has none."""
        return self.backend.scalars()[1]

    @property
    def similarity(self) -> Literal["softmax", "sigmoid"]:
        """How logits become probabilities: `sigmoid` for models with a bias (SigLIP), else `softmax`."""
        return "softmax" if self.logit_bias is None else "sigmoid"

    def fingerprint(self) -> Fingerprint:
        """What names this model in every index and result; changes with any weight or setting."""
        return take(self.backend, self.processor)

    # -- training -----------------------------------------------------------------------------

    def forward(
        self,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **text: Tensor,
    ) -> Embeddings:
        """Embed a batch of tensors. Sides without input are None in what comes out.

        Args:
            pixel_values: (n, channels, height, width), as `processor.images` gives them.
            image_features: (n, width), as `vision_features` gives them, in place of pixels.
            input_ids: (m, length), as `processor.texts` gives them.
            attention_mask: (m, length); whatever else `processor.texts` gives is passed on in `text`.
        """
        if pixel_values is not None:
            image_features = self.vision_features(pixel_values)
        image = None if image_features is None else self.backend.project_image(image_features.to(self.dtype))
        words = None if input_ids is None else self.backend.embed_text(input_ids, attention_mask, **text)
        bias = self.logit_bias
        return Embeddings(
            None if image is None else _unit(image),
            None if words is None else _unit(words),
            _full(self.logit_scale).exp().reshape(()),
            None if bias is None else _full(bias).reshape(()),
        )

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """The image tower's pooled output, before the projection: (n, width). What a locked tower caches.

        For SigLIP and open_clip the projection is a part of the tower, and the width is `dim`.
        """
        return self.backend.image_features(pixel_values.to(self.dtype))

    def freeze(self, part: Part, *, head: bool = False) -> Self:
        """Lock a tower: no gradients, and eval mode even while the rest trains (BatchNorm, dropout).

        Args:
            part: `image` or `text`.
            head: whether its projection is locked as well. With it, the embeddings of that side stay
                what they are (an index of images stays valid); without it, the tower's features do.
        """
        self._in_eval += freeze(self.backend, part, head=head)
        return self

    def train(self, mode: bool = True) -> Self:
        """Training or eval mode, for all but the frozen towers."""
        super().train(mode)
        for module in self._in_eval:
            module.training = False  # the list holds their children, too
        return self

    # -- encoding -----------------------------------------------------------------------------

    def encode_images(
        self,
        images: Sequence[Any],
        *,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        workers: int = 0,
        progress: bool = False,
    ) -> Tensor:
        """Image embeddings, in the order given: (n, dim), float32, unit length, on the CPU.

        Args:
            images: paths, PIL images, bytes, arrays, or what a data set holds, in any mixture.
            batch_size: images at once; changes the last bits only.
            device: moves the model there first.
            dtype: precision of the computation by autocast, e.g. torch.bfloat16; the model's own if None.
            workers: processes that open and transform images; 0 does it here.
            progress: whether to show a bar.

        Raises:
            BadImage: an image cannot be used; it is named.
            ModelError: an embedding is not finite.
        """
        items = listed(images, "encode_images", (str, bytes, os.PathLike, Image.Image, np.ndarray, Mapping))
        chunks = image_chunks(items, self.processor, batch_size, workers)
        return encode(self, chunks, "image", items, device, dtype, progress)

    def encode_texts(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Text embeddings, in the order given: (n, dim), float32, unit length, on the CPU.

        Arguments as in `encode_images`. Texts beyond `processor.context_length` tokens are cut.

        Raises:
            DataError: something in `texts` is not a text.
            ModelError: an embedding is not finite.
        """
        items = listed(texts, "encode_texts", (str, bytes))
        return encode(self, text_chunks(items, self.processor, batch_size), "text", items, device, dtype, progress)

    # -- opening and saving -------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> DualEncoder:
        """Open a model.

        Args:
            name: `org/name` of the hub or a folder (transformers), `open_clip:ARCH/TAG`,
                `open_clip:FOLDER`, `open_clip:hf-hub:org/name`, or a folder that `save_pretrained` wrote.
            device, dtype: where to and in which precision, after the checks (fp32 on the CPU).
            revision: branch, tag or commit on the hub.
            trust_remote_code: whether a model may run Python code that it brings along.

        Raises:
            ModelError: no such model, or weights that would be random, not finite, pickled or misshapen.
            CorruptArtefact: files or embeddings that are not what was saved.
        """
        from clipkit.models.open_model import open_model

        backend, processor, body, folder = open_model(name, revision, trust_remote_code)
        model = cls(backend, processor, str(name)).eval()
        if body is not None and folder is not None:
            artefact.check(body, folder, facts(backend, processor), golden(model))
            model.verified = True
        else:
            logger.info("%s: unverified, for there is no clipkit.json to hold it to; clipkit check model looks", name)
        if dtype is not None:
            model._cast(dtype)
        return model if device is None else model.to(device)

    @classmethod
    def from_transformers(cls, model: Any, processor: Any, *, name: str | None = None) -> DualEncoder:
        """Wrap a CLIP-like model of transformers and its processor, both loaded already."""
        from clipkit.models.hf import wrap

        backend, own = wrap(model, processor)
        return cls(backend, own, name or getattr(model, "name_or_path", "") or type(model).__name__).eval()

    @classmethod
    def from_open_clip(
        cls, model: Any, preprocess: Any, tokenizer: Any, *, arch: str | Mapping[str, Any] | None = None
    ) -> DualEncoder:
        """Wrap a model of open_clip, its evaluation transform and its tokenizer, all loaded already.

        `arch` is the name given to `create_model`, or the config itself (its `model_cfg`); only
        `save_pretrained` needs it, for open_clip models do not remember theirs.
        """
        from clipkit.models.openclip import wrap

        backend, processor = wrap(model, preprocess, tokenizer, arch)
        return cls(backend, processor, f"open_clip:{arch if isinstance(arch, str) else type(model).__name__}").eval()

    @classmethod
    def from_towers(
        cls,
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
        head: Literal["linear", "mlp"] = "linear",
        image_pooling: Literal["auto", "cls", "mean", "pooler"] = "auto",
        text_pooling: Literal["auto", "cls", "mean", "last", "eos", "pooler"] = "auto",
        context_length: int | None = None,
        logit_scale: float = math.log(1 / 0.07),
        logit_bias: float | None = None,
        trust_remote_code: bool = False,
    ) -> DualEncoder:
        """Join any vision tower and any text tower of transformers (timm's through TimmWrapperModel).

        The towers keep their weights; the two projection heads are new and drawn from torch's random state.

        Args:
            vision, text: a transformers model, or a folder or hub name to open one from.
            tokenizer: a transformers tokenizer, or a folder or name; the text tower's own if None.
            dim: length of the embeddings.
            image_size: pixels; the tower's own if None.
            image_processor: of transformers, or an `ImageTransform`; the tower's own if None.
            image_mean, image_std: of each channel, for values in [0, 1]; 0.5 if nothing says otherwise.
            channels: 1 or 3; the tower's own if None.
            resize: `squash` (the default) or `shortest` side and centre crop.
            head: `linear` (without bias, as in CLIP) or `mlp` (two layers, GELU).
            image_pooling, text_pooling: what of a tower's output is projected; `auto` takes what the tower
                was made for: its pooler (unless BERT's or ViT's tanh layer), else the class token for
                images, the last token for causal text towers, the mean over the mask for others.
            context_length: the most tokens of a text; 77, or the tower's limit if that is less.
            logit_scale: logarithm of the initial scale; ln(1 / 0.07) as in Radford et al. 2021.
            logit_bias: initial bias for a sigmoid loss (Zhai et al. 2023 begin at ln 10 and -10), else None.
        """
        from clipkit.models.towers import join_towers

        backend, processor = join_towers(
            vision,
            text,
            tokenizer,
            dim=dim,
            image_size=image_size,
            image_processor=image_processor,
            image_mean=image_mean,
            image_std=image_std,
            channels=channels,
            resize=resize,
            head=head,
            image_pooling=image_pooling,
            text_pooling=text_pooling,
            context_length=context_length,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            trust_remote_code=trust_remote_code,
        )
        vision_class, text_class = backend.classes()
        model = cls(backend, processor, f"{vision_class} + {text_class}").eval()
        heads = ("backend.image_head.", "backend.text_head.")
        model.fresh = frozenset(name for name, _ in model.named_parameters() if name.startswith(heads))
        return model

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder that the native library opens, with clipkit.json beside its files.

        Args:
            folder: is created; must not exist, or be empty, unless `overwrite`.
            overwrite: replace a model that stands there. Other folders are never replaced.

        Raises:
            UsageError: something stands at `folder`.
            ModelError: weights that are not finite.
        """
        save(self, Path(folder), overwrite)

    def _cast(self, dtype: torch.dtype) -> None:
        scalars = [p for p in self.backend.scalars() if p is not None]
        kept = [p.detach().clone() for p in scalars]
        self.to(dtype)
        for parameter, value in zip(scalars, kept, strict=True):
            parameter.data = value  # bf16 holds a scale of 100 to within 0.5 only


def _full(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_full(x), dim=-1)
