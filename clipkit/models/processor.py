"""From an image and a text to the tensors a model takes: small, picklable, without weights.

A `Processor` has two sides. Each side knows how to save itself in the files that the model's own
library reads, and how to describe its declared settings; `measure_processor` measures what it does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image
from torch import Tensor

from clipkit.errors import ModelError
from clipkit.files import json_hash

Padding = Literal["longest", "max_length"]


class ImageSide(Protocol):
    """RGB images to the tensor of a batch."""

    @property
    def image_size(self) -> int: ...

    def __call__(self, images: Sequence[Image.Image]) -> Tensor: ...

    def describe(self) -> dict[str, Any]:
        """Its settings as they are declared; the fingerprint measures what they do."""
        ...

    def save(self, folder: Path) -> None: ...


class TextSide(Protocol):
    """Texts to token ids."""

    @property
    def context_length(self) -> int: ...
    @property
    def unknown_id(self) -> int | None:
        """The token that stands for whatever the vocabulary lacks; None where it lacks nothing (bytes)."""
        ...

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]: ...
    def counts(self, texts: Sequence[str]) -> list[int]: ...

    def describe(self) -> dict[str, Any]:
        """`tokenizer`: the hash of the vocabulary, which running it on a few texts cannot tell."""
        ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Processor:
    """What turns images and texts into a model's inputs, in evaluation and in training alike."""

    image_side: ImageSide
    text_side: TextSide

    @property
    def image_size(self) -> int:
        """Height and width of the model's input, in pixels."""
        return self.image_side.image_size

    @property
    def context_length(self) -> int:
        """The most tokens a text may have, special ones included; longer texts are cut."""
        return self.text_side.context_length

    def image(self, image: Image.Image) -> Tensor:
        """The evaluation transform of one RGB image: (channels, height, width), float32."""
        return self.image_side([image])[0]

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """The same for many RGB images at once: (n, channels, height, width), float32."""
        return self.image_side(images)

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` (n, length) and, where the text tower reads it, `attention_mask` of that shape."""
        return self.text_side(texts)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has before it is cut, special tokens included."""
        return self.text_side.counts(texts)

    def save(self, folder: Path) -> None:
        """Write the native files of both sides."""
        self.image_side.save(folder)
        self.text_side.save(folder)


class TransformersImages:
    """An image processor of transformers, used as it is."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.image_size = _side(image_processor)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels: Tensor = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels.float()

    def describe(self) -> dict[str, Any]:
        settings = json.loads(json.dumps(self.image_processor.to_dict(), default=str))
        relevant = ("do_", "size", "crop", "resample", "image_mean", "image_std", "rescale", "interpolation")
        kept = {k: v for k, v in settings.items() if k.startswith(relevant) and v is not None}
        return {"transform": type(self.image_processor).__name__, "image_size": self.image_size, **kept}

    def save(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)


def _side(image_processor: Any) -> int:
    size = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    size = size or getattr(image_processor, "size", None) or {}
    sides = [size] if isinstance(size, int) else [v for v in dict(size).values() if v]
    if not sides:
        raise ModelError(f"{type(image_processor).__name__} does not say which image size it gives")
    return max(sides)


class TransformersTexts:
    """A tokenizer of transformers, with what it leaves open settled: length, padding, mask.

    Args:
        tokenizer: with a pad token.
        context_length: the most tokens, special ones included.
        padding: to the `longest` of the batch, or always to `max_length` (SigLIP was trained that way).
        mask: whether the tower is given the attention mask.
        vocabulary: how many tokens the tower knows, where the tokenizer may have been given more.

    Cut texts keep their end-of-text token, also where the tokenizer would drop it.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_length: int,
        *,
        padding: Padding = "longest",
        mask: bool = True,
        vocabulary: int | None = None,
    ) -> None:
        if tokenizer.pad_token_id is None:
            fix = "set tokenizer.pad_token, to the end-of-text token if it has no other"
            raise ModelError("the tokenizer has no pad token, so texts of unequal length make no batch", fix=fix)
        self.tokenizer, self.context_length, self.padding, self.mask = tokenizer, context_length, padding, mask
        self.vocabulary = vocabulary
        self.ends_texts = _ends_texts(tokenizer)  # with its end-of-text token
        self.unknown_id: int | None = tokenizer.unk_token_id
        self._hash: str | None = None

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(
            list(texts),
            padding=self.padding,
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=self.mask,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        ids = batch["input_ids"]
        if self.ends_texts and ids.shape[1] == self.context_length:
            lost = ~(ids == self.tokenizer.eos_token_id).any(1)
            ids[lost, -1] = self.tokenizer.eos_token_id
        if self.vocabulary is not None and ids.numel() and int(ids.max()) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            fix = f"model.resize_token_embeddings({len(self.tokenizer)}) in transformers, then train the new tokens"
            raise ModelError(f"the text tower has no embedding for the token {token!r}", fix=fix)
        return dict(batch)

    def counts(self, texts: Sequence[str]) -> list[int]:
        ids = self.tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
        return [len(row) for row in ids]

    def describe(self) -> dict[str, Any]:
        if self._hash is None:  # a tokenizer of 256,000 tokens takes half a second, once
            self._hash = hash_tokenizer(self.tokenizer)
        return {"tokenizer": self._hash}

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def _ends_texts(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.eos_token_id is not None and bool(ids) and ids[-1] == tokenizer.eos_token_id


def hash_tokenizer(tokenizer: Any) -> str:
    """16 hex characters for the vocabulary of a tokenizer of transformers."""
    return vocabulary_hash(tokenizer.get_vocab(), {tokenizer.bos_token: START, tokenizer.eos_token: END})


START, END = "<start>", "<end>"  # names that libraries spell differently


def vocabulary_hash(vocabulary: Mapping[str, int], special: Mapping[str | None, str]) -> str:
    """16 hex characters for tokens and their ids; `special` renames start and end, spelt differently elsewhere."""
    named = {special.get(token, token): number for token, number in vocabulary.items()}
    return json_hash([*sorted(named, key=lambda token: (named[token], token)), len(named)])
