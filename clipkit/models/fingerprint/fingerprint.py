"""One name for everything that decides about a model's embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from clipkit.files import json_hash
from clipkit.modality import MODALITIES, Modality
from clipkit.models.backend import Backend
from clipkit.models.fingerprint.image_transform import measure_transform
from clipkit.models.fingerprint.tokenizer import measure_tokenizer
from clipkit.models.fingerprint.tower import measure_towers
from clipkit.models.processor import Processor
from clipkit.models.threads import one_thread

# What load_image does to every image before a transform sees it.
_IMAGE_POLICY = {"exif": "applied", "alpha": "over white", "mode": "RGB"}


# Keys of a record that are not plain words.
_WORDS = {
    "dim": "embedding length",
    "logit_scale": "logit scale (its logarithm)",
    "image.filter": "image resize filter",
    "image.crop_rounding": "image crop where the margin is odd, rounded",
    "image.exif": "image EXIF orientation",
    "image.norm_eps": "image norm epsilon",
    "text.norm_eps": "text norm epsilon",
    "text.ids": "text token ids of the probe texts",
    "text.tokenizer": "text tokenizer's vocabulary",
    "text.end_token": "text end token (EOS)",
    "text.end_when_cut": "text end token (EOS) of a text that is cut",
}


@dataclass(frozen=True)
class Fingerprint:
    """A readable record of a model and the hashes that stand for it.

    `record` holds `family`, `dim`, `logit_scale` and `logit_bias`; for `image` and `text` the hash of the
    `weights`, `class`, `head`, `activation`, `pooling`, `attention_heads` and `norm_eps`; for `image` also `size`,
    `channels`, `mean`, `std`, `resize`, `crop`, `crop_rounding`, `filter`, `antialias`, `exif`, `alpha` and
    `mode`; for `text` `tokenizer` (its vocabulary), `ids` (of probe texts), `case`, `context_length`,
    `padding`, `padding_side`, `pad_token`, `attention_mask`, `start_token`, `end_token` and `end_when_cut`.
    All but the class and the vocabulary are measured, so that they mean the same in every library.
    """

    record: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """16 hex characters for the whole model."""
        return json_hash(self.record)

    @property
    def image(self) -> str:
        """16 hex characters for image embeddings alone: they stay valid while only the text tower trains."""
        return self._part("image")

    @property
    def text(self) -> str:
        """16 hex characters for text embeddings alone."""
        return self._part("text")

    def _part(self, part: str) -> str:
        return json_hash({key: self.record.get(key) for key in ("family", "dim", part)})

    def difference(self, other: Fingerprint) -> list[str]:
        """Return one line for every fact that differs, `fact: mine != theirs`; empty for the same model."""
        return [f"{words(key)}: {mine} != {theirs}" for key, mine, theirs in self.changes(other)]

    def changes(self, other: Fingerprint) -> list[tuple[str, Any, Any]]:
        """The same as (key of the record, mine, theirs)."""
        mine, theirs = dict(_flat(self.record)), dict(_flat(other.record))
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return [(k, mine.get(k), theirs.get(k)) for k in keys if mine.get(k) != theirs.get(k)]

    def with_weights(self, hashes: Mapping[Modality, str]) -> Fingerprint:
        """Return it with the hash of each tower's weights."""
        return Fingerprint({**self.record, **{part: {"weights": hashes[part], **self.record[part]} for part in hashes}})

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {"hash": self.hash, **self.record}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fingerprint:
        return cls({key: value for key, value in record.items() if key != "hash"})

    def __str__(self) -> str:
        return self.hash


def full_fingerprint(backend: Backend, processor: Processor) -> Fingerprint:
    """Return the fingerprint of weights and processor together. Reads every weight, see `hash_weights`."""
    return settings_fingerprint(backend, processor).with_weights(hash_towers(backend))


def hash_towers(backend: Backend) -> dict[Modality, str]:
    """Return `hash_weights` of every tower, its head included."""
    state = backend.state_dict()
    return {
        part: hash_weights({name: tensor for name, tensor in state.items() if backend.belongs_to(part, name)})
        for part in MODALITIES
    }


def tower_hash(backend: Backend, processor: Processor, part: Modality = "image") -> str:
    """Return 16 hex characters for a tower's features, before its head: the head may train on."""
    weights = {
        name: tensor for name, tensor in backend.state_dict().items() if backend.belongs_to(part, name, head=False)
    }
    record = settings_fingerprint(backend, processor).record[part]
    return json_hash({"family": backend.family, "weights": hash_weights(weights), part: record})


@one_thread()
def settings_fingerprint(backend: Backend, processor: Processor) -> Fingerprint:
    """Return the fingerprint without the hashes of the weights, by running towers and processor: 0.1 seconds."""
    scale, bias = backend.logit_scale_and_bias()
    described = measure_processor(processor)
    sides = {"image": processor.image_side, "text": processor.text_side}
    parts: dict[Modality, dict[str, Any]] = {"image": described["image"] | _IMAGE_POLICY, "text": described["text"]}
    towers: dict[str, Any] = {
        part: {**measure_towers(backend, part, sides[part]), **inputs} for part, inputs in parts.items()
    }
    return Fingerprint(
        {
            "family": backend.family,
            "dim": backend.dim,
            "logit_scale": _round(scale),
            "logit_bias": None if bias is None else _round(bias),
            **towers,
        }
    )


def measure_processor(processor: Processor) -> dict[Modality, dict[str, Any]]:
    """Return the processor's part of the fingerprint: what its image side and its text side really do."""
    return {"image": measure_transform(processor.image_side), "text": measure_tokenizer(processor.text_side)}


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Return SHA-256 (16 hex characters) over names, types, shapes and bytes, in the order of the names.

    It is computed once for a state of the weights, at about 1 GB a second. XXH3 over every byte, at ten times that
    rate, tells whether this state was hashed before: a step, an edit in place, `load_state_dict`, a merge,
    a cast and new buffers all change it. Neither the identity of tensors nor torch's version counters are trusted: an
    edit through `.data` or NumPy moves neither. XXH3 is not a cryptographic hash: two models that are made on purpose
    so that it cannot tell them apart, and opened in one process, get one fingerprint.
    """
    state = xxh3(weights)
    known = _hashed.get(state)
    if known is None:
        known = sha256(weights)
        if len(_hashed) >= _REMEMBERED:
            _hashed.pop(next(iter(_hashed)), None)  # the oldest
        _hashed[state] = known
    return known


_REMEMBERED = 256  # states: a training that is measured at every step must not grow
_hashed: dict[bytes, str] = {}  # by XXH3, for all models of this process


def sha256(weights: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over the weights, the slow hash, which goes into files."""
    digest = hashlib.sha256()
    for part in _bytes(weights):
        digest.update(part)
    return digest.hexdigest()[:16]


def xxh3(weights: Mapping[str, Tensor]) -> bytes:
    """Return XXH3 over the weights, the fast hash, which is kept in memory alone."""
    digest = xxhash.xxh3_128()
    for part in _bytes(weights):
        digest.update(part)
    return digest.digest()


def _bytes(weights: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _round(scalar: Tensor) -> float:
    return round(float(scalar.detach().float().reshape(())), 6)  # fp32 at ln 100 is spaced by 5e-7


def words(key: str) -> str:
    """Return a key of a record in words: `image.filter` is the image resize filter."""
    return _WORDS.get(key, key.replace(".", " ").replace("_", " "))


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
