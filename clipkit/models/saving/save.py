"""Writing a model folder: native files, a card, clipkit.json, and proof that it opens again."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.errors import ClipkitError, ModelError, UsageError, option
from clipkit.files import FILE_HASHES, list_files, publish
from clipkit.models.adapting import lora
from clipkit.models.backend import Backend, check_finite
from clipkit.models.backends.towers import TowersBackend
from clipkit.models.fingerprint.fingerprint import Fingerprint, hash_towers, settings_fingerprint
from clipkit.models.fingerprint.golden import FEW, GoldenEmbeddings, as_fp32_cpu, golden_embeddings
from clipkit.models.loading import manifest
from clipkit.models.loading.load import open_written
from clipkit.models.loading.proof import Proof
from clipkit.models.processor import Processor
from clipkit.models.saving import model_card, standalone
from clipkit.models.saving.model_card import Card

logger = logging.getLogger("clipkit")
_MARKS = (manifest.NAME, "config.json", "open_clip_config.json")


@dataclass(frozen=True)
class Saved:
    """In which form a model was written.

    Attributes:
        form: `open_clip` (its `local-dir:`), `vision-text-dual-encoder` or another model type of transformers
            (AutoModel and AutoProcessor), or `towers` (vision/, text/, heads.safetensors, without_clipkit.py).
        why: what opens it, and for `towers` why it is not a VisionTextDualEncoder.
    """

    form: str
    why: str


def save(
    backend: Backend,
    processor: Processor,
    folder: Path,
    overwrite: bool,
    *,
    name: str,
    card: Card,
    proven: Saved | None = None,
) -> tuple[Saved, Card]:
    """What `DualEncoder.save_pretrained` documents; gives the model card as it was written, too.

    Args:
        name: where the model came from.
        proven: what saving this model gave before, when only its weights have changed since and a full save follows
            later: weights and files are written with their XXH3 and not opened again, and clipkit.json has neither
            fingerprint nor golden embeddings.
    """
    check_place(folder, overwrite)
    check_finite(backend, name)
    plain = lora.merged(backend)
    written: list[tuple[Saved, Card]] = []

    def write(fresh: Path) -> None:
        if proven is None:
            written.append(_write(plain, processor, fresh, name, card))
        else:
            _write_quickly(plain, processor, fresh, name, card, proven)
            written.append((proven, card))

    publish(folder, write, replace=True)
    saved, settled = written[-1]
    if proven is None:
        logger.info("%s: saved as %s: %s", folder, saved.form, saved.why)
    return saved, settled


def check_place(folder: Path, overwrite: bool, marks: Sequence[str] = _MARKS) -> None:
    """Refuse a folder that is not empty, unless it is to be overwritten and holds one of the files `marks`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UsageError(
            "the folder exists and is not empty", where=folder, fix=f"another folder, or {option('overwrite', True)}"
        )
    if not any((folder / name).is_file() for name in marks):
        raise UsageError("only a model may be overwritten, and this is not one", where=folder, fix="another folder")


def _write(backend: Backend, processor: Processor, folder: Path, name: str, card: Card) -> tuple[Saved, Card]:
    plain = as_fp32_cpu(backend)  # bf16 weights open as fp32: the fingerprint is of what opens
    with ThreadPoolExecutor(max_workers=2) as threads:
        # SHA-256 of the weights in memory and of the files takes as long as all the rest
        hashed = threads.submit(hash_towers, plain)
        golden = golden_embeddings(plain, processor, FEW)
        saved = _write_native(backend, processor, folder, golden, None)
        listed = threads.submit(list_files, folder, *FILE_HASHES)
        facts = settings_fingerprint(plain, processor)
        check_written(folder, saved.form, backend.settings(), facts, golden, name)
        fingerprint = facts.with_weights(hashed.result())
        files = listed.result()
    card = card.settled(name, fingerprint)
    model_card.write(folder, card, backend, processor, fingerprint, saved.form)
    files[model_card.NAME] = list_files(folder, *FILE_HASHES, only=model_card.NAME)[model_card.NAME]
    about = {
        "name": name,
        "why": saved.why,
        "fingerprint": fingerprint.as_dict(),
        "logit_scale": fingerprint.record["logit_scale"],
        "logit_bias": fingerprint.record["logit_bias"],
        "similarity": backend.similarity,
        "card": card.as_dict(),
    }
    settings = backend.settings()
    body = manifest.write(folder, form=saved.form, settings=settings, about=about, files=files, golden=golden)
    Proof(body).remember()
    return saved, card


def _write_quickly(backend: Backend, processor: Processor, folder: Path, name: str, card: Card, proven: Saved) -> None:
    _write_native(backend, processor, folder, None, proven)
    about = {"name": name, "why": proven.why, "similarity": backend.similarity, "card": card.as_dict()}
    files = list_files(folder, "xxh3")
    manifest.write(folder, form=proven.form, settings=backend.settings(), about=about, files=files)


def check_written(
    folder: Path,
    form: str,
    settings: Mapping[str, Any],
    facts: Fingerprint,
    golden: GoldenEmbeddings,
    name: str,
) -> None:
    """Open a folder while it is being saved, before an older model is replaced: what cannot be opened is not published.

    Args:
        folder: its files are there, but for clipkit.json.
        form, settings: as clipkit.json is going to have them.
        facts: `settings_fingerprint` of the model.
        golden: its golden embeddings, of the rows `FEW`.
        name: of the model, for messages.

    Raises:
        ModelError: it does not open, or is another model.
    """
    fix = "check what is special about its processor or arch"
    try:
        backend, processor = open_written(folder, form, settings)
        now = settings_fingerprint(backend, processor)
    except ClipkitError as error:
        message = f"the saved model does not open as it was: {error.message}"
        raise ModelError(message, where=name, fix=fix) from error
    changed = manifest.changed_facts({"fingerprint": facts.as_dict()}, now)
    reopened = golden_embeddings(backend, processor, FEW)
    for side, vectors in reopened.items():
        worst = float((vectors - golden[side]).abs().max()) if vectors.shape == golden[side].shape else math.inf
        if not worst <= manifest.TOLERANCE:
            changed.append(f"{side} embeddings differ by {worst:.2g}")
    if changed:
        message = f"the saved model does not open as it was: {'; '.join(changed)}"
        raise ModelError(message, where=name, fix=fix)


def _write_native(
    backend: Backend, processor: Processor, folder: Path, expected: GoldenEmbeddings | None, proven: Saved | None
) -> Saved:
    folder.mkdir()
    if isinstance(backend, TowersBackend):
        return _write_towers(backend, processor, folder, expected, proven)
    backend.save(folder, processor)
    return Saved(backend.family, "open_clip opens it (local-dir:)" if backend.family == "open_clip" else _TRANSFORMERS)


def _write_towers(
    backend: TowersBackend,
    processor: Processor,
    folder: Path,
    expected: GoldenEmbeddings | None,
    proven: Saved | None,
) -> Saved:
    from clipkit.models.saving import vision_text as vtde

    if proven is None:
        assert expected is not None  # golden embeddings of the model, before it is written
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
