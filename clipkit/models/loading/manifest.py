"""clipkit.json: what a saved model folder promises, and the check at load that it still holds.

It lists the size and SHA-256 of every file, the fingerprint, the logit scale and bias, and golden
embeddings: what the model gave for four built-in images and texts. So bit rot is found in the files,
a changed library, transform or activation in the embeddings, and the fingerprint names it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.extras import upgrade_command
from clipkit.files import dump_json, read_json, sha256_file
from clipkit.models.fingerprint.fingerprint import Fingerprint, words
from clipkit.models.fingerprint.golden import GoldenEmbeddings

logger = logging.getLogger(__name__)


NAME = "clipkit.json"


CARD = "README.md"  # the model card: people edit it by hand, and no library reads a model from it


SCHEMA = 2  # 2: the fingerprint is measured


TOLERANCE = 1e-4  # of any component; other CPUs and thread counts move fp32 by some 1e-6


def write(
    folder: Path, *, form: str, settings: Mapping[str, Any], about: Mapping[str, Any], golden: GoldenEmbeddings
) -> None:
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


@dataclass(frozen=True)
class Damage:
    """One file of a saved folder that is not what was saved."""

    path: Path
    message: str
    prose: bool = False  # the model card, which does not change the model

    def error(self) -> CorruptArtefact:
        return CorruptArtefact(self.message, where=self.path, fix=_AGAIN)


def damages(folder: Path) -> Iterator[Damage]:
    """Every file that is missing or differs from what was saved, clipkit.json included. Opens no model."""
    path = folder / NAME
    if not path.is_file():
        return
    try:
        body = read_json(path)
    except CorruptArtefact as error:
        yield Damage(path, error.message)
        return
    # byte by byte: JSON of other spelling (1E-5, no last newline) would read the same
    if body.get("sha256") != _own_hash(body) or path.read_bytes() != dump_json(body).encode():
        yield Damage(path, "its content is not what was saved")
    for name, expected in _files(body):
        if message := _damage(folder / name, expected):
            yield Damage(folder / name, message, prose=name == CARD)


def read(folder: Path, *, check: bool = True) -> dict[str, Any] | None:
    """clipkit.json after its files have been checked; None where clipkit did not write the folder.

    Args:
        folder: of the model.
        check: False reads what is there, for the doctor.

    Raises:
        CorruptArtefact: a file is missing or differs from what was saved; it is named. Of the model card a line
            in the log says so: it is meant to be edited.
        ModelError: a newer or an older clipkit wrote the folder.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    body = read_json(path)
    if not check:
        return body
    for damage in damages(folder):
        if not damage.prose:
            raise damage.error()
        logger.warning("%s: %s; the model itself is the one that was saved", damage.path, damage.message)
    _check_schema(body.get("schema"), path)
    return body


def _check_schema(schema: Any, path: Path) -> None:
    if isinstance(schema, int) and schema > SCHEMA:
        message = f"written by a newer clipkit (schema {schema}, known up to {SCHEMA})"
        raise ModelError(message, where=path, fix=upgrade_command())
    if schema != SCHEMA:
        message = f"written by an older clipkit (schema {schema}, expected {SCHEMA})"
        raise ModelError(message, where=path, fix="save the model again from where it came")


_AGAIN = "copy or download the model again"


def _files(body: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    files = body.get("files")
    found = files.items() if isinstance(files, dict) else ()
    return [(name, each) for name, each in found if isinstance(each, dict)]


def _damage(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "a file of the model is missing"
    size = path.stat().st_size
    if size != expected.get("size"):
        return f"a file of the model has {size} bytes instead of {expected.get('size')}"
    if sha256_file(path) != expected.get("sha256"):
        return "a file of the model is not what was saved (its SHA-256 differs)"
    return None


def check(body: Mapping[str, Any], folder: Path, now: Fingerprint, found: GoldenEmbeddings) -> None:
    """Refuse a model that is no longer the one that was saved, and name what changed.

    Args:
        body: of clipkit.json.
        folder: for messages.
        now: the facts of the model as it opened (`fingerprint.facts`).
        found: its golden embeddings.

    Raises:
        CorruptArtefact: a fact or an embedding differs.
    """
    changed = changed_facts(body, now)
    worst = golden_differences(body, found)
    if not changed and max(worst.values()) <= TOLERANCE:
        return
    apart = ", ".join(f"{side} embeddings differ by {value:.2g}" for side, value in worst.items() if value > TOLERANCE)
    listed = "; ".join(changed) or "every recorded fact is the same, so the weights or a library's arithmetic changed"
    message = f"this is not the model that was saved: {apart or 'embeddings fit, but'} ({listed})"
    fix = (
        "install the versions of torch, transformers or open_clip it was saved with, undo the change, or save it "
        f"anew; clipkit check model {folder} tells more"
    )
    raise CorruptArtefact(message, where=folder, fix=fix)


def changed_facts(body: Mapping[str, Any], now: Fingerprint) -> list[str]:
    """Facts of the stored fingerprint that are others now, weights and class names left out, in words."""
    saved = Fingerprint.from_dict(body["fingerprint"])
    ignored = (".weights", ".class")  # sha256 answers for the weights; libraries may rename their classes
    return [
        f"{words(key)} was {before} and is {after}"
        for key, before, after in saved.changes(now)
        if not key.endswith(ignored)
    ]


def golden_differences(body: Mapping[str, Any], found: GoldenEmbeddings) -> dict[str, float]:
    """Largest difference of any component for each side; infinite for another shape or NaN."""
    worst = {}
    for side, vectors in found.items():
        expected = _unpack(body["golden"][side])
        same = expected.numel() == vectors.numel()
        largest = float((expected.view_as(vectors) - vectors).abs().max()) if same else math.inf
        worst[side] = math.inf if math.isnan(largest) else largest
    return worst


def _own_hash(body: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _pack(vectors: Tensor) -> str:
    return base64.b64encode(vectors.numpy().astype("<f4").tobytes()).decode()


def _unpack(packed: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(packed), dtype="<f4").astype(np.float32))
