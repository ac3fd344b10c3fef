"""Writing a model folder: native files, clipkit.json, and proof that it opens again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clipkit.errors import ClipkitError, ModelError, UsageError
from clipkit.files import publish
from clipkit.models import artefact
from clipkit.models.weights import check_finite

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder


def save(model: DualEncoder, folder: Path, overwrite: bool) -> None:
    """What `DualEncoder.save_pretrained` documents."""
    taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if taken and not overwrite:
        raise UsageError("the folder exists and is not empty", where=folder, fix="another folder, or overwrite=True")
    if taken and not _holds_model(folder):
        raise UsageError("only a model may be overwritten, and this is none", where=folder, fix="another folder")
    check_finite(model.backend, model.name)
    publish(folder, lambda fresh: _write(model, fresh), replace=True)


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (artefact.NAME, "config.json", "open_clip_config.json"))


def _write(model: DualEncoder, folder: Path) -> None:
    folder.mkdir()
    backend = model.backend
    backend.save(folder, model.processor)
    plain = as_opened(model)  # bf16 weights open as fp32: the promise is about what opens
    found = plain.fingerprint()
    about = {
        "name": model.name,
        "fingerprint": found.as_dict(),
        "logit_scale": found.record["logit_scale"],
        "logit_bias": found.record["logit_bias"],
        "similarity": model.similarity,
    }
    artefact.write(folder, form=backend.family, settings=backend.settings(), about=about, golden=golden(plain))
    try:  # while an older model still stands: what cannot be opened again is not published
        type(model).from_pretrained(folder)
    except ClipkitError as error:
        message = f"the saved model does not open as it was: {error.message}"
        raise ModelError(message, where=model.name, fix="check what is special about its processor or arch") from error


def as_opened(model: DualEncoder) -> DualEncoder:
    """The model in fp32 on the CPU, as `from_pretrained` will give it; a copy unless it is that already."""
    plain = model.device.type == "cpu" and model.dtype is torch.float32
    backend = model.backend if plain else copy.deepcopy(model.backend).cpu().float()
    # a new shell: in training, Accelerate has patched autocast into this one's forward
    return type(model)(backend, model.processor, model.name)


def golden(model: DualEncoder) -> artefact.Goldens:
    """The embeddings of the built-in images and texts, in fp32 on the CPU."""
    model = as_opened(model)
    images = model.encode_images(artefact.golden_images(), dtype=torch.float32)
    return {"image": images, "text": model.encode_texts(artefact.GOLDEN_TEXTS, dtype=torch.float32)}
