"""Opening a folder of transformers without surprises: nothing random, nothing that runs code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.models.backend import check_finite
from clipkit.models.backends.quiet import quiet
from clipkit.models.loading.layouts import no_model
from clipkit.models.loading.remote_code import refuse_code

# What transformers opens, the first that is there. Beside them may lie other libraries' weights, or half of them.
_TRANSFORMERS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
_OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".onnx", ".h5", ".msgpack", ".gguf")


def check_folder(folder: Path, *, trust_remote_code: bool = False, weights: bool = True) -> None:
    """Refuse what transformers would open wrongly or dangerously.

    Args:
        folder: holds config.json, and unless `weights` is False also the weights.
        trust_remote_code: whether the configs may name Python code to run.

    Raises:
        ModelError: no config.json, no weights, a Git LFS pointer, a config or a pickle that asks to run code, an
            adapter of peft.
        CorruptArtefact: a config or weight file that cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise no_model(folder)
    if (folder / "adapter_config.json").is_file():
        message = "an adapter of peft stands beside the weights: transformers would open the base model that it names"
        raise ModelError(message, where=folder, fix="merge it into the weights, or take adapter_config.json away")
    refuse_code(folder, trust_remote_code=trust_remote_code)
    if weights:
        check_weights(folder)


def check_weights(folder: Path, patterns: Sequence[str] = _TRANSFORMERS) -> list[Path]:
    """The weight files that a library opens, each readable.

    Args:
        folder: holds the weights, not in folders below it.
        patterns: of the files that the library opens, in its order of preference: the first that fits counts.

    Raises:
        ModelError: no such files, a Git LFS pointer, or a pickle that holds more than tensors.
        CorruptArtefact: a file cannot be read.
    """
    files = weight_files(folder, patterns)
    if not files:
        others = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _OTHERS))
        message = f"no weights that can be opened were found, only {others}" if others else "no weights were found"
        fix = f"a folder with {' or '.join(patterns)}; download the model again"
        raise ModelError(message, where=folder, fix=fix)
    for path in files:
        weight_shapes(path)
    return files


def weight_files(folder: Path, patterns: Sequence[str] = _TRANSFORMERS) -> list[Path]:
    """The files of the first pattern that fits; not `._model.safetensors`, which macOS leaves on foreign disks."""
    fitting = (sorted(p for p in folder.glob(pattern) if p.is_file() and p.name[0] != ".") for pattern in patterns)
    return next((files for files in fitting if files), [])


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file or a pickle, without reading the numbers.

    Raises:
        ModelError: a Git LFS pointer, or a pickle that holds more than tensors.
        CorruptArtefact: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ModelError("a Git LFS pointer instead of weights", where=path, fix="git lfs pull")
    if path.suffix != ".safetensors":
        return _pickled_shapes(path)
    try:
        with safe_open(path, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        message = f"not a readable safetensors file of {path.stat().st_size} bytes: {error}"
        raise CorruptArtefact(message, where=path, fix="download or save the model again") from error


def _pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    content = load_pickle(path, "meta")
    state = content
    if isinstance(content, dict):
        state = content.get("state_dict", content)  # open_clip's training checkpoints
    tensors = state.values() if isinstance(state, dict) else ()
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ModelError("a pickle without a dictionary of weights", where=path, fix="save model.state_dict()")
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load_pickle(path: Path, device: str = "cpu") -> Any:
    """A pickle's content by torch's safe unpickler, which builds tensors and plain containers alone."""
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "nsupported" in line), "")
        if not reason:
            raise _unreadable(path, error) from error
        fix = "safetensors, or a pickle of model.state_dict() alone; a pickle like this one can run any code"
        raise ModelError(f"the pickle asks for more than tensors: {reason[:200]}", where=path, fix=fix) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CorruptArtefact:
    message = f"not a readable pickle of weights, {path.stat().st_size} bytes: {_first_line(error)[:200]}"
    return CorruptArtefact(message, where=path, fix="download or save the model again")


def load_exactly(
    load: Callable[..., Any], folder: Path, *, spare: bool = False, may_lack: tuple[str, ...] = (), **options: Any
) -> tuple[Any, list[str]]:
    """Call a `from_pretrained` and accept only weights that fill the whole model, as fp32.

    Args:
        load: a class's `from_pretrained`.
        spare: whether the folder may hold more weights than the model takes (a tower out of a bigger model).
        may_lack: prefixes of weights that may be missing; the caller must then not use them.

    Returns:
        The model in eval mode, and the names of the weights that were missing.

    Raises:
        ModelError: weights are missing, left over, of another shape, or not finite.
    """
    try:
        with quiet():
            model, info = load(
                folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=any(path.suffix == ".safetensors" for path in weight_files(folder)),
                local_files_only=True,
                dtype=torch.float32,
                **options,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise ModelError(f"transformers cannot open the model: {_first_line(error)}", where=folder) from error
    missing = sorted(info["missing_keys"])
    _check_shapes(info["mismatched_keys"], folder)
    _check_missing([key for key in missing if not key.startswith(may_lack or ("\0",))], info, folder)
    if info["unexpected_keys"] and not spare:
        keys = _few(info["unexpected_keys"])
        raise ModelError(
            f"the weights hold keys that the model has no place for: {keys}", where=folder, topic="weights"
        )
    check_finite(model, folder)
    return model.eval(), missing


def _check_shapes(mismatched: Iterable[Any], folder: Path) -> None:
    for key, shape, expected in sorted(mismatched):
        message = f"weight {key} has shape {tuple(shape)}, the config asks for {tuple(expected)}"
        raise ModelError(
            message, where=folder, fix="config.json and weights must come from the same model", topic="weights"
        )


def _check_missing(missing: list[str], info: Any, folder: Path) -> None:
    if not missing:
        return
    message = f"{len(missing)} weights are missing and would be random: {_few(missing)}"
    prefixed = [key for key in info["unexpected_keys"] if key.startswith(("module.", "_orig_mod."))]
    fix = "save the whole model again"
    if prefixed:
        fix = f"the keys carry a wrapper's prefix ({prefixed[0]}): save the unwrapped model (model.module)"
    raise ModelError(message, where=folder, fix=fix, topic="weights")


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
