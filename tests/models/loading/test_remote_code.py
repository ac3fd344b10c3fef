"""Folders whose configs ask for code of their own: nothing of it runs unless the user said so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.tokenizer import HFTokenizer
from transformers import ViTConfig, ViTModel

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.models.checks.check_model import check_model
from clipkit.models.checks.compare_models import compare_models
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.loading.remote_code import refuse_code

CODE = """
from pathlib import Path
from transformers import BertModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
Path({canary!r}).write_text("owned")
class Config(CLIPConfig): model_type = "evil"
class Model(CLIPModel): config_class = Config
class Images(CLIPImageProcessorPil): pass
class Tokenizer(CLIPTokenizer): pass
"""
TOKENIZER: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}}
IMAGES: dict[str, Any] = {"auto_map": {"AutoImageProcessor": "code.Images"}}
MODEL: dict[str, Any] = {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What the code of a folder writes where it runs."""
    return tmp_path / "canary"


@pytest.fixture
def plant(clip_folder: Path, tmp_path: Path, canary: Path) -> Callable[..., Path]:
    """A CLIP with code beside it, and configs changed so that they name it."""

    def make(**changes: dict[str, Any]) -> Path:
        folder = shutil.copytree(clip_folder, tmp_path / "asks")
        (folder / "code.py").write_text(CODE.format(canary=str(canary)))
        for name, values in changes.items():
            edit(folder / f"{name}.json", values)
        return folder

    return make


def edit(path: Path, values: dict[str, Any]) -> None:
    """Changes a JSON file; None takes a key away."""
    found = (json.loads(path.read_text()) if path.is_file() else {}) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def code_in(name: str, folder: Path) -> dict[str, Any]:
    """The same image processor, in the folder's processor_config.json or in a file of its own."""
    found = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    return {"image_processor": found | IMAGES} if name == "processor_config" else found | IMAGES


CONFIGS: dict[str, Callable[[Path], dict[str, dict[str, Any]]]] = {
    "model": lambda f: {"config": {**MODEL, "model_type": "evil"}},
    "tokenizer": lambda f: {"tokenizer_config": {**TOKENIZER, "tokenizer_class": "Tokenizer"}},
    "images": lambda f: {"processor_config": code_in("processor_config", f)},
    "images, old form": lambda f: {"preprocessor_config": code_in("preprocessor_config", f)},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_runs_no_code_unasked(case: str, plant: Callable[..., Path], clip_folder: Path, canary: Path) -> None:
    folder = plant(**CONFIGS[case](clip_folder))
    for open_it in (DualEncoder.from_pretrained, DualEncoder.from_config, lambda f: compare_models(f, clip_folder)):
        # a comparison calls any folder that does not open corrupt, as the doctor's exit code does
        with pytest.raises((ModelError, CorruptArtefact), match=r"asks to run its own code \(.*auto_map"):
            open_it(folder)
    report = check_model(folder)
    assert [finding.about for finding in report.findings if finding.level == "error"] == ["remote code"]
    assert "trust_remote_code=True" in report.findings[0].fix
    for towers in (
        (folder, clip_folder, clip_folder),
        (clip_folder, folder, clip_folder),
        (clip_folder,) * 2 + (folder,),
    ):
        with pytest.raises(ModelError, match="asks to run its own code"):
            DualEncoder.from_towers(*towers)
    assert not canary.exists()


def test_the_user_can_agree(plant: Callable[..., Path], canary: Path) -> None:
    folder = plant(tokenizer_config={**TOKENIZER, "tokenizer_class": "Tokenizer"})
    assert type(DualEncoder.from_pretrained(folder, trust_remote_code=True).processor.text_side.tokenizer).__name__
    assert canary.exists()  # so the tests beside this one would notice


def test_towers_hand_the_agreement_on_to_the_image_processor(
    plant: Callable[..., Path], clip_folder: Path, canary: Path
) -> None:
    folder = plant(**CONFIGS["images, old form"](clip_folder))
    (folder / "processor_config.json").unlink()
    ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ).save_pretrained(folder)
    model = DualEncoder.from_towers(folder, clip_folder, clip_folder, dim=8, trust_remote_code=True)
    assert type(model.processor.image_side.image_processor).__name__ == "Images"
    assert canary.exists()


# -------------------------------------------------------------------------------------------------------- open_clip


