"""Trackers: what the real packages wrote, read back by their own readers."""

from __future__ import annotations

import json
import sqlite3
import struct
import threading

import pytest
import runs
import tiny

from clipkit import TrainConfig, Trainer
from clipkit.errors import UsageError
from clipkit.training.run_folder import trackers
from clipkit.training.run_folder.trackers import LOGGER_TYPE_TO_CLASS, Trackers

LOGGED = {"loss", "kl", "epoch", "logit_scale", "gradient_norm", "learning_rate"}
RECALL = "retrieval/text_to_image_recall@1"


@pytest.fixture(autouse=True)
def local(tmp_path, monkeypatch):
    """Everything offline, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder, key):
    """(step, value) of a key, as metrics.jsonl has it."""
    return [(line["step"], line[key]) for line in lines(folder) if key in line]


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    data = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    config = HParamsPluginData.FromString(data).session_start_info.hparams
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in config.items()}, scalars


def read_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'clipkit'")
    (run,) = client.search_runs([experiment.experiment_id])
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return run, {key: [(point.step, point.value) for point in points] for key, points in history.items()}


def read_trackio(path):
    with sqlite3.connect(path) as base:
        logged = base.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        configs = base.execute("select run_id, config from configs").fetchall()
    base.close()
    return logged, configs


def read_wandb(folder):
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, records = next(folder.glob("*.wandb")).read_bytes(), 7, b"", []
    while at + 7 < len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that has no room for a header
            at += 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(part))
            part = b""
    return records


def test_tensorboard(tmp_path, cut):
    cut(tmp_path / "birds", 4, trackers=("tensorboard",), save_steps=4, epochs=2)
    runs.train(tmp_path / "birds", trackers=("tensorboard",), save_steps=4, epochs=2)
    config, scalars = read_tensorboard(tmp_path / "birds")
    assert (config["batch_size"], config["learning_rate"], config["augmentation"]) == (8, 1e-3, "crop")
    assert scalars.keys() >= {*LOGGED, RECALL}
    for key, points in scalars.items():
        wanted = series(tmp_path / "birds", key)
        assert [step for step, _ in points] == [step for step, _ in wanted]
        assert [value for _, value in points] == pytest.approx([value for _, value in wanted])  # which are fp32 there
    assert [step for step, _ in scalars[RECALL]] == [3, 6, 8]


def test_mlflow(tmp_path, cut):
    cut(tmp_path / "birds", 4, trackers=("mlflow",), epochs=2)
    run, _ = read_mlflow(tmp_path / "birds")
    assert run.info.status == "FAILED"  # not RUNNING for ever
    runs.train(tmp_path / "birds", trackers=("mlflow",), epochs=2)
    run, history = read_mlflow(tmp_path / "birds")  # there is one
    assert (run.info.run_name, run.info.status) == ("birds", "FINISHED")
    assert (run.data.params["batch_size"], run.data.params["augmentation"]) == ("8", "crop")
    assert history["loss"] == series(tmp_path / "birds", "loss")
    assert history[RECALL.replace("@", "_at_")] == series(tmp_path / "birds", RECALL)


def test_trackio(tmp_path, cut, monkeypatch, capsys):
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in (utils, __import__("trackio.sqlite_storage").sqlite_storage, __import__("trackio")):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    cut(tmp_path / "birds", 4, trackers=("trackio",), epochs=2)
    runs.train(tmp_path / "other/birds", trackers=("trackio",), max_steps=1)  # of the same name
    runs.train(tmp_path / "birds", trackers=("trackio",), epochs=2)
    logged, configs = read_trackio(SQLiteStorage.get_project_db_path("clipkit"))
    ids = list(dict.fromkeys(run for run, *_ in logged))
    assert len(ids) == 2
    assert {name for _, name, *_ in logged} == {"birds"}
    mine = [(step, json.loads(values)) for run, _, step, values in logged if run == ids[0]]
    for key in ("loss", RECALL):
        assert [(step, values[key]) for step, values in mine if key in values] == series(tmp_path / "birds", key)
    assert json.loads(dict(configs)[ids[0]])["augmentation"] == "crop"
    assert capsys.readouterr().out == ""  # it prints, but standard output is for data
    assert not [thread for thread in threading.enumerate() if "_batch_sender" in thread.name]


def test_wandb(tmp_path, cut):
    cut(tmp_path / "birds", 4, trackers=("wandb",), epochs=2)
    runs.train(tmp_path / "birds", trackers=("wandb",), epochs=2)
    attempts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    records = [read_wandb(folder) for folder in attempts]
    begun = [record.run for attempt in records for record in attempt if record.HasField("run")]
    known = json.loads((tmp_path / "birds/trackers.json").read_text())["wandb"]
    assert {(run.run_id, run.project, run.display_name) for run in begun} == {(known, "clipkit", "birds")}
    updates = [update for attempt in records for record in attempt for update in record.config.update]
    config = {update.key: json.loads(update.value_json) for update in updates}
    assert (config["batch_size"], config["augmentation"]) == (8, "crop")
    logged: list[tuple[int, dict]] = []
    for attempt in records:
        for record in attempt:
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            logged += [(int(items["_step"]), items)] if items else []
    for key in ("loss", RECALL):
        read = [(step, json.loads(items[key])) for step, items in logged if key in items]
        assert read == series(tmp_path / "birds", key)
    codes = [record.exit.exit_code for attempt in records for record in attempt if record.HasField("exit")]
    assert codes == [1, 0]


def test_two_ranks_write_once(tmp_path):
    def work():
        runs.train(tmp_path / "birds", trackers=("tensorboard", "mlflow"), epochs=1)

    log = tmp_path / "log"
    codes = [runs.wait(child) for child in runs.fork_ranks(2, work, log)]
    assert codes == [0, 0], "\n".join(rank_log.read_text() for rank_log in tmp_path.glob("log.*"))
    assert len(list((tmp_path / "birds/tensorboard").glob("events*"))) == 1
    _, history = read_mlflow(tmp_path / "birds")
    assert history["loss"] == series(tmp_path / "birds", "loss")
    _, scalars = read_tensorboard(tmp_path / "birds")
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4]


def test_a_config_of_yaml_arrives_flat(tmp_path):
    flattened = trackers.flat({"model": {"freeze": ("image",), "lora": None}, "train": {"betas": [0.9, 0.98]}, "x": ()})
    assert flattened == {
        "model.freeze.0": "image",
        "model.lora": "None",
        "train.betas.0": 0.9,
        "train.betas.1": 0.98,
        "x": "()",
    }


class Failing:
    """A tracker that fails when it is told of a step."""

    requires_logging_directory = False

    def __init__(self, *_, **__):
        self.seen = []

    def start(self):
        if Failing.broken == "start":
            raise ConnectionError("no route\nto host")

    def store_init_configuration(self, values):
        self.seen.append(values)

    def log(self, values, step):
        if Failing.broken == "log" and step >= 2:
            raise ConnectionError("no route\nto host")

    def finish(self):
        if Failing.broken == "finish":
            raise ConnectionError("no route\nto host")


@pytest.fixture
def failing(monkeypatch):
    def at(when):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "failing", Failing)
        monkeypatch.setattr(Failing, "broken", when, raising=False)

    return at


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, failing, caplog):
    failing("log")
    assert runs.train(tmp_path / "run", trackers=("failing", "tensorboard"), max_steps=4, evaluators=False).steps == 4
    said = [message for message in caplog.messages if "the tracker 'failing'" in message]
    assert len(said) == 1
    assert said[0].endswith("run/metrics.jsonl has everything: ConnectionError: no route to host")
    _, scalars = read_tensorboard(tmp_path / "run")  # the other one is told on
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4]
    failing("finish")
    closing = Trackers(("failing",), tmp_path)
    closing.start({}, 0)
    closing.finish("FINISHED")
    assert caplog.messages[-1] == "the tracker 'failing' was not closed: ConnectionError: no route to host"


def test_a_tracker_that_does_not_start_ends_only_a_run_that_has_not_begun(tmp_path, failing, caplog):
    failing("start")
    with pytest.raises(UsageError, match=r"'failing' does not start: ConnectionError: no route(?s:.)*leave it out"):
        runs.train(tmp_path / "a", trackers=("failing",))
    Trackers(("failing",), tmp_path).start({}, 4)
    assert "the tracker 'failing' failed, and gets no more data" in caplog.messages[-1]


def test_a_slow_tracker_is_told_once(tmp_path, monkeypatch, failing, caplog):
    failing(None)
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(trackers.time, "monotonic", lambda: next(now))
    slow = Trackers(("failing",), tmp_path)
    slow.start({}, 0)
    for step in range(5):
        slow.log({"loss": 1.0}, step)
    assert caplog.messages == ["the tracker 'failing' takes 50 % of the run's time; a higher log_every helps"]


def test_trackers_that_are_not_there(tmp_path):
    def trainer(name):
        return Trainer(
            tiny.make_model(), tiny.make_pairs(), TrainConfig(str(tmp_path / "a"), batch_size=8, trackers=(name,))
        )

    with pytest.raises(UsageError, match=r"no tracker 'nonesuch'(?s:.)*one of: aim, (?s:.)*tensorboard"):
        trainer("nonesuch")
    with pytest.raises(UsageError, match=r"'comet_ml' is not installed(?s:.)*pip install comet_ml"):
        trainer("comet_ml")
