from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from plain import run_plain
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from clipkit.errors import UsageError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.golden import golden_images
from clipkit.models.saving.model_card import Card, base_of

Make = Callable[..., DualEncoder]
BLOCKS = re.compile(r"^With (\w+).*?:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def vtde(make_towers: Make) -> DualEncoder:
    torch.manual_seed(5)
    return make_towers(
        Dinov2Model(Dinov2Config(**SMALL, image_size=32, patch_size=8)),
        BertModel(BertConfig(**SMALL, vocab_size=200)),
        image_processor=ViTImageProcessor(size={"height": 32, "width": 32}),
        text_pooling="pooler",
    )


def of_open_clip(open_clip_arch: Callable[..., str]) -> DualEncoder:
    arch = open_clip_arch("tiny-card")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(arch)
    return DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch)


def test_every_block_of_every_card_gives_the_same_similarity(
    make_towers: Make,
    clip_folder: Path,
    siglip_folder: Path,
    open_clip_arch: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = {
        "clip": DualEncoder.from_pretrained(clip_folder),
        "siglip": DualEncoder.from_pretrained(siglip_folder),
        "vtde": vtde(make_towers),
        "towers": make_towers(),
        "mlp": make_towers(head="mlp", resize="shortest", text_pooling="last"),
        "open_clip": of_open_clip(open_clip_arch),
    }
    expected, native = {}, []
    for name, model in models.items():
        saved = model.save_pretrained(tmp_path / name)
        assert (saved.form == "towers") == (name in ("towers", "mlp"))
        golden_images()[3].save(tmp_path / name / "photo.jpg")
        expected[name] = (
            model.encode_images([tmp_path / name / "photo.jpg"]) @ model.encode_texts(["a caption"]).T
        ).item()
        blocks = dict(BLOCKS.findall((tmp_path / name / "README.md").read_text()))
        assert list(blocks) == ["clipkit", "open_clip" if name == "open_clip" else "transformers"]
        monkeypatch.chdir(tmp_path / name)
        exec(compile(blocks["clipkit"], name, "exec"), {})
        assert float(capsys.readouterr().out) == pytest.approx(expected[name], abs=1e-5)
        native.append(f"os.chdir({str(tmp_path / name)!r})\n{list(blocks.values())[1]}")
    printed = run_plain("import os\n" + "\n".join(native), tmp_path).split()
    assert [float(each) for each in printed] == pytest.approx(list(expected.values()), abs=1e-5)


LONGEST: dict[str, Any] = {"head": "mlp", "resize": "shortest", "image_pooling": "mean", "text_pooling": "last"}


@pytest.mark.parametrize("options", [{}, LONGEST, {**LONGEST, "image_mean": [0.3], "image_std": [0.2]}])
def test_the_loader_in_the_card_has_at_most_20_lines(
    options: dict[str, Any], make_towers: Make, tmp_path: Path
) -> None:
    channels = len(options.get("image_mean", "rgb"))
    make_towers(
        ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8, num_channels=channels)), **options
    ).save_pretrained(tmp_path / "saved")
    blocks = dict(BLOCKS.findall((tmp_path / "saved" / "README.md").read_text()))
    code = [line for line in blocks["transformers"].splitlines() if line.strip()]
    assert len(code) <= 20
    assert "clipkit" not in blocks["transformers"]


def test_a_card_says_what_it_is_given(towers: DualEncoder, tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "license": "cc-by-4.0",
        "base_model": "org/base",
        "data": "birds.csv",
        "pairs": 9000,
        "config": {"epochs": 5, "similar": ["Paired()"]},
        "metrics": {"retrieval/text_to_image_recall@1": 0.25},
        "n": {"retrieval/images": 500},
        "limits": "No medicine.",
    }
    towers.save_pretrained(tmp_path / "saved", card=facts)
    text = (tmp_path / "saved" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["base_model"] == "org/base"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert front["library_name"] == "clipkit"
    for words in (
        "birds.csv; 9,000 image-text pairs",
        '"epochs": 5',
        "recall@1 | 0.2500",
        "images 500",
        "No medicine.",
    ):
        assert words in text
    for words in (towers.fingerprint().hash, f"{sum(p.numel() for p in towers.backend.parameters()):,}", "softmax"):
        assert words in text
    assert "README.md" in json.loads((tmp_path / "saved" / "clipkit.json").read_text())["files"]


def test_without_facts_the_license_is_unknown_and_nothing_is_made_up(towers: DualEncoder, tmp_path: Path) -> None:
    towers.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"
    assert "Data: not said." in text
    assert "None were given" in text


def test_facts_stay_with_the_folder_and_metrics_with_the_weights(towers: DualEncoder, tmp_path: Path) -> None:
    towers.save_pretrained(tmp_path / "one", card={"license": "mit", "metrics": {"top1": 0.5}, "n": {"images": 3}})
    again = DualEncoder.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert "top1 | 0.5000" in (tmp_path / "two" / "README.md").read_text()
    with torch.no_grad():
        again.logit_scale.add_(0.1)
    again.save_pretrained(tmp_path / "three")
    text = (tmp_path / "three" / "README.md").read_text()
    assert "top1" not in text
    assert 'license: "mit"' in text
    with pytest.raises(UsageError, match="Did you mean license"):
        again.save_pretrained(tmp_path / "four", card={"licence": "mit"})


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("open_clip:ViT-B-32/openai", "open_clip:ViT-B-32/openai"),
        ("/home/me/model", None),
        ("ViTModel + BertModel", None),
    ],
)
def test_the_base_model_is_a_name_that_others_know(name: str, base: str | None) -> None:
    assert base_of(name) == base
    assert Card().license == "unknown"


def test_a_folder_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "birds").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_of("runs/birds") is None
    shutil.rmtree(tmp_path / "runs")
    assert base_of("runs/birds") == "runs/birds"
