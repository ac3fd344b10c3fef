"""A model's name to the folder that holds its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from clipkit.errors import ModelError
from clipkit.models.loading.layouts import tower_folder
from clipkit.suggest import closest, near

Library = Literal["transformers", "open_clip"]
_OTHER_FORMATS = ("*.msgpack", "*.h5", "*.onnx", "*.ckpt", "*.gguf", "onnx/*")
_PICKLES = ("*.bin", "*.pt", "*.pth")


# The weights that a library opens first, the other's copies of the same, and what it opens where the first are missing.
_WEIGHTS: dict[Library, tuple[str, str, tuple[str, ...]]] = {
    "transformers": ("*.safetensors", "open_clip_*.safetensors", ("pytorch_model*",)),
    "open_clip": ("open_clip_*.safetensors", "model*.safetensors", ("open_clip_*", *_PICKLES, "model.safetensors")),
}


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


def near_folders(name: str) -> str:
    """A hint that names folders whose path differs in one part, or nothing: " Did you mean runs/birds/model?"."""
    wanted = Path(name).expanduser()
    # from the first part that is missing: what stands below it may be spelt rightly
    missing = next((part for part in (*reversed(wanted.parents), wanted) if not part.is_dir()), wanted)
    if not missing.parent.is_dir():
        return ""
    names = [path.name for path in missing.parent.iterdir() if path.is_dir()]
    close = closest(missing.name, names, count=3)
    candidates = [missing.parent / name / wanted.relative_to(missing) for name in close]
    candidates = [path for path in candidates if path.is_dir()] or [missing.parent / name for name in close]
    return f" Did you mean {', '.join(str(path) for path in candidates)}?" if candidates else ""


def find_folder(name: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The folder that holds a local or hub model's config. A local folder never touches the network.

    Of a run, and of an older model of sentence-transformers, that is a folder within the one that is named
    (`model_of_run`, `tower_folder`).

    Raises:
        ModelError: no such folder, no such repository, or it is not in the cache and there is no network.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return tower_folder(model_of_run(folder))
    text = os.fspath(name)
    if folder.exists():
        fix = "pass the folder that holds config.json"
        raise ModelError("a model is a folder, not a single file", where=text, fix=fix)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text:
        raise _no_folder(text)
    try:
        return tower_folder(download(text, revision))
    except ModelError as error:
        if folder.parent.is_dir():  # runs/birds looks like org/name
            raise _no_folder(text) from error
        raise


def model_of_run(folder: Path) -> Path:
    """The folder itself; of a run, which is not a model but holds one, its `model` folder."""
    inner = folder / "model"
    if any((folder / name).is_file() for name in ("config.json", "clipkit.json")):
        return folder
    return inner if (folder / "config.yaml").is_file() and (inner / "clipkit.json").is_file() else folder


def _no_folder(name: str) -> ModelError:
    parent = Path(name).expanduser().parent
    hint = near_folders(name)
    if not hint and parent.is_dir() and (there := sorted(path.name for path in parent.iterdir() if path.is_dir())):
        hint = f" In {parent} there are {', '.join(there[:10])}."
    fix = None if hint else "a model's name is a folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER"
    return ModelError(f"no such model folder.{hint}", where=name, fix=fix)


def download(name: str, revision: str | None, library: Library = "transformers") -> Path:
    """The hub model `org/name` in the cache, fetched if there is a network. Pickles only where it has no safetensors.

    Raises:
        ModelError: no such repository, or it is not in the cache and there is no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    first, foreign, otherwise = _WEIGHTS[library]
    try:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=[*_OTHER_FORMATS, *_PICKLES, foreign]))
        other_library = library == "transformers" and not (folder / "config.json").is_file()
        if not other_library and not any(folder.glob(first)):
            snapshot_download(name, revision=revision, allow_patterns=list(otherwise))
        return folder
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        here = ", ".join(cached_models()[:10]) or "none"
        message = f"the hub cannot be reached, and this model is not in the cache (cached: {here}).{_near_known(name)}"
        raise ModelError(message, where=name, fix="check the name; unset HF_HUB_OFFLINE, or pass a folder") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        message = f"the hub has no such model, or does not let you have it.{_near_known(name)}"
        raise ModelError(message, where=name, fix="check the name and revision, or log in for a gated model") from error


def _near_known(name: str) -> str:
    return near_folders(name) or near(name, [*cached_models(), *_WELL_KNOWN])


def cached_models() -> list[str]:
    """Names of the hub models that are already on this machine."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
