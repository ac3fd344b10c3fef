"""open_clip's image transform and tokenizer, used as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipkit.models.processor import END, START, hash_tokenizer, vocabulary_hash


class OpenClipImages:
    """open_clip's evaluation transform, used as it is."""

    def __init__(self, preprocess: Callable[[Image.Image], Tensor], settings: Mapping[str, Any]) -> None:
        self.preprocess, self.settings = preprocess, dict(settings)
        size = self.settings["size"]
        self.image_size = size if isinstance(size, int) else max(size)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self.preprocess(image) for image in images])

    def describe(self) -> dict[str, Any]:
        # Its text names every step with its numbers, whoever built it.
        steps = " ".join(str(self.preprocess).replace("[", "(").replace("]", ")").split())
        return {"transform": steps, "image_size": self.image_size, **jsonable(self.settings)}

    def save(self, folder: Path) -> None:
        """Nothing: open_clip_config.json holds it."""


class OpenClipTexts:
    """open_clip's tokenizer, used as it is."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.context_length = tokenizer, int(tokenizer.context_length)
        vocabulary = tokenizer.tokenizer.get_vocab() if is_hf(self) else tokenizer.encoder
        self.highest_id = max(vocabulary.values())
        self.eos_token_id = tokenizer.tokenizer.eos_token_id if is_hf(self) else tokenizer.eot_token_id
        self.pad_token_id = tokenizer.tokenizer.pad_token_id if is_hf(self) else 0
        self.unknown_id: int | None = tokenizer.tokenizer.unk_token_id if is_hf(self) else None
        self._hash: str | None = None

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(list(texts))}

    def counts(self, texts: Sequence[str]) -> list[int]:
        if is_hf(self):
            cleaned = [self.tokenizer.clean_fn(text) for text in texts]
            rows = self.tokenizer.tokenizer(cleaned, padding=False, truncation=False, verbose=False)["input_ids"]
            return [len(row) for row in rows]
        return [len(self.tokenizer.encode(text)) + 2 for text in texts]  # start and end of text

    def describe(self) -> dict[str, Any]:
        if self._hash is None:
            self._hash = self._hash_tokenizer()
        return {"tokenizer": self._hash}

    def _hash_tokenizer(self) -> str:
        if is_hf(self):
            return hash_tokenizer(self.tokenizer.tokenizer)
        start, end = (self.tokenizer.decoder[n] for n in (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id))
        return vocabulary_hash(self.tokenizer.encoder, {start: START, end: END})

    def save(self, folder: Path) -> None:
        if is_hf(self):
            self.tokenizer.save_pretrained(folder)


def is_hf(side: Any) -> bool:
    return hasattr(side.tokenizer, "tokenizer")


def jsonable(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return plain
