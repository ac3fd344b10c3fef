"""The step gives the gradients of one big batch: every loss, target and mode, on any ranks, in fp32 and bf16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import step_matrix
from step_matrix import BUGS, CASES, MODES

PROGRAM = Path(step_matrix.__file__)
ALL = list(CASES)
SOME = ["known", "views", "hard", "dropout"]
BOTH = ["plain", "tiled+cached"]


def wrong(case, own):
    """What of a case is further from the float64 big batch than it may be; `own`: the error of plain fp32 there."""
    errors = {name: value for name, value in case.items() if name not in ("cosine", "ratio")}
    if own is not None:
        return {name: value for name, value in errors.items() if value > min(2 * own, 5e-6)}
    figures = {name: value for name, value in errors.items() if name in ("scale", "bias") and value > 0.02}
    figures |= {} if case["cosine"] >= 0.999 else {"cosine": case["cosine"]}
    return figures | ({} if 0.99 <= case["ratio"] <= 1.01 else {"ratio": case["ratio"]})


def own_error(cases, name):
    """Of the plain loss in fp32, over all that is compared."""
    loss, target, precision, _ = name.split(" ")
    plain = cases[f"{loss} {target} fp32 plain"]
    return max(v for k, v in plain.items() if k not in ("cosine", "ratio")) if precision == "fp32" else None


def check(figures, cases, modes):
    matrix = {name: case for name, case in figures.items() if name not in BUGS}
    assert len(matrix) == len(cases) * 2 * 2 * len(modes)
    assert not {name: bad for name, case in matrix.items() if (bad := wrong(case, own_error(figures, name)))}


def launched(folder, world, *names):
    out = folder / "errors.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(PROGRAM), str(out), *names], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_one_process():
    check(step_matrix.errors(ALL, BOTH), ALL, BOTH)


@pytest.fixture(scope="module")
def two_ranks():
    return runs.on_ranks(step_matrix.errors, 2, ALL, BOTH, list(BUGS))


def test_two_uneven_ranks(two_ranks):
    check(two_ranks, ALL, BOTH)


@pytest.mark.parametrize("bug", BUGS)
def test_every_known_bug_is_seen(two_ranks, bug):
    assert wrong(two_ranks[bug], own_error(two_ranks, f"info_nce {BUGS[bug]} fp32 cached"))


def test_four_ranks():
    check(runs.on_ranks(step_matrix.errors, 4, SOME, BOTH), SOME, BOTH)


@pytest.mark.full
def test_two_ranks_of_torchrun(tmp_path):
    check(launched(tmp_path, 2, *SOME, *BOTH), SOME, BOTH)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_mode_on_any_ranks(tmp_path, world):
    check(launched(tmp_path, world), ALL, list(MODES))
