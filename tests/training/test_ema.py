"""The moving average of the weights: its numbers, where it stands in for them, and that it survives a kill."""

import pytest
import runs
import torch

from clipkit import DualEncoder, TrainConfig, Trainer
from clipkit.errors import ConfigError
from clipkit.training.ema import EMA


def test_the_formula():
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average, wanted = EMA(module, ["weight"], 0.5), 1.0
    for step, value in enumerate([3.0, -2.0, 8.0, 1.0, 0.5, 2.0, 2.5, 7.0, 3.0, 3.0], start=1):
        module.weight.data.fill_(value)
        average.update()
        d = min(0.5, (1 + step) / (10 + step))
        wanted = d * wanted + (1 - d) * value
        assert average.averages["weight"].item() == pytest.approx(wanted, rel=1e-6)
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
    monkeypatch.setattr(EMA, "update", lambda self: updates.append(1))
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
    with pytest.raises(ConfigError, match="ema must be less than 1"):
        TrainConfig("x", ema=1.0)
