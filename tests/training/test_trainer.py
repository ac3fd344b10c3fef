"""The loop: it learns, keeps the best, logs what it did, and says what is wrong."""

import json
import math

import pytest
import tiny
import torch

from clipkit import DualEncoder, Paired, SameGroup, TrainConfig, Trainer
from clipkit.errors import BadImage, ClipkitError, TooManyRejected, UsageError
from clipkit.training.optimizer import parameter_groups, schedule


def config(folder, **changes):
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "augmentation": "none", "log_every": 1}
    return TrainConfig(str(folder), progress=False, **{**settings, **changes})


def test_it_learns_and_keeps_the_best_weights(tmp_path, pairs, make_model):
    from clipkit import RetrievalEvaluator

    model = make_model()
    evaluator = RetrievalEvaluator(pairs)
    before = evaluator(model)
    settings = config(tmp_path / "run", epochs=15, learning_rate=3e-3, batch_size=16, evaluate_every=6)
    result = Trainer(model, pairs, settings, evaluators=[evaluator]).train()
    key = "retrieval/text_to_image_recall@1"
    assert result.metrics[key] > max(0.3, 3 * before[key])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    measured = {line["step"]: line[key] for line in lines if key in line}
    assert max(measured.values()) == result.metrics[key] == measured[result.step]
    assert sorted(measured) == [6, 12, 18, 24, 30]
    # the model in memory and the one on disk are the ones that were measured best
    assert evaluator(model) == result.metrics
    assert evaluator(DualEncoder.from_pretrained(tmp_path / "run/model"))[key] == pytest.approx(result.metrics[key])


def test_the_best_is_kept_when_later_steps_are_worse(tmp_path, pairs, make_model):
    model, values = make_model(), iter([0.1, 0.9, 0.5])
    seen = []

    def evaluator(current):
        value = next(values)
        seen.append((value, current.backend.image_head.weight.detach().clone()))
        return {"score": value}

    settings = config(tmp_path / "run", max_steps=3, evaluate_every=1, learning_rate=1e-2)
    result = Trainer(model, pairs, settings, evaluators=[evaluator]).train()
    assert (result.step, result.metrics) == (2, {"score": 0.9})
    assert model.backend.image_head.weight.equal(seen[1][1])
    assert not model.backend.image_head.weight.equal(seen[2][1])


def test_of_ranks_the_lowest_is_the_best(tmp_path, pairs, make_model):
    values = iter([5.0, 2.0, 9.0])
    settings = config(tmp_path / "run", max_steps=3, evaluate_every=1, best="x/median_rank")
    result = Trainer(make_model(), pairs, settings, evaluators=[lambda _: {"x/median_rank": next(values)}]).train()
    assert (result.step, result.metrics) == (2, {"x/median_rank": 2.0})


def test_without_evaluators_the_last_weights_are_saved(tmp_path, pairs, make_model):
    model = make_model()
    result = Trainer(model, pairs, config(tmp_path / "run", max_steps=2)).train()
    assert (result.step, result.metrics) == (2, {})
    again = DualEncoder.from_pretrained(tmp_path / "run/model")
    assert again.encode_texts(["a red square"]).equal(model.encode_texts(["a red square"]))


def test_the_same_seed_gives_the_same_run(tmp_path, pairs, make_model):
    def losses(name, **changes):
        model = make_model(dropout=0.1)
        trainer = Trainer(model, pairs, config(tmp_path / name, augmentation="crop", **changes), similar=Paired())
        return [line["loss"] for line in trainer.train().history]

    first = losses("a")
    assert losses("b") == first
    assert losses("workers", workers=1) == first
    assert losses("other", seed=1) != first


def test_losses_of_several_notions_are_added(tmp_path, pairs, make_model):
    def first_loss(name, similar):
        trainer = Trainer(make_model(), pairs, config(tmp_path / name, max_steps=1), similar=similar)
        return trainer.train().history[0]["loss"]

    one, two = first_loss("a", Paired()), first_loss("b", SameGroup("colour"))
    assert one != pytest.approx(two)
    both = first_loss("c", [Paired(), SameGroup("colour", weight=0.5)])
    assert both == pytest.approx(one + two / 2, rel=1e-6)


def test_the_scale_is_clamped_at_what_was_loaded_or_100(tmp_path, pairs, make_model):
    for loaded, ceiling in [(4.5, math.log(100)), (4.7, 4.7)]:
        model = make_model()
        model.logit_scale.data.fill_(loaded)
        Trainer(model, pairs, config(tmp_path / f"{loaded}", scale_learning_rate=1.0, max_steps=2)).train()
        assert float(model.logit_scale.detach()) <= ceiling + 1e-6


