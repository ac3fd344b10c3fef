"""The one place that resolves a model's name to a backend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clipkit.errors import ModelError
from clipkit.models import artefact
from clipkit.models.backend import Backend
from clipkit.models.names import find_folder
from clipkit.models.processor import Processor

Opened = tuple[Backend, Processor, dict[str, Any] | None, Path | None]


def open_model(
    name: str | os.PathLike[str], revision: str | None, trust_remote_code: bool, *, check: bool = True
) -> Opened:
    """The backend, its processor, and for a local folder what its clipkit.json promises.

    `check=False` opens what it can of a damaged folder, for the doctor.
    """
    text = os.fspath(name)
    if text.startswith("open_clip:"):
        rest = text.removeprefix("open_clip:")
        folder = Path(rest).expanduser()
        if not folder.is_dir():
            from clipkit.models.openclip import open_by_name

            return *open_by_name(rest), None, None
    else:
        folder = find_folder(text, revision=revision)
        if not Path(text).expanduser().is_dir() and _only_open_clip(folder):
            if revision is not None:
                raise ModelError("open_clip opens a hub model at its newest revision only", where=text)
            from clipkit.models.openclip import open_by_name

            return *open_by_name(f"hf-hub:{text}"), None, None
    body = artefact.read(folder, check=check)
    return *_open_folder(folder, body, text.startswith("open_clip:"), trust_remote_code), body, folder


def _open_folder(
    folder: Path, body: dict[str, Any] | None, as_open_clip: bool, trust: bool
) -> tuple[Backend, Processor]:
    if body is not None and body["form"] == "towers":
        from clipkit.models.towers import open_towers

        return open_towers(folder, body["settings"])
    if (folder / "heads.safetensors").is_file() and not (folder / "config.json").is_file():
        raise ModelError("towers joined by clipkit, but clipkit.json is missing", where=folder)
    if as_open_clip or _only_open_clip(folder):
        from clipkit.models.openclip import open_folder

        return open_folder(folder)
    from clipkit.models import hf

    return hf.open_folder(folder, trust)


def _only_open_clip(folder: Path) -> bool:
    return (folder / "open_clip_config.json").is_file() and not (folder / "config.json").is_file()
