"""Checkpoints: whole or not there, known to be what was saved, and never fewer than one."""

import contextlib
import errno
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import runs
import torch

from clipkit import files
from clipkit.errors import CorruptArtefact, ResourceError
from clipkit.training.checkpoints import checkpoint
from clipkit.training.checkpoints.checkpoint import Checkpoints, read, verify
from clipkit.training.state import Facts


class Numbers(Facts):
    """A part with tensors that tell of their step."""

    def __init__(self, step):
        super().__init__(step=step)
        self.held = {"a": torch.full((300,), float(step)), "b": torch.tensor(step)}

    def tensor_state(self):
        return self.held

    def restore(self, tensors, facts):
        super().restore(tensors, facts)
        self.held = dict(tensors)


def parts(step):
    return {"weights": Numbers(step), "optimizer": Numbers(10 * step), "log": Facts(lines=step)}


@pytest.fixture
def folder(tmp_path):
    found = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        found.save(step, parts(step))
    return found


def test_what_was_saved_comes_back(folder):
    found = {"weights": Numbers(0), "optimizer": Numbers(0), "log": Facts()}
    snapshot = read(folder.newest())
    snapshot.restore(found)
    assert snapshot.step == 2
    assert found["weights"].held["a"].equal(torch.full((300,), 2.0))
    assert found["optimizer"].held["b"].equal(torch.tensor(20))
    assert found["log"].values == {"lines": 2}


def test_two_are_kept_by_their_step_and_not_by_their_age(folder):
    os.utime(folder.paths()[0])
    folder.save(3, parts(3))
    assert [path.name for path in folder.paths()] == ["step_00000002", "step_00000003"]
    folder.save(4, parts(4), keep=1)
    assert [path.name for path in folder.paths()] == ["step_00000004"]
    assert sorted(path.name for path in folder.folder.iterdir()) == ["step_00000004"]


def test_other_parts_are_refused(folder):
    with pytest.raises(CorruptArtefact, match="do not remember the same things: ema"):
        read(folder.newest()).restore({**parts(0), "ema": Facts()})


def test_200_flips_and_200_cuts_are_all_found(folder, caplog):
    draw = random.Random(0)
    path = folder.newest()
    contents = {each: each.read_bytes() for each in path.iterdir()}
    for kind in ("flip", "cut"):
        for _ in range(200):
            file, content = draw.choice(list(contents.items()))
            damaged = bytearray(content)
            if kind == "flip":
                damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            else:
                del damaged[draw.randrange(len(content)) :]
            file.write_bytes(damaged)
            with pytest.raises(CorruptArtefact):
                verify(path)
            file.write_bytes(content)
    verify(path)


def test_a_stray_or_a_missing_file_is_found(folder):
    path = folder.newest()
    (path / "more").touch()
    with pytest.raises(CorruptArtefact, match="a file is not in the manifest"):
        verify(path)
    (path / "more").unlink()
    (path / "weights.safetensors").unlink()
    with pytest.raises(CorruptArtefact, match="a file of the checkpoint is missing"):
        verify(path)


def test_damaged_ones_are_set_aside_one_by_one(folder, caplog):
    folder.save(3, parts(3), keep=3)
    for path in folder.paths()[1:]:
        (path / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "clipkit"):
        assert folder.newest().name == "step_00000001"
    assert caplog.text.count("damaged and was set aside") == 2
    assert [path.name for path in folder.damaged()] == ["step_00000002.corrupt", "step_00000003.corrupt"]
    folder.save(2, parts(2))
    (folder.folder / "step_00000002/manifest.json").write_text("")
    assert folder.newest().name == "step_00000001"
    assert folder.damaged()[1].name == "step_00000002.corrupt2"


# -- every point at which the disk or the process can fail


