"""Every block of the README runs: Python as it stands, `clipkit` lines as they stand, programs on generated photos.

Only what is not on this machine is put in place of what the README names: the hub's CLIP by a tiny model, the photos
by generated ones, the finished quickstart by one of three steps.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command import clipkit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
HUB = "openai/clip-vit-base-patch32"


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with runs/quickstart, birds.csv, photos/ and a model in place of the hub's."""
    folder = tmp_path_factory.mktemp("desk")
    done = clipkit("quickstart", "--output", folder / "runs/quickstart", "--max-steps", 3)
    assert done.code == 0, done.err
    (folder / "photos").mkdir()
    with (folder / "birds.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption", "species"])
        for number in range(10):  # 320 photos: the README's batches hold 256
            for colour in tiny.COLOURS:
                for place in tiny.PLACES:
                    path = folder / "photos" / f"{colour}_{place}_{number}.png"
                    path.write_bytes(tiny.square(colour, place) + bytes([number]))
                    rows.writerow([f"photos/{path.name}", f"a {colour} square {place}", colour])
    (folder / "photos.csv").write_bytes((folder / "birds.csv").read_bytes())
    tiny.make_model().save_pretrained(folder / "tiny-clip")
    return folder


@pytest.fixture(scope="module")
def names():
    """What a block defines, the next one may use."""
    return {}


def runnable(text, folder):
    return text.replace(HUB, str(folder / "tiny-clip"))


def test_there_are_blocks_of_each_kind():
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count("python") >= 2
    assert kinds.count("sh") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [text for kind, text in BLOCKS if kind == "python"], ids=["search", "train", "keep", "models"]
)
def test_python_blocks(block, desk, names, monkeypatch):
    monkeypatch.chdir(desk)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(runnable(block, desk), "README.md", "exec"), names)
    assert out.getvalue()


@pytest.mark.slow
def test_shell_blocks(desk, monkeypatch):
    monkeypatch.chdir(desk)
    lines = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("export PHOTOS=", "python ")):
            continue
        name, *arguments = shlex.split(runnable(line, desk))
        assert name == "clipkit", line
        done = clipkit(*arguments)
        assert done.code == 0, f"{line}\n{done.err}"


@pytest.mark.slow
def test_the_sample_error_is_a_real_one(desk, monkeypatch):
    monkeypatch.chdir(desk)
    (sample,) = [text for kind, text in BLOCKS if kind == "text"]
    assert clipkit("check", "data", "birds.csv", "--text", "captoin").err == sample


@pytest.mark.slow
def test_program_lines_on_generated_photos(desk):
    from transformers import TimmWrapperConfig, TimmWrapperModel

    photos = desk / "generated"
    (photos / "flickr8k_train2600").mkdir(parents=True)
    lines = [
        {"image": str(path), "captions": [path.stem.replace("_", " "), f"a picture of {path.stem.split('_')[0]}"]}
        for path in sorted((desk / "photos").iterdir())
    ]
    (photos / "flickr8k_train2600" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    config = TimmWrapperConfig(architecture="mobilenetv2_035", pretrained_cfg=cfg)
    config.num_classes = 0
    TimmWrapperModel(config).save_pretrained(photos / "mobilenetv2_timm")
    (desk / "train").symlink_to(ROOT / "train")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (block,) = [text for kind, text in BLOCKS if kind == "sh" and "PHOTOS" in text]
    small = block.replace("PHOTOS=…", f"PHOTOS={photos}").rstrip("\n") + " --epochs 1 --batch-size 32"
    done = subprocess.run(["bash", "-ec", small], cwd=desk, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "288 photos to learn from, 32 held out" in done.stdout


def test_the_file_map_names_every_folder_and_only_what_is_there():
    drawn = README.split("## File map")[1].split("## Develop")[0]
    folders = [path for path in (ROOT / "clipkit").rglob("*/") if path.name != "__pycache__"]
    for folder in folders:
        assert f" {folder.name}/ " in drawn, folder.name
    for path in (ROOT / "clipkit").glob("*.*"):
        if path.name != "py.typed":
            assert path.stem in drawn, path.name
    named = set(re.findall(r"(\w+\.(?:py|html))\b", drawn))
    assert named <= {path.name for path in (ROOT / "clipkit").rglob("*") if path.suffix in (".py", ".html")}
    assert set(re.findall(r"^ +(\w+)/ ", drawn, re.MULTILINE)) == {folder.name for folder in folders}


def test_the_guide_names_every_program_and_figure_and_its_notion_works():
    guide = (ROOT / "train/README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in guide for path in (ROOT / "train").glob("*.py"))
    assert {f"figures/{path.name}" for path in (ROOT / "train/figures").iterdir()} == set(
        re.findall(r"\((figures/[^)]*)\)", guide)
    )
    (block,) = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) < 40
    names = {}
    exec(compile(block, "train/README.md", "exec"), names)
    places = {"latitude": torch.tensor([48.8584, 48.8606]), "longitude": torch.tensor([2.2945, 2.3376])}
    affinity = names["Nearby"](kilometres=5).affinity(places, places)  # Eiffel tower and Louvre are 3.2 km apart
    assert affinity[0].tolist() == pytest.approx([1, 0.53], abs=0.01)
