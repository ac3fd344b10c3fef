"""A model's name to the folder that holds its files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from clipkit.errors import ModelError

# Weights in other formats, and other libraries' copies of the same weights.
_NOT_NEEDED = [
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "open_clip_*.safetensors",
    "onnx/*",
]

# For hints where the cache is empty.
_WELL_KNOWN = (
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "google/siglip-base-patch16-224",
    "google/siglip-so400m-patch14-384",
    "google/siglip2-base-patch16-224",
    "google/siglip2-so400m-patch14-384",
)


def near(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest matches, or nothing: " Did you mean a, b?"."""
    names = sorted(set(known))
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    return f" Did you mean {', '.join(close)}?" if close else ""


def find_folder(name: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The folder of a local or hub model. A local folder never touches the network.

    Raises:
        ModelError: no such folder, no such repository, or it is not in the cache and there is no network.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    text = os.fspath(name)
    if folder.exists():
        fix = "pass the folder that holds config.json"
        raise ModelError("a model is a folder, not a single file", where=text, fix=fix)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text:
        siblings = [str(path) for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        kinds = "a folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER"
        raise ModelError(f"no such model folder.{near(text, siblings)}", where=text, fix=f"a model's name is {kinds}")
    return _download(text, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=_NOT_NEEDED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        here = ", ".join(cached_models()[:10]) or "none"
        message = f"the hub cannot be reached, and this model is not in the cache (cached: {here}).{_near_known(name)}"
        raise ModelError(message, where=name, fix="check the name; unset HF_HUB_OFFLINE, or pass a folder") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        message = f"the hub has no such model, or does not let you have it.{_near_known(name)}"
        raise ModelError(message, where=name, fix="check the name and revision, or log in for a gated model") from error


def _near_known(name: str) -> str:
    return near(name, [*cached_models(), *_WELL_KNOWN])


def cached_models() -> list[str]:
    """Names of the hub models that are already on this machine."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
