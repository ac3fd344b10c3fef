"""Saving a checkpoint while the disk fails or the process dies, at every call that touches the disk."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit import files
from clipkit.errors import ClipkitError
from clipkit.training import checkpoint
from clipkit.training.checkpoint import Checkpoints

TOUCHES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree")
KILL, FULL, BROKEN = "kill", errno.ENOSPC, errno.EIO
NEVER = 3  # exit status: the save was through before the call came


def save(folder: Path, step: int) -> None:
    tensors = {"model": {"a": torch.full((50,), float(step))}, "best": {"a": torch.zeros(10)}}
    Checkpoints(folder, keep=1).save(step, tensors, {"step": step}, unchanged=("best",))


def in_child(work: Callable[[], None]) -> int:
    """The exit status of `work` in a fork: 0 done, 1 raised, 137 killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except (OSError, ClipkitError):
            pass
        except BaseException:
            traceback.print_exc()
            status = 2
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fail_at(call: int, what: Any, folder: Path) -> Callable[[], None]:
    """Makes the call number `call` that touches `folder` fail; for a child alone: hooks stay for good."""
    seen = 0

    def touch() -> None:
        nonlocal seen
        seen += 1
        if seen == call:
            if what == KILL:
                os._exit(137)
            raise OSError(what, os.strerror(what))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in TOUCHES and str(folder) in str(arguments[0]):
            touch()

    sync, save_file = os.fsync, checkpoint.save_file

    def broken_sync(handle: int) -> None:
        touch()
        sync(handle)

    def broken_save(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:100])  # as far as it got
        touch()
        save_file(tensors, path)

    def work() -> None:
        os.fsync = broken_sync
        checkpoint.save_file = broken_save  # type: ignore[assignment]
        sys.addaudithook(hook)
        save(folder, 2)
        if seen < call:
            os._exit(NEVER)

    return work


def sweep(tmp_path: Path, what: Any) -> tuple[int, list[int]]:
    """How many calls there are, and at which of them nothing could be loaded afterwards."""
    lost = []
    for call in range(1, 1000):
        folder = tmp_path / f"{what}-{call}"
        save(folder, 1)
        status = in_child(fail_at(call, what, folder))
        assert status != 2
        found = Checkpoints(folder).newest()
        if found is None or found.step not in (1, 2):
            lost.append(call)
        elif status in (0, NEVER):  # 0: a failure that does no harm, such as a link in place of a copy
            assert found.step == 2
        if status == NEVER:
            return call - 1, lost
        shutil.rmtree(folder)
    raise AssertionError("the save never came to its end")


@pytest.mark.parametrize("what", [KILL, FULL, BROKEN])
def test_one_can_be_loaded_whatever_fails(tmp_path: Path, what: Any) -> None:
    calls, lost = sweep(tmp_path, what)
    assert calls > 20
    assert lost == []


def test_deleting_first_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Checkpoints.save

    def delete_first(self: Checkpoints, *arguments: Any, **options: Any) -> Any:
        for old in self.folder.glob("step-*"):
            shutil.rmtree(old)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", delete_first)
    _, lost = sweep(tmp_path, KILL)
    assert lost


def unsynced(folder: Path, step: int) -> list[str]:
    """What of the new checkpoint was not on the disk when it took its place: a power cut could lose it."""
    synced: set[str] = set()
    late: list[str] = []
    sync, rename = os.fsync, Path.replace

    def watched_sync(handle: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
        sync(handle)

    def watched_rename(self: Path, target: Path) -> Path:
        late.extend(str(path) for path in [self, *self.rglob("*")] if str(path) not in synced)
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", watched_sync)
        patch.setattr(Path, "replace", watched_rename)
        save(folder, step)
    return late + ([] if str(folder) in synced else [f"the entry in {folder}"])


def test_everything_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsynced(tmp_path / "checkpoints", 1) == []
    monkeypatch.setattr(files, "_fsync", lambda path: None)  # and this test would see it missing
    assert len(unsynced(tmp_path / "checkpoints", 2)) == 6