def test_a_frozen_tower_stays_as_it_is(tmp_path, pairs, make_model):
    model = make_model(dropout=0.1).freeze("image")
    before = {name: parameter.clone() for name, parameter in model.backend.vision.state_dict().items()}
    text = model.backend.text.embeddings.word_embeddings.weight.detach().clone()
    Trainer(model, pairs, config(tmp_path / "run", max_steps=3)).train()
    assert all(parameter.equal(before[name]) for name, parameter in model.backend.vision.state_dict().items())
    assert not model.backend.text.embeddings.word_embeddings.weight.equal(text)


def test_groups_of_parameters(pairs, make_model):
    model = make_model()
    settings = TrainConfig("x", learning_rate=1e-5, head_learning_rate=1e-3, scale_learning_rate=1e-2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    group_of = {
        names[id(parameter)]: group for group in parameter_groups(model, settings) for parameter in group["params"]
    }
    assert group_of.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in group_of.items()}
    assert rates["backend.logit_scale"] == (1e-2, 0)
    assert rates["backend.image_head.weight"] == (1e-3, 0.1)
    assert rates["backend.text.embeddings.LayerNorm.weight"] == (1e-5, 0)
    for name in ("vision.embeddings.cls_token", "vision.embeddings.position_embeddings"):
        assert rates[f"backend.{name}"] == (1e-5, 0)
    assert {decay for name, (_, decay) in rates.items() if name.endswith("bias")} == {0}
    model.fresh = frozenset()  # as after from_pretrained
    again = {
        names[id(parameter)]: group["lr"]
        for group in parameter_groups(model, TrainConfig("x"))
        for parameter in group["params"]
    }
    assert set(again.values()) == {1e-5}


def test_schedule():
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    assert schedule(0, 1, 0.1) == 1


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path, pairs, make_model):
    model = make_model()
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    hook = model.backend.image_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ClipkitError, match=r"the gradient is (nan|inf); the step was not applied"):
        Trainer(model, pairs, config(tmp_path / "run")).train()
    hook.remove()
    assert all(parameter.equal(before[name]) for name, parameter in model.state_dict().items())


def test_an_evaluation_metric_that_is_not_there(tmp_path, pairs, make_model):
    trainer = Trainer(
        make_model(), pairs, config(tmp_path / "run", max_steps=1, best="recall"), evaluators=[lambda _: {"a": 1}]
    )
    with pytest.raises(UsageError, match=r"no evaluator gives the metric 'recall'(?s:.)*best=\"a\""):
        trainer.train()


