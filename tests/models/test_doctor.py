"""Ten faults, each planted in every form of folder that can carry it, and each named."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit.errors import CorruptArtefact
from clipkit.files import dump_json, sha256_file
from clipkit.models import artefact
from clipkit.models.comparison import compare_models
from clipkit.models.doctor import Report, examine
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.known_answers import about

Edit = Callable[[Path], object]


@pytest.fixture(scope="session")
def healthy(
    clip_folder: Path, siglip_folder: Path, open_clip_arch: Any, word_tokenizer: Any, tmp_path_factory: Any
) -> dict[str, Path]:
    """One folder of each form, as `save_pretrained` writes it."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    root: Path = tmp_path_factory.mktemp("healthy")
    arch = open_clip_arch("tiny-healthy", quick_gelu=True)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(arch)
    layers: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    layers["num_attention_heads"] = 2
    vision = ViTModel(ViTConfig(**layers, image_size=32, patch_size=8))
    bert = BertModel(BertConfig(**layers, vocab_size=200))
    siglip = DualEncoder.from_pretrained(siglip_folder)
    with torch.no_grad():
        siglip.logit_scale.fill_(math.log(10))  # transformers begins at 0, which a trained model is not
    models = {
        "clip": DualEncoder.from_pretrained(clip_folder),
        "siglip": siglip,
        "open_clip": DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch),
        "towers": DualEncoder.from_towers(vision, bert, word_tokenizer, dim=12, resize="shortest"),
    }
    for name, each in models.items():
        each.save_pretrained(root / name)
    return {name: root / name for name in models}


# ----------------------------------------------------------------------------------------------------------- faults


def in_json(name: str, **changes: Any) -> Edit:
    """Set keys, by their dotted path with __ for the dot; None deletes."""

    def edit(folder: Path) -> None:
        body = json.loads((folder / name).read_text(encoding="utf-8"))
        for path, value in changes.items():
            *parents, last = path.split("__")
            at = body
            for parent in parents:
                at = at[parent]
            at[last] = value
        text = dump_json(body)
        (folder / name).write_text(text, encoding="utf-8")

    return edit


