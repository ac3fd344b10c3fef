from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, Siglip2Config, Siglip2Model

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.fingerprint import tower_hash

Images = list[Image.Image]


FAMILIES = ["clip", "metaclip_2", "altclip", "chinese_clip", "align", "siglip", "siglip2"]


def pipeline(folder: Path, images: Images, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """transformers alone, as its documentation shows it: embeddings and logits."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    siglip, align = (model.config.model_type == kind for kind in ("siglip", "align"))
    padding = {} if align else {"padding": "max_length" if siglip else True}  # ALIGN's processor brings its own
    length = {"max_length": 24} if align else {}  # of this tiny tower
    inputs = processor(text=texts, images=images, truncation=True, return_tensors="pt", **padding, **length)
    if siglip:
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        output = model(**inputs)
    return F.normalize(output.image_embeds), F.normalize(output.text_embeds), output.logits_per_image


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Path:
    return family_folder(request.param)


def test_embeddings_equal_the_whole_pipeline_of_transformers(folder: Path, images: Images, texts: list[str]) -> None:
    # transformers 5.23 leaves the case of what a fixed-size SigLIP 2 reads, though it was trained without
    image, text, logits = pipeline(folder, images, [t.lower() for t in texts] if folder.name == "siglip2" else texts)
    model = DualEncoder.from_pretrained(folder)
    assert (model.encode_images(images) - image).abs().max() < 1e-5
    assert (model.encode_texts(texts) - text).abs().max() < 1e-5
    found = model(pixel_values=model.processor.images(images), **model.processor.texts(texts))
    mine = found.scale * found.image @ found.text.T + (0 if found.bias is None else found.bias)
    assert (mine - logits).abs().max() < 1e-4
    assert model.similarity == ("sigmoid" if "siglip" in str(folder) else "softmax")


def test_a_saved_folder_opens_in_plain_transformers(
    folder: Path, images: Images, texts: list[str], tmp_path: Path
) -> None:
    model = DualEncoder.from_pretrained(folder)
    with torch.no_grad():
        next(model.backend.parameters()).mul_(1.01)
        model.logit_scale.add_(0.5)
    model.save_pretrained(tmp_path / "saved")
    image, text, logits = pipeline(tmp_path / "saved", images, texts)
    assert (model.encode_images(images) - image).abs().max() < 1e-5
    assert (model.encode_texts(texts) - text).abs().max() < 1e-5
    found = model(pixel_values=model.processor.images(images), **model.processor.texts(texts))
    mine = found.scale * found.image @ found.text.T + (0 if found.bias is None else found.bias)
    assert (mine - logits).abs().max() < 1e-4
    again = DualEncoder.from_pretrained(tmp_path / "saved")
    assert again.fingerprint().difference(model.fingerprint()) == []
    assert torch.equal(again.logit_scale, model.logit_scale)


def test_a_loaded_model_can_be_wrapped(folder: Path, images: Images) -> None:
    model = DualEncoder.from_transformers(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder))
    assert torch.equal(model.encode_images(images), DualEncoder.from_pretrained(folder).encode_images(images))


def test_a_cut_text_keeps_its_ends(folder: Path, texts: list[str]) -> None:
    processor = DualEncoder.from_pretrained(folder).processor
    whole, cut = (processor.texts([text])["input_ids"][0] for text in ("a cat", texts[3]))
    length = processor.context_length
    assert length == (16 if "siglip" in folder.name else 24)
    assert len(cut) == length < processor.token_counts(texts)[3]
    real = processor.token_counts(["a cat"])[0]
    assert cut[-1] == whole[real - 1]  # the end-of-text or separator token
    if folder.name not in ("siglip", "siglip2"):
        assert cut[0] == whole[0]  # and the start-of-text or class token


def test_siglip_reads_full_length_without_a_mask(siglip_folder: Path) -> None:
    padded = DualEncoder.from_pretrained(siglip_folder).processor.texts(["a cat"])
    assert padded["input_ids"].shape == (1, 16)
    assert "attention_mask" not in padded


@pytest.mark.parametrize("family", ["siglip", "siglip2", "clip"])
def test_case_does_not_matter_where_training_had_none(family: str, family_folder: Callable[[str], Path]) -> None:
    model = DualEncoder.from_pretrained(family_folder(family))
    shouted, whispered = model.encode_texts(["TWO DOGS on a Beach"]), model.encode_texts(["two dogs on a beach"])
    assert torch.equal(shouted, whispered)


def test_names_split_every_parameter(folder: Path) -> None:
    backend = DualEncoder.from_pretrained(folder).backend
    scalars = {id(p) for p in backend.logit_scale_and_bias()}
    for name, parameter in backend.named_parameters():
        owners = [part for part in ("image", "text") if backend.belongs_to(part, name)]
        if id(parameter) not in scalars and name != "model.temperature":
            assert len(owners) == 1, name
    assert {backend.belongs_to("image", n, head=False) for n in ("model.visual_projection.weight",)} == {False}


def test_a_frozen_image_tower_leaves_its_projection(folder: Path, images: Images) -> None:
    model = DualEncoder.from_pretrained(folder)
    before = tower_hash(model.backend, model.processor)
    model.freeze("image")
    trained = {n.removeprefix("backend.model.") for n, p in model.named_parameters() if p.requires_grad}
    expected = {"siglip": {"logit_scale", "logit_bias"}, "align": {"backend.logit_scale"}}
    head = {"logit_scale", "visual_projection.weight"}
    assert {n for n in trained if "text" not in n} == expected.get(folder.name.removesuffix("2"), head)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.1)
    assert tower_hash(model.backend, model.processor) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_gets_a_gradient(
    family: str, family_folder: Callable[[str], Path], images: Images, texts: list[str]
) -> None:
    model = DualEncoder.from_pretrained(family_folder(family))
    found = model(pixel_values=model.processor.images(images), **model.processor.texts(texts))
    (found.scale * found.image @ found.text.T).logsumexp(1).sum().backward()
    lacking = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert lacking <= {"backend.model.logit_bias"}  # a softmax reads none
    assert model.logit_scale.grad is not None


def add_token(folder: Path) -> None:
    """Gives the tower two words more, as transformers' own documentation does it."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra", "quagga"])
    model.text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_added_tokens_do_not_take_the_end_of_texts_place(clip_folder: Path, texts: list[str], tmp_path: Path) -> None:
    old = shutil.copytree(clip_folder, tmp_path / "old")
    add_token(old)
    config = json.loads((old / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # as in configs of 2022: transformers pools at the highest id
    (old / "config.json").write_text(json.dumps(config))
    model = DualEncoder.from_pretrained(old)
    ids = model.processor.texts(["a zebra on a beach"])["input_ids"]
    with torch.no_grad():
        tower = model.backend.model.text_model(input_ids=ids)
    end = ids[0].tolist().index(1)
    assert ids[0].argmax() != end  # where the zebra stands
    assert torch.equal(tower.pooler_output[0], tower.last_hidden_state[0, end])
    assert torch.equal(model.encode_texts(texts), DualEncoder.from_pretrained(clip_folder).encode_texts(texts))
    model.save_pretrained(tmp_path / "saved")
    _, text, _ = pipeline(tmp_path / "saved", [Image.new("RGB", (9, 9))], ["a zebra on a beach"])
    assert (model.encode_texts(["a zebra on a beach"]) - text).abs().max() < 1e-5


def test_an_end_of_text_that_no_text_has_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="pools at token 7, the tokenizer ends texts with 1"):
        DualEncoder.from_pretrained(folder)


def test_a_token_without_an_embedding_is_named(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    model = DualEncoder.from_pretrained(folder)
    assert model.encode_texts(["a cat"]).shape == (1, 16)
    with pytest.raises(ModelError, match="no embedding for the token 'zebra'"):
        model.encode_texts(["a zebra"])


def test_locked_features_stand_in_for_pixels(folder: Path, images: Images) -> None:
    model = DualEncoder.from_pretrained(folder)
    pixels = model.processor.images(images)
    features = model.vision_features(pixels)
    assert torch.equal(model(image_features=features).image, model(pixel_values=pixels).image)
    assert features.shape[1] == (16 if folder.name == "align" else 32)  # before the projection, where that is apart


Change = Callable[[Path], object]


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        changed = change(weights)
        save_file(changed if isinstance(changed, dict) else weights, folder / "model.safetensors", {"format": "pt"})

    return edit


def edit_config(**values: Any) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def pickled(content: Callable[[dict[str, Tensor]], Any] = dict, cut: int = 0) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "pytorch_model.bin"
        torch.save(content(load_file(folder / "model.safetensors")), path)
        (folder / "model.safetensors").unlink()
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])

    return edit


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


def with_nan(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights["text_projection.weight"][0] = torch.nan
    return weights


class Evil:
    """What a malicious checkpoint holds: unpickling calls print, or anything else."""

    def __reduce__(self) -> Any:
        return print, ("owned",)


BROKEN: dict[str, tuple[Change, type[Exception], str]] = {
    "missing key": (edit_weights(lambda w: w.pop("visual_projection.weight")), ModelError, "visual_projection.weight"),
    "left-over key": (edit_weights(lambda w: w.update(extra=torch.zeros(1))), ModelError, "no place for: extra"),
    "prefix": (edit_weights(lambda w: {f"module.{k}": v for k, v in w.items()}), ModelError, "prefix"),
    "shape": (edit_weights(lambda w: w.update({"text_projection.weight": torch.zeros(3, 3)})), ModelError, r"\(3, 3\)"),
    "NaN": (edit_weights(lambda w: w["text_projection.weight"][0].fill_(torch.nan)), ModelError, "NaN"),
    "no config": (lambda f: (f / "config.json").unlink(), ModelError, "config.json is missing"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), CorruptArtefact, "not a JSON"),
    "pickle that runs code": (pickled(lambda w: {**w, "x": Evil()}), ModelError, "more than tensors: .*print"),
    "pickle of no weights": (pickled(lambda w: [1, 2]), ModelError, "without a dictionary of weights"),
    "pickle cut": (pickled(cut=100), CorruptArtefact, "not a readable pickle"),
    "pickle missing key": (pickled(lambda w: without(w, "logit_scale")), ModelError, "logit_scale"),
    "pickle prefix": (pickled(lambda w: {f"module.{k}": v for k, v in w.items()}), ModelError, "prefix"),
    "pickle shape": (pickled(lambda w: w | {"text_projection.weight": torch.zeros(3, 3)}), ModelError, r"\(3, 3\)"),
    "pickle NaN": (pickled(with_nan), ModelError, "NaN"),
    "other pickle": (
        lambda f: (f / "model.safetensors").rename(f / "epoch_3.pt"),
        ModelError,
        "only epoch_3.pt",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ModelError, "no weights"),
    "code": (edit_config(auto_map={"AutoModel": "evil.Model"}), ModelError, "run its own code"),
    "hidden code": (edit_config(_attn_implementation_internal="a/b"), ModelError, "run its own code"),
    "another base": (lambda f: (f / "adapter_config.json").write_text("{}"), ModelError, "an adapter of peft"),
    "LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ModelError,
        "git lfs pull",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        CorruptArtefact,
        "model.safetensors",
    ),
    "NaFlex": (edit_config(model_type="siglip2"), ModelError, "NaFlex"),
    "unknown kind": (edit_config(model_type="no_such_kind"), ModelError, "cannot open"),
    "one tower": (edit_config(model_type="clip_vision_model"), ModelError, "from_towers"),
    "no transform": (lambda f: (f / "processor_config.json").unlink(), ModelError, "image processor"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], ModelError, "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused(case: str, clip_folder: Path, tmp_path: Path) -> None:
    change, error, words = BROKEN[case]
    folder = shutil.copytree(clip_folder, tmp_path / "broken")
    change(folder)
    with pytest.raises(error, match=words):
        DualEncoder.from_pretrained(folder)


def test_a_broken_pickle_runs_nothing(clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "evil")
    pickled(lambda w: {**w, "x": Evil()})(folder)
    with pytest.raises(ModelError, match="can run any code"):
        DualEncoder.from_pretrained(folder)
    assert "owned" not in capsys.readouterr().out
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the test would notice
    assert "owned" in capsys.readouterr().out


@pytest.mark.parametrize("shards", [False, True])
def test_a_pickle_of_tensors_opens(shards: bool, clip_folder: Path, images: Images, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "pickled")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards:
        halves = [dict(list(weights.items())[i::2]) for i in range(2)]
        names = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
        index = {key: name for half, name in zip(halves, names, strict=True) for key in half}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for half, name in zip(halves, names, strict=True):
            torch.save(half, folder / name)
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    found = DualEncoder.from_pretrained(folder).encode_images(images)
    assert torch.equal(found, DualEncoder.from_pretrained(clip_folder).encode_images(images))


def test_safetensors_are_preferred_to_a_pickle(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "both")
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    DualEncoder.from_pretrained(folder)


def test_a_config_gives_random_weights(folder: Path, images: Images, texts: list[str], tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    torch.manual_seed(3)
    by_folder = DualEncoder.from_config(bare)
    config, processor = AutoConfig.from_pretrained(bare), AutoProcessor.from_pretrained(bare)
    torch.manual_seed(3)
    by_object = DualEncoder.from_config(config, processor)
    assert torch.equal(by_folder.encode_images(images), by_object.encode_images(images))
    assert torch.equal(by_folder.encode_texts(texts), by_object.encode_texts(texts))
    assert by_folder.fresh == {name for name, _ in by_folder.named_parameters()}
    assert not torch.equal(by_folder.encode_texts(texts), DualEncoder.from_pretrained(folder).encode_texts(texts))


def test_a_config_object_brings_no_processor(clip_folder: Path) -> None:
    with pytest.raises(ModelError, match="processor"):
        DualEncoder.from_config(AutoConfig.from_pretrained(clip_folder))


def test_naflex_is_refused_by_name() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Siglip2Model(Siglip2Config(text_config=small | {"vocab_size": 9}, vision_config=small))
    with pytest.raises(ModelError, match="NaFlex"):
        DualEncoder.from_transformers(model, None)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("clap", "ClapModel is not a dual encoder"),
        ("blip", r"BlipModel \(blip\) is none of the dual encoders known here: align, altclip"),
        ("xclip", "XCLIPModel is not a dual encoder"),
        ("groupvit", "none of the dual encoders known here"),
        ("owlvit", "none of the dual encoders known here"),
        ("flava", "none of the dual encoders known here"),
        ("bert", "BertModel is not a dual encoder"),
    ],
)
def test_another_kind_of_model_is_refused_by_name(kind: str, words: str, clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "other")
    edit_config(model_type=kind)(folder)
    with pytest.raises(ModelError, match=words) as caught:
        DualEncoder.from_pretrained(folder)
    assert "from_towers" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("openai/clip-vit-base-patch23", "openai/clip-vit-base-patch32"),
        ("/no/such/folder", "no such model folder"),
        ("clip", "no such model folder"),
        ("a/b/c/d", "a model's name is"),
    ],
)
def test_an_unknown_name_offline_is_an_error_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        DualEncoder.from_pretrained(name)


def test_a_neighbouring_folder_is_suggested(clip_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"Did you mean .*clip"):
        DualEncoder.from_pretrained(str(clip_folder) + "s")
