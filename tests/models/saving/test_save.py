from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkit.errors import ModelError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.saving import save as saving

Make = Callable[..., DualEncoder]


def test_saving_says_which_form_it_wrote(
    towers: DualEncoder, clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="clipkit"):
        saved = towers.save_pretrained(tmp_path / "towers")
    assert saved.form == "towers"
    assert "image pooling is 'cls'" in saved.why
    assert f"saved as towers: {saved.why}" in caplog.text
    body = json.loads((tmp_path / "towers" / "clipkit.json").read_text())
    assert (body["form"], body["why"]) == (saved.form, saved.why)
    assert DualEncoder.from_pretrained(clip_folder).save_pretrained(tmp_path / "clip").form == "clip"


def test_new_weights_in_a_proven_form_are_written_without_opening_them(
    towers: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    parts = (towers.backend, towers.processor, folder, True)
    proven, card = saving.save(*parts, name="towers", card=towers.card)
    with torch.no_grad():
        towers.logit_scale.add_(0.25)
    opened: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(saving, "check_written", lambda where, *_: opened.append(where))
        for name in ("golden_embeddings", "settings_fingerprint", "hash_towers"):
            patch.setattr(saving, name, lambda *_, name=name: pytest.fail(f"{name} during a run"))
        assert saving.save(*parts, name="towers", card=card, proven=proven)[0] == proven
        assert opened == []
        body = json.loads((folder / "clipkit.json").read_text())
        assert not {"golden", "fingerprint"} & set(body)
        assert all(set(file) == {"size", "xxh3"} for file in body["files"].values())
        assert DualEncoder.from_pretrained(folder).fingerprint().difference(towers.fingerprint()) == []
    with monkeypatch.context() as patch:
        patch.setattr(saving, "check_written", lambda where, *_: opened.append(where))
        saving.save(*parts, name="towers", card=card)
        assert len(opened) == 1
    again = DualEncoder.from_pretrained(folder)
    assert again.fingerprint().difference(towers.fingerprint()) == []


def test_a_folder_that_opens_as_another_model_is_not_published(
    towers: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_native = saving._write_native

    def spoilt(*arguments: Any) -> Any:
        saved, folder = write_native(*arguments), arguments[2]
        weights = load_file(folder / "heads.safetensors")
        save_file({name: tensor.flip(0) for name, tensor in weights.items()}, folder / "heads.safetensors")
        return saved

    monkeypatch.setattr(saving, "_write_native", spoilt)
    with pytest.raises(ModelError, match=r"does not open as it was: .*embeddings differ by"):
        towers.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
