"""Signals, locks, full disks and numbers that are none: how a run ends when it cannot go on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import runs
import tiny

from clipkit import TrainConfig, Trainer
from clipkit.errors import ClipkitError, ResourceError, UsageError
from clipkit.training.checkpoints.signals import StopSignal


def signalled(folder, number, *, times=1, whole_group=False, **changes):
    """A run that is sent a signal after its third checkpoint: exit code, and what it said."""
    log = folder.with_suffix(".log")
    child = runs.fork(lambda: runs.train(folder, epochs=50, **changes), log)
    end = time.monotonic() + 60
    while not (folder / "checkpoints/step_00000003").exists():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.002)
    for _ in range(times):
        (os.killpg if whole_group else os.kill)(child, number)
        time.sleep(0.05 * (times - 1))
    return runs.wait(child), log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_saves_at_the_step_boundary_and_exits_75(tmp_path, number):
    code, said = signalled(tmp_path / "run", number, save_steps=None, save_minutes=1e-9)
    assert code == 75, said
    assert f"stopped by {number.name} after step" in said
    assert 'resume="auto"' in said
    last = json.loads((tmp_path / "run/attempts.jsonl").read_text().splitlines()[-1])
    newest = sorted((tmp_path / "run/checkpoints").glob("step_*"))[-1]
    assert newest.name == f"step_{last['ends_after_step']:08d}"
    assert last["how"].startswith("Interrupted")


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    code, said = signalled(tmp_path / "run", signal.SIGTERM, evaluators=False, max_steps=60)
    assert code == 75, said
    runs.train(tmp_path / "run", epochs=50, evaluators=False, max_steps=60)
    runs.train(tmp_path / "whole", epochs=50, evaluators=False, max_steps=60)
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")


def test_the_workers_are_sent_it_too_and_leave_the_decision_to_the_run(tmp_path):
    code, said = signalled(tmp_path / "run", signal.SIGTERM, whole_group=True, workers=2)
    assert code == 75, said
    assert "DataLoader" not in said


def test_a_second_signal_ends_at_once(tmp_path):
    def slow():
        model = tiny.make_model()
        model.backend.image_head.weight.register_hook(lambda grad: time.sleep(60))
        config = TrainConfig(str(tmp_path / "run"), batch_size=8, progress=False)
        Trainer(model, tiny.make_pairs(), config).train()

    child = runs.fork(slow, tmp_path / "log")
    while not (tmp_path / "run/attempts.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    begin = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert runs.wait(child) == -signal.SIGTERM
    assert time.monotonic() - begin < 5
    assert "SIGTERM: saving after this step; once more ends at once" in (tmp_path / "log").read_text()


def test_handlers_are_put_back_and_other_threads_have_none():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._note
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received is signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []

    def elsewhere():
        with StopSignal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_command_line_ends_with_75_and_goes_on(tmp_path):
    tiny.make_model(dropout=0.1).save_pretrained(tmp_path / "model")
    for colour in tiny.COLOURS:
        for place in tiny.PLACES:
            (tmp_path / f"{colour}-{place}.png").write_bytes(tiny.square(colour, place))
            (tmp_path / f"{colour}-{place}.txt").write_text(f"a {colour} square {place}")
    data = tmp_path / "data"
    data.mkdir()
    for path in [*tmp_path.glob("*.png"), *tmp_path.glob("*.txt")]:
        path.rename(data / path.name)
    command = [sys.executable, "-m", "clipkit", "train", f"model.name={tmp_path / 'model'}", f"data.train={data}"]
    command += ["train.batch_size=8", f"train.output_dir={tmp_path / 'run'}", "train.save_steps=1", "train.epochs=20"]
    command += ["train.evaluate_every=40", "--resume", "auto"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/checkpoints/step_00000003").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=300)[1]
    assert first.returncode == 75, said
    other = subprocess.run([*command, "train.seed=3"], capture_output=True, text=True, timeout=300)
    assert other.returncode == 2
    assert "train.seed: 0 before, 3 now" in other.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stderr
    attempts = (tmp_path / "run/attempts.jsonl").read_text()
    assert attempts.count("--resume auto") == 2


# -- one writer


def test_two_writers_are_refused_and_the_first_is_named(tmp_path, make_model, pairs):
    settings = TrainConfig(str(tmp_path / "run"), batch_size=8, max_steps=2, progress=False)
    trainer = Trainer(make_model(), pairs, settings)

    def hold():
        from clipkit.training.run_folder.ownership import locked

        with locked(tmp_path / "run"):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = runs.fork(hold)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with pytest.raises(UsageError, match=f"another process writes to this folder: process {child} on "):
            trainer.train()
    finally:
        os.kill(child, signal.SIGKILL)
        runs.wait(child)
    trainer.train()  # a dead one holds nothing


# -- disk


def test_a_full_disk_is_foreseen_before_the_first_step(tmp_path, make_model, pairs, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(ResourceError, match=r"a checkpoint needs \d+ MiB, and the disk has 1 MiB"):
        Trainer(make_model(), pairs, TrainConfig(str(tmp_path / "run"), batch_size=8, progress=False)).train()
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_disk_that_fills_up_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    import shutil

    from clipkit.training.checkpoints.checkpoint import Checkpoints, verify

    usage, whole = shutil.disk_usage(tmp_path), Checkpoints.save

    def save(self, step, parts, **options):
        if step == 4:
            monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**20))
        return whole(self, step, parts, **options)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(ResourceError, match="the disk has 1 MiB"):
        runs.train(tmp_path / "run")
    paths = Checkpoints(tmp_path / "run/checkpoints").paths()
    assert [path.name for path in paths] == ["step_00000002", "step_00000003"]
    for path in paths:
        verify(path)
    monkeypatch.undo()
    runs.train(tmp_path / "run")
    runs.train(tmp_path / "whole")
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")


# -- numbers


def poisoned(model, steps, value):
    """Makes a gradient `value` at these steps, from 1."""
    count = iter(range(1, 10**6))
    return model.backend.image_head.weight.register_hook(lambda g: g * value if next(count) in steps else g)


def test_a_gradient_that_is_no_number_stops_the_run_and_its_rows_are_written_out(tmp_path, make_model, pairs):
    model = make_model()
    trainer = Trainer(model, pairs, TrainConfig(str(tmp_path / "run"), batch_size=8, progress=False))
    poisoned(model, {2}, float("nan"))
    with pytest.raises(ClipkitError, match=r"the gradient is nan; the step was not applied(?s:.)*nonfinite.jsonl"):
        trainer.train()
    (line,) = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    assert (line["step"], line["gradient_norm"]) == (2, "nan")
    assert line["parameters"] == ["model.backend.image_head.weight"]
    assert [each["row"] for each in line["rows"]] == [draw.row for draw in trainer.plan.batch(0, 1)]


def test_some_such_steps_may_be_left_out(tmp_path, make_model, pairs):
    model = make_model()
    settings = {"batch_size": 8, "max_steps": 3, "log_every": 1, "skip_nonfinite": 2, "progress": False}
    trainer, before = Trainer(model, pairs, TrainConfig(str(tmp_path / "run"), **settings)), []
    poisoned(model, {1, 2}, float("inf"))
    head = model.backend.image_head.weight
    original = head.detach().clone()
    head.register_hook(lambda grad: before.append(head.detach().clone()))
    result = trainer.train()
    assert before[1].equal(original)
    assert before[2].equal(original)
    assert not head.equal(original)
    assert [line["gradient_norm"] for line in result.history][:2] == [None, None]
    assert len((tmp_path / "run/nonfinite.jsonl").read_text().splitlines()) == 2


def test_a_loss_that_is_no_number_is_not_applied(tmp_path, make_model, pairs, monkeypatch):
    from clipkit.losses.contrastive import Loss
    from clipkit.training import update

    real = update.backward

    def backward(*arguments, **options):
        found = real(*arguments, **options)
        return Loss(found.loss * float("nan"), found.kl)

    monkeypatch.setattr(update, "backward", backward)
    model = make_model()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ClipkitError, match="the loss is nan; the step was not applied"):
        Trainer(model, pairs, TrainConfig(str(tmp_path / "run"), batch_size=8, progress=False)).train()
    assert all(each.equal(before[name]) for name, each in model.state_dict().items())


# -- ranks


@pytest.mark.slow
def test_ranks_that_see_other_data_are_named(tmp_path):
    def work():
        rank = int(os.environ["RANK"])
        return runs.train(tmp_path / "run", seed=rank)

    codes = [runs.wait(child) for child in runs.fork_ranks(2, work, tmp_path / "log")]
    assert codes == [2, 2]
    for rank in range(2):
        text = (tmp_path / f"log.{rank}").read_text()
        assert "rank 1 does not run what rank 0 runs" in text
        assert "train.seed: 0 on rank 0, 1" in text


@pytest.mark.slow
def test_one_signal_to_one_of_two_ranks_stops_both_at_the_same_step(tmp_path):
    children = runs.fork_ranks(2, lambda: runs.train(tmp_path / "run", epochs=50, evaluators=False), tmp_path / "log")
    while not (tmp_path / "run/checkpoints/step_00000003").exists():
        time.sleep(0.005)
    os.kill(children[1], signal.SIGUSR1)
    assert [runs.wait(child) for child in children] == [75, 75], (tmp_path / "log.0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 1])
def test_a_broken_image_on_one_rank_ends_all_with_its_message(tmp_path, batch):
    def work():
        pairs = tiny.make_pairs()
        settings = TrainConfig(str(tmp_path / "run"), batch_size=16, epochs=2, progress=False)
        plan = Trainer(tiny.make_model(), pairs, settings).plan
        rows = pairs.to_list()
        rows[plan.batch(0, batch)[-1].row]["image"]["bytes"] = b"no image"
        broken = type(pairs).from_list(rows, features=pairs.features)
        Trainer(tiny.make_model(), broken, settings).train()

    assert [runs.wait(child) for child in runs.fork_ranks(2, work, tmp_path / "log")] == [3, 3]
    for rank in range(2):
        assert "NOT_IMAGE" in (tmp_path / f"log.{rank}").read_text()


@pytest.mark.slow
def test_metrics_that_differ_between_ranks_are_those_of_rank_0(tmp_path):
    def work():
        from clipkit import distributed

        def evaluator(model):
            count[0] += 1
            return {"score": count[0] * (1.0 if distributed.is_main() else -1.0)}

        count = [0]
        settings = TrainConfig(str(tmp_path / "run"), batch_size=8, epochs=1, evaluate_every=1, progress=False)
        trainer = Trainer(tiny.make_model(), tiny.make_pairs(), settings, evaluators=[evaluator])
        assert trainer.train().metrics == {"score": 4.0}

    codes = [runs.wait(child) for child in runs.fork_ranks(2, work, tmp_path / "log")]
    assert codes == [0, 0], (tmp_path / "log.1").read_text()


def test_a_long_evaluation_is_followed_by_a_checkpoint(tmp_path, make_model, pairs, monkeypatch):
    from clipkit.training.loop import Loop

    now, saved = [0.0], []
    monkeypatch.setattr("clipkit.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))

    def save(self, **_):
        saved.append(self.step)
        self.saved = now[0]

    def slow(model):
        now[0] += 60 * 6
        return {"score": 1.0}

    monkeypatch.setattr(Loop, "save", save)
    monkeypatch.setattr("clipkit.training.loop.write_timing", lambda *_: None)
    settings = TrainConfig(str(tmp_path / "run"), batch_size=8, max_steps=5, epochs=2, evaluate_every=2, progress=False)
    Trainer(make_model(), pairs, settings, evaluators=[slow]).train()
    assert saved == [2, 4, 4, 5, 5]  # after the first; before and after the second; before the last, and at the end
