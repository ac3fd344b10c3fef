"""Real processes: torchrun on two uneven ranks gives what one process gives."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("rank_program.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PROGRAM.parents[1:3])), "OMP_NUM_THREADS": "1"}


def start(command, env=ENV):
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def seen(folder, command, program, *options):
    folder.mkdir()
    done = start([*command, str(PROGRAM.with_name(program)), str(folder), *options])
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "seen.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return functools.cache(lambda program: seen(tmp_path_factory.mktemp("ranks") / "one", [sys.executable], program))


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [("rank_program.py",), ("rank_program.py", "4"), ("lora_program.py",)], ids=["plain", "cached", "lora"]
)
def test_two_ranks_give_the_one_process_result(tmp_path, one, program):  # cached: of 5 and 4 rows, two chunks and one
    two = seen(tmp_path / "two", [*TORCHRUN, "2"], *program)
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


def test_a_launcher_whose_processes_are_not_connected_is_refused():
    # Accelerate set up by the program itself, in a way that makes every process believe that it is alone
    code = "from accelerate import PartialState; PartialState(); from clipkit import distributed; distributed.start()"
    done = start([sys.executable, "-c", code], {**ENV, "WORLD_SIZE": "2", "RANK": "0"})
    assert "the launcher announced 2 processes (WORLD_SIZE), Accelerate joined 1" in done.stderr
