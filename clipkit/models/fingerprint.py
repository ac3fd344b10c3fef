"""One name for everything that decides about a model's embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clipkit.models.backend import Backend, Part
    from clipkit.models.processor import Processor

# What load_image does to every image before a transform sees it.
_IMAGE_POLICY = {"exif": "applied", "alpha": "over white", "mode": "RGB"}


@dataclass(frozen=True)
class Fingerprint:
    """A readable record of a model and the hashes that stand for it.

    `record` holds `family`, `dim`, `logit_scale`, `logit_bias`, and for `image` and `text` the hash of
    the weights beside the transform, the tokenizer, the activation and the pooling.
    """

    record: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """16 hex characters for the whole model."""
        return _hash(self.record)

    @property
    def image(self) -> str:
        """16 hex characters for image embeddings alone: they stay valid while only the text tower trains."""
        return self._part("image")

    @property
    def text(self) -> str:
        """16 hex characters for text embeddings alone."""
        return self._part("text")

    def _part(self, part: str) -> str:
        return _hash({key: self.record.get(key) for key in ("family", "dim", part)})

    def difference(self, other: Fingerprint) -> list[str]:
        """One line for each thing in which two models differ; empty for the same model."""
        mine, theirs = dict(_flat(self.record)), dict(_flat(other.record))
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return [f"{k}: {mine.get(k)} != {theirs.get(k)}" for k in keys if mine.get(k) != theirs.get(k)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {"hash": self.hash, **self.record}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Fingerprint:
        return cls({key: value for key, value in found.items() if key != "hash"})

    def __str__(self) -> str:
        return self.hash


def take(backend: Backend, processor: Processor) -> Fingerprint:
    """The fingerprint of weights and processor together. Reads every weight: about 1 GB a second."""
    scale, bias = backend.scalars()
    described = processor.describe()
    described["image"] |= _IMAGE_POLICY
    return Fingerprint(
        {
            "family": backend.family,
            "dim": backend.dim,
            "logit_scale": _round(scale),
            "logit_bias": None if bias is None else _round(bias),
            "image": _describe(backend, "image", described["image"]),
            "text": _describe(backend, "text", described["text"]),
        }
    )


def tower_hash(backend: Backend, processor: Processor) -> str:
    """16 hex characters for the image tower's features, before its head: the head may train on."""
    weights = {n: each for n, each in backend.state_dict().items() if backend.owns("image", n, head=False)}
    about = {**backend.describe("image"), **processor.describe()["image"], **_IMAGE_POLICY}
    return _hash({"family": backend.family, "weights": hash_weights(weights), "image": about})


def _describe(backend: Backend, part: Part, processing: dict[str, Any]) -> dict[str, Any]:
    weights = {name: tensor for name, tensor in backend.state_dict().items() if backend.owns(part, name)}
    return {"weights": hash_weights(weights), **backend.describe(part), **processing}


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (16 hex characters) over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _round(scalar: Tensor) -> float:
    return round(float(scalar.detach().float().reshape(())), 6)  # fp32 at ln 100 is spaced by 5e-7


def _hash(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
