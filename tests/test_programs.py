"""Every program of train/ and eval/, started as its first lines say: plain, torchrun, accelerate launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Generated photos with captions.jsonl and class folders, a saved model, a vision tower in timm's form."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    folder = tmp_path_factory.mktemp("world")
    lines = []
    for colour in tiny.COLOURS:
        (folder / "classes" / colour).mkdir(parents=True)
        for place in tiny.PLACES:
            name = f"classes/{colour}/{place}.png"
            (folder / name).write_bytes(tiny.square(colour, place))
            lines.append({"image": name, "captions": [f"a {colour} square {place}", f"{place} {colour}"]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    labels = [f"{line['image']},{line['image'].split('/')[1]}" for line in lines]
    (folder / "labels.csv").write_text("\n".join(["image,label", *labels]))
    tiny.make_model().save_pretrained(folder / "model")
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    config = TimmWrapperConfig(architecture="mobilenetv2_035", pretrained_cfg=cfg)
    config.num_classes = 0
    TimmWrapperModel(config).save_pretrained(folder / "tower")
    return folder


def start(launcher, program, *arguments, folder):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHERS[launcher], str(ROOT / program), *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [pytest.param("accelerate", marks=pytest.mark.full), "torchrun"])
def test_finetune(world, tmp_path, launcher):
    settings = ["--test", 0.25, "--epochs", 1, "--batch-size", 8, "--output", tmp_path / "run"]
    out = start(
        launcher, "train/finetune.py", world / "captions.jsonl", "--model", world / "model", *settings, folder=tmp_path
    )
    assert out.count('"retrieval/text_to_image_recall@1":') == 1  # one process speaks
    assert (tmp_path / "run" / "model" / "clipkit.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [pytest.param("python", marks=pytest.mark.full), "torchrun"])
def test_locked_image(world, tmp_path, launcher):
    settings = [
        "--epochs",
        2,
        "--batch-size",
        8,
        "--output",
        tmp_path / "run",
        "--features",
        tmp_path / "features.sqlite",
    ]
    out = start(launcher, "train/locked_image.py", world, "--vision", world / "tower", *settings, folder=tmp_path)
    assert "29 photos to learn from, 3 held out" in out
    # with its write-ahead log, which stays where two processes close it at the same moment
    assert sum(path.stat().st_size for path in tmp_path.glob("features.sqlite*")) > 29 * 4 * 1000
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["n"]["retrieval/images"] == 3


@pytest.mark.slow
def test_forgetting(world, tmp_path):
    settings = ["--held-photos", 8, "--held-emoji", 8, "--photo-epochs", 1, "--emoji-epochs", 1, "--batch-size", 8]
    files = ["--output", tmp_path / "run", "--features", tmp_path / "features.sqlite", "--figure", tmp_path / "a.svg"]
    start_it = [world, world, "--vision", world / "tower", *settings, *files, "--seeds", 3]
    out = start("torchrun", "train/forgetting.py", *start_it, folder=tmp_path)
    assert out.count("| 3 | plain fine-tuning |") == 1  # one process speaks
    (result,) = json.loads((tmp_path / "run" / "result.json").read_text())["seeds"]
    assert result["images"] == {"emoji": 4, "photos": 4}
    assert len(result["curve"]) == 11
    ends = {name: [result["curve"][i][name] for i in (0, -1)] for name in ("emoji", "photos")}
    assert ends == {name: [own["before"], own["plain"]] for name, own in result["recall"].items()}
    assert (tmp_path / "run/seed3/emoji/model/README.md").read_text().count("| chosen |") <= 1
    assert "<path" in (tmp_path / "a.svg").read_text()


@pytest.mark.slow
def test_evaluation_programs(world, tmp_path):
    ask = ["--model", world / "model", "--to"]
    one = start("python", "eval/retrieval.py", world / "captions.jsonl", *ask, tmp_path / "one.json", folder=tmp_path)
    assert "chance" in one
    two = start("torchrun", "eval/retrieval.py", world / "captions.jsonl", *ask, tmp_path / "two.json", folder=tmp_path)
    assert two.count("text_to_image_recall@1 ") == 1
    metrics = [json.loads((tmp_path / name).read_text())["metrics"] for name in ("one.json", "two.json")]
    assert metrics[0] == metrics[1]
    out = start("accelerate", "eval/zero_shot.py", world / "labels.csv", *ask, tmp_path / "z.json", folder=tmp_path)
    assert "majority 0.1250" in out
    assert json.loads((tmp_path / "z.json").read_text())["n"]["zero_shot/images"] == 32


@pytest.mark.slow
def test_gradient_parity(tmp_path):
    start("python", "train/gradient_parity.py", "--ranks", 2, "--to", tmp_path / "parity.md", folder=tmp_path)
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "parity.md").read_text().splitlines()
    ][2:]
    ours = [row for row in table if row[0].startswith("clipkit")]
    assert len(ours) == 6
    assert all(set(row[2:]) <= {"1.000 / 1.000", "1.000", "not trained"} for row in ours), ours
    rows = {(name, run): cells for name, run, *cells in table}
    assert rows["open_clip, as it is by default", "2 ranks"] == ["0.500 / 1.000", "0.500 / 1.000", "1.000"]
    assert rows["open_clip --accum-freq", "4 chunks"][2] == "4.000"


@pytest.mark.slow
def test_loss_scaling(world, tmp_path):
    settings = ["--sizes", 128, 256, "--dim", 16, "--repeats", 1, "--to", tmp_path / "scaling.svg"]
    settings += ["--step", world / "model", "--batch-size", 6, "--micro-batch", 2]
    out = start("python", "train/loss_scaling.py", *settings, folder=tmp_path)
    assert out.count("| info_nce, tiled |") == out.count("| open_clip SigLipLoss |") == 2
    assert "| at once | 6 |" in out
    assert "| cached, 3 chunks | 6 |" in out
    assert (tmp_path / "scaling.svg").read_text().count("<path") > 20


@pytest.mark.slow
def test_step_speed(tmp_path):
    size = ["--steps", 12, "--warmup", 2, "--batch-size", 8, "--width", 32, "--layers", 1]
    out = start("python", "train/step_speed.py", *size, "--to", tmp_path / "speed.json", folder=tmp_path)
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["loops"].keys() == {"clipkit Trainer", "bare step", "open_clip_train"}
    for name, loop in result["loops"].items():
        assert f"| {name} | {loop['images_per_second']:.1f} |" in out
        low, high = loop["trainer_speed_of_this_95"]
        assert 0 < low <= loop["trainer_speed_of_this"] <= high
    saved = result["checkpoint"]
    assert saved["saves"] == 2  # at steps 4 and 8; the last one is measured, too, and not counted
    assert saved["bytes"] > 16 * result["model"]["parameters"]  # weights, best weights, two moments
    assert saved["seconds"] > 0
    assert f"{saved['bytes'] / 1e6:.1f} MB" in out
