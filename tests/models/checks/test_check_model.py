"""Ten faults, each planted in every form of folder that can carry it, and each named."""

from __future__ import annotations

import copy
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
from command import clipkit
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.files import dump_json, sha256_file
from clipkit.models.checks.check_model import Report, check_model
from clipkit.models.checks.compare_models import compare_models
from clipkit.models.checks.finding import about
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.loading import manifest

Edit = Callable[[Path], object]


@pytest.fixture(scope="session")
def healthy(
    clip_folder: Path, siglip_folder: Path, open_clip_arch: Any, word_tokenizer: Any, tmp_path_factory: Any
) -> dict[str, Path]:
    """One folder of each form, as `save_pretrained` writes it."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

    root: Path = tmp_path_factory.mktemp("healthy")
    arch = open_clip_arch("tiny-healthy", quick_gelu=True)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(arch)
    layers: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    layers |= {"num_attention_heads": 2, "initializer_range": 0.2}  # so that activations show
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
        "vtde": DualEncoder.from_towers(
            copy.deepcopy(vision),
            copy.deepcopy(bert),
            word_tokenizer,
            dim=12,
            image_processor=ViTImageProcessor(size=SQUARE, resample=3),
            image_pooling="pooler",
            text_pooling="pooler",
        ),
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
    refused: bool = False  # at opening, before there are embeddings


FAULTS = {
    "activation": Fault(
        "clip", "activation", in_json("config.json", vision_config__hidden_act="gelu", text_config__hidden_act="gelu")
    ),
    "activation of the texts": Fault("clip", "activation", in_json("config.json", text_config__hidden_act="gelu")),
    "activation, SigLIP": Fault("siglip", "activation", in_json("config.json", vision_config__hidden_act="quick_gelu")),
    "activation, open_clip": Fault("open_clip", "activation", in_json(OPEN_CLIP, model_cfg__quick_gelu=False)),
    "activation, towers": Fault("towers", "activation", in_json("vision/config.json", hidden_act="quick_gelu")),
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
    "padding side, SigLIP": Fault("siglip", "padding", in_json("tokenizer_config.json", padding_side="left")),
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
    "pooling": Fault("clip", "pooling", in_json("config.json", text_config__eos_token_id=7), refused=True),
    "pooling, open_clip": Fault("open_clip", "pooling", in_json(OPEN_CLIP, model_cfg__text_cfg__pool_type="last")),
    "pooling of images, open_clip": Fault(
        "open_clip", "pooling", in_json(OPEN_CLIP, model_cfg__vision_cfg__pool_type="avg")
    ),
    "pooling, towers": Fault("towers", "pooling", in_json("clipkit.json", settings__text_pooling="cls")),
    "activation, VisionTextDualEncoder": Fault(
        "vtde", "activation", in_json("config.json", vision_config__hidden_act="quick_gelu")
    ),
    "filter, VisionTextDualEncoder": Fault("vtde", "resize filter", in_json(IMAGES, resample=2)),
    "std, VisionTextDualEncoder": Fault("vtde", "mean and std", in_json(IMAGES, image_std=[0.2, 0.2, 0.2])),
    "case, VisionTextDualEncoder": Fault("vtde", "case", in_json("tokenizer.json", normalizer=None)),
    "scale, VisionTextDualEncoder": Fault("vtde", "logit scale", scaled("model.safetensors"), unseen=True),
    "pooling, VisionTextDualEncoder": Fault("vtde", "pooling", in_json("clipkit.json", settings__text_pooling="mean")),
    "pooling of images, towers": Fault("towers", "pooling", in_json("clipkit.json", settings__image_pooling="mean")),
}


def signed_again(folder: Path) -> None:
    """As someone would leave a folder who also mends the hashes."""
    path = folder / manifest.NAME
    body = json.loads(path.read_text())
    for name in body["files"]:
        body["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    body["sha256"] = manifest._own_hash(body)
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


THE_TEN = ("activation", "filter", "antialias", "crop", "mean", "padding", "case", "EOS", "scale", "pooling")
WORDS = {"mean and std": "mean|std", "padding": "padding|pad token", "end token (EOS)": "EOS", "pooling": "pool"}


@pytest.mark.parametrize("case", THE_TEN)
def test_a_fault_in_the_files_is_named_beside_the_file(case: str, planted: Callable[[str], Path]) -> None:
    folder = planted(case)
    with pytest.raises(CorruptArtefact, match=r"not what was saved|bytes instead of"):
        DualEncoder.from_pretrained(folder)
    report = check_model(folder)
    assert {"files", FAULTS[case].named} <= errors(report)
    assert report.exit_code == 6


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_where_all_hashes_fit(case: str, planted: Callable[[str], Path]) -> None:
    folder, fault = planted(case), FAULTS[case]
    signed_again(folder)
    with pytest.raises(ModelError if fault.refused else CorruptArtefact) as refused:
        DualEncoder.from_pretrained(folder)
    assert fault.refused or "not the model that was saved" in refused.value.message
    assert re.search(WORDS.get(fault.named, fault.named), refused.value.message)
    report = check_model(folder)
    assert fault.named in errors(report)
    assert "files" not in errors(report)
    assert fault.unseen or fault.refused or any("embeddings of the built-in" in effect for effect in report.effects)


@pytest.mark.parametrize("case", [case for case in FAULTS if not FAULTS[case].refused])
def test_a_comparison_names_the_fault(case: str, planted: Callable[[str], Path], healthy: Any) -> None:
    fault = FAULTS[case]
    found = compare_models(healthy[fault.form], planted(case))
    assert fault.named in {about(key) for key, _, _ in found.differences}
    assert found.exit_code == 6
    worst = max(value or 0 for value in found.embeddings.values())
    assert worst == 0 if fault.unseen else worst > 10 * manifest.TOLERANCE  # the golden inputs show it clearly
    if case.split(",")[0] in ("filter", "antialias", "crop", "mean", "std", "crop of a larger image"):
        assert "images: preprocessing alone" in str(found)
    if "activation" in case:
        assert "weights, activation or pooling" in str(found)


def test_a_comparison_says_which_model_does_not_open(planted: Callable[[str], Path], healthy: Any) -> None:
    folder = planted("pooling")
    with pytest.raises(CorruptArtefact, match="does not open: the text tower pools at token 7") as refused:
        compare_models(healthy["clip"], folder)
    assert refused.value.where == str(folder)


@pytest.mark.parametrize("form", ["clip", "siglip", "open_clip", "towers", "vtde"])
def test_healthy_models_have_no_findings(form: str, healthy: dict[str, Path]) -> None:
    report = check_model(healthy[form])
    assert report.findings == []
    assert "healthy: it is the model that was saved" in str(report)
    again = compare_models(healthy[form], healthy[form])
    assert again.ok
    assert "no recorded fact differs" in str(again)
    assert DualEncoder.from_pretrained(healthy[form]).verified


# --------------------------------------------------------------------------------------------------------- damage


def renamed(prefix: str) -> Edit:
    return in_weights("model.safetensors", lambda found: {prefix + name: each for name, each in found.items()})


def without_one() -> Edit:
    return in_weights(
        "model.safetensors", lambda found: {n: each for n, each in found.items() if n != "text_projection.weight"}
    )


def with_nan() -> Edit:
    return in_weights("model.safetensors", lambda found: found["visual_projection.weight"].view(-1)[3].fill_(math.nan))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


# what was done, what opening says where all hashes fit, what the doctor says
DAMAGE: dict[str, tuple[Edit, str, str]] = {
    "a cut file": (cut, "not a readable safetensors file", "cannot be read"),
    "a prefix": (renamed("module."), "wrapper's prefix", "every name begins with 'module.'"),
    "a missing key": (without_one(), "weights are missing and would be random", "weights are missing"),
    "NaN": (with_nan(), "holds NaN or infinity", "NaN or infinity"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_each_damage_is_refused_in_its_own_words(case: str, healthy: dict[str, Path], tmp_path: Path) -> None:
    edit, said, told = DAMAGE[case]
    folder = shutil.copytree(healthy["clip"], tmp_path / "broken")
    edit(folder)
    with pytest.raises(CorruptArtefact, match="a file of the model"):
        DualEncoder.from_pretrained(folder)
    signed_again(folder)
    with pytest.raises((CorruptArtefact, ModelError), match=said):
        DualEncoder.from_pretrained(folder)
    report = check_model(folder)
    assert any(told in finding.what for finding in report.findings)
    assert "weights" in errors(report)
    assert report.exit_code == 6


def test_the_doctor_goes_on_after_the_first_finding(healthy: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(healthy["clip"], tmp_path / "broken")
    for case in ("activation", "mean", "filter", "scale"):
        FAULTS[case].edit(folder)
    assert {"files", "activation", "mean and std", "resize filter", "logit scale"} <= errors(check_model(folder))


# ---------------------------------------------------------------------------------------------- without a record


LARGER = in_json(IMAGES, size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
# what is known of its family is held against a folder without clipkit.json: form, fault, level, what is named
KNOWN: dict[str, tuple[str, Edit, str, str]] = {
    "gelu": ("clip", FAULTS["activation"].edit, "warning", "activation"),
    "filter": ("clip", FAULTS["filter"].edit, "warning", "resize filter"),
    "antialias": ("clip", FAULTS["antialias"].edit, "warning", "antialias"),
    "crop": ("clip", FAULTS["crop"].edit, "warning", "crop"),
    "mean": ("clip", FAULTS["mean"].edit, "warning", "mean and std"),
    "case": ("clip", FAULTS["case"].edit, "warning", "case"),
    "no end token": ("clip", FAULTS["EOS"].edit, "error", "pooling"),
    "end token": ("clip", FAULTS["pooling"].edit, "error", "pooling"),
    "size": (
        "clip",
        in_json(IMAGES, size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),
        "error",
        "image size",
    ),
    "scale": (
        "clip",
        in_weights("model.safetensors", lambda found: found["logit_scale"].fill_(100.0)),
        "error",
        "logit scale",
    ),
    "no scale": (
        "clip",
        in_weights("model.safetensors", lambda found: found["logit_scale"].zero_()),
        "warning",
        "logit scale",
    ),
    "constant": (
        "clip",
        in_weights("model.safetensors", lambda found: found["vision_model.post_layernorm.weight"].zero_()),
        "error",
        "collapsed",
    ),
    "NaN": ("clip", with_nan(), "error", "weights"),
    "prefix": ("clip", renamed("module."), "error", "weights"),
    "SigLIP case": ("siglip", FAULTS["case, SigLIP"].edit, "warning", "case"),
    "SigLIP length": ("siglip", in_json("tokenizer_config.json", model_max_length=9), "error", "context length"),
    "SigLIP mean": ("siglip", in_json(IMAGES, image_mean=[0.48, 0.46, 0.41]), "warning", "mean and std"),
    "open_clip crop": ("open_clip", FAULTS["crop, open_clip"].edit, "warning", "crop"),
    "open_clip pooling": ("open_clip", FAULTS["pooling, open_clip"].edit, "error", "pooling"),
}


@pytest.mark.parametrize("case", KNOWN)
def test_what_is_known_of_a_family_is_held_against_it(case: str, healthy: dict[str, Path], tmp_path: Path) -> None:
    form, edit, level, named = KNOWN[case]
    folder = shutil.copytree(healthy[form], tmp_path / "broken")
    (folder / manifest.NAME).unlink()
    edit(folder)
    report = check_model(folder)
    assert (level, named) in {(finding.level, finding.about) for finding in report.findings}
    assert report.ok == (level == "warning")


def test_a_folder_without_a_record_is_unverified(
    family_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="clipkit"):
        assert not DualEncoder.from_pretrained(family_folder("clip")).verified
    assert "unverified" in caplog.text
    report = check_model(family_folder("clip"))
    assert report.findings == []
    assert "unverified" in str(report)
    assert report.as_dict()["verified"] is False


@pytest.mark.parametrize("family", ["metaclip_2", "altclip", "chinese_clip", "align"])
def test_every_family_is_healthy(family: str, family_folder: Callable[[str], Path]) -> None:
    assert check_model(family_folder(family)).findings == []


def test_an_edited_card_is_a_note(healthy: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(healthy["clip"], tmp_path / "edited")
    (folder / manifest.CARD).write_text("# My model")
    assert DualEncoder.from_pretrained(folder).verified
    report = check_model(folder)
    assert [(finding.level, finding.about) for finding in report.findings] == [("warning", "files")]
    assert report.exit_code == 0


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command_line(healthy: dict[str, Path], planted: Callable[[str], Path]) -> None:
    well, ill = healthy["clip"], planted("activation")
    done = clipkit("check", "model", well)
    assert (done.code, done.out.splitlines()[-1]) == (0, "healthy: it is the model that was saved")
    done = clipkit("check", "model", ill, "--json")
    found = json.loads(done.out)
    assert (done.code, found["ok"], found["verified"]) == (6, False, False)
    assert "activation" in {each["about"] for each in found["findings"]}
    done = clipkit("check", "model", well, ill)
    assert done.code == 6
    assert "image activation: quick_gelu in A, gelu in B" in done.out
    assert clipkit("check", "model", well, well, "--json").code == 0
