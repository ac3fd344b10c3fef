"""Checkpoints: folders that appear complete or not at all, and are verified before use.

    checkpoints/step_00000120/
        weights.safetensors  optimizer.safetensors …    the tensors of every part of the run
        state.json                                       the facts of every part
        manifest.json                                    size and SHA-256 of every file, written last

A new one is written beside, synced, renamed into place and read back; only then the oldest goes. Two are kept, so
that there is one to fall back on if the newest is damaged.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit.errors import CorruptArtefact, ResourceError, option
from clipkit.files import dump_json, file_damage, list_files, nearest, publish, resource_errors
from clipkit.training.state import Stateful

logger = logging.getLogger("clipkit")
MANIFEST, STATE = "manifest.json", "state.json"
SCHEMA = 1
KEPT = 2
_NAME = re.compile(r"step_(\d{8,})")
_ROOM = 16 * 2**20  # bytes for JSON, logs and what a file system needs beside the tensors


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        step: that was taken last.
        facts: part -> its state in JSON.
        tensors: part -> its tensors, by name, on the CPU.
    """

    step: int
    facts: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Tensor]]

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Restore every part.

        Raises:
            CorruptArtefact: the run had other parts, or they are of another model.
        """
        if self.facts.keys() != parts.keys():
            odd = ", ".join(sorted(self.facts.keys() ^ parts.keys()))
            raise CorruptArtefact(f"the checkpoint and this run do not remember the same things: {odd}")
        for name, part in parts.items():
            part.restore(self.tensors[name], self.facts[name])


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: that holds them; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, parts: Mapping[str, Stateful], *, keep: int = KEPT) -> Path:
        """Write the checkpoint of `step`, read it back, and remove all but the newest `keep`.

        Raises:
            ResourceError: there is no room for it; what was there stays.
            CorruptArtefact: what was read back is not what was written; what was there stays.
        """
        self.require_room(size_of(parts))
        path = self.folder / f"step_{step:08d}"
        with resource_errors(path):
            publish(path, lambda fresh: _write(fresh, step, parts), replace=True)
            verify(path)
            for old in self.paths()[:-keep]:
                if old != path:
                    remove(old)
        return path

    def foresee(self, parts: Mapping[str, Stateful], later: int) -> None:
        """Refuse a disk that cannot hold what will be saved: those that are kept, and one in the making.

        Args:
            parts: of the run.
            later: bytes that will be added to them: moments and best weights.

        Raises:
            ResourceError: as `require_room`.
        """
        self.require_room(max(1, KEPT + 1 - len(self.paths())) * (size_of(parts) + later))

    def require_room(self, needed: int) -> None:
        """Refuse a disk with too little free space.

        Args:
            needed: bytes.

        Raises:
            ResourceError: fewer are free; says how many.
        """
        free = shutil.disk_usage(nearest(self.folder)).free
        if free < needed + _ROOM:
            raise ResourceError(
                f"a checkpoint needs {(needed + _ROOM) / 2**20:,.0f} MiB, and the disk has {free / 2**20:,.0f} MiB",
                where=self.folder,
                fix=f"free some space, or set {option('output_dir')} to another disk; older checkpoints stay valid",
            )

    def paths(self) -> list[Path]:
        """Return all folders with a checkpoint's name, the oldest step first."""
        if not self.folder.is_dir():
            return []
        step_of = {}
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match:
                step_of[path] = int(match[1])
        return sorted(step_of, key=lambda path: (step_of[path], path))

    def newest(self) -> Path | None:
        """Return the valid checkpoint of the latest step; rename damaged ones to ``….corrupt``, with a warning."""
        for path in reversed(self.paths()):
            try:
                verify(path)
            except CorruptArtefact as error:
                aside = _free(path.with_name(f"{path.name}.corrupt"))
                path.rename(aside)
                logger.warning("a checkpoint is damaged and was set aside as %s: %s", aside, error.message)
                continue
            return path
        return None

    def damaged(self) -> list[Path]:
        """Return the damaged checkpoints that `newest` set aside."""
        return sorted(self.folder.glob("step_*.corrupt*")) if self.folder.is_dir() else []


def size_of(parts: Mapping[str, Stateful]) -> int:
    """Return the bytes of all tensors."""
    return sum(
        tensor.numel() * tensor.element_size() for part in parts.values() for tensor in part.tensor_state().values()
    )


def _write(folder: Path, step: int, parts: Mapping[str, Stateful]) -> None:
    folder.mkdir()
    for name, part in parts.items():
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in part.tensor_state().items()}
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors")
    facts = {name: part.json_state() for name, part in parts.items()}
    (folder / STATE).write_text(dump_json({"step": step, "parts": facts}), encoding="utf-8")
    files = list_files(folder, "sha256")
    (folder / MANIFEST).write_text(dump_json({"schema": SCHEMA, "files": files}), encoding="utf-8")


def verify(path: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        CorruptArtefact: a file is missing, cut, changed, or not listed; a newer clipkit wrote it.
    """
    manifest = _json(path / MANIFEST)
    schema, files = manifest.get("schema"), manifest.get("files")
    if schema != SCHEMA or not isinstance(files, dict):
        raise CorruptArtefact(f"expected a manifest of schema {SCHEMA}, found {schema!r}", where=path / MANIFEST)
    if (path / MANIFEST).read_bytes() != dump_json(manifest).encode():
        raise CorruptArtefact("the manifest is not what was saved", where=path / MANIFEST)
    names = {file.name for file in path.iterdir()}
    unlisted = names - {MANIFEST} - files.keys()
    if unlisted:
        raise CorruptArtefact("a file is not in the manifest", where=path / min(unlisted))
    for name, expected in files.items():
        entry = expected if isinstance(expected, dict) else {}
        damage = file_damage(path / name, entry, "sha256", "checkpoint")
        if damage is not None:
            raise CorruptArtefact(damage, where=path / name)


def read(path: Path) -> Snapshot:
    """Return the content of a checkpoint that `newest` verified.

    Raises:
        CorruptArtefact: it cannot be read, on any process.
    """
    state = _json(path / STATE)
    try:
        facts = state["parts"]
        files = {name: path / f"{name}.safetensors" for name in facts}
        tensors = {name: load_file(file) if file.is_file() else {} for name, file in files.items()}
    except (KeyError, OSError, SafetensorError) as error:
        raise CorruptArtefact(f"the checkpoint cannot be read: {error}", where=path) from error
    return Snapshot(int(state["step"]), facts, tensors)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptArtefact(f"{path.name} cannot be read: {error}", where=path) from error
    if not isinstance(value, dict):
        raise CorruptArtefact(f"a JSON object was expected in {path.name}, found {type(value).__name__}", where=path)
    return value


def _free(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.partition('.corrupt')[0]}.corrupt{number}")
    return path


def remove(path: Path) -> None:
    """Delete a checkpoint: rename it first, so that a half-deleted one is never taken for a checkpoint."""
    trash = path.with_name(f".{path.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
