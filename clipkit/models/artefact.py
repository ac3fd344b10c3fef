"""clipkit.json: what a saved model folder promises, and the check at load that it still holds.

It lists the size and SHA-256 of every file, the fingerprint, the logit scale and bias, and golden
embeddings: what the model gave for four built-in images and texts. So bit rot is found in the files,
and a changed library, transform or activation in the embeddings.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.files import dump_json, sha256_file
from clipkit.models.weights import read_json

NAME = "clipkit.json"
SCHEMA = 1
TOLERANCE = 1e-4  # of any component; other CPUs and thread counts move fp32 by some 1e-6

GOLDEN_TEXTS = (
    "a photo of a cat",
    "Two DOGS, running on a Beach!",
    "latin small letter e with acute",
    "one sentence that goes on and on, " * 20 + "and ends",  # longer than any context in use
)


def golden_images() -> list[Image.Image]:
    """Four images drawn with integers alone: a ramp, stripes, a disc, noise; square, wide and tall, odd sides."""
    sizes = ((64, 64), (97, 61), (53, 89), (301, 223))
    images = []
    for kind, (width, height) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width]
        red, green = (x * 255 // width, y * 255 // height) if kind != 1 else ((x // 5 % 2) * 255, (y // 7 % 2) * 255)
        blue = (x * 7919 + y * 104729 + x * y * 31) % 256 if kind == 3 else (x + y) % 256
        if kind == 2:
            blue = ((x - width // 2) ** 2 + (y - height // 2) ** 2 < 400) * 255
        images.append(Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8)))
    return images


def write(folder: Path, *, form: str, settings: Mapping[str, Any], about: Mapping[str, Any], golden: Goldens) -> None:
    """Write clipkit.json into a folder whose other files are all there."""
    files = {
        str(path.relative_to(folder).as_posix()): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    body = {"schema": SCHEMA, "form": form, **about, "settings": dict(settings), "files": files}
    body["golden"] = {side: _pack(vectors) for side, vectors in golden.items()}
    body["sha256"] = _own_hash(body)
    (folder / NAME).write_text(dump_json(body), encoding="utf-8")


Goldens = dict[str, Tensor]


def read(folder: Path) -> dict[str, Any] | None:
    """clipkit.json after its files have been checked; None where clipkit did not write the folder.

    Raises:
        CorruptArtefact: a file is missing or differs from what was saved; it is named.
        ModelError: a newer clipkit wrote the folder.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    body = read_json(path)
    if body.get("schema", 0) > SCHEMA:
        message = f"written by a newer clipkit (schema {body['schema']}, known up to {SCHEMA})"
        raise ModelError(message, where=path, fix="pip install -U clipkit")
    if body.get("sha256") != _own_hash(body):
        raise CorruptArtefact("its content is not what was saved", where=path, fix=_AGAIN)
    for name, expected in body["files"].items():
        _check_file(folder / name, expected)
    return body


_AGAIN = "copy or download the model again"


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CorruptArtefact("a file of the model is missing", where=path, fix=_AGAIN)
    if path.stat().st_size != expected["size"]:
        found = f"{path.stat().st_size} bytes instead of {expected['size']}"
        raise CorruptArtefact(f"a file of the model has {found}", where=path, fix=_AGAIN)
    if sha256_file(path) != expected["sha256"]:
        raise CorruptArtefact("a file of the model is not what was saved (its SHA-256 differs)", where=path, fix=_AGAIN)


def check_golden(body: Mapping[str, Any], found: Goldens, folder: Path) -> None:
    """Refuse a model that no longer gives the embeddings it gave when it was saved."""
    for side, packed in body["golden"].items():
        expected = _unpack(packed, found[side].shape[1])
        if expected.shape != found[side].shape:
            raise CorruptArtefact(f"{side} embeddings have another shape than when it was saved", where=folder)
        worst = float((expected - found[side]).abs().max())
        if not worst <= TOLERANCE:
            message = f"{side} embeddings differ by {worst:.2g} from those it gave when it was saved"
            fix = "install the versions of torch, transformers or open_clip it was saved with, or save it anew"
            raise CorruptArtefact(message, where=folder, fix=fix)


def _own_hash(body: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _pack(vectors: Tensor) -> str:
    return base64.b64encode(vectors.numpy().astype("<f4").tobytes()).decode()


def _unpack(packed: str, dim: int) -> Tensor:
    values = np.frombuffer(base64.b64decode(packed), dtype="<f4").astype(np.float32)
    return torch.from_numpy(values.copy()).reshape(-1, dim)
