"""What the doctor sees of a model's folder without opening the model: its files, and the weights in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipkit.errors import ClipkitError
from clipkit.extras import upgrade_command
from clipkit.files import read_json
from clipkit.models.checks.finding import Finding
from clipkit.models.loading import manifest

_PREFIXES = ("module.", "_orig_mod.")
_READ_BY_LIBRARIES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".bin")


def damaged(folder: Path) -> dict[str, str]:
    """Return the files that are missing or not what was saved, the card aside: name -> a sentence about it."""
    sentences = {}
    for damage in manifest.damages(folder):
        name = damage.path.relative_to(folder).as_posix()
        short = damage.message.removeprefix("a file of the model ")
        if not damage.prose:
            sentences[name] = f"{name}: {short}" if short == damage.message else f"{name} {short}"
    return sentences


def file_findings(folder: Path) -> Iterator[Finding]:
    sentences = damaged(folder)
    if sentences:
        several = len(sentences) > 1
        reason = f"{'they were' if several else 'it was'} damaged, cut or edited after the model was saved"
        what = "; ".join(sentences.values())
        fix = f"copy or download {'these files' if several else 'that file'} again"
        yield Finding("error", "files", what, reason, fix)
    if any(damage.prose for damage in manifest.damages(folder)):
        what = f"{manifest.CARD} was edited"
        yield Finding("warning", "files", what, "it does not change the model", "nothing to do")
    body = recorded(folder)
    if body is None:
        return
    if body.get("schema") != manifest.SCHEMA:
        what = f"{manifest.NAME} has schema {body.get('schema')}, expected {manifest.SCHEMA}"
        yield Finding(
            "error",
            "files",
            what,
            "another version of clipkit wrote it",
            f"{upgrade_command()}, or save the model again",
        )
    listed = set(body.get("files") or ())
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _READ_BY_LIBRARIES and path.name not in {*listed, manifest.NAME}:
            what = f"{path.name} was not there when the model was saved"
            yield Finding("warning", "files", what, "libraries may read it in place of another file", "remove it")


def recorded(folder: Path) -> dict[str, Any] | None:
    path = folder / manifest.NAME
    try:
        return read_json(path) if path.is_file() else None
    except ClipkitError:
        return None  # reported as damage


def weight_findings(folder: Path) -> Iterator[Finding]:
    """Check weight files without building the model; damage that clipkit.json shows is left out."""
    named = damaged(folder)
    for path in sorted(path for path in folder.rglob("*.safetensors") if path.name[0] != "."):
        name = path.relative_to(folder).as_posix()
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
                bad = [key for key in keys if not _finite(file.get_tensor(key))]
        except (SafetensorError, OSError) as error:
            if name in named:
                continue
            yield Finding(
                "error",
                "weights",
                f"{name} cannot be read: {error}",
                "the file was cut or damaged",
                "copy or download it again",
            )
            continue
        if bad:
            what = f"{name}: {len(bad)} of {len(keys)} weights with NaN or infinity, the first is {bad[0]}"
            yield Finding("error", "weights", what, "every embedding becomes NaN", "use an earlier checkpoint")
        prefix = _common_prefix(keys)
        if prefix is not None:
            what = f"{name}: every name begins with {prefix!r}, the mark of a wrapper"
            reason = "libraries find no weight by its name, and transformers then opens a random model"
            yield Finding("error", "weights", what, reason, "save the model inside the wrapper (model.module)")


def _common_prefix(keys: list[str]) -> str | None:
    for prefix in _PREFIXES:
        if keys and all(key.startswith(prefix) for key in keys):
            return prefix
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
