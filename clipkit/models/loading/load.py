"""The one place that resolves a model's name to a backend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from clipkit.errors import ModelError, UsageError
from clipkit.files import read_json
from clipkit.models.backend import Backend
from clipkit.models.fingerprint.fingerprint import settings_fingerprint
from clipkit.models.fingerprint.golden import golden_embeddings
from clipkit.models.loading import manifest
from clipkit.models.loading.hub import download, find_folder
from clipkit.models.loading.proof import Proof, Verify
from clipkit.models.processor import Processor

Opened = tuple[Backend, Processor, dict[str, Any] | None, Path | None]
OPEN_CLIP, HUB = "open_clip:", "hf-hub:"


def open_model(name: str | os.PathLike[str], revision: str | None, trust_remote_code: bool) -> Opened:
    """The backend, its processor, and for a folder what its clipkit.json promises, of which nothing is checked."""
    text = os.fspath(name)
    folder, rest, as_open_clip = _locate(text, revision)
    if folder is None:
        return *_open_by_name(rest, trust_remote_code), None, None
    body = read_json(folder / manifest.NAME) if (folder / manifest.NAME).is_file() else None
    return *_open_folder(folder, text, body, as_open_clip, trust_remote_code), body, folder


def open_checked(
    name: str | os.PathLike[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    verify: Verify = "once",
) -> tuple[Backend, Processor, dict[str, Any] | None]:
    """The backend in eval mode, its processor and clipkit.json, to which both have been held; None without one.

    Args:
        name, revision, trust_remote_code, verify: as in `DualEncoder.from_pretrained`.

    Raises:
        ModelError, CorruptArtefact: as `DualEncoder.from_pretrained`.
    """
    if verify not in get_args(Verify):
        raise UsageError(f"verify is one of {', '.join(get_args(Verify))}; found {verify!r}")
    text = os.fspath(name)
    folder, rest, as_open_clip = _locate(text, revision)
    if folder is None:
        backend, processor = _open_by_name(rest, trust_remote_code)
        return backend.eval(), processor, None
    body = manifest.read(folder)
    if body is None:
        backend, processor = _open_folder(folder, text, None, as_open_clip, trust_remote_code)
        return backend.eval(), processor, None
    with manifest.verified_files(folder, body, "sha256" if verify == "always" else "xxh3"):
        backend, processor = _open_folder(folder, text, body, as_open_clip, trust_remote_code)
    backend.eval()
    proof = Proof(body)
    if "golden" in body and verify != "files" and (verify == "always" or not proof.is_known()):
        rows = manifest.golden_rows(body)
        golden = golden_embeddings(backend, processor, rows)
        manifest.check(body, folder, settings_fingerprint(backend, processor), golden, rows)
        proof.remember()
    return backend, processor, body


def open_written(folder: Path, form: str, settings: Mapping[str, Any]) -> tuple[Backend, Processor]:
    """Open a folder that is being saved, before its clipkit.json is written; nothing is checked.

    Args:
        folder: of the model.
        form, settings: as clipkit.json is going to have them.
    """
    body = {"form": form, "settings": dict(settings)}
    backend, processor = _open_folder(folder, str(folder), body, form == "open_clip", trust=False)
    return backend.eval(), processor


def _locate(text: str, revision: str | None) -> tuple[Path | None, str, bool]:
    """The folder, what follows `open_clip:`, and whether that stood before it; no folder for open_clip's own names."""
    rest = text.removeprefix(OPEN_CLIP)
    as_open_clip = rest != text
    if as_open_clip and not rest.startswith(HUB) and not Path(rest).expanduser().is_dir():
        return None, rest, True
    return _find(rest, revision, as_open_clip), rest, as_open_clip


def _open_by_name(name: str, trust: bool) -> tuple[Backend, Processor]:
    from clipkit.models.loading.open_clip import open_by_name

    return open_by_name(name, trust)


def _find(name: str, revision: str | None, as_open_clip: bool) -> Path:
    if as_open_clip and name.startswith(HUB):
        return download(name.removeprefix(HUB), revision, "open_clip")
    folder = find_folder(name, revision=revision)
    if not Path(name).expanduser().is_dir() and _only_open_clip(folder):
        return download(name, revision, "open_clip")  # its weights were left aside
    return folder


def _open_folder(
    folder: Path, name: str, body: dict[str, Any] | None, as_open_clip: bool, trust: bool
) -> tuple[Backend, Processor]:
    if body is not None and body["form"] == "towers":
        from clipkit.models.loading.joined_towers import open_towers

        return open_towers(folder, body["settings"], trust)
    if (folder / "heads.safetensors").is_file() and not (folder / "config.json").is_file():
        raise ModelError("towers joined by clipkit, but clipkit.json is missing", where=folder)
    if as_open_clip or _only_open_clip(folder):
        from clipkit.models.loading.open_clip import open_folder

        return open_folder(folder, name, trust)
    if _is_vtde(folder):
        from clipkit.models.loading.joined_towers import open_vtde

        return open_vtde(folder, None if body is None else body["settings"], trust)
    from clipkit.models.loading import transformers as native

    return native.open_folder(folder, trust)


def _only_open_clip(folder: Path) -> bool:
    return (folder / "open_clip_config.json").is_file() and not (folder / "config.json").is_file()


def _is_vtde(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "vision-text-dual-encoder"


def from_config(
    config: Any, processor: Any, device: Any, revision: str | None, trust_remote_code: bool
) -> tuple[Backend, Processor]:
    """What `DualEncoder.from_config` documents: the parts of a model whose weights are random."""
    import torch

    from clipkit.models.loading import transformers as native

    if not isinstance(config, str | os.PathLike):
        with torch.device(device):
            return native.from_config(config, processor)
    text = os.fspath(config)
    if text.startswith(OPEN_CLIP):
        from clipkit.models.loading import open_clip as open_openclip

        rest = text.removeprefix(OPEN_CLIP)
        rest = str(_find(rest, revision, True)) if rest.startswith(HUB) else rest
        return open_openclip.from_config(rest, device, trust_remote_code)
    folder = find_folder(text, revision=revision)
    with torch.device(device):
        return native.open_folder(folder, trust_remote_code, fresh=True)
