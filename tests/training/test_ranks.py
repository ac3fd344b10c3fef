"""Real processes: two uneven ranks give what one process gives."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch

from clipkit import TrainConfig, Trainer, distributed
from clipkit.errors import UsageError

PROGRAM = Path(__file__).with_name("rank_program.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PROGRAM.parents[1:3])), "OMP_NUM_THREADS": "1"}


def seen(folder, world, program, *options, launcher="forked"):
    folder.mkdir()
    program = PROGRAM.with_name(program)
    if launcher == "forked":
        runs.run_program(program, world, folder, *options)
    else:
        command = [*TORCHRUN, str(world), str(program), str(folder), *options]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "seen.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda program: seen(tmp_path_factory.mktemp("ranks") / "one", 1, program))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "program"),
    [
        ("torchrun", ("rank_program.py",)),
        ("forked", ("rank_program.py", "4")),  # cached: of 5 and 4 rows, two chunks and one
        ("forked", ("lora_program.py",)),
    ],
    ids=["plain", "cached", "lora"],
)
def test_two_ranks_give_the_one_process_result(tmp_path, one, launcher, program):
    two = seen(tmp_path / "two", 2, *program, launcher=launcher)
    one = one(program[0])
    assert (one["world"], two["world"]) == (1, 2)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, wanted in one["gradients"].items():
        error = (two["gradients"][name] - wanted).norm() / wanted.norm()
        assert error < 5e-6 or wanted.norm() < 1e-7, name  # key biases: softmax does not see them
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["step"] == theirs["step"]
        assert ours.get("learning_rate") == theirs.get("learning_rate")
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_a_launcher_whose_processes_are_not_connected_is_refused(tmp_path, monkeypatch):
    distributed.start()  # Accelerate believes that it is alone, as it does where a program set it up by itself
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = r"the launcher announced 2 processes \(WORLD_SIZE\), Accelerate joined 1"
    with pytest.raises(UsageError, match=said):
        distributed.start()
    with pytest.raises(UsageError, match=said):
        Trainer(tiny.make_model(), tiny.make_pairs(), TrainConfig(str(tmp_path / "run"), batch_size=8))