def in_weights(name: str, change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        weights = load_file(folder / name)
        changed = change(weights)
        save_file(changed if isinstance(changed, dict) else weights, folder / name, {"format": "pt"})

    return edit


def in_tokenizer(**changes: Any) -> Edit:
    """tokenizer.json, read by the plain class that believes it."""

    def edit(folder: Path) -> None:
        in_json("tokenizer_config.json", tokenizer_class="TokenizersBackend")(folder)
        in_json("tokenizer.json", **changes)(folder)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def scaled(name: str) -> Edit:
    return in_weights(name, lambda weights: weights.update(logit_scale=weights["logit_scale"] + 0.5))


IMAGES, OPEN_CLIP, SQUARE = "preprocessor_config.json", "open_clip_config.json", {"height": 32, "width": 32}
MARK = "clipkit_transform"


class Fault(NamedTuple):
    form: str
    named: str
    edit: Edit
    unseen: bool = False  # by the golden embeddings: only logits change


FAULTS = {
    "activation": Fault(
        "clip", "activation", in_json("config.json", vision_config__hidden_act="gelu", text_config__hidden_act="gelu")
    ),
    "activation of the texts": Fault("clip", "activation", in_json("config.json", text_config__hidden_act="gelu")),
    "activation, SigLIP": Fault("siglip", "activation", in_json("config.json", vision_config__hidden_act="gelu")),
    "activation, open_clip": Fault("open_clip", "activation", in_json(OPEN_CLIP, model_cfg__quick_gelu=False)),
    "activation, towers": Fault("towers", "activation", in_json("vision/config.json", hidden_act="gelu_new")),
    "filter": Fault("clip", "resize filter", in_json(IMAGES, resample=2)),
    "filter, SigLIP": Fault("siglip", "resize filter", in_json(IMAGES, resample=2)),
    "filter, open_clip": Fault(
        "open_clip", "resize filter", in_json(OPEN_CLIP, preprocess_cfg__interpolation="bilinear")
    ),
    "filter, towers": Fault("towers", "resize filter", in_json(IMAGES, clipkit_transform__filter="bilinear")),
    "antialias": Fault("clip", "antialias", in_json(IMAGES, resample=0)),  # of the filters, nearest has none
    "antialias, SigLIP": Fault("siglip", "antialias", in_json(IMAGES, resample=0)),
    "crop": Fault("clip", "crop", in_json(IMAGES, do_center_crop=False, size=SQUARE)),
    "crop, open_clip": Fault("open_clip", "crop", in_json(OPEN_CLIP, preprocess_cfg__resize_mode="squash")),
    "crop, towers": Fault("towers", "crop", in_json(IMAGES, clipkit_transform__resize="squash")),
    "crop of a larger image": Fault("clip", "resize", in_json(IMAGES, size={"shortest_edge": 36})),
    "mean": Fault("clip", "mean and std", in_json(IMAGES, image_mean=[0.5, 0.5, 0.5])),
    "std": Fault("clip", "mean and std", in_json(IMAGES, image_std=[0.229, 0.224, 0.225])),
    "mean, open_clip": Fault("open_clip", "mean and std", in_json(OPEN_CLIP, preprocess_cfg__mean=[0.5, 0.5, 0.5])),
    "mean, towers": Fault("towers", "mean and std", in_json(IMAGES, clipkit_transform__mean=[0.485, 0.456, 0.406])),
    "padding": Fault("clip", "padding", in_json("tokenizer_config.json", padding_side="left")),
    "padding, SigLIP": Fault("siglip", "padding", in_json("tokenizer_config.json", pad_token="<eos>")),
    "padding side, SigLIP": Fault("siglip", "padding", in_json("tokenizer_config.json", padding_side="right")),
    "padding, towers": Fault(
        "towers", "padding", in_json("clipkit.json", settings__padding="max_length", settings__attention_mask=False)
    ),
    "mask, towers": Fault("towers", "attention mask", in_json("clipkit.json", settings__attention_mask=False)),
    "case": Fault("clip", "case", in_tokenizer(normalizer=None)),
    "case, SigLIP": Fault(
        "siglip",
        "case",
        in_tokenizer(normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
    ),
    "case, open_clip": Fault(
        "open_clip", "case", in_json(OPEN_CLIP, model_cfg__text_cfg__tokenizer_kwargs={"clean": "whitespace"})
    ),
    "case, towers": Fault("towers", "case", in_json("tokenizer.json", normalizer=None)),
    "EOS": Fault("clip", "end token (EOS)", in_tokenizer(post_processor=None)),
    "scale": Fault("clip", "logit scale", scaled("model.safetensors"), unseen=True),
    "scale, SigLIP": Fault("siglip", "logit scale", scaled("model.safetensors"), unseen=True),
    "scale, open_clip": Fault("open_clip", "logit scale", scaled("open_clip_model.safetensors"), unseen=True),
    "scale, towers": Fault("towers", "logit scale", scaled("heads.safetensors"), unseen=True),
    "pooling": Fault("clip", "pooling", in_json("config.json", text_config__eos_token_id=7)),
    "pooling, open_clip": Fault("open_clip", "pooling", in_json(OPEN_CLIP, model_cfg__text_cfg__pool_type="last")),
    "pooling of images, open_clip": Fault(
        "open_clip", "pooling", in_json(OPEN_CLIP, model_cfg__vision_cfg__pool_type="avg")
    ),
    "pooling, towers": Fault("towers", "pooling", in_json("clipkit.json", settings__text_pooling="cls")),
    "pooling of images, towers": Fault("towers", "pooling", in_json("clipkit.json", settings__image_pooling="mean")),
}


def signed_again(folder: Path) -> None:
    """As someone would leave a folder who also mends the hashes."""
    path = folder / artefact.NAME
    body = json.loads(path.read_text())
    for name in body["files"]:
        body["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    body["sha256"] = artefact._own_hash(body)
    path.write_text(dump_json(body))


@pytest.fixture
def planted(healthy: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def plant(case: str) -> Path:
        folder = shutil.copytree(healthy[FAULTS[case].form], tmp_path / "broken")
        FAULTS[case].edit(folder)
        return folder

    return plant


def errors(report: Report) -> set[str]:
    return {finding.about for finding in report.findings if finding.level == "error"}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_in_the_files_is_named_beside_the_file(case: str, planted: Callable[[str], Path]) -> None:
    folder = planted(case)
    with pytest.raises(CorruptArtefact, match=r"not what was saved|bytes instead of"):
        DualEncoder.from_pretrained(folder)
    report = examine(folder)
    assert {"files", FAULTS[case].named} <= errors(report)
    assert report.exit_code == 6


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_where_all_hashes_fit(case: str, planted: Callable[[str], Path], healthy: Any) -> None:
    folder, fault = planted(case), FAULTS[case]
    signed_again(folder)
    with pytest.raises(CorruptArtefact, match="not the model that was saved") as refused:
        DualEncoder.from_pretrained(folder)
    word = {"mean and std": "mean|std", "end token (EOS)": "EOS"}.get(fault.named, fault.named)
    assert re.search(word, refused.value.message)
    report = examine(folder)
    assert fault.named in errors(report)
    assert "files" not in errors(report)
    assert fault.unseen or "golden embeddings" in errors(report)


@pytest.mark.parametrize("case", FAULTS)
def test_a_comparison_names_the_fault(case: str, planted: Callable[[str], Path], healthy: Any) -> None:
    fault = FAULTS[case]
    found = compare_models(healthy[fault.form], planted(case))
    assert fault.named in {about(key) for key, _, _ in found.differences}
    assert found.exit_code == 6
    worst = max(value or 0 for value in found.embeddings.values())
    assert worst == 0 if fault.unseen else worst > 10 * artefact.TOLERANCE  # the golden inputs show it clearly
    images = case.split(",")[0] in ("filter", "antialias", "crop", "mean", "std", "crop of a larger image")
    if images:
        assert "images: preprocessing alone" in str(found)
    if "activation" in case:
        assert "weights, activation or pooling" in str(found)


def test_healthy_models_have_no_findings(healthy: dict[str, Path]) -> None:
    for folder in healthy.values():
        report = examine(folder)
        assert report.findings == []
        assert "healthy: it is the model that was saved" in str(report)
        again = compare_models(folder, folder)
        assert again.ok
        assert "no recorded fact differs" in str(again)
        assert DualEncoder.from_pretrained(folder).verified
