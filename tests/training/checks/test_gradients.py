"""The check of a user's own launch: it agrees where all is well, and sees each way of being wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import clipkit
from step_matrix import sabotage

from clipkit import Graded, Paired, SameGroup, TrainConfig, Views
from clipkit.losses import contrastive
from clipkit.training.checks.gradients import GradientCheck, check_gradients
from clipkit.training.setup import TrainSetup

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # --cpu would start one process; several need --multi_gpu, also where there is none: clipkit then joins them by gloo
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}
NOTIONS: dict[str, Any] = {
    "paired": Paired(),
    "group, equal captions ignored": SameGroup("colour", known={"texts": "ignore"}),
    "graded": Graded(("colour", "place"), "hierarchy"),
    "pairs and views": [Paired(), Views(weight=0.5)],
}


def check(
    folder: Path, similar: Any = None, pairs: Any = None, bias: float | None = None, **options: Any
) -> GradientCheck:
    config = TrainConfig(str(folder / "run"), batch_size=12, progress=False, **options)
    model = tiny.make_model(dropout=0.1, logit_bias=bias)
    return check_gradients(
        TrainSetup(model, tiny.make_pairs() if pairs is None else pairs, config, similar=similar or Paired())
    )


@pytest.mark.parametrize("notion", NOTIONS)
def test_every_notion_gives_the_big_batch(tmp_path: Path, notion: str) -> None:
    checked = check(tmp_path, NOTIONS[notion], micro_batch=5, label_smoothing=0.1)
    assert checked.same, checked.lines()
    assert {group.name for group in checked.groups} >= {
        "image tower",
        "image head",
        "text tower",
        "text head",
        "logit scale",
    }
    assert max(abs(group.ratio - 1) for group in checked.groups) < 1e-4


def test_sigmoid_scores_hard_negatives_and_matryoshka(tmp_path: Path) -> None:
    pairs = tiny.make_pairs()
    pairs = pairs.add_column("hard_texts", [[f"a {colour} square"] for colour in reversed(pairs["colour"])])
    pairs = pairs.add_column("trust", [0.5 + row % 3 for row in range(len(pairs))])
    checked = check(tmp_path, Paired(score="trust"), pairs, bias=-3.0, matryoshka=(4, 16))
    assert checked.same, checked.lines()
    assert "logit bias" in {group.name for group in checked.groups}


def test_a_scale_that_is_counted_once_a_chunk_is_seen(tmp_path: Path) -> None:
    with sabotage("scale x K"):
        checked = check(tmp_path, micro_batch=4)
    assert [group.name for group in checked.groups if not group.same] == ["logit scale"]
    assert not checked.same
    assert any("NOT the big batch" in line for line in checked.lines())
    assert [group["cosine"] is None for group in checked.as_dict()["groups"]] == [
        group.parameters == 1 for group in checked.groups
    ]


def test_a_loss_of_each_chunk_alone_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        contrastive.EmbeddedBatch, "gathered", lambda self: contrastive.EmbeddedBatch(self.emb.detach(), self.keys)
    )
    checked = check(tmp_path)
    assert {group.name for group in checked.groups if not group.same} >= {"text tower", "text head"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, their captions, a model, and run.yaml."""
    folder = tmp_path_factory.mktemp("world")
    lines = []
    for colour in tiny.COLOURS:
        for place in tiny.PLACES:
            (folder / f"{colour}-{place}.png").write_bytes(tiny.square(colour, place))
            lines.append({"image": f"{colour}-{place}.png", "captions": [f"a {colour} square {place}"]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tiny.make_model().save_pretrained(folder / "model")
    loop = {"output_dir": "unused", "batch_size": 11, "micro_batch": 3}
    (folder / "run.yaml").write_text(
        json.dumps({"model": {"name": "model"}, "data": {"train": "captions.jsonl"}, "train": loop})
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.full)])
def test_the_command_under_a_launcher(config: Path, launcher: str) -> None:
    program = Path(__file__).parents[1] / "gradients_program.py"
    paths = [str(program.parents[2]), str(program.parents[1])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(program), "run.yaml", "--json"],
        cwd=config,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    right, broken = (json.loads(part) for part in re.findall(r"^{.*?^}$", done.stdout, re.DOTALL | re.MULTILINE))
    assert (right["same"], right["ranks"], right["micro_batch"]) == (True, 2, 3), done.stderr[-3000:]
    assert (broken["same"], broken["ranks"]) == (False, 2)
    assert done.returncode != 0
    assert not (config / "unused").exists()


def test_the_command_says_by_its_exit_code(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config)
    right = clipkit("check", "gradients", "run.yaml")
    assert right.code == 0, right.err
    assert "these are the gradients of the big batch" in right.out
    with sabotage("scale x K"):
        broken = clipkit("check", "gradients", "run.yaml")
    assert broken.code == 1
    assert [line.split("  ")[0] for line in broken.out.splitlines() if "NOT the big batch" in line] == ["logit scale"]
