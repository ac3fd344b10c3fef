from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.files import dump_json, sha256_file
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.golden import golden_images
from clipkit.models.loading import manifest


@pytest.fixture
def saved(towers: DualEncoder, tmp_path: Path) -> Path:
    towers.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def sign_again(folder: Path, change: Any) -> None:
    """Change a saved model as someone would who also mends the hashes."""
    path = folder / manifest.NAME
    body = json.loads(path.read_text())
    change(body)
    for name in body["files"]:
        file = folder / name
        body["files"][name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    body["sha256"] = manifest._own_hash(body)
    path.write_text(dump_json(body))


def test_every_file_is_listed(saved: Path) -> None:
    body = json.loads((saved / manifest.NAME).read_text())
    there = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert there - {manifest.NAME} == set(body["files"])
    assert body["logit_scale"] == pytest.approx(2.659260, abs=1e-5)


Spoil = Callable[[bytes, random.Random], bytes]


def flipped(whole: bytes, generator: random.Random) -> bytes:
    spoilt = bytearray(whole)
    spoilt[generator.randrange(len(spoilt))] ^= 1 << generator.randrange(8)
    return bytes(spoilt)


def shortened(whole: bytes, generator: random.Random) -> bytes:
    return whole[: generator.randrange(len(whole))]


@pytest.fixture(scope="session")
def forms(family_folder: Any, open_clip_arch: Any, word_tokenizer: Any, tmp_path_factory: Any) -> list[Path]:
    """One saved folder of each form."""
    import open_clip
    from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

    root: Path = tmp_path_factory.mktemp("forms")
    arch = open_clip_arch("tiny-spoilt")
    model, _, preprocess = open_clip.create_model_and_transforms(arch)
    layers: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    layers["num_attention_heads"] = 2
    vision = ViTModel(ViTConfig(**layers, image_size=32, patch_size=8))
    bert = BertModel(BertConfig(**layers, vocab_size=200))
    square = ViTImageProcessor(size={"height": 32, "width": 32})
    pooled: dict[str, Any] = {"image_processor": square, "image_pooling": "pooler", "text_pooling": "pooler"}
    models = {
        "clip": DualEncoder.from_pretrained(family_folder("clip")),
        "open_clip": DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch),
        "towers": DualEncoder.from_towers(vision, bert, word_tokenizer, dim=8, head="mlp"),
        "vision-text-dual-encoder": DualEncoder.from_towers(vision, bert, word_tokenizer, dim=8, **pooled),
    }
    for form, each in models.items():
        assert each.save_pretrained(root / form).form == form
    return [root / form for form in models]


def check_files(folder: Path, kind: Any) -> None:
    """What is done at each opening, before a weight is used."""
    body = manifest.read(folder)
    assert body is not None
    with manifest.verified_files(folder, body, kind):
        pass


def count_found(
    folders: list[Path], spoil: Spoil, log: pytest.LogCaptureFixture, times: int = 200, kind: str = "xxh3"
) -> int:
    """Of `times` single damages, over all files of all folders in turn, how many are refused or reported."""
    generator, found = random.Random(0), 0
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    roots = {path: folder for folder in folders for path in folder.rglob("*")}
    for path in [files[index % len(files)] for index in range(times)]:
        whole = path.read_bytes()
        path.write_bytes(spoil(whole, generator))
        log.clear()
        try:
            check_files(roots[path], kind)
            found += path.name == manifest.CARD and str(path) in log.text  # a card is reported, all else refused
        except (CorruptArtefact, ModelError) as error:
            found += path.name in str(error)
        finally:
            path.write_bytes(whole)
    return found


@pytest.mark.parametrize("spoil", [flipped, shortened])
def test_every_flipped_bit_and_every_cut_is_found(
    spoil: Spoil, forms: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert count_found(forms, spoil, caplog) == 200
    assert count_found(forms, spoil, caplog, 40, "sha256") == 40
    for folder in forms:
        check_files(folder, "xxh3")


def test_without_the_hashes_damage_would_pass(
    forms: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "file_damage", lambda *arguments: None)
    assert count_found(forms, flipped, caplog) < 50


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

    digest = hashlib.sha256(b"".join(image.tobytes() for image in golden_images())).hexdigest()
    assert digest[:16] == "e31c75fe773af109"
