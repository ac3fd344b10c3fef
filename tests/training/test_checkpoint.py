from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.errors import ResourceError
from clipkit.training.checkpoint import Checkpoints, damage


def state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weights = {"a": torch.full((3, 4), float(step)), "b": torch.arange(5)}
    return {"model": weights, "best": {"a": torch.zeros(1000)}}


def save(store: Checkpoints, step: int, **options: Any) -> Any:
    return store.save(step, state(step), {"step": step, "lines": [1.5, None]}, **options)


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.newest() is None
    cost = save(store, 7)
    found = store.newest()
    assert found is not None
    assert (found.step, found.facts) == (7, {"step": 7, "lines": [1.5, None]})
    assert torch.equal(found.tensors["model"]["a"], torch.full((3, 4), 7.0))
    assert found.tensors["model"]["b"].dtype is torch.int64
    assert cost.bytes == sum(path.stat().st_size for path in found.folder.iterdir())


def test_the_newest_by_step_stay(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (5, 20, 100):
        save(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]


def test_unchanged_files_are_linked(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    save(store, 1)
    save(store, 2, unchanged=("best",))
    first, second = (tmp_path / f"step-0000000{step}" / "best.safetensors" for step in (1, 2))
    assert first.stat().st_ino == second.stat().st_ino
    shutil.rmtree(first.parent)
    assert damage(second.parent) is None


def test_a_damaged_one_is_set_aside_and_the_one_before_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Checkpoints(tmp_path)
    save(store, 1)
    save(store, 2)
    path = tmp_path / "step-00000002" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "clipkit"):
        found = store.newest()
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is damaged (model.safetensors is not what was written)" in caplog.text
    assert (tmp_path / "step-00000002.damaged").is_dir()


@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_every_harm_is_seen(tmp_path: Path, harm: str) -> None:
    save(Checkpoints(tmp_path), 1)
    draw = random.Random(0)
    for number in range(100):
        folder = shutil.copytree(tmp_path / "step-00000001", tmp_path / f"copy-{number}")
        path = draw.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        if harm == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif harm == "cut":
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        if harm == "lose":
            path.unlink()
        assert damage(folder) is not None, (path, number)


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path)
    save(store, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="a checkpoint needs 1 MB, the disk has 0 MB"):
        save(store, 2)
    found = store.newest()
    assert found is not None
    assert found.step == 1