def test_what_cannot_start_does_not(tmp_path, pairs, make_model):
    model = make_model()
    with pytest.raises(UsageError, match=r"batch_size=33 is larger than the data \(32 pairs\)"):
        Trainer(model, pairs, config(tmp_path / "a", batch_size=33))
    Trainer(model, pairs, config(tmp_path / "run", max_steps=1)).train()
    with pytest.raises(UsageError, match=r"holds another run(?s:.)*run(?s:.)*choose another output_dir"):
        Trainer(model, pairs, config(tmp_path / "run"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the output folder is a file"):
        Trainer(model, pairs, config(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"no column 'color'(?s:.)*did you mean 'colour'"):
        Trainer(model, pairs, config(tmp_path / "b"), similar=SameGroup("color"))
    with pytest.raises(UsageError, match="nothing counts as similar"):
        Trainer(model, pairs, config(tmp_path / "b"), similar=[])
    with pytest.raises(UsageError, match="the data has no column of texts"):
        Trainer(model, pairs.remove_columns("texts"), config(tmp_path / "b"))


def test_a_run_that_never_made_a_step_may_start_again(tmp_path, pairs, make_model):
    rows = pairs.to_list()
    rows[3]["image"]["bytes"] = b"no image"
    broken = type(pairs).from_list(rows, features=pairs.features)
    with pytest.raises(BadImage):
        Trainer(make_model(), broken, config(tmp_path / "run", batch_size=32)).train()
    Trainer(make_model(), pairs, config(tmp_path / "run", max_steps=1)).train()


def test_a_broken_image_stops_the_run_or_is_listed(tmp_path, pairs, make_model):
    rows = pairs.to_list()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:30]
    broken = type(pairs).from_list(rows, features=pairs.features)
    with pytest.raises(BadImage):
        Trainer(make_model(), broken, config(tmp_path / "a")).train()
    result = Trainer(make_model(), broken, config(tmp_path / "b", on_bad="skip", epochs=2)).train()
    assert [row["row"] for row in result.rejected] == [3]
    with pytest.raises(TooManyRejected, match="1 of 32 images cannot be used, more than max_bad=0"):
        Trainer(make_model(), broken, config(tmp_path / "c", on_bad="skip", max_bad=0)).train()
    listed = [json.loads(line) for line in (tmp_path / "b/rejects.jsonl").read_text().splitlines()]
    assert [(row["row"], row["stage"]) for row in listed] == [(3, "train")]


def test_bf16(tmp_path, pairs, make_model):
    settings = config(tmp_path / "run", precision="bf16", max_steps=3, evaluate_every=2)  # saves inside the loop
    result = Trainer(make_model(), pairs, settings, evaluators=[lambda _: {"score": 1.0}]).train()
    plain = Trainer(make_model(), pairs, config(tmp_path / "fp32", max_steps=3)).train()
    losses = [line for line in result.history if "loss" in line]
    for ours, theirs in zip(losses, plain.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    assert ours["loss"] != theirs["loss"]
    assert torch.is_autocast_enabled("cpu") is False


def test_the_saved_folder_tells_of_the_training(tmp_path):
    import tiny

    from clipkit import RetrievalEvaluator, TrainConfig, Trainer

    pairs, model = tiny.make_pairs(), tiny.make_model()
    model.name = "org/base"
    config = TrainConfig(str(tmp_path / "run"), batch_size=8, max_steps=4, evaluate_every=1, progress=False)
    result = Trainer(model, pairs, config, evaluators=[RetrievalEvaluator(pairs)]).train()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for words in ("64 image-text pairs", "base_model: org/base", '"batch_size": 8', "Paired", "retrieval/images 32"):
        assert words in card
    key, value = next(iter(result.metrics.items()))
    assert f"| {key} | {value:.4f} |" in card
    model.save_pretrained(tmp_path / "again")
    assert f"| {key} | {value:.4f} |" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_that_is_asked_for_and_not_active_is_an_error(tmp_path, pairs, make_model, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UsageError, match=name if name == "FSDP" else "(?i)deepspeed"):
        Trainer(make_model(), pairs, config(tmp_path / "a"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score": math.nan}, r"a metric must be finite, found nan(?s:.)*score"),
        ({"score": "good"}, r"a metric is a number, found 'good'(?s:.)*score"),
        ({}, "an evaluator gives no metric"),
    ],
)
def test_what_is_no_metric_is_refused_by_name(tmp_path, pairs, make_model, given, message):
    trainer = Trainer(make_model(), pairs, config(tmp_path / "run", max_steps=1), evaluators=[lambda _: given])
    with pytest.raises(ClipkitError, match=message):
        trainer.train()


def test_numbers_of_other_kinds_are_metrics(tmp_path, pairs, make_model):
    given = {"a": torch.tensor(0.5), "b": torch.tensor(0.25).numpy()}
    trainer = Trainer(make_model(), pairs, config(tmp_path / "run", max_steps=1), evaluators=[lambda _: given])
    assert trainer.train().metrics == {"a": 0.5, "b": 0.25}


def test_what_best_names_is_known_before_the_first_step(tmp_path, pairs, make_model):
    from clipkit import RetrievalEvaluator, ZeroShotEvaluator
    from clipkit.evaluation.validation_loss import ValidationLoss

    names = {"class_names": tiny.COLOURS, "label": "colour"}
    evaluators = [RetrievalEvaluator(pairs), ZeroShotEvaluator(pairs, **names), ValidationLoss(pairs)]
    model = make_model()
    for evaluator in evaluators:
        assert evaluator.keys() == list(evaluator(model))
    with pytest.raises(UsageError, match=r"no evaluator gives the metric 'recall@1'(?s:.)*zero_shot/top1"):
        Trainer(model, pairs, config(tmp_path / "a", best="recall@1"), evaluators=evaluators)
    Trainer(model, pairs, config(tmp_path / "a", best="zero_shot/top5"), evaluators=evaluators)
    with pytest.raises(UsageError, match="best=recall@1 chooses by a metric, and nothing is measured"):
        Trainer(model, pairs, config(tmp_path / "a", best="recall@1"))


def test_without_progress_all_else_is_said(tmp_path, pairs, make_model, capsys, monkeypatch):
    from clipkit import RetrievalEvaluator, progress

    monkeypatch.setattr(progress, "SHORT", 0)

    def said(name, **changes):
        settings = TrainConfig(str(tmp_path / name), batch_size=9, max_steps=3, **changes)
        Trainer(make_model(), pairs, settings, evaluators=[RetrievalEvaluator(pairs)]).train()
        return capsys.readouterr().err.splitlines()

    lines = said("a", progress=False)
    for words in ("training: 3 steps of 9 pairs", "5 of 32 rows are left out an epoch", "loss: starts near 2.20"):
        assert [line for line in lines if line.startswith(words)], words
    assert "step 3: measuring" in lines
    shown = said("b")
    assert [line for line in shown if line in lines] == lines
    assert [line for line in shown if line.startswith("training 3/3  loss ")]
