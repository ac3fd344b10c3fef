"""Checkpoints: folders `step-00000120`, each whole or not there.

Tensors are safetensors files, everything else is `facts.json`, and `manifest.json`, written last, holds the size and
SHA-256 of each. An older checkpoint goes only after the newer one has been read back, so that at any instant one
can be loaded; a damaged one is set aside under another name, and the newest whole one is taken.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit.errors import CorruptArtefact, ResourceError
from clipkit.files import dump_json, publish, sha256_file

logger = logging.getLogger("clipkit")

MANIFEST, FACTS = "manifest.json", "facts.json"
SLACK = 2**20  # bytes, for headers and folders

Tensors = Mapping[str, Mapping[str, Tensor]]  # file's stem -> name -> tensor


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read: `tensors` by the stem of their file, on the CPU."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What saving took."""

    bytes: int
    seconds: float


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds them; created when the first is saved.
        keep: how many of the newest stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, max(1, keep)

    def save(self, step: int, tensors: Tensors, facts: Mapping[str, Any], *, unchanged: tuple[str, ...] = ()) -> Cost:
        """Write the state after `step`, then drop what is older than the newest `keep`.

        Args:
            step: the number of steps taken.
            tensors: what a safetensors file each is made of.
            facts: what JSON can hold.
            unchanged: stems that are as in the checkpoint before: linked to its files rather than written.

        Raises:
            ResourceError: the disk has too little room; nothing was written, and the older checkpoints stand.
            CorruptArtefact: what was written cannot be read back.
        """
        start = time.perf_counter()
        target = self.folder / f"step-{step:08d}"
        if not target.exists():
            before = next(self._newest_first(), None)
            kept = [stem for stem in unchanged if before and (before / f"{stem}.safetensors").is_file()]
            fresh = {stem: group for stem, group in tensors.items() if stem not in kept}
            self._foresee(fresh)
            publish(target, lambda folder: _write(folder, fresh, facts, before, kept))
        if problem := damage(target):
            raise CorruptArtefact(f"the checkpoint just written cannot be read back: {problem}", where=target)
        self._prune()
        size = sum(path.stat().st_size for path in target.iterdir())
        return Cost(size, time.perf_counter() - start)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None if there is none. Damaged ones are renamed to `….damaged` and reported."""
        for folder in self._newest_first():
            if problem := damage(folder):
                aside = folder.with_name(f"{folder.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                logger.warning("%s is damaged (%s) and was set aside as %s", folder, problem, aside.name)
                continue
            tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            return Checkpoint(folder, _step(folder), tensors, facts)
        return None

    def clear_leftovers(self) -> None:
        """Remove what a killed save left half-written. Only the run that holds the folder may call this."""
        for room in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(room, ignore_errors=True)

    def _newest_first(self) -> Iterator[Path]:
        if self.folder.is_dir():
            found = [path for path in self.folder.iterdir() if path.name[:5] == "step-" and path.name[5:].isdigit()]
            yield from sorted(found, key=_step, reverse=True)

    def _prune(self) -> None:
        for old in list(self._newest_first())[self.keep :]:
            shutil.rmtree(old)

    def _foresee(self, tensors: Tensors) -> None:
        need = SLACK + sum(each.numel() * each.element_size() for group in tensors.values() for each in group.values())
        parent = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        have = shutil.disk_usage(parent).free
        if need > have:
            raise ResourceError(
                f"a checkpoint needs {need / 1e6:,.0f} MB, the disk has {have / 1e6:,.0f} MB",
                where=self.folder,
                fix="free some space and resume: the older checkpoints are whole",
            )


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None for a whole one."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = {path.name for path in folder.iterdir() if path.name != MANIFEST}
        if found != set(expected):
            return f"files {sorted(found)} in place of {sorted(expected)}"
        for name, about in expected.items():
            if (folder / name).stat().st_size != about["size"] or sha256_file(folder / name) != about["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be used: {error}"
    return None


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _write(folder: Path, tensors: Tensors, facts: Mapping[str, Any], before: Path | None, kept: list[str]) -> None:
    folder.mkdir()
    for stem, group in tensors.items():
        # clones: safetensors refuses tensors that share memory, such as tied weights
        save_file({name: each.detach().cpu().contiguous().clone() for name, each in group.items()}, _file(folder, stem))
    for stem in kept:
        assert before is not None  # there are none to keep otherwise
        _link(_file(before, stem), _file(folder, stem))
    (folder / FACTS).write_text(dump_json(dict(facts)), encoding="utf-8")
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(dump_json({"files": files}), encoding="utf-8")


def _file(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.safetensors"


def _link(old: Path, new: Path) -> None:
    with contextlib.suppress(OSError):  # a file system without hard links
        os.link(old, new)
    if not new.exists():
        shutil.copyfile(old, new)
