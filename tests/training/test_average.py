"""The moving average of the weights: its numbers, where it stands in for them, and that it survives a kill."""

import pytest
import runs
import torch

from clipkit import DualEncoder, TrainConfig, Trainer
from clipkit.errors import ConfigError
from clipkit.training.average import Average


def test_the_formula():
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average, wanted = Average(module, 0.5), 1.0
    for step, value in enumerate([3.0, -2.0, 8.0, 1.0, 0.5, 2.0, 2.5, 7.0, 3.0, 3.0], start=1):
        module.weight.data.fill_(value)
        average.update()
        d = min(0.5, (1 + step) / (10 + step))
        wanted = d * wanted + (1 - d) * value
        assert average.held["weight"].item() == pytest.approx(wanted, rel=1e-6)
    seen = []

    def fail():
        with average.applied():
            seen.append(module.weight.item())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [pytest.approx(wanted)]
    assert module.weight.item() == 3.0


def test_it_is_measured_and_kept_in_place_of_the_weights(tmp_path, pairs, make_model):
    seen, trained = [], []

    def evaluator(model):
        seen.append(model.backend.image_head.weight.detach().clone())
        return {"score": float(len(seen))}

    model = make_model()
    model.backend.image_head.weight.register_hook(lambda grad: trained.append(model.backend.image_head.weight.clone()))
    config = TrainConfig(
        str(tmp_path / "run"), batch_size=8, max_steps=4, evaluate_every=2, ema=0.9, learning_rate=1e-2, progress=False
    )
    Trainer(model, pairs, config, evaluators=[evaluator]).train()
    assert not seen[0].equal(trained[2])  # the average is measured, and the weights train on
    assert model.backend.image_head.weight.equal(seen[-1])
    again = DualEncoder.from_pretrained(tmp_path / "run/model")
    assert again.encode_texts(["a red square"]).equal(model.encode_texts(["a red square"]))


def test_without_evaluators_the_average_is_what_is_saved(tmp_path, pairs, make_model):
    models = [make_model(), make_model()]
    for ema, model in zip((None, 0.9), models, strict=True):
        config = TrainConfig(str(tmp_path / str(ema)), batch_size=8, max_steps=3, ema=ema, progress=False)
        Trainer(model, pairs, config).train()
    assert not models[0].backend.image_head.weight.equal(models[1].backend.image_head.weight)


def test_a_step_that_is_left_out_is_not_averaged(tmp_path, pairs, make_model, monkeypatch):
    updates = []
    monkeypatch.setattr(Average, "update", lambda self: updates.append(1))
    model, count = make_model(), iter(range(10))
    model.backend.image_head.weight.register_hook(lambda grad: grad * float("nan") if next(count) == 1 else grad)
    config = TrainConfig(str(tmp_path / "run"), batch_size=8, max_steps=4, ema=0.9, skip_nonfinite=1, progress=False)
    Trainer(model, pairs, config).train()
    assert len(updates) == 3


def test_a_killed_run_has_the_same_average(tmp_path, cut):
    runs.train(tmp_path / "whole", ema=0.9)
    cut(tmp_path / "run", 5, ema=0.9)
    runs.train(tmp_path / "run", ema=0.9)
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")
    assert "checkpoints/step_00000012/average.safetensors" in runs.outcome(tmp_path / "run")


def test_what_is_no_decay_is_refused():
    with pytest.raises(ConfigError, match="ema is a decay in"):
        TrainConfig("x", ema=1.0)


# -- early stopping


def scores(values):
    found = iter(values)
    return lambda _: {"score": next(found)}


def test_the_run_ends_when_it_gets_no_better(tmp_path, pairs, make_model):
    config = TrainConfig(
        str(tmp_path / "run"), batch_size=8, max_steps=8, evaluate_every=1, patience=2, progress=False
    )  # fmt: skip
    result = Trainer(make_model(), pairs, config, evaluators=[scores([0.1, 0.5, 0.4, 0.45, 0.9])]).train()
    assert (result.step, result.steps, result.stopped_early) == (2, 4, True)
    assert result.metrics == {"score": 0.5}


def test_a_run_that_stopped_early_stays_stopped(tmp_path, pairs, make_model):
    settings = {"batch_size": 8, "max_steps": 8, "evaluate_every": 1, "patience": 2, "progress": False}

    def train(values):
        config = TrainConfig(str(tmp_path / "run"), resume="auto", save_steps=1, **settings)
        return Trainer(make_model(), pairs, config, evaluators=[scores(values)]).train()

    first = train([0.5, 0.4, 0.3])
    again = train([])  # nothing is measured any more
    assert (again.step, again.steps, again.stopped_early, again.metrics) == (1, 3, True, first.metrics)


def test_patience_survives_a_kill(tmp_path, pairs, make_model):
    settings = {"batch_size": 8, "max_steps": 8, "evaluate_every": 1, "patience": 3, "progress": False}

    def train(values):
        config = TrainConfig(str(tmp_path / "run"), resume="auto", save_steps=1, **settings)
        return Trainer(make_model(), pairs, config, evaluators=[scores(values)]).train()

    with pytest.raises(StopIteration):
        train([0.5, 0.4])  # killed within the third evaluation
    assert train([0.3, 0.2]).steps == 4


def test_all_steps_are_taken_without_patience(tmp_path, pairs, make_model):
    config = TrainConfig(str(tmp_path / "run"), batch_size=8, max_steps=3, evaluate_every=1, progress=False)
    result = Trainer(make_model(), pairs, config, evaluators=[scores([0.5, 0.4, 0.3])]).train()
    assert (result.steps, result.stopped_early) == (3, False)


def test_of_losses_the_lowest_is_the_best(tmp_path, pairs, make_model):
    values = iter([2.0, 1.0, 3.0])
    config = TrainConfig(str(tmp_path / "run"), batch_size=8, max_steps=3, evaluate_every=1, progress=False)
    result = Trainer(make_model(), pairs, config, evaluators=[lambda _: {"validation/loss": next(values)}]).train()
    assert (result.step, result.metrics) == (2, {"validation/loss": 1.0})
