"""DualEncoder: images and texts in one space, whatever library the weights come from."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clipkit.images.parallel import Workers
from clipkit.models.adaptable import AdaptableModel
from clipkit.models.adapting import lora
from clipkit.models.backend import Backend, Embeddings
from clipkit.models.encode import encode, image_chunks, listed, report_cut, text_chunks
from clipkit.models.fingerprint.fingerprint import Fingerprint, full_fingerprint
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS
from clipkit.models.image_transform import Resize
from clipkit.models.loading.load import from_config, open_checked
from clipkit.models.loading.proof import Verify
from clipkit.models.processor import Processor
from clipkit.models.saving.model_card import Card
from clipkit.models.saving.save import Saved, save

if TYPE_CHECKING:
    from clipkit.models.exporting.report import ExportReport

logger = logging.getLogger("clipkit")
_ROOT = "backend."  # of the name of every parameter


class DualEncoder(AdaptableModel):
    """A model with an image side and a text side that embed into one space.

    Open one with `from_pretrained`, wrap one that is loaded already with `from_transformers` or
    `from_open_clip`, or join two towers with `from_towers`.

    Args:
        backend: the weights, of one family.
        processor: what prepares images and texts for them.
        name: where the model came from; for messages and reports.
    """

    def __init__(self, backend: Backend, processor: Processor, name: str) -> None:
        super().__init__(backend, processor, name)
        self.verified = False  # whether it was opened from a folder whose clipkit.json it still fits
        self.card = Card()  # what is known of it beside its weights
        self._said: set[Hashable] = set()

    def once(self, what: Hashable) -> bool:
        """Whether this is asked for the first time: what the log says of a model it says once."""
        new = what not in self._said
        self._said.add(what)
        return new

    # -- what it is ---------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.backend.dim

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; the logit scale and bias stay fp32 whatever they are."""
        return self.backend.dtype

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the scale of the logits, as a parameter."""
        return self.backend.logit_scale_and_bias()[0]

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """What is added to the logits, as a parameter; None where the model has none."""
        return self.backend.logit_scale_and_bias()[1]

    @property
    def similarity(self) -> Literal["softmax", "sigmoid"]:
        """How logits become probabilities: `sigmoid` for models with a bias (SigLIP), else `softmax`."""
        return self.backend.similarity

    @property
    def fresh(self) -> frozenset[str]:
        """Names of parameters that began at random: they learn faster."""
        return frozenset(f"{_ROOT}{name}" for name in self.backend.fresh)

    @fresh.setter
    def fresh(self, names: frozenset[str]) -> None:
        self.backend.fresh = frozenset(name.removeprefix(_ROOT) for name in names)

    def fingerprint(self) -> Fingerprint:
        """What names this model in every index and result; changes with any weight or setting.

        Takes a pass over the weights at the speed of memory, and SHA-256 over them once for a state of the weights.
        """
        plain = lora.merged(self.backend)  # what `save_pretrained` writes
        return full_fingerprint(plain, self.processor)

    # -- training -----------------------------------------------------------------------------

    def forward(
        self,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_features: Tensor | None = None,
        **text: Tensor,
    ) -> Embeddings:
        """Embed a batch of tensors. Sides without input are None in what comes out.

        Args:
            pixel_values: (n, channels, height, width), as `processor.images` gives them.
            image_features: (n, width), as `vision_features` gives them, in place of pixels.
            input_ids: (m, length), as `processor.texts` gives them.
            attention_mask: (m, length); whatever else `processor.texts` gives is passed on in `text`.
            text_features: (m, width), as `text_features` gives them, in place of tokens.
        """
        if pixel_values is not None:
            image_features = self.vision_features(pixel_values)
        return self.backend.embed(
            image_features=image_features,
            input_ids=input_ids,
            attention_mask=attention_mask,
            text_features=text_features,
            **text,
        )

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """The image tower's pooled output, before the projection: (n, width). What a locked tower caches.

        For SigLIP and open_clip the projection is a part of the tower, and the width is `dim`.
        """
        return self.backend.image_features(pixel_values.to(self.dtype))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **text: Tensor) -> Tensor:
        """The text tower's pooled output, before the projection: (m, width). What a frozen tower keeps.

        For SigLIP and open_clip the projection is a part of the tower, and the width is `dim`.
        """
        return self.backend.text_features(input_ids, attention_mask, **text)

    # -- encoding -----------------------------------------------------------------------------

    def encode_images(
        self,
        images: Sequence[Any],
        *,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        workers: Workers = "auto",
        progress: bool = False,
        dim: int | None = None,
    ) -> Tensor:
        """Image embeddings, in the order given: (n, dim), float32, unit length, on the CPU.

        Args:
            images: paths, PIL images, bytes, arrays, or what a data set holds, in any mixture.
            batch_size: images at once; changes the last bits only.
            device: moves the model there first.
            dtype: precision of the computation by autocast, e.g. torch.bfloat16; the model's own if None.
            workers: ``"auto"`` decodes in threads, as many as there are cores; a number: so many processes, 0 none.
            progress: whether to show a bar.
            dim: keep the first so many components, at unit length again (Matryoshka, Kusupati et al. 2022);
                all if None. Good only for models that were trained for it.

        Raises:
            BadImage: an image cannot be used; it is named.
            ModelError: an embedding is not finite.
        """
        items = listed(images, "encode_images", (str, bytes, os.PathLike, Image.Image, np.ndarray, Mapping))
        chunks = image_chunks(items, self.processor, batch_size, workers, torch.device(device or self.device))
        options: dict[str, Any] = {"device": device, "dtype": dtype, "progress": progress, "dim": dim}
        return encode(self.backend, chunks, "image", items, **options, forward=self)

    def encode_texts(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        dim: int | None = None,
    ) -> Tensor:
        """Text embeddings, in the order given: (n, dim), float32, unit length, on the CPU.

        Arguments as in `encode_images`. Texts beyond `processor.context_length` tokens are cut, and a
        line in the log says how many, once of the same texts.

        Raises:
            DataError: something in `texts` is not a text.
            ModelError: an embedding is not finite.
        """
        items = listed(texts, "encode_texts", (str, bytes))
        chunks = text_chunks(items, self.processor, batch_size)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "progress": progress, "dim": dim}
        embeddings = encode(self.backend, chunks, "text", items, **options, forward=self)
        if tuple(items) != GOLDEN_TEXTS:  # one of them is over-long on purpose
            report_cut(self.processor, items, self.once)
        return embeddings

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
        verify: Verify = "once",
    ) -> DualEncoder:
        """Open a model.

        Args:
            name: `org/name` of the hub or a folder (transformers), `open_clip:ARCH/TAG`,
                `open_clip:ARCH/FILE`, `open_clip:FOLDER`, `open_clip:hf-hub:org/name`, or a folder that
                `save_pretrained` wrote.
            device, dtype: where to and in which precision, after the checks (fp32 on the CPU).
            revision: branch, tag or commit on the hub.
            trust_remote_code: whether a model may run Python code that it brings along.
            verify: what is checked of a folder that `save_pretrained` wrote. Its files are, always: by XXH3, which
                finds accidents, before their content is used. ``"once"`` also computes the golden embeddings, the
                first time that this content is opened with these versions of the libraries, and remembers it in the
                user's cache folder (`CLIPKIT_CACHE`); ``"always"`` does so every time, and checks SHA-256, which finds
                tampering, too; ``"files"`` leaves it at the files.

        Raises:
            ModelError: no such model, or weights that would be random, not finite, pickled or misshapen.
            CorruptArtefact: files or embeddings that are not what was saved.
        """
        backend, processor, body = open_checked(name, revision, trust_remote_code, verify=verify)
        model = cls(backend, processor, str(name)).eval()
        if body is not None:
            model.card = Card.from_dict(body.get("card", {}))
            model.verified = True
        else:
            logger.info("%s: unverified, for there is no clipkit.json to hold it to; clipkit check model looks", name)
        if dtype is not None:
            model._cast(dtype)
        return model if device is None else model.to(device)

    @classmethod
    def from_config(
        cls,
        config: Any,
        processor: Any = None,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> DualEncoder:
        """A model with random weights, drawn from torch's random state. All its parameters count as fresh.

        Args:
            config: `open_clip:ARCH`, or a config object of transformers; or what `from_pretrained` takes for
                a folder or hub model, whose config, transform and tokenizer are read and its weights left aside.
            processor: of transformers; only beside a config object, which brings none.
            device: where the weights are drawn; on `meta` they take no memory.
            revision, trust_remote_code: as in `from_pretrained`.

        Raises:
            ModelError: no such architecture, or it needs a tokenizer or config that is not here: named.
        """
        backend, own = from_config(config, processor, device, revision, trust_remote_code)
        name = str(config) if isinstance(config, str | os.PathLike) else type(config).__name__
        model = cls(backend, own, name).eval()
        model.fresh = frozenset(name for name, _ in model.named_parameters())
        return model

    @classmethod
    def from_transformers(cls, model: Any, processor: Any, *, name: str | None = None) -> DualEncoder:
        """Wrap a CLIP-like model of transformers and its processor, both loaded already."""
        from clipkit.models.backends.transformers import wrap

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
        from clipkit.models.backends.open_clip import wrap

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
        from clipkit.models.loading.joined_towers import join_towers

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

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False, card: Mapping[str, Any] | None = None
    ) -> Saved:
        """Write a folder that the native library opens, with clipkit.json and a model card beside its files.

        Models of transformers and open_clip keep their format. Joined towers become a VisionTextDualEncoder of
        transformers where that was tried and gives the same embeddings to 1e-5, else vision/, text/ and
        heads.safetensors with a program that needs no clipkit.

        LoRA is merged into the weights that are written; the model itself goes on as it is.

        Args:
            folder: is created; must not exist, or be empty, unless `overwrite`.
            overwrite: replace a model that stands there. Other folders are never replaced.
            card: facts for the model card, see `clipkit.models.saving.model_card.Card`:
                license, base_model, data, pairs, config,
                metrics, n, limits. They are kept in `self.card`, and by the folder.

        Returns:
            In which form it was written, and why.

        Raises:
            UsageError: something stands at `folder`; an unknown fact.
            ModelError: weights that are not finite.
        """
        if card is not None:
            self.card = self.card.updated(card)
        saved, self.card = save(self.backend, self.processor, Path(folder), overwrite, name=self.name, card=self.card)
        return saved

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        to: Literal["transformers", "open_clip", "onnx"],
        overwrite: bool = False,
    ) -> ExportReport:
        """Write the model in another library's format, and check it against this one.

        CLIP with a ViT and SigLIP convert between transformers and open_clip, weights, tokenizer and transform.
        ONNX takes any model: image.onnx and text.onnx give embeddings of unit length, for batches of any size.

        Args:
            folder: is created; must not exist, or be empty, unless `overwrite`.
            to: `transformers`, `open_clip` or `onnx` (extra `onnx`).
            overwrite: replace a model that stands there.

        Returns:
            How far the two are apart: on identical tensors, and with the other library's own preprocessing.

        Raises:
            ModelError: the architecture does not convert (the message says which do), or embeddings would differ.
            UsageError: it is of that library already; something stands at `folder`; the extra is missing.
        """
        from clipkit.models.exporting.export import export

        plain = lora.merged(self.backend)
        return export(plain, self.processor, Path(folder), to, overwrite, name=self.name, card=self.card)

    def _cast(self, dtype: torch.dtype) -> None:
        scalars = [p for p in self.backend.logit_scale_and_bias() if p is not None]
        kept = [p.detach().clone() for p in scalars]
        self.to(dtype)
        for parameter, value in zip(scalars, kept, strict=True):
            parameter.data = value  # bf16 holds a scale of 100 to within 0.5 only
