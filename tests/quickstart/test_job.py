"""The main job, in a small version: everything that the real one writes, and the commands that it names."""

import json
import re
import shlex

import pytest
from command import clipkit

from clipkit import DualEncoder
from clipkit.quickstart.job import next_commands

STEPS = 3


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick") / "runs" / "quickstart"
    return folder, clipkit("quickstart", "--output", folder, "--max-steps", STEPS)


@pytest.mark.slow
def test_it_writes_what_it_promises(quick):
    folder, done = quick
    assert done.code == 0, done.err
    for name in ("config.yaml", "metrics.jsonl", "result.json", "report.html", "glyphs.index", "glyphs.csv"):
        assert (folder / name).stat().st_size > 100, name
    assert len(list((folder / "glyphs").glob("*.png"))) == 250
    result = json.loads((folder / "result.json").read_text())
    keys = {f"unseen_characters/retrieval/text_to_image_recall@{k}" for k in (1, 5)}
    keys |= {f"unseen_characters/retrieval/image_to_text_recall@{k}" for k in (1, 5)}
    keys |= {f"unseen_characters/zero_shot_{idea}/top1" for idea in ("script", "case")}
    keys |= {f"unseen_face/retrieval/text_to_image_recall@{k}" for k in (1, 5)}
    assert keys <= result["metrics"].keys()
    assert keys <= result["chance"].keys()
    assert all(0 <= value <= 1 for key, value in result["metrics"].items() if "median" not in key)
    assert result["n"]["unseen_characters/retrieval/images"] == 250
    assert result["seed"] == 0
    assert result["seconds"] > 0
    assert {"torch", "transformers", "clipkit"} <= result["versions"].keys()
    model = DualEncoder.from_pretrained(folder / "model")
    assert result["fingerprint"]["hash"] == model.fingerprint().hash
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, STEPS, STEPS]  # two of the loss, one of the validation


@pytest.mark.slow
def test_its_advice_names_no_option_that_it_lacks(quick):
    _, done = quick
    assert "Raise scale_learning_rate, or train longer" in done.err
    assert "--scale" not in done.err


@pytest.mark.slow
def test_the_report_is_one_file(quick):
    page = (quick[0] / "report.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("data:image/png;base64,") > 40
    for word in ("chance", "majority", "mistakes", "Text queries", "Images and their names"):
        assert word in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", page)  # nothing is fetched from anywhere
    assert "<script" not in page


@pytest.mark.slow
def test_the_summary_shows_chance_and_the_next_commands_work(quick):
    folder, done = quick
    assert "chance" in done.out
    assert "majority" in done.out
    for line in next_commands(folder):
        assert line in done.out
        name, *arguments = shlex.split(line)
        assert name == "clipkit"
        again = clipkit(*arguments)
        assert again.code == 0, again.err
        assert len(again.out.splitlines()) >= 5


@pytest.mark.slow
def test_a_folder_is_replaced_only_when_asked_and_only_if_it_is_ours(quick, tmp_path):
    again = clipkit("quickstart", "--output", quick[0])
    assert again.code == 2
    assert "the output folder exists" in again.err
    assert "--overwrite" in again.err
    for name, text in (("thesis.tex", "years of work"), ("config.yaml", "model:\n  name: a run of clipkit train\n")):
        mine = tmp_path / name.partition(".")[0]
        mine.mkdir()
        (mine / name).write_text(text)
        refused = clipkit("quickstart", "--output", mine, "--overwrite")
        assert refused.code == 2
        assert (mine / name).exists()