@pytest.fixture
def open_clip_folder(open_clip_arch: Callable[..., str], plant: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of open_clip whose tokenizer is the one of transformers, with code."""
    asks = plant(tokenizer_config={**TOKENIZER, "tokenizer_class": "Tokenizer"})
    plain = shutil.copytree(asks, tmp_path / "plain")
    edit(plain / "tokenizer_config.json", {"auto_map": None, "tokenizer_class": "CLIPTokenizer"})
    tokenizer = HFTokenizer(str(plain), context_length=20)
    text = {
        "context_length": 20,
        "vocab_size": 700,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "hf_tokenizer_name": str(asks),
    }
    arch = open_clip_arch("asks-for-code", text_cfg=text)
    save_for_hf(open_clip.create_model(arch), tokenizer, open_clip.get_model_config(arch), tmp_path / "oc", True)
    return tmp_path / "oc"


def in_text_config(folder: Path, **values: Any) -> None:
    path = folder / "open_clip_config.json"
    body = json.loads(path.read_text())
    body["model_cfg"]["text_cfg"] |= values
    path.write_text(json.dumps(body))


def own_tokenizer(folder: Path) -> None:
    in_text_config(folder, tokenizer_kwargs={"trust_remote_code": True})
    edit(folder / "tokenizer_config.json", {**TOKENIZER, "tokenizer_class": "Tokenizer"})
    shutil.copy(folder.parent / "asks" / "code.py", folder)


def named_tokenizer(folder: Path) -> None:
    in_text_config(folder, tokenizer_kwargs={"trust_remote_code": True})
    for path in folder.glob("*token*"):
        path.unlink()


def named_tokenizer_alone(folder: Path) -> None:
    named_tokenizer(folder)
    in_text_config(folder, tokenizer_kwargs={})


def named_tower(folder: Path) -> None:
    edit(folder.parent / "asks" / "config.json", {**MODEL, "model_type": "evil"})
    in_text_config(folder, hf_model_name=str(folder.parent / "asks"))


def saved_tower(folder: Path) -> None:
    edit(folder.parent / "asks" / "config.json", {**MODEL, "model_type": "evil"})
    shutil.copytree(folder.parent / "asks", folder / "text_config")
    in_text_config(folder, hf_model_name="org/name")


OPEN_CLIP = [own_tokenizer, named_tokenizer, named_tokenizer_alone, named_tower, saved_tower]


@pytest.mark.parametrize("change", OPEN_CLIP)
def test_a_config_of_open_clip_runs_no_code_unasked(
    change: Callable[[Path], None], open_clip_folder: Path, canary: Path
) -> None:
    assert DualEncoder.from_pretrained(open_clip_folder).encode_texts(["a cat"]).shape == (1, 16)
    change(open_clip_folder)
    for open_it in (DualEncoder.from_pretrained, DualEncoder.from_config):
        with pytest.raises(ModelError, match="asks to run its own code"):
            open_it(f"open_clip:{open_clip_folder}")
    assert "remote code" in {finding.about for finding in check_model(open_clip_folder).findings}
    assert not canary.exists()


def test_an_architecture_runs_no_code_unasked(
    open_clip_arch: Callable[..., str], open_clip_folder: Path, canary: Path
) -> None:
    text = {"hf_tokenizer_name": str(open_clip_folder.parent / "asks"), "tokenizer_kwargs": {"trust_remote_code": True}}
    text |= {"context_length": 20, "vocab_size": 700, "width": 16, "heads": 2, "layers": 1}
    arch = open_clip_arch("agrees-by-itself", text_cfg=text)
    with pytest.raises(ModelError, match=r"asks to run its own code|custom code"):
        DualEncoder.from_config(f"open_clip:{arch}")
    assert not canary.exists()


def test_the_user_can_agree_in_open_clip(open_clip_folder: Path, canary: Path) -> None:
    named_tokenizer(open_clip_folder)
    torch.manual_seed(0)
    DualEncoder.from_pretrained(f"open_clip:{open_clip_folder}", trust_remote_code=True)
    assert canary.exists()


# ------------------------------------------------------------------------------------------------------------- keys


ASKING: list[tuple[dict[str, Any], str]] = [
    ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    ({"text_config": {"deeper": [{"auto_map": {"AutoConfig": "code.Config"}}]}}, "text_config.deeper.0.auto_map"),
    ({"custom_pipelines": {"a": {"impl": "code.Pipe"}}}, "custom_pipelines"),
    ({"custom_generate": "org/name"}, "custom_generate"),
    (
        {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}},
        "tokenizer_kwargs.trust_remote_code",
    ),
    ({"vision_config": {"_attn_implementation_internal": "org/kernel"}}, "vision_config._attn_implementation_internal"),
    ({"attn_implementation": {"text_config": "org/kernel:function"}}, "attn_implementation"),
]
NOT_ASKING: list[dict[str, Any]] = [
    {"auto_map": None, "custom_pipelines": {}, "trust_remote_code": False},
    {"attn_implementation": "sdpa", "_attn_implementation_internal": None, "hidden_act": "gelu"},
]


@pytest.mark.parametrize("name", ["config", "processor_config", "tokenizer_config", "open_clip_config"])
@pytest.mark.parametrize(("body", "key"), ASKING)
def test_each_key_is_refused_at_any_depth(name: str, body: dict[str, Any], key: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.json").write_text(json.dumps({"plain": 1, **body}))
    with pytest.raises(ModelError, match="asks to run its own code") as refused:
        refuse_code(tmp_path)
    assert key in refused.value.message
    assert refused.value.where == str(tmp_path / f"{name}.json")
    refuse_code(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("body", NOT_ASKING)
def test_what_names_no_code_is_no_reason_to_refuse(body: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(body))
    refuse_code(tmp_path)