FAULTS = ("kill", errno.ENOSPC, errno.EIO)
CALLS = [
    *((os, name) for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open", "chmod")),
    (Path, "write_text"),
    (checkpoint, "save_file"),
]


class Faulty:
    """Counts what is done to the disk, and fails at call number `at`, half done."""

    def __init__(self, patch, at, fault):
        self.count, self.at, self.fault, self.done = 0, at, fault, []
        for place, name in CALLS:
            patch.setattr(place, name, self.wrapped(name, getattr(place, name)))

    def wrapped(self, name, real):
        def call(*arguments, **options):
            self.count += 1
            self.done.append((name, str(arguments[0])))
            if self.count != self.at:
                return real(*arguments, **options)
            if name in ("write_text", "save_file"):  # a part of it reaches the disk
                real(*arguments, **options)
                target = Path(arguments[0] if name == "write_text" else arguments[1])
                os.truncate(target, target.stat().st_size // 2)
            if self.fault == "kill":
                os._exit(137)
            raise OSError(self.fault, os.strerror(self.fault), str(arguments[0]))

        return call


def holds(folder):
    """Whether a checkpoint that is what was saved can be found: step 2, or step 3 if it got that far."""
    path = folder.newest()
    if path is None:
        return False
    snapshot = read(path)
    return snapshot.step in (2, 3) and snapshot.tensors["weights"]["a"].eq(snapshot.step).all().item()


def sweep(tmp_path, fault):
    """Save step 3 with a fault at each point in turn; the numbers of those that left nothing to go on from."""
    lost, at = [], 0
    while True:
        at += 1
        place = tmp_path / f"{fault}{at}"
        folder = Checkpoints(place)
        for step in (1, 2):
            folder.save(step, parts(step))
        reached = _save(folder, at, fault)
        if not holds(folder):
            lost.append(at)
        after = Checkpoints(place)
        after.save(4, parts(4))  # and the run goes on
        assert read(after.newest()).step == 4
        shutil.rmtree(place)
        if not reached:
            return lost, at - 1


def _save(folder, at, fault):
    """Whether the fault was met."""
    if fault == "kill":

        def work():
            with pytest.MonkeyPatch.context() as patch:
                Faulty(patch, at, fault)
                folder.save(3, parts(3))

        return runs.wait(runs.fork(work)) == 137
    with pytest.MonkeyPatch.context() as patch:
        faulty = Faulty(patch, at, fault)
        with contextlib.suppress(OSError, ResourceError):
            folder.save(3, parts(3))
    return faulty.count >= at


@pytest.mark.parametrize("fault", FAULTS, ids=["kill", "ENOSPC", "EIO"])
def test_every_point_of_a_save_keeps_a_checkpoint(tmp_path, fault):
    lost, points = sweep(tmp_path, fault)
    assert points > 25
    assert lost == []


def test_the_sweep_finds_a_save_that_deletes_first(tmp_path, monkeypatch):
    real = checkpoint.publish

    def delete_first(target, write, **options):
        for old in Checkpoints(target.parent).paths():
            checkpoint.remove(old)
        real(target, write, **options)

    monkeypatch.setattr(checkpoint, "publish", delete_first)
    lost, points = sweep(tmp_path, "kill")
    assert len(lost) > points / 2


def test_the_sweep_finds_a_save_in_place(tmp_path, monkeypatch):
    def in_place(target, write, **options):
        target.parent.mkdir(exist_ok=True)
        for old in target.parent.iterdir():
            old.rename(target)
            shutil.rmtree(target)
        write(target)

    monkeypatch.setattr(checkpoint, "publish", in_place)
    lost, _ = sweep(tmp_path, "kill")
    assert lost


# -- what reaches the disk before what


def order(folder):
    with pytest.MonkeyPatch.context() as patch:
        real, opened = os.open, {}
        faulty = Faulty(patch, -1, None)
        counted = os.open

        def remember(path, *arguments, **options):
            handle = (counted if real else real)(path, *arguments, **options)
            opened[handle] = str(path)
            return handle

        patch.setattr(os, "open", remember)
        synced = os.fsync
        patch.setattr(os, "fsync", lambda handle: faulty.done.append(("synced", opened[handle])) or synced(handle))
        folder.save(3, parts(3))
    return faulty.done


def durable(done, folder):
    """Whether every file was synced before the rename that shows it, and that rename before an older one goes."""

    def moved(name):
        return next(i for i, (what, path) in enumerate(done) if what in ("rename", "replace") and path.endswith(name))

    published, pruned = moved(".tmp/step_00000003"), moved("/step_00000001")
    synced = {Path(path).name for what, path in done[:published] if what == "synced"}
    names = {"weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "step_00000003"}
    after = [path for what, path in done[published:pruned] if what == "synced"]
    return names <= synced and str(folder.folder) in after


def test_everything_is_on_disk_before_it_is_needed(folder):
    assert durable(order(folder), folder)


@pytest.mark.parametrize("kept", ["none", "files"])
def test_a_save_without_sync_is_found(folder, monkeypatch, kept):
    real = files._fsync
    monkeypatch.setattr(files, "_fsync", lambda path: real(path) if kept == "files" and path.is_file() else None)
    assert not durable(order(folder), folder)
