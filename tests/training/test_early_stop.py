"""A run that learns no more ends early, as whole as any; and of losses and ranks the lowest is the best."""

import logging

import pytest
import tiny

from clipkit import DualEncoder, TrainConfig, Trainer
from clipkit.errors import ConfigError, UsageError
from clipkit.evaluation.evaluator import Evaluator
from clipkit.metrics.ranking import greater_is_better
from clipkit.training.checkpoints.checkpoint import Checkpoints, read


class KilledError(Exception):
    pass


class Scripted:
    """Gives one value after another, by the step at which it is asked; counts how often that was."""

    name = "scripted"

    def __init__(self, values, key="score", kill_at=None):
        self.values, self.key, self.kill_at, self.asked = dict(enumerate(values, 1)), key, kill_at, 0

    def __call__(self, model):
        self.asked += 1
        if self.asked == self.kill_at:
            raise KilledError
        return {self.key: self.values[self.asked]}


def train(folder, evaluator, **changes):
    settings = {"max_steps": 8, "epochs": 9, "batch_size": 8, "evaluate_every": 1, "augmentation": "none"}
    settings |= {"learning_rate": 1e-2, "patience": 2, "log_every": 1, "progress": False, **changes}
    trainer = Trainer(
        tiny.make_model(dropout=0.1), tiny.make_pairs(), TrainConfig(str(folder), **settings), evaluators=[evaluator]
    )
    return trainer, trainer.train()


VALUES = [0.1, 0.3, 0.2, 0.5, 0.4, 0.5, 0.9, 0.9]  # the second 0.5 is no new best


def test_it_ends_after_so_many_without_a_new_best(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="clipkit"):
        trainer, result = train(tmp_path / "run", Scripted(VALUES))
    assert (result.stopped_early, result.step, result.steps, result.metrics) == (True, 4, 6, {"score": 0.5})
    assert "stopped early after step 6 of 8: 2 evaluations in a row gave no better score than step 4" in caplog.text
    assert [line["score"] for line in result.history if "score" in line] == VALUES[:6]
    (last,) = Checkpoints(tmp_path / "run" / "checkpoints").paths()
    assert last.name == "step_00000006"
    kept = DualEncoder.from_pretrained(tmp_path / "run" / "model")
    assert kept.encode_texts(["a red square"]).equal(trainer.model.encode_texts(["a red square"]))


def test_a_resumed_run_that_was_stopped_ends_at_once(tmp_path):
    _, first = train(tmp_path / "run", Scripted(VALUES), resume="auto")
    evaluator = Scripted(VALUES)
    _, again = train(tmp_path / "run", evaluator, resume="auto")
    assert evaluator.asked == 0
    for name in ("metrics", "step", "steps", "history", "stopped_early"):
        assert getattr(again, name) == getattr(first, name), name


@pytest.mark.parametrize("asked", [5, 6])
def test_the_count_survives_a_kill(tmp_path, asked):
    """Killed in an evaluation, after one or none that was worse; the count goes on where it was."""
    train(tmp_path / "whole", Scripted(VALUES), save_steps=1)
    with pytest.raises(KilledError):
        train(tmp_path / "run", Scripted(VALUES, kill_at=asked), save_steps=1)
    evaluator = Scripted(VALUES)
    evaluator.asked = asked - 1  # the checkpoint stands before the evaluation, which is done again
    _, result = train(tmp_path / "run", evaluator, save_steps=1, resume="auto")
    assert (result.stopped_early, result.step, result.steps) == (True, 4, 6)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    one, two = (read(tmp_path / name / "checkpoints/step_00000006") for name in ("whole", "run"))
    assert one.facts["best"] == two.facts["best"]
    assert one.facts["best"]["since"] == 2
    assert all(weight.equal(two.tensors["weights"][name]) for name, weight in one.tensors["weights"].items())


def test_the_batch_after_the_last_is_never_opened(tmp_path):
    """A broken image in it must not end a run that is over."""
    from clipkit.data.batches.loader import Loader

    pairs, opened = tiny.make_pairs(), []
    settings = TrainConfig(
        str(tmp_path / "run"), batch_size=8, evaluate_every=1, patience=1, max_steps=4, progress=False
    )
    trainer = Trainer(tiny.make_model(), pairs, settings, evaluators=[Scripted([0.5, 0.1])])
    batches = Loader.batches

    def counted(self, start, stop):
        for batch in batches(self, start, stop):
            opened.append(start)
            yield batch

    trainer.loader.batches = counted.__get__(trainer.loader)
    assert trainer.train().steps == 2
    assert len(opened) == 2


def test_without_patience_it_takes_all_steps(tmp_path):
    _, result = train(tmp_path / "run", Scripted(VALUES), patience=None)
    assert (result.stopped_early, result.step, result.steps) == (False, 7, 8)


def test_the_last_evaluation_of_all_is_no_early_stop(tmp_path):
    _, result = train(tmp_path / "run", Scripted([0.5, 0.4, 0.3]), max_steps=3)
    assert (result.stopped_early, result.step, result.steps) == (False, 1, 3)


def test_of_a_loss_the_lowest_is_the_best(tmp_path):
    _, result = train(tmp_path / "run", Scripted([3.0, 2.0, 2.5, 2.1, 9.0], key="validation/loss"))
    assert (result.stopped_early, result.step, result.metrics) == (True, 2, {"validation/loss": 2.0})


@pytest.mark.parametrize(
    ("key", "greater"),
    [("validation/loss", False), ("x/median_rank", False), ("retrieval/recall@1", True), ("zero_shot/top1", True)],
)
def test_direction(key, greater):
    assert greater_is_better(key) is greater


def test_an_evaluator_says_which_direction_is_better(tmp_path):
    class Error(Scripted, Evaluator):
        def greater_is_better(self, key):
            return False

    evaluator = Error([3.0, 2.0, 2.5, 2.1, 9.0], key="validation/error")
    _, result = train(tmp_path / "run", evaluator)
    assert (result.stopped_early, result.step, result.metrics) == (True, 2, {"validation/error": 2.0})


def test_patience_needs_something_that_is_measured(tmp_path):
    with pytest.raises(UsageError, match=r"patience counts evaluations, and nothing is measured"):
        Trainer(tiny.make_model(), tiny.make_pairs(), TrainConfig(str(tmp_path / "run"), patience=2, batch_size=8))
    with pytest.raises(ConfigError, match="patience must be greater than 0, found 0"):
        TrainConfig("x", patience=0)
