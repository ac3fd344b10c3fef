"""The check of a user's own launch: it agrees where all is well, and sees each way of being wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from clipkit import Graded, Paired, SameGroup, TrainConfig, Trainer, Views
from clipkit.losses import contrastive
from clipkit.training import step
from clipkit.training.verify import GradientCheck, check_gradients

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
        Trainer(model, tiny.make_pairs() if pairs is None else pairs, config, similar=similar or Paired())
    )


@pytest.mark.parametrize("notion", NOTIONS)
def test_every_notion_gives_the_big_batch(tmp_path: Path, notion: str) -> None:
    found = check(tmp_path, NOTIONS[notion], micro_batch=5, label_smoothing=0.1)
    assert found.same, found.lines()
    assert {each.name for each in found.groups} >= {
        "image tower",
        "image head",
        "text tower",
        "text head",
        "logit scale",
    }
    assert max(abs(each.ratio - 1) for each in found.groups) < 1e-4


def test_sigmoid_scores_hard_negatives_and_matryoshka(tmp_path: Path) -> None:
    pairs = tiny.make_pairs()
    pairs = pairs.add_column("hard_texts", [[f"a {colour} square"] for colour in reversed(pairs["colour"])])
    pairs = pairs.add_column("trust", [0.5 + row % 3 for row in range(len(pairs))])
    found = check(tmp_path, Paired(score="trust"), pairs, bias=-3.0, matryoshka=(4, 16))
    assert found.same, found.lines()
    assert "logit bias" in {each.name for each in found.groups}


def test_a_scale_that_is_counted_once_a_chunk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = step._cut
    monkeypatch.setattr(step, "_cut", lambda leaves, seen: [p | step._scalar_grads(leaves) for p in cut(leaves, seen)])
    found = check(tmp_path, micro_batch=4)
    assert [each.name for each in found.groups if not each.same] == ["logit scale"]
    assert not found.same
    assert any("NOT the big batch" in line for line in found.lines())


def test_a_loss_of_each_chunk_alone_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        contrastive.Embedded, "gathered", lambda self: contrastive.Embedded(self.emb.detach(), self.keys)
    )
    found = check(tmp_path)
    assert {each.name for each in found.groups if not each.same} >= {"text tower", "text head"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_command_under_a_launcher(tmp_path: Path, launcher: str) -> None:
    lines = []
    for colour in tiny.COLOURS:
        for place in tiny.PLACES:
            (tmp_path / f"{colour}-{place}.png").write_bytes(tiny.square(colour, place))
            lines.append({"image": f"{colour}-{place}.png", "captions": [f"a {colour} square {place}"]})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tiny.make_model().save_pretrained(tmp_path / "model")
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": ["accelerate.commands.launch", "--num_processes", "1", "--cpu"],
    }[launcher]
    settings = ["model.name=model", "data.train=captions.jsonl", "train.output_dir=unused", "train.batch_size=11"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *start,
            "-m",
            "clipkit",
            "check",
            "gradients",
            *settings,
            "train.micro_batch=3",
            "--json",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["same"], found["ranks"], found["micro_batch"]) == (True, 2 if launcher == "torchrun" else 1, 3)
    assert not (tmp_path / "unused").exists()
