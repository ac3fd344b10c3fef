"""What is checked when a saved model is opened, counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipkit import files
from clipkit.errors import CorruptArtefact, UsageError
from clipkit.files import dump_json
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.loading import load, manifest, proof


@pytest.fixture
def saved(towers: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    towers.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))  # as on another machine: a save proves what it wrote
    return tmp_path / "saved"


class Counts:
    """Which golden embeddings were computed, and which files were hashed how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.golden: list[Any] = []
        self.hashed: list[tuple[str, str]] = []
        golden_embeddings, hash_file = load.golden_embeddings, files.hash_file

        def counting_golden(*args: Any) -> Any:
            self.golden.append(args[2])
            return golden_embeddings(*args)

        def counting_hash(path: Path, *kinds: Any) -> Any:
            self.hashed += [(path.name, kind) for kind in kinds]
            return hash_file(path, *kinds)

        monkeypatch.setattr(load, "golden_embeddings", counting_golden)
        monkeypatch.setattr(files, "hash_file", counting_hash)

    def opened(self, folder: Path, verify: Any = "once") -> tuple[int, set[str]]:
        self.golden.clear()
        self.hashed.clear()
        DualEncoder.from_pretrained(folder, verify=verify)
        listed = json.loads((folder / manifest.NAME).read_text())["files"]
        assert sorted(name for name, _ in self.hashed) == sorted(Path(name).name for name in listed)  # each file once
        return len(self.golden), {kind for _, kind in self.hashed}


def test_a_content_is_proved_once_with_the_same_libraries(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(monkeypatch)
    assert counts.opened(saved) == (1, {"xxh3"})
    assert counts.golden == [proof_rows()]
    assert counts.opened(saved) == (0, {"xxh3"})
    assert counts.opened(saved, "always") == (1, {"sha256"})
    assert counts.golden == [proof_rows()]
    versions = proof._environment()
    monkeypatch.setattr(proof, "_environment", lambda: versions | {"torch": "another"})
    assert counts.opened(saved, "files") == (0, {"xxh3"})
    assert counts.opened(saved) == (1, {"xxh3"})
    assert counts.opened(saved) == (0, {"xxh3"})


def proof_rows() -> Any:
    from clipkit.models.fingerprint.golden import FEW

    return {side: list(rows) for side, rows in FEW.items()}


def test_where_nothing_can_be_remembered_it_is_proved_each_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved.parent / "file").write_text("")
    monkeypatch.setenv("CLIPKIT_CACHE", str(saved.parent / "file"))
    counts = Counts(monkeypatch)
    assert [counts.opened(saved)[0] for _ in range(2)] == [1, 1]


def test_a_save_proves_what_it_wrote(saved: Path, towers: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(monkeypatch)
    assert counts.opened(saved)[0] == 1
    towers.backend.logit_scale_and_bias()[0].data.add_(0.01)
    towers.save_pretrained(saved, overwrite=True)
    assert counts.opened(saved)[0] == 0
    monkeypatch.setenv("CLIPKIT_CACHE", str(saved.parent / "empty"))
    assert counts.opened(saved)[0] == 1


def test_only_always_finds_who_can_make_equal_fast_hashes(saved: Path) -> None:
    path = saved / manifest.NAME
    body = json.loads(path.read_text())
    body["files"]["heads.safetensors"]["sha256"] = "0" * 64  # as if the file had been changed, and XXH3 were the same
    body["sha256"] = manifest._own_hash(body)
    path.write_text(dump_json(body))
    DualEncoder.from_pretrained(saved)
    with pytest.raises(CorruptArtefact, match="SHA-256"):
        DualEncoder.from_pretrained(saved, verify="always")


@pytest.mark.parametrize("verify", ["once", "always", "files"])
def test_damage_is_found_in_every_mode(saved: Path, verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_LARGE", 1000)  # so that weights are hashed beside the opening
    DualEncoder.from_pretrained(saved, verify=verify)
    weights = saved / "text" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(data)
    with pytest.raises(CorruptArtefact, match=r"text.model\.safetensors"):
        DualEncoder.from_pretrained(saved, verify=verify)
    weights.write_bytes(data[:-100])  # which the library cannot open: the damage is named all the same
    with pytest.raises(CorruptArtefact, match="bytes instead of"):
        DualEncoder.from_pretrained(saved, verify=verify)


def test_an_unknown_mode_is_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="once, always, files"):
        DualEncoder.from_pretrained(saved, verify="never")  # type: ignore[arg-type]
