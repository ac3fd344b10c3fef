from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.files import dump_json, sha256_file
from clipkit.models import artefact
from clipkit.models.dual_encoder import DualEncoder


@pytest.fixture
def saved(towers: DualEncoder, tmp_path: Path) -> Path:
    towers.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def sign_again(folder: Path, change: Any) -> None:
    """Change a saved model as someone would who also mends the hashes."""
    path = folder / artefact.NAME
    body = json.loads(path.read_text())
    change(body)
    for name in body["files"]:
        file = folder / name
        body["files"][name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    body["sha256"] = artefact._own_hash(body)
    path.write_text(dump_json(body))


def test_every_file_is_listed(saved: Path) -> None:
    body = json.loads((saved / artefact.NAME).read_text())
    there = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert there - {artefact.NAME} == set(body["files"])
    assert body["logit_scale"] == pytest.approx(2.659260, abs=1e-5)


def test_every_flipped_bit_is_found(saved: Path) -> None:
    generator = random.Random(0)
    for path in sorted(p for p in saved.rglob("*") if p.is_file()):
        original = path.read_bytes()
        for _ in range(8):
            spoilt = bytearray(original)
            spoilt[generator.randrange(len(spoilt))] ^= 1 << generator.randrange(8)
            path.write_bytes(spoilt)
            with pytest.raises(CorruptArtefact, match=path.name):
                artefact.read(saved)
        path.write_bytes(original)
    DualEncoder.from_pretrained(saved)


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_lost_or_cut_file_is_named(saved: Path, change: Any) -> None:
    change(saved / "text" / "model.safetensors")
    with pytest.raises(CorruptArtefact, match=r"text.model\.safetensors"):
        DualEncoder.from_pretrained(saved)


def test_other_embeddings_are_found_where_all_hashes_fit(saved: Path) -> None:
    config = saved / "vision" / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    sign_again(saved, lambda body: None)
    with pytest.raises(CorruptArtefact, match=r"image embeddings differ.*image activation was gelu and is relu"):
        DualEncoder.from_pretrained(saved)


def test_another_pooling_is_found_where_all_hashes_fit(saved: Path) -> None:
    sign_again(saved, lambda body: body["settings"].update(text_pooling="last"))
    with pytest.raises(
        CorruptArtefact, match=r"text embeddings differ.*text pooling was mean over the mask and is last token"
    ):
        DualEncoder.from_pretrained(saved)


def test_a_folder_of_the_future_is_refused(saved: Path) -> None:
    sign_again(saved, lambda body: body.update(schema=99))
    with pytest.raises(ModelError, match="newer clipkit"):
        DualEncoder.from_pretrained(saved)


def test_a_folder_of_the_past_is_refused(saved: Path) -> None:
    sign_again(saved, lambda body: body.update(schema=1))
    with pytest.raises(ModelError, match=r"older clipkit \(schema 1, expected 2\)"):
        DualEncoder.from_pretrained(saved)


def test_golden_images_never_change() -> None:
    import hashlib

    digest = hashlib.sha256(b"".join(image.tobytes() for image in artefact.golden_images())).hexdigest()
    assert digest[:16] == "e31c75fe773af109"
