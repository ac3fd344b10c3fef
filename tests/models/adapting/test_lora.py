"""LoRA: what trains, what is saved, and that what is saved is the model that was trained."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from clipkit.errors import CorruptArtefact, ModelError, ModelMismatch, UsageError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.config.train import TrainConfig
from clipkit.training.optimizer import parameter_groups

Images = list[Image.Image]
Make = Callable[..., DualEncoder]
Reopen = Callable[[DualEncoder, Path], DualEncoder]


def embeddings(model: DualEncoder, images: Images, texts: list[str]) -> Tensor:
    return torch.cat([model.encode_images(images), model.encode_texts(texts)])


def train(model: DualEncoder, images: Images, texts: list[str], steps: int = 3) -> set[str]:
    """A few steps; gives the names of what moved."""
    before = {name: tensor.clone() for name, tensor in model.backend.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        out = model(pixel_values=model.processor.images(images), **model.processor.texts(texts))
        logits = out.scale * (out.image @ out.text.T) + (0 if out.bias is None else out.bias)
        loss = logits.log_softmax(1).diagonal().sum() if out.bias is None else logits.sigmoid().sum()
        (-loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {name for name, tensor in model.backend.state_dict().items() if not torch.equal(tensor, before[name])}


def test_it_begins_as_the_base_and_trains_matrices_and_scalars_alone(
    any_model: DualEncoder, images: Images, texts: list[str]
) -> None:
    before = embeddings(any_model, images, texts)
    any_model.add_lora("both", rank=2)
    assert (embeddings(any_model, images, texts) - before).abs().max() < 1e-6
    moved = train(any_model, images, texts)
    assert any(".lora_A." in name and any_model.backend.belongs_to("image", name) for name in moved)
    assert any(".lora_B." in name and any_model.backend.belongs_to("text", name) for name in moved)
    rest = {name for name in moved if ".lora_" not in name}
    scalars = {name for name in rest if name.endswith(("logit_scale", "logit_bias"))}
    heads = {name for name in rest if f"backend.{name}" in any_model.fresh}
    assert rest == scalars | heads
    assert len(scalars) == 1 + (any_model.logit_bias is not None)
    assert bool(heads) == (any_model.backend.family == "towers")  # fresh heads train, pretrained ones do not
    assert (embeddings(any_model, images, texts) - before).abs().max() > 1e-2


def test_all_linear_layers_of_attention_and_mlp_are_adapted(any_model: DualEncoder) -> None:
    any_model.add_lora("both", rank=2)
    assert any_model.lora is not None
    for part in ("image", "text"):
        names = any_model.lora.parts[part].layers  # type: ignore[index]
        assert len(names) == 2 * 6, names  # two blocks of query, key, value, output, and the MLP's two
        assert not any("pooler" in name or "head." in name for name in names)


def test_the_merged_model_is_saved_while_training_goes_on(
    any_model: DualEncoder, images: Images, texts: list[str], tmp_path: Path, reopen: Reopen
) -> None:
    names = set(any_model.backend.state_dict())
    any_model.add_lora("both", rank=2)
    train(any_model, images, texts)
    expected = embeddings(any_model, images, texts)
    again = reopen(any_model, tmp_path / "saved")
    assert (embeddings(again, images, texts) - expected).abs().max() <= 1e-5
    assert set(again.backend.state_dict()) <= names  # no trace of peft
    assert not any("adapter" in path.name for path in (tmp_path / "saved").rglob("*"))
    assert again.fingerprint().difference(any_model.fingerprint()) == []
    assert any(".lora_" in name for name in any_model.backend.state_dict())
    assert torch.equal(embeddings(any_model, images, texts), expected)
    assert train(any_model, images, texts)

    expected = embeddings(any_model, images, texts)
    fingerprint = any_model.fingerprint()
    any_model.merge_lora()
    assert (embeddings(any_model, images, texts) - expected).abs().max() <= 1e-5
    assert any_model.fingerprint().difference(fingerprint) == []
    assert set(any_model.backend.state_dict()) == names
    assert any_model.lora is None
    assert any_model.merge_lora() is any_model


def test_merging_lets_the_weights_train_as_before(towers: DualEncoder) -> None:
    towers.freeze("text")
    before = {name: p.requires_grad for name, p in towers.named_parameters()}
    towers.add_lora("image", rank=2).merge_lora()
    assert {name: p.requires_grad for name, p in towers.named_parameters()} == before
    assert all("image_head" in name or "text_head" in name for name in towers.fresh)


def test_one_tower_alone_can_be_adapted(any_model: DualEncoder, images: Images, texts: list[str]) -> None:
    any_model.add_lora("text", rank=2)
    moved = train(any_model, images, texts)
    assert not any(".lora_" in name and any_model.backend.belongs_to("image", name) for name in moved)
    assert any(any_model.backend.belongs_to("image", name, head=False) for name in moved)  # trains as a whole
    with pytest.raises(UsageError, match="text tower has LoRA already"):
        any_model.add_lora("text")
    any_model.add_lora("image", rank=3)
    assert all(
        ".lora_" in name or any_model.backend.belongs_to("image", name) is False
        for name in train(any_model, images, texts)
        if any_model.backend.belongs_to("image", name, head=False)
    )


def test_the_base_does_not_drift(open_clip_arch: Callable[..., str], images: Images, texts: list[str]) -> None:
    import open_clip

    arch = open_clip_arch("tiny-drift")
    made, _, preprocess = open_clip.create_model_and_transforms(arch)
    model = DualEncoder.from_open_clip(made, preprocess, open_clip.get_tokenizer(arch), arch=arch)
    before = model.fingerprint()
    model.add_lora("both", rank=2)
    train(model, images, texts, steps=5)
    for name, parameter in model.backend.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    model.merge_lora()
    assert [line.partition(":")[0] for line in model.fingerprint().difference(before)] == [
        "logit scale (its logarithm)"
    ]


# -- which layers -------------------------------------------------------------------------------


def test_targets_are_names_of_layers(open_clip_arch: Callable[..., str], towers: DualEncoder) -> None:
    towers.add_lora("text", targets=["query", "value"])
    assert [name.rpartition(".")[2] for name in towers.lora.parts["text"].layers] == ["query", "value"] * 2
    with pytest.raises(ModelError, match=r"no layer called 'q_prj' that LoRA could adapt\. Did you mean q_proj"):
        towers.add_lora("image", targets=["q_prj"])
    import open_clip

    arch = open_clip_arch("tiny-targets")
    made, _, preprocess = open_clip.create_model_and_transforms(arch)
    model = DualEncoder.from_open_clip(made, preprocess, open_clip.get_tokenizer(arch), arch=arch)
    model.add_lora("image", targets=["attn"]).add_lora("text", targets=["c_fc", "v_proj"])
    assert len(model.lora.parts["image"].layers) == 2 * 4
    assert {name.rpartition(".")[2] for name in model.lora.parts["text"].layers} == {"c_fc", "v_proj"}
    adapted = {n for n, _ in model.backend.named_parameters() if ".lora_A." in n}
    assert len(adapted) == 8 + 4  # the text tower's names are endings of the image tower's


def test_towers_without_linear_layers_need_targets(
    make_towers: Make, vision_tower: Callable[[str], Any], images: Images, texts: list[str]
) -> None:
    model = make_towers(vision_tower("mobilenetv2_035"))
    with pytest.raises(ModelError, match="no linear layers in its blocks"):
        model.add_lora("image")
    model.add_lora("image", targets=["conv_pw"], rank=2)
    statistics = {name for name, _ in model.backend.named_buffers() if "running" in name}
    assert not statistics & train(model, images, texts)  # BatchNorm of the frozen base stands still


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_numbers_out_of_range_are_refused(towers: DualEncoder, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="rank must be at least 1"):
        towers.add_lora("image", **options)


def test_without_peft_the_extra_is_named(towers: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install -e \S*\[lora\]"):
        towers.add_lora("image")


# -- learning rates -----------------------------------------------------------------------------


def test_matrices_learn_fast_and_a_pretrained_scale_does_not(clip_folder: Path) -> None:
    model = DualEncoder.from_pretrained(clip_folder).add_lora("image", rank=2)
    config = TrainConfig("x", learning_rate=1e-5, head_learning_rate=5e-4)
    rates = {id(p): group["lr"] for group in parameter_groups(model, config) for p in group["params"]}
    named = dict(model.named_parameters())
    assert {rates[id(p)] for name, p in named.items() if ".lora_" in name} == {5e-4}
    assert rates[id(model.logit_scale)] == 1e-5
    assert {rates[id(p)] for name, p in named.items() if "text_model" in name} == {1e-5}
    assert set(rates) == {id(p) for p in named.values() if p.requires_grad}


# -- the adapter's own folder -------------------------------------------------------------------


def test_an_adapter_comes_back_on_its_base(
    any_model: DualEncoder, images: Images, texts: list[str], tmp_path: Path
) -> None:
    base = copy.deepcopy(any_model)
    any_model.add_lora("both", rank=2, alpha=6, dropout=0.1)
    train(any_model, images, texts)
    any_model.save_adapter(tmp_path / "adapter")
    names = {path.relative_to(tmp_path / "adapter").as_posix() for path in (tmp_path / "adapter").rglob("*.*")}
    assert names == {"adapter.json", "trained.safetensors"} | {
        f"{part}/adapter_{what}" for part in ("image", "text") for what in ("config.json", "model.safetensors")
    }
    scalars = [name for name in load_file(tmp_path / "adapter" / "trained.safetensors") if "logit" in name]
    assert len(scalars) == 1 + (any_model.logit_bias is not None)

    again = base.load_adapter(tmp_path / "adapter")
    assert torch.equal(embeddings(again, images, texts), embeddings(any_model, images, texts))
    assert again.fingerprint().difference(any_model.fingerprint()) == []
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (again, any_model)]
    assert trained[0] == trained[1]
    assert again.lora.parts == any_model.lora.parts
    assert train(again, images, texts)


def test_peft_itself_opens_the_files(clip_folder: Path, images: Images, texts: list[str], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import CLIPModel

    model = DualEncoder.from_pretrained(clip_folder).add_lora("image", rank=2)
    train(model, images, texts)
    model.save_adapter(tmp_path / "adapter")
    plain = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = model.processor.images(images)
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        before = plain.vision_model(pixels).pooler_output
        adapted = PeftModel.from_pretrained(plain.vision_model, tmp_path / "adapter" / "image").eval()
        found = adapted(pixel_values=pixels).pooler_output
        expected = model.vision_features(pixels)
    assert (found - expected).abs().max() < 1e-5
    assert (before - expected).abs().max() > 1e-2


def test_a_whole_tower_that_trained_beside_it_is_in_the_folder(
    towers: DualEncoder, images: Images, texts: list[str], tmp_path: Path
) -> None:
    base = copy.deepcopy(towers)
    towers.add_lora("image", rank=2)
    train(towers, images, texts)
    towers.save_adapter(tmp_path / "adapter")
    again = base.load_adapter(tmp_path / "adapter")
    assert torch.equal(embeddings(again, images, texts), embeddings(towers, images, texts))


def test_another_base_is_refused(any_model: DualEncoder, tmp_path: Path) -> None:
    base, other = copy.deepcopy(any_model), copy.deepcopy(any_model)
    any_model.add_lora("image", rank=2).save_adapter(tmp_path / "adapter")
    with torch.no_grad():
        other.logit_scale.fill_(1.0)  # the adapter brings its own
    copy.deepcopy(other).load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        weight = next(
            p for n, p in other.backend.named_parameters() if other.backend.belongs_to("image", n) and p.ndim > 1
        )
        weight.view(-1)[0] += 1e-3
    with pytest.raises(ModelMismatch, match=r"trained on another model than this one: image weights"):
        other.load_adapter(tmp_path / "adapter")
    resized = copy.deepcopy(base).resize(image_size=2 * base.processor.image_size)
    with pytest.raises(ModelMismatch, match="image"):
        resized.load_adapter(tmp_path / "adapter")
    with pytest.raises(UsageError, match="has a LoRA adapter already"):
        any_model.load_adapter(tmp_path / "adapter")


def test_damage_is_found(towers: DualEncoder, tmp_path: Path) -> None:
    base = copy.deepcopy(towers)
    folder = tmp_path / "adapter"
    towers.add_lora("both", rank=2).save_adapter(folder)
    files = sorted(path for path in folder.rglob("*.*") if path.is_file())
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        half = len(whole) // 2
        for damaged in (whole[:half], whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises((CorruptArtefact, ModelError)) as caught:
                copy.deepcopy(base).load_adapter(folder)
            assert path.name in str(caught.value)
        path.unlink()
        with pytest.raises((CorruptArtefact, ModelError), match=path.name):
            copy.deepcopy(base).load_adapter(folder)
        path.write_bytes(whole)
    base.load_adapter(folder)


def test_what_an_adapter_cannot_hold_is_refused(towers: DualEncoder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no LoRA adapter"):
        towers.save_adapter(tmp_path / "adapter")
    towers.add_lora("image", rank=2)
    bias = next(p for name, p in towers.named_parameters() if name.endswith("base_layer.bias"))
    bias.requires_grad_(True)
    with pytest.raises(ModelError, match=r"an adapter cannot hold(?s:.)*base_layer\.bias"):
        towers.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_only_an_adapter_is_overwritten(towers: DualEncoder, tmp_path: Path) -> None:
    towers.add_lora("image", rank=2).save_adapter(tmp_path / "adapter")
    with pytest.raises(UsageError, match="not empty"):
        towers.save_adapter(tmp_path / "adapter")
    towers.save_adapter(tmp_path / "adapter", overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        towers.save_adapter(tmp_path / "thesis", overwrite=True)


# -- peft, as it is -----------------------------------------------------------------------------


def test_pefts_own_packed_attention_is_why_it_is_taken_apart() -> None:
    """If this fails, peft has mended its MultiheadAttention, and attention.py may go."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(16, 2, batch_first=True)})
    plain, x = copy.deepcopy(model["attn"]), torch.randn(2, 5, 16)
    config = LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False)
    with warnings.catch_warnings(action="ignore"):
        inject_adapter_in_model(config, model)
    layer = model["attn"]
    with torch.no_grad():
        plain.in_proj_weight += layer.get_delta_weight("default")
        for _ in range(2):
            plain.out_proj.weight += layer.base_layer.out_proj.get_delta_weight("default")
        assert (layer(x, x, x)[0] - plain(x, x, x)[0]).abs().max() < 1e-5
