"""clipkit.json: what a saved model folder promises, and the check at load that it still holds.

It lists the size and two hashes of every file, the fingerprint, the logit scale and bias, and golden
embeddings: what the model gave for four built-in images and texts. So bit rot is found in the files,
a changed library, transform or activation in the embeddings, and the fingerprint names it.

XXH3 finds every accident, at the speed of memory, and is checked at each opening. SHA-256 also finds what someone
changed on purpose, who did not change clipkit.json with it; it is checked with ``verify="always"`` and by
`clipkit check model`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.extras import upgrade_command
from clipkit.files import FileHash, dump_json, file_damage, read_json
from clipkit.modality import MODALITIES, Modality
from clipkit.models.fingerprint.fingerprint import Fingerprint, words
from clipkit.models.fingerprint.golden import FEW, GOLDEN_TEXTS, GoldenEmbeddings

logger = logging.getLogger(__name__)
NAME = "clipkit.json"
CARD = "README.md"  # the model card: people edit it by hand, and no library reads a model from it
SCHEMA = 2  # 2: the fingerprint is measured
_LARGE = 2**24  # bytes: hashed beside the opening
TOLERANCE = 1e-4  # of any component; other CPUs and thread counts move fp32 by some 1e-6


def write(
    folder: Path,
    *,
    form: str,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    golden: GoldenEmbeddings | None = None,
) -> dict[str, Any]:
    """Write clipkit.json into a folder whose other files are all there, and return its content.

    Args:
        folder: of the model.
        form, settings, about: what else is written.
        files: sizes and hashes of the others (`list_files`).
        golden: golden embeddings of the rows `FEW`; None where a later save follows, which has them.
    """
    body = {"schema": SCHEMA, "form": form, **about, "settings": dict(settings), "files": dict(files)}
    if golden is not None:
        body["golden_rows"] = {side: list(FEW[side]) for side in golden}
        body["golden"] = {side: _pack(vectors) for side, vectors in golden.items()}
    body["sha256"] = _own_hash(body)
    (folder / NAME).write_text(dump_json(body), encoding="utf-8")
    return body


def golden_rows(body: Mapping[str, Any]) -> dict[Modality, Sequence[int]]:
    """Of which built-in images and texts clipkit.json holds the embeddings."""
    every = range(len(GOLDEN_TEXTS))
    return {side: body.get("golden_rows", {}).get(side, every) for side in MODALITIES}


@dataclass(frozen=True)
class Damage:
    """One file of a saved folder that is not what was saved."""

    path: Path
    message: str
    prose: bool = False  # the model card, which does not change the model

    def error(self) -> CorruptArtefact:
        return CorruptArtefact(self.message, where=self.path, fix=_AGAIN)


def damages(folder: Path, kind: FileHash = "sha256") -> Iterator[Damage]:
    """Every file that is missing or differs from what was saved, clipkit.json included. Opens no model."""
    path = folder / NAME
    if not path.is_file():
        return
    try:
        body = read_json(path)
    except CorruptArtefact as error:
        yield Damage(path, error.message)
        return
    if not _is_intact(body, path):
        yield Damage(path, "its content is not what was saved")
    for name, expected in _files(body):
        damage = file_damage(folder / name, expected, kind, "model")
        if damage is not None:
            yield Damage(folder / name, damage, prose=name == CARD)


def _is_intact(body: Mapping[str, Any], path: Path) -> bool:
    # byte by byte: JSON of other spelling (1E-5, no last newline) would read the same
    return body.get("sha256") == _own_hash(body) and path.read_bytes() == dump_json(body).encode()


def read(folder: Path) -> dict[str, Any] | None:
    """clipkit.json, not yet compared with the folder's files; None where clipkit did not write the folder.

    Raises:
        CorruptArtefact: it is not what was saved.
        ModelError: a newer or an older clipkit wrote the folder.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    body = read_json(path)
    if not _is_intact(body, path):
        raise Damage(path, "its content is not what was saved").error()
    _check_schema(body.get("schema"), path)
    return body


@contextlib.contextmanager
def verified_files(folder: Path, body: Mapping[str, Any], kind: FileHash) -> Iterator[None]:
    """Compare a folder's files with clipkit.json: small ones at once, large ones in a thread beside the block.

    So weights are hashed while they are loaded, and compared before the block's result can be used.

    Raises:
        CorruptArtefact: a file is missing or differs from what was saved; it is named, also where the block fails of
            it. Of the model card a line in the log says so: it is meant to be edited.
    """
    listed = _files(body)
    large = [(name, expected) for name, expected in listed if int(expected.get("size") or 0) > _LARGE]
    for name, expected in listed:
        if (name, expected) not in large:
            _require_intact(folder / name, expected, kind)
    with ThreadPoolExecutor(max_workers=1) as thread:
        checks = [thread.submit(file_damage, folder / name, expected, kind, "model") for name, expected in large]
        try:
            yield
        finally:
            for (name, _), check in zip(large, checks, strict=True):
                damage = check.result()
                if damage is not None:
                    raise Damage(folder / name, damage).error()


def _require_intact(path: Path, expected: Mapping[str, Any], kind: FileHash) -> None:
    message = file_damage(path, expected, kind, "model")
    if message is None:
        return
    if path.name != CARD:
        raise Damage(path, message).error()
    logger.warning("%s: %s; the model itself is the one that was saved", path, message)


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
    entries = files.items() if isinstance(files, dict) else ()
    return [(name, entry) for name, entry in entries if isinstance(entry, dict)]


def check(
    body: Mapping[str, Any],
    folder: Path,
    now: Fingerprint,
    golden: GoldenEmbeddings,
    rows: Mapping[Modality, Sequence[int]] | None = None,
) -> None:
    """Refuse a model that is no longer the one that was saved, and name what changed.

    Args:
        body: of clipkit.json.
        folder: for messages.
        now: the facts of the model as it opened (`fingerprint.facts`).
        found: its golden embeddings.
        rows: which of the built-in images and texts they are of; None: all.

    Raises:
        CorruptArtefact: a fact or an embedding differs.
    """
    changed = changed_facts(body, now)
    worst = golden_differences(body, golden, rows)
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


def golden_differences(
    body: Mapping[str, Any], golden: GoldenEmbeddings, rows: Mapping[Modality, Sequence[int]] | None = None
) -> dict[str, float]:
    """Largest difference of any component for each side; infinite for another shape or NaN."""
    worst: dict[str, float] = {}
    stored_rows = golden_rows(body)
    for side, vectors in golden.items():
        expected = _unpack(body["golden"][side]).reshape(len(stored_rows[side]), -1)
        if expected.shape[1] != vectors.shape[1]:
            worst[side] = math.inf
            continue
        stored = dict(zip(stored_rows[side], expected, strict=True))
        computed = dict(zip(range(len(vectors)) if rows is None else rows[side], vectors, strict=True))
        largest = max(float((stored[row] - computed[row]).abs().max()) for row in stored if row in computed)
        worst[side] = math.inf if math.isnan(largest) else largest
    return worst


def _own_hash(body: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _pack(vectors: Tensor) -> str:
    return base64.b64encode(vectors.numpy().astype("<f4").tobytes()).decode()


def _unpack(packed: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(packed), dtype="<f4").astype(np.float32))
