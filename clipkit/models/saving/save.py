"""Writing a model folder: native files, a card, clipkit.json, and proof that it opens again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.errors import ClipkitError, ModelError, UsageError, option
from clipkit.files import publish
from clipkit.models.adapting import lora
from clipkit.models.backend import check_finite
from clipkit.models.fingerprint.golden import GoldenEmbeddings, as_fp32_cpu, golden_embeddings
from clipkit.models.loading import manifest as artefact
from clipkit.models.saving import model_card as card
from clipkit.models.saving import standalone

if TYPE_CHECKING:
    from clipkit.models.backends.towers import TowersBackend
    from clipkit.models.dual_encoder import DualEncoder
    from clipkit.models.processor import Processor

logger = logging.getLogger("clipkit")


_MARKS = (artefact.NAME, "config.json", "open_clip_config.json")


@dataclass(frozen=True)
class Saved:
    """In which form a model was written.

    Attributes:
        form: `open_clip` (its `local-dir:`), `vision-text-dual-encoder` or another model type of transformers
            (AutoModel and AutoProcessor), or `towers` (vision/, text/, heads.safetensors, without_clipkit.py).
        why: what opens it, and for `towers` why it is no VisionTextDualEncoder.
    """

    form: str
    why: str


def save(model: DualEncoder, folder: Path, overwrite: bool, proven: Saved | None = None) -> Saved:
    """What `DualEncoder.save_pretrained` documents.

    Args:
        proven: what saving this model gave before, when only its weights have changed since: it is written in that
            form, and not opened again (`check_saved` does, at the end).
    """
    check_place(folder, overwrite)
    check_finite(model.backend, model.name)
    plain = lora.merged(model)
    saved: list[Saved] = []
    publish(folder, lambda fresh: saved.append(_write(plain, fresh, proven)), replace=True)
    model.card = plain.card
    if proven is None:
        logger.info("%s: saved as %s: %s", folder, saved[-1].form, saved[-1].why)
    return saved[-1]


def check_place(folder: Path, overwrite: bool, marks: Sequence[str] = _MARKS) -> None:
    """Refuse a folder that something stands in, unless it is to be overwritten and holds one of the files `marks`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UsageError(
            "the folder exists and is not empty", where=folder, fix=f"another folder, or {option('overwrite', True)}"
        )
    if not any((folder / name).is_file() for name in marks):
        raise UsageError("only a model may be overwritten, and this is none", where=folder, fix="another folder")


def _write(model: DualEncoder, folder: Path, proven: Saved | None) -> Saved:
    expected = golden_embeddings(model)
    saved = _write_native(model, folder, expected, proven)
    found = as_fp32_cpu(model).fingerprint()  # bf16 weights open as fp32: the record is of what opens
    model.card = model.card.settled(model.name, found)
    card.write(folder, model.card, model.backend, model.processor, found, saved.form)
    about = {
        "name": model.name,
        "why": saved.why,
        "fingerprint": found.as_dict(),
        "logit_scale": found.record["logit_scale"],
        "logit_bias": found.record["logit_bias"],
        "similarity": model.similarity,
        "card": model.card.as_dict(),
    }
    artefact.write(folder, form=saved.form, settings=model.backend.settings(), about=about, golden=expected)
    if proven is None:
        check_saved(model, folder)  # while an older model still stands: what cannot be opened is not published
    return saved


def check_saved(model: DualEncoder, folder: Path) -> None:
    """Open a folder that `model` was saved in.

    Raises:
        ModelError: it does not open, or gives other embeddings.
    """
    try:
        type(model).from_pretrained(folder)
    except ClipkitError as error:
        message = f"the saved model does not open as it was: {error.message}"
        raise ModelError(message, where=model.name, fix="check what is special about its processor or arch") from error


def _write_native(model: DualEncoder, folder: Path, expected: GoldenEmbeddings, proven: Saved | None) -> Saved:
    from clipkit.models.backends.towers import TowersBackend

    folder.mkdir()
    backend = model.backend
    if isinstance(backend, TowersBackend):
        return _write_towers(backend, model.processor, folder, expected, proven)
    backend.save(folder, model.processor)
    return Saved(backend.family, "open_clip opens it (local-dir:)" if backend.family == "open_clip" else _TRANSFORMERS)


def _write_towers(
    backend: TowersBackend, processor: Processor, folder: Path, expected: GoldenEmbeddings, proven: Saved | None
) -> Saved:
    from clipkit.models.saving import vision_text as vtde

    if proven is None:
        reason = vtde.attempt(backend, processor, folder, expected)
        if reason is None:
            return Saved(vtde.FORM, _TRANSFORMERS)
        shutil.rmtree(folder)
        folder.mkdir()
        proven = Saved("towers", f"no VisionTextDualEncoder, for {reason}")
    if proven.form == vtde.FORM:
        vtde.write(backend, processor, folder)
    else:
        backend.save(folder, processor)
        program = standalone.program(backend.joint, processor, *backend.classes())
        (folder / "without_clipkit.py").write_text(program, encoding="utf-8")
    return proven


_TRANSFORMERS = "AutoModel and AutoProcessor of transformers open it"
