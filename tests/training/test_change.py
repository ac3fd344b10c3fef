"""Changed models in a run: what YAML asks for, and LoRA from the first step to the saved folder."""

import json

import pytest
import tiny
import torch

from clipkit import DualEncoder, RetrievalEvaluator, RunConfig, TrainConfig, Trainer, run
from clipkit.errors import ConfigError
from clipkit.models.backends.layers import parameters_by_depth
from clipkit.training.run import open_model

BASIC = ["model.name=some/model", "data.train=birds.csv", "train.output_dir=runs/birds"]


@pytest.fixture
def folder(tmp_path, make_model):
    make_model().save_pretrained(tmp_path / "start")
    rows = []
    for index, colour in enumerate(tiny.COLOURS):
        for place in tiny.PLACES:
            name = f"{index}-{place}.png"
            (tmp_path / name).write_bytes(tiny.square(colour, place))
            rows.append({"image": name, "text": f"a {colour} square {place}"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def load(folder, *overrides):
    basic = [f"model.name={folder / 'start'}", f"data.train={folder / 'pairs.jsonl'}", "train.progress=false"]
    loop = ["train.batch_size=8", "train.max_steps=2", "train.learning_rate=1e-3", f"train.output_dir={folder / 'run'}"]
    return RunConfig.load(None, [*basic, *loop, *overrides])


def test_a_run_changes_its_model_as_the_config_says(folder):
    changes = ["model.lora={rank: 2, targets: [query, value, q_proj, v_proj]}", "model.gradient_checkpointing=true"]
    sizes = ["model.image_size=32", "model.context_length=12", "model.patch_dropout=0.5"]
    config = load(folder, *changes, *sizes)
    (folder / "again.yaml").write_text(config.dump())
    assert RunConfig.load(folder / "again.yaml") == config
    done = run(config)
    assert done.model.processor.image_size == 32
    assert done.model.processor.context_length == 12
    assert done.model._patches.rate == 0.5
    assert done.model.lora.parts["text"].rank == 2
    assert any(getattr(module, "gradient_checkpointing", False) for module in done.model.modules())
    saved = DualEncoder.from_pretrained(folder / "run" / "model")
    assert saved.fingerprint().difference(done.model.fingerprint()) == []


def test_blocks_that_a_config_freezes_stand_still(folder):
    start = DualEncoder.from_pretrained(folder / "start")
    depths = parameters_by_depth(start.backend, start.processor, "image")
    done = run(load(folder, "model.freeze_blocks={image: 1}"))
    before, after = start.backend.state_dict(), done.model.backend.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not moved & {*depths.before, *depths.blocks[0]}
    assert any(name.startswith("text.encoder") for name in moved)
    assert any(name in moved for name in depths.after)


def test_nothing_is_changed_unasked(folder):
    model = open_model(load(folder).model)
    assert model.lora is None
    assert all(p.requires_grad for name, p in model.named_parameters() if "pooler" not in name)
    assert model.fingerprint() == DualEncoder.from_pretrained(folder / "start").fingerprint()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.lora={rnak: 2}", r"unknown key `model.lora.rnak`(?s:.)*did you mean model.lora.rank=2\?"),
        ("model.lora={rank: 0}", "`model.lora.rank`: input should be greater than 0, found 0"),
        ("model.lora={part: images}", "`model.lora.part`.*found 'images'"),
        ("model.freeze_blocks={vision: 3}", "vision"),
        ("model.freeze_blocks={image: half}", "found 'half'"),
        ("model.patch_dropout=1", "`model.patch_dropout`: input should be less than 1, found 1"),
        ("model.image_size=0", "`model.image_size`: input should be greater than 0, found 0"),
        ("model={name: x, freeze: [image], lora: {part: both}}", "the image tower is named by more than one"),
        ("model={name: x, freeze: [text], freeze_blocks: {text: 3}}", "the text tower is named by more than one"),
    ],
)
def test_what_is_wrong_is_named(override, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig.load(None, [*BASIC, override])


def test_the_trainer_keeps_the_best_matrices_and_saves_them_merged(tmp_path, pairs, make_model):
    model, values, seen = make_model().add_lora("both", rank=2), iter([0.1, 0.9, 0.5]), []

    def evaluator(current):
        value = next(values)
        seen.append(current.encode_texts(["a red square left"]))
        return {"score": value}

    settings = TrainConfig(
        str(tmp_path / "run"), batch_size=8, max_steps=3, evaluate_every=1, head_learning_rate=1e-2, progress=False
    )
    result = Trainer(model, pairs, settings, evaluators=[evaluator]).train()
    assert result.step == 2
    embeddings = model.encode_texts(["a red square left"])
    assert torch.equal(embeddings, seen[1])
    assert not torch.equal(embeddings, seen[2])
    saved = DualEncoder.from_pretrained(tmp_path / "run" / "model")
    assert (saved.encode_texts(["a red square left"]) - embeddings).abs().max() < 1e-5
    assert saved.fingerprint().difference(model.fingerprint()) == []
    model.save_adapter(tmp_path / "adapter")
    again = make_model().load_adapter(tmp_path / "adapter")
    assert again.fingerprint().difference(model.fingerprint()) == []


def test_lora_learns(tmp_path, pairs, make_model):
    model, evaluator, key = (
        make_model().add_lora("both", rank=4),
        RetrievalEvaluator(pairs),
        "retrieval/text_to_image_recall@1",
    )
    before = evaluator(model)[key]
    settings = TrainConfig(
        str(tmp_path / "run"), epochs=15, batch_size=16, head_learning_rate=5e-3, augmentation="none", progress=False
    )
    assert Trainer(model, pairs, settings, evaluators=[evaluator]).train().metrics[key] > max(0.3, 3 * before)
