"""A run that was interrupted and goes on is the run that was not."""

import json
import random
import shutil

import pytest
import runs
import tiny
import torch

from clipkit import RetrievalEvaluator, SameGroup, TrainConfig, Trainer
from clipkit.errors import CorruptArtefact, UsageError
from clipkit.training.checkpoints.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = runs.train(folder)
    return folder, result


def test_mid_epoch_twice_in_an_epoch_at_its_end_and_after_the_last_step(tmp_path, whole, cut):
    for step in (1, 2, 4, 6, 12):  # an epoch has four steps, the third is measured
        cut(tmp_path / "run", step)
    result = runs.train(tmp_path / "run")
    assert runs.outcome(tmp_path / "run") == runs.outcome(whole[0])
    assert (result.metrics, result.step, result.history) == (whole[1].metrics, whole[1].step, whole[1].history)


def test_a_finished_run_gives_its_result_again(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    result = runs.train(tmp_path / "run")
    assert runs.outcome(tmp_path / "run") == runs.outcome(whole[0])
    assert (result.metrics, result.step, result.steps) == (whole[1].metrics, whole[1].step, 12)


@pytest.mark.parametrize("changes", [{"workers": 2}, {"micro_batch": 3}, {"evaluators": False}], ids=str)
def test_other_set_ups(tmp_path, cut, changes):
    runs.train(tmp_path / "whole", **changes)
    cut(tmp_path / "run", 5, **changes)
    runs.train(tmp_path / "run", **changes)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        one, two = (folder / "checkpoints/step_00000012" / name for folder in (tmp_path / "whole", tmp_path / "run"))
        assert one.read_bytes() == two.read_bytes(), name
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_without_the_state_of_the_optimizer_the_result_is_another(tmp_path, whole, cut, monkeypatch):
    from clipkit.training.state import Adam

    cut(tmp_path / "run", 5)
    monkeypatch.setattr(Adam, "restore", lambda *_: None)
    runs.train(tmp_path / "run")
    assert runs.outcome(tmp_path / "run") != runs.outcome(whole[0])


def test_random_numbers_that_do_not_follow_the_step_give_another_result(tmp_path, whole, cut, monkeypatch):
    cut(tmp_path / "run", 5)
    monkeypatch.setattr("clipkit.training.update.hash64", lambda *_: 7)
    runs.train(tmp_path / "run")
    assert runs.outcome(tmp_path / "run") != runs.outcome(whole[0])


def test_other_numbers_of_workers_and_chunks_follow_the_same_batches(tmp_path, cut, caplog):
    whole = runs.train(tmp_path / "whole", dropout=0.0)
    cut(tmp_path / "run", 5, dropout=0.0)
    with caplog.at_level("WARNING", "clipkit"):
        result = runs.train(tmp_path / "run", dropout=0.0, workers=1, micro_batch=4)
    assert "micro_batch: null before, 4 now" in caplog.text
    for line, wanted in zip(result.history, whole.history, strict=True):
        assert line == pytest.approx(wanted, rel=1e-3)


def test_what_changed_is_listed(tmp_path, cut, pairs, make_model):
    folder = tmp_path / "run"
    cut(folder, 5)
    with pytest.raises(UsageError) as found:
        runs.train(folder, seed=1, learning_rate=1e-4)
    for words in (
        "not the run that the folder holds",
        "train.seed: 0 before, 1 now",
        "train.learning_rate: 0.001 before",
    ):
        assert words in str(found.value)

    def train(pairs=pairs, **options):
        config = TrainConfig(
            str(folder), epochs=3, batch_size=8, learning_rate=1e-3, log_every=1, evaluate_every=3, resume="auto",
            progress=False,
        )  # fmt: skip
        options = {"evaluators": [RetrievalEvaluator(tiny.make_pairs())], **options}
        return Trainer(make_model(dropout=0.1), pairs, config, **options).train()

    changed = pairs.to_list()
    changed[7]["texts"][0] += "!"
    with pytest.raises(UsageError, match=r"data: .* before, .* now"):
        train(type(pairs).from_list(changed, features=pairs.features))
    with pytest.raises(UsageError, match=r"similar\[0\]: .*Paired.* before, .*SameGroup"):
        train(similar=SameGroup("colour"))
    with pytest.raises(UsageError, match="evaluators"):
        train(evaluators=[])
    train()  # as it was


def test_without_resume_a_run_is_not_touched(tmp_path, cut):
    cut(tmp_path / "run", 5)
    before = runs.outcome(tmp_path / "run")
    with pytest.raises(UsageError, match=r'holds another run(?s:.)*resume="auto"'):
        runs.train(tmp_path / "run", resume="never")
    assert before == runs.outcome(tmp_path / "run")


def test_a_folder_of_something_else_is_not_resumed(tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"holds 'model', but not a run that could be resumed(?s:.)*choose another"):
        runs.train(tmp_path / "run")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_taken(tmp_path, whole, cut, caplog):
    cut(tmp_path / "run", 6)
    folder = tmp_path / "run/checkpoints"
    flipped = folder / "step_00000006/optimizer.safetensors"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    with caplog.at_level("INFO", "clipkit"):
        runs.train(tmp_path / "run")
    assert "step_00000005: going on after step 5 of 12" in caplog.text
    assert "damaged and was set aside" in caplog.text
    assert (folder / "step_00000006.corrupt").is_dir()
    assert runs.outcome(tmp_path / "run") == runs.outcome(whole[0])


def test_with_no_whole_checkpoint_left_the_run_stops(tmp_path, cut):
    cut(tmp_path / "run", 6)
    for path in (tmp_path / "run/checkpoints").glob("step_*"):
        (path / "manifest.json").unlink()
    with pytest.raises(CorruptArtefact, match="none of the run's checkpoints can be used; 2 were set aside"):
        runs.train(tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").stat().st_size


def test_attempts_and_curves(tmp_path, cut):
    cut(tmp_path / "run", 5)
    runs.train(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/attempts.jsonl").read_text().splitlines()]
    assert [line.get("begins_after_step", line.get("ends_after_step")) for line in lines] == [0, 5, 5, 12]
    assert [line["how"] for line in lines[1::2]] == ["CutError: ", "done"]
    assert lines[0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"command", "git", "topology", "process"} <= lines[0].keys()
    assert {path.name for path in (tmp_path / "run/curves").iterdir()} >= {
        "loss.svg",
        "logit_scale.svg",
        "retrieval.svg",
    }
    timing = [json.loads(line)["step"] for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    assert timing == list(range(1, 13))


def test_what_an_error_advises_to_change_may_change(tmp_path, cut):
    cut(tmp_path / "run", 2)  # before the first evaluation
    runs.train(tmp_path / "run", skip_nonfinite=3, max_bad=5, best="retrieval/image_to_text_recall@1")
    with pytest.raises(UsageError, match=r"chosen by 'retrieval/image_to_text_recall@1', not by 'retrieval/text"):
        runs.train(tmp_path / "run", best="retrieval/text_to_image_recall@1")


def test_a_log_that_is_gone_is_named(tmp_path, cut):
    cut(tmp_path / "run", 5)
    (tmp_path / "run/metrics.jsonl").unlink()
    with pytest.raises(CorruptArtefact, match=r"bytes that the file had at the checkpoint, found 0(?s:.)*metrics"):
        runs.train(tmp_path / "run")


def test_other_test_images_are_noticed(pairs):
    from clipkit.training.checkpoints.resume import _evaluator

    turned = pairs.select([1, 0, *range(2, 32)])
    mixed = turned.remove_columns("texts").add_column("texts", pairs["texts"])
    one, other = (_evaluator(RetrievalEvaluator(each)) for each in (pairs, mixed))
    assert one["name"] == other["name"]
    assert one["set-up"] != other["set-up"]
    assert one == _evaluator(RetrievalEvaluator(tiny.make_pairs()))


def test_differences_show_where_texts_part():
    from clipkit.training.checkpoints.resume import differences

    long = "x" * 200
    (line,) = differences({"a": [1, {"b": long + "1"}]}, {"a": [1, {"b": long + "2"}]})
    assert line.startswith("a[1].b: …xxx")
    assert '1" before' in line
    assert '2" now' in line
    assert differences({"a": [1]}, {"a": [1, 2]}) == ["a[1]: null before, 2 now"]


class Noisy(torch.utils.data.Dataset):
    """Draws random numbers of its own, as torchvision's transforms do."""

    def __init__(self):
        self.pairs = tiny.make_pairs()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, row):
        shift = int(torch.randint(4, ())) + random.randrange(2)
        return {**self.pairs[(row + shift) % 32], "texts": self.pairs[row]["texts"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_with_random_numbers_of_its_own_resumes_bit_for_bit(tmp_path, make_model, workers):
    def train(name):
        config = TrainConfig(
            str(tmp_path / name), epochs=3, max_steps=8, batch_size=8, save_steps=1, resume="auto", progress=False,
            learning_rate=1e-3, log_every=1, workers=workers,
        )  # fmt: skip
        return Trainer(make_model(dropout=0.1), Noisy(), config).train()

    train("whole")
    whole = Checkpoints.save

    def save(self, now, parts, **options):
        path = whole(self, now, parts, **options)
        if now == 3:
            raise ZeroDivisionError
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(ZeroDivisionError):
            train("run")
    random.seed(99)
    torch.manual_seed(99)
    train("run")
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")
