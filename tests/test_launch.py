"""The scripts of train/launch/ with real processes; srun and scontrol are stand-ins that do as SLURM's manual says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

FOLDER = Path(__file__).parents[1] / "train" / "launch"
SCRIPTS = ["accelerate.sh", "slurm.sh", "torchrun.sh"]

# One task. The first time USR1 goes to the batch shell once a step is logged, as --signal=B:USR1@120 has it; what the
# shell then sends to srun goes on to the task. srun's code is the task's.
SRUN = """#!/bin/bash
batch=$PPID
while [[ $1 == --* ]]; do echo "$1" >> "$NOTES/options"; shift; done
SLURM_PROCID=0 SLURM_NTASKS=1 "$@" &
task=$!
trap 'echo USR1 >> "$NOTES/forwarded"; kill -USR1 $task' USR1
if [ ! -e "$NOTES/requeued" ]; then
    until [ -s "$RUN/metrics.jsonl" ]; do sleep 0.05; kill -0 $task || break; done
    kill -USR1 $batch
fi
wait $task; code=$?
while [ $code -gt 128 ]; do wait $task; code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo localhost ;;
    requeue) echo "$2" >> "$NOTES/requeued" ;;
esac
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Squares with captions, a model, and the start of a command line."""
    folder = tmp_path_factory.mktemp("launch")
    tiny.write_pairs(folder)
    tiny.make_model().save_pretrained(folder / "model")
    return folder


def launch(script, world, run, *settings, path=(), **env):
    data = [f"model.name={world / 'model'}", f"data.train={world / 'pairs.jsonl'}", "data.test=0.25"]
    loop = ["train.batch_size=8", "train.progress=false", f"train.output_dir={run}", "train.log_every=1"]
    search_path = os.pathsep.join([*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": search_path, **env}
    command = ["bash", FOLDER / script, *data, *loop, *settings]
    return subprocess.run(command, env=environment, cwd=world, capture_output=True, text=True, timeout=240)


def steps(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def attempts(run):
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def test_they_are_shell():
    assert sorted(path.name for path in FOLDER.iterdir()) == SCRIPTS
    for name in SCRIPTS:
        subprocess.run(["bash", "-n", FOLDER / name], check=True)


@pytest.mark.full
def test_torchrun_on_two_processes(world, tmp_path):
    done = launch("torchrun.sh", world, tmp_path / "run", "train.max_steps=2", GPUS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps(tmp_path / "run") == [1, 2]
    assert attempts(tmp_path / "run")[0]["topology"]["processes"] == 2
    assert done.stdout.count("retrieval/text_to_image_recall@10") == 1  # one speaks


def test_several_nodes_need_a_meeting_place(world, tmp_path):
    done = launch("torchrun.sh", world, tmp_path / "run", NODES="2")
    assert done.returncode != 0
    assert "HEAD: the name of one of the nodes" in done.stderr


@pytest.mark.full
def test_accelerate(world, tmp_path):
    options = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu"
    done = launch("accelerate.sh", world, tmp_path / "run", "train.max_steps=2", ACCELERATE=options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps(tmp_path / "run") == [1, 2]


@pytest.mark.slow
def test_slurm_sends_the_signal_and_the_job_goes_on(world, tmp_path):
    tools, notes, run = tmp_path / "bin", tmp_path / "notes", tmp_path / "run"
    tools.mkdir()
    notes.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "NOTES": str(notes), "RUN": str(run)}
    settings = ["train.max_steps=200", "train.epochs=100", "train.evaluate_every=1000"]

    first = launch("slurm.sh", world, run, *settings, path=[tools], **job)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "stopped by SIGUSR1" in first.stderr
    assert (notes / "requeued").read_text().split() == ["4711"]
    assert (notes / "forwarded").read_text().split() == ["USR1"]
    assert (notes / "options").read_text().split() == ["--wait=25", "--kill-on-bad-exit=0"]
    before = steps(run)
    assert 0 < len(before) < 200

    second = launch("slurm.sh", world, run, *settings, path=[tools], **job)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (notes / "requeued").read_text().split() == ["4711"]  # not again
    assert steps(run) == list(range(1, 201))
    begun = [attempt["begins_after_step"] for attempt in attempts(run) if "topology" in attempt]
    assert begun == [0, before[-1]]
    endings = [attempt["how"].partition(":")[0] for attempt in attempts(run) if "how" in attempt]
    assert endings == ["Interrupted", "done"]

    broken = launch("slurm.sh", world, run, "train.max_steps=0", path=[tools], **job)  # a code that is final
    assert broken.returncode == 2
    assert (notes / "requeued").read_text().split() == ["4711"]
