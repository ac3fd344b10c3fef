"""The verbs on good and on bad input: exit codes, messages that tell what to do, JSON for scripts."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
import tiny
from command import clipkit

from clipkit.cli import output
from clipkit.cli.main import main

VERBS = ["quickstart", "train", "evaluate", "label", "index", "search", "export", "check data", "env"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    tiny.make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def table(tmp_path):
    """squares.csv with 32 images in squares/, one row a caption, a colour."""
    (tmp_path / "squares").mkdir()
    with (tmp_path / "squares.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption", "colour"])
        for colour in tiny.COLOURS:
            for place in tiny.PLACES:
                name = f"squares/{colour}_{place}.png"
                (tmp_path / name).write_bytes(tiny.square(colour, place))
                rows.writerow([name, f"a {colour} square {place}", colour])
    return tmp_path / "squares.csv"


def image_of(folder):
    return folder / "squares" / "red_left.png"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    done = clipkit(*verb.split(), "--help")
    assert done.code == 0
    assert f"Example: clipkit {verb}" in " ".join(done.out.split())


def test_train_evaluate_label_index_search(tmp_path, table, model):
    out = tmp_path / "run"
    settings = ["train.batch_size=8", "train.max_steps=2", "train.progress=false", f"train.output_dir={out}"]
    done = clipkit("train", f"model.name={model}", f"data.train={table}", "data.test=0.25", *settings)
    assert done.code == 0, done.err
    assert "retrieval/text_to_image_recall@1" in done.out
    for name in ("config.yaml", "metrics.jsonl", "result.json", "model/clipkit.json"):
        assert (out / name).is_file(), name

    done = clipkit("train", out / "config.yaml", f"train.output_dir={tmp_path / 'again'}", "--print-config")
    assert f"output_dir: {tmp_path / 'again'}" in done.out
    assert "max_steps: 2" in done.out

    done = clipkit(
        "evaluate", table, "--model", out / "model", "--label", "colour", "--json", "--to", tmp_path / "r.json"
    )
    result = json.loads(done.out)
    assert result["n"]["retrieval/images"] == 32
    assert {"retrieval/image_to_text_recall@10", "zero_shot/top1", "zero_shot/top5"} <= result["metrics"].keys()
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == result["metrics"]

    done = clipkit("label", tmp_path / "squares", "-m", model, "-c", "red", "-c", "blue", "--json", "--top", 2)
    labels = json.loads(done.out)
    assert len(labels) == 32
    assert all(sum(score for _, score in row["top"]) == pytest.approx(1) for row in labels)
    done = clipkit("label", tmp_path / "squares", "-m", model, "-c", "red", "-c", "blue", "--to", tmp_path / "l.csv")
    rows = list(csv.DictReader((tmp_path / "l.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == [row["label"] for row in labels]

    done = clipkit("index", tmp_path / "squares", "--model", model, "--to", tmp_path / "s.index")
    assert done.code == 0, done.err
    done = clipkit("index", tmp_path / "squares", "--model", model, "--to", tmp_path / "s.index")
    assert "32 images (0 new, 0 changed, 0 moved, 0 deleted, 32 as before)" in done.err
    done = clipkit("index", tmp_path, "--model", model, "--to", tmp_path / "s.index")
    assert (done.code, "another folder" in done.err, "--overwrite replaces" in done.err) == (2, True, True)
    hits = json.loads(clipkit("search", tmp_path / "s.index", "a red square left", "-k", 3, "--json").out)
    assert len(hits) == 3
    assert [hit["warnings"] for hit in hits] == [[]] * 3
    done = clipkit("search", tmp_path / "s.index", "zebra", "-k", 2, "--json")  # not a word of the model
    assert [warning["code"] for hit in json.loads(done.out) for warning in hit["warnings"]] == ["UNKNOWN"] * 2
    assert "the model knows nothing of 'zebra'" in done.err
    done = clipkit("label", image_of(tmp_path), "-m", model, "-c", "zebra", "-c", "gnu", "--json")
    (row,) = json.loads(done.out)
    assert [warning["code"] for warning in row["warnings"]] == ["UNKNOWN", "SAME"]
    assert "the model cannot tell the classes 'zebra' and 'gnu' apart" in done.err
    image = image_of(tmp_path)
    assert clipkit("search", tmp_path / "s.index", image, "-k", 1).out == f"1.000  {image}\n"
    done = clipkit("search", tmp_path / "s.index", tmp_path / "nope.png")  # not a text that happens to end in .png
    assert (done.code, "MISSING: no such file" in done.err) == (3, True)


def test_no_name_costs_the_output(monkeypatch):
    bytes_written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_written, encoding="ascii"))
    output.replace_unencodable_characters()
    output.say("caf\udce9 漢字.png")
    output.print_json({"path": "caf\udce9 漢字.png"})
    sys.stdout.flush()
    text, _, data = bytes_written.getvalue().partition(b"\n")
    assert "漢字.png" in text.decode()
    assert os.fsencode(json.loads(data)["path"]) == b"caf\xe9 " + "漢字.png".encode()


def test_check_data(table, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the rejects are listed
    done = clipkit("check", "data", table, "--label", "colour", "--model", model)
    assert done.code == 0, done.err
    assert "32" in done.out
    (tmp_path / "squares" / "red_left.png").write_bytes(b"<html>not found</html>")
    done = clipkit("check", "data", table, "--json")
    assert done.code == 3
    assert "NOT_IMAGE" in done.out


def test_how_a_table_is_written_is_typed_as_the_error_says(tmp_path, table, model):
    rows = table.read_text().replace(",", ";").replace("a red", "a caf\xe9 red")
    (tmp_path / "other.csv").write_text(rows, encoding="cp1252")
    typed = []
    settings = [f"model.name={model}", f"data.train={tmp_path / 'other.csv'}", f"train.output_dir={tmp_path / 'run'}"]
    settings += ["train.batch_size=8", "train.max_steps=1", "data.test=0", "train.progress=false"]
    for fix in ("--encoding cp1252", "--separator semicolon"):
        done = clipkit("check", "data", tmp_path / "other.csv", *typed)
        assert (done.code, fix in done.err) == (3, True), done.err
        typed += fix.split()
    done = clipkit("check", "data", tmp_path / "other.csv", *typed, "--json")
    assert json.loads(done.out)["rows"] == 32
    for fix in ("data.encoding=cp1252", "data.separator=semicolon"):
        done = clipkit(
            "train", f"data.train={tmp_path / 'other.csv'}", *settings, f"train.output_dir={tmp_path / 'run'}"
        )
        assert (done.code, fix in done.err) == (3, True), done.err
        settings.append(fix)
    assert clipkit("train", *settings).code == 0


def test_labels_alone_are_measured_and_trained_on_by_templates(tmp_path, table, model):
    rows = [f"squares/{colour}_{place}.png,{colour}" for colour in tiny.COLOURS for place in tiny.PLACES]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["image,colour", *rows]))
    done = clipkit("evaluate", labels, "--model", model, "--label", "colour", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["metrics"].keys() == {"zero_shot/top1", "zero_shot/top5", "zero_shot/mean_per_class"}
    assert "retrieval is not measured" in done.err

    settings = [f"model.name={model}", f"data.train={labels}", "data.label=colour", "train.max_steps=1"]
    settings += ["train.batch_size=8", "train.progress=false", f"train.output_dir={tmp_path / 'run'}"]
    done = clipkit("train", *settings)
    assert done.code == 2
    assert "make them out of the labels" in done.err
    assert clipkit("train", *settings, "data.templates=a photo of a {}.").code == 0
    # held out: labels alone beside training pairs with texts
    texts = [f"model.name={model}", f"data.train={table}", f"data.test={labels}", "data.label=colour", *settings[3:]]
    done = clipkit("train", *texts, f"train.output_dir={tmp_path / 'other'}", "evaluate.zero_shot=label")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "other/result.json").read_text())["n"]["zero_shot/images"] == 32


def test_env():
    facts = json.loads(clipkit("env", "--json").out)
    assert {"clipkit", "torch", "device", "cores"} <= facts.keys()


def test_rejected_rows_are_counted_and_listed(table, model, tmp_path):
    (tmp_path / "squares" / "red_left.png").write_bytes(b"")
    out = tmp_path / "run"
    settings = [f"model.name={model}", f"data.train={table}", f"train.output_dir={out}", "train.batch_size=8"]
    settings += ["train.max_steps=1", "train.progress=false"]
    done = clipkit("train", *settings)
    assert done.code == 3
    assert "EMPTY" in done.err
    assert "red_left.png" in done.err
    assert "leave them out with --on-bad skip\n" in done.err
    assert not (out / "metrics.jsonl").exists()
    done = clipkit("train", *settings, "train.on_bad=skip")
    assert done.code == 0, done.err
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(row["code"], row["path"].endswith("red_left.png")) for row in rejects] == [("EMPTY", True)]
    assert "32 rows = 31 used + 1 rejected" in done.err.replace(",", "")
    done = clipkit("train", *settings, "train.on_bad=skip", "train.max_bad=0.01", f"train.output_dir={tmp_path / 'b'}")
    assert done.code == 4


def test_an_image_that_breaks_only_when_decoded_is_listed_by_every_verb(table, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "squares" / "red_left.png"
    broken.write_bytes(broken.read_bytes()[:60])
    settings = [f"model.name={model}", f"data.train={table}", f"data.test={table}", "train.batch_size=8"]
    settings += ["train.epochs=1", "train.progress=false", "train.on_bad=skip", "train.output_dir=run"]
    done = clipkit("train", *settings)
    assert done.code == 0, done.err
    rejects = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rejects} == {"train", "evaluate"}
    assert {row["code"] for row in rejects} == {"TRUNCATED"}
    verbs = {
        "evaluate": [table],
        "label": ["squares", "-c", "a,b"],
        "index": ["squares", "--to", "squares.index"],
    }
    for verb, arguments in verbs.items():
        typed = [verb, *arguments, "--model", model]
        done = clipkit(*typed)
        assert done.code == 3
        assert "red_left.png" in done.err
        assert "with --on-bad skip\n" in done.err
        done = clipkit(*typed, "--on-bad", "skip", "--max-bad", 0)
        assert done.code == 4
        assert "raise --max-bad" in done.err
        assert not (tmp_path / "squares.index").exists()
        done = clipkit(*typed, "--on-bad", "skip", "--rejects", f"{verb}.jsonl")
        assert done.code == 0, done.err
        assert "32 rows = 31 used + 1 rejected (1 TRUNCATED); 31 images; listed in" in done.err
        (line,) = (tmp_path / f"{verb}.jsonl").read_text().splitlines()
        assert json.loads(line)["code"] == "TRUNCATED"


def test_what_is_wrong_is_said_with_what_to_do(table, model, tmp_path):
    basic = [f"model.name={model}", f"data.train={table}", "train.batch_size=8", "train.progress=false"]

    def fails(code, *words, arguments):
        done = clipkit(*arguments)
        assert done.code == code, done.err
        for word in words:
            assert word in done.err
        assert "Traceback" not in done.err

    out = f"train.output_dir={tmp_path / 'run'}"
    fails(
        2,
        "unknown key `train.epoch`",
        "did you mean train.epochs=1?",
        arguments=["train", *basic, out, "train.epoch=1"],
    )
    fails(2, "`train.output_dir` is missing", arguments=["train", *basic, "train.epochs=1"])
    fails(3, "captoin", "caption", arguments=["train", *basic, out, "data.text=captoin"])
    fails(3, "nowhere.csv", arguments=["train", *basic, out, f"data.train={tmp_path / 'nowhere.csv'}"])
    fails(2, "batch_size=99 is larger than the data", arguments=["train", *basic, out, "train.batch_size=99"])
    fails(2, "some-org/some-model", "HF_HUB_OFFLINE", arguments=["evaluate", table, "--model", "some-org/some-model"])
    fails(2, "no such model folder", arguments=["evaluate", table, "--model", tmp_path / "gone"])
    fails(2, "gone.index", arguments=["search", tmp_path / "gone.index", "a dog"])
    fails(3, "gone", arguments=["label", tmp_path / "gone", "-m", model, "-c", "red"])
    (tmp_path / "latin1.yaml").write_bytes("model: é".encode("latin-1"))
    fails(2, "not UTF-8", "latin1.yaml", arguments=["train", tmp_path / "latin1.yaml"])
    fails(2, "train.betas.1", "less than 1", arguments=["train", *basic, out, "train.betas=[0.9, 1.5]"])
    fails(2, "no column 'nope'", arguments=["train", *basic, out, "similar=[{group: nope}]"])
    fails(2, "expected one YAML file", arguments=["train", "a.yaml", "b.yaml"])
    fails(2, "No such option", arguments=["label", "x", "--nonsense"])


def test_export_says_how_close_the_two_are(tmp_path, model):
    done = clipkit("export", model, tmp_path / "onnx", "--to", "onnx", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert max(report["tensors"].values()) < 1e-5
    assert (tmp_path / "onnx" / "image.onnx").is_file()

    done = clipkit("export", model, tmp_path / "there", "--to", "open_clip")
    assert done.code == 2
    assert "joined of two towers" in done.err
    assert not (tmp_path / "there").exists()


def test_train_without_held_out_pairs_and_with_bad_rows_left_out(tmp_path, table, model):
    with table.open("a", newline="") as file:
        csv.writer(file).writerow(["squares/none.png", "a picture that is not there", "red"])
    settings = [f"model.name={model}", f"data.train={table}", "data.test=0", "train.batch_size=8", "train.max_steps=1"]
    settings += ["train.progress=false", f"train.output_dir={tmp_path / 'run'}"]
    assert clipkit("train", *settings).code == 3
    done = clipkit("train", *settings, "--on-bad", "skip", "--json")
    assert done.code == 0, done.err
    assert "step 1 of 1" in done.err
    assert json.loads(done.out) == json.loads((tmp_path / "run/result.json").read_text())
    assert json.loads((tmp_path / "run/result.json").read_text())["metrics"] == {}


def test_train_says_which_weights_it_kept(tmp_path, table, model):
    settings = [f"model.name={model}", f"data.train={table}", "data.test=0.25", "train.batch_size=8"]
    settings += ["train.max_steps=2", "train.learning_rate=1e-2", "train.progress=false"]
    done = clipkit("train", *settings, f"train.output_dir={tmp_path / 'run'}", "--forget-budget", 0)
    assert done.code == 0, done.err
    alpha = json.loads((tmp_path / "run/result.json").read_text())["alpha"]
    assert ("before training" if alpha == 0 else f"{alpha:g} of the way from the start to step") in done.err
    assert f"{tmp_path / 'run/last'}   (step" in done.err
    assert "chance" in done.out


@pytest.mark.parametrize(
    ("left_out", "fix"),
    [
        ("model.name", "model.name=FOLDER"),
        ("data.train", "data.train=FILE"),
        ("train.output_dir", "train.output_dir=runs"),
    ],
)
def test_what_is_missing_is_named_with_its_fix(tmp_path, left_out, fix):
    given = {"model.name": "x", "data.train": "y.csv", "train.output_dir": tmp_path / "run"}
    done = clipkit("train", *(f"{key}={value}" for key, value in given.items() if key != left_out), "--print-config")
    assert done.code == 2
    assert fix in done.err


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    done = clipkit("train", "model.name=x", "data.train=y.csv", f"train.output_dir={tmp_path / 'file' / 'run'}")
    assert done.code == 2
    assert "the output folder cannot be made: Not a directory" in done.err


def test_a_config_may_lie_in_a_folder_with_an_equals_sign_and_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "lr=3e-4" / "config.yaml"
    config.parent.mkdir()
    config.write_text("model: {name: x}\ndata: {train: y.csv}\ntrain: {output_dir: ~/a=b}")
    for typed in (config, "lr=3e-4/config.yaml", "~/lr=3e-4/config.yaml"):
        done = clipkit("train", typed, "data.test=~/t=1.csv", "--print-config")
        assert f"output_dir: {tmp_path}/a=b" in done.out
        assert f"test: {tmp_path}/t=1.csv" in done.out


def test_what_is_no_config_is_told_what_to_type(tmp_path, table, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for typed, fix in [
        (["squares.csv"], "data.train=squares.csv"),
        (["squares"], "data.train=squares"),
        (["run"], "its config: run/config.yaml"),
        (["train.epochs"], "train.epochs=VALUE"),
        (["run/confg.yaml"], "did you mean run/config.yaml?"),
    ]:
        done = clipkit("train", *typed)
        assert (done.code, done.err.splitlines()[-1].strip()) == (2, f"fix:   {fix}")


def test_label_reads_a_table_and_writes_what_was_found(tmp_path, model, monkeypatch):
    """Names as the table has them, also those that a spreadsheet would run; each image once; three classes a row."""
    monkeypatch.chdir(tmp_path)
    names = ["=red.png", "'blue'.png", "@left/caf\u00e9, one.png"]
    (tmp_path / "@left").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(tiny.square("red", "left"))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *([name, "x"] for name in names), [names[0], "x"]])
    (tmp_path / "classes.txt").write_text("\ufeffa dog, black\n\n=cat\nsea_lion\n")
    typed = ["label", "t.csv", "-m", model, "--classes", "classes.txt", "--top", 3, "--to", "out.csv"]
    done = clipkit(*typed)
    assert (done.code, done.out) == (0, "")
    assert "t.csv: 4 rows = 4 used + 0 rejected; 3 images\n" in done.err
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == names
    for row in rows:
        labels = [row["label"], row["label_2"], row["label_3"]]
        assert sorted(labels) == ["=cat", "a dog, black", "sea_lion"]
        scores = [float(row[name]) for name in ("score", "score_2", "score_3")]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=2e-4)
    top = [[row["label"], row["label_2"], row["label_3"]] for row in rows]
    assert [[name for name, _ in row["top"]] for row in json.loads(clipkit(*typed[:-2], "--json").out)] == top

    done = clipkit(*typed)
    assert (done.code, done.err.splitlines()[-1]) == (2, "  fix:   --overwrite, or another path")
    assert clipkit(*typed, "--overwrite").code == 0


def test_classes_with_commas_between_them_are_several_and_that_is_said(tmp_path, table, model):
    done = clipkit("label", tmp_path / "squares" / "red_left.png", "-m", model, "-c", "cat, dog", "-c", "cow", "--json")
    (row,) = json.loads(done.out)
    assert row["label"] in ("cat", "dog", "cow")
    assert "-c 'cat, dog': 2 classes, 'cat', 'dog'; a name with a comma goes into a file: --classes FILE" in done.err
    done = clipkit("label", tmp_path / "squares", "-m", model)
    assert (done.code, "fix:   -c robin -c crow, or --classes FILE" in done.err) == (2, True)


def test_images_that_are_all_broken_are_bad_data_for_every_verb(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(tiny.square("red", "left")[:60])
    (tmp_path / "t.csv").write_text("image,label\nphotos/a.png,x\n")
    for typed in (["label", "photos", "-c", "a"], ["label", "t.csv", "-c", "a"], ["index", "photos", "--to", "i"]):
        done = clipkit(*typed, "-m", model, "--on-bad", "skip", "--max-bad", "1.0")
        assert (done.code, "1 of 1 rows are rejected: none is left" in done.err) == (3, True), done.err
        assert json.loads((tmp_path / "rejects.jsonl").read_text())["code"] == "TRUNCATED"
        (tmp_path / "rejects.jsonl").unlink()


def test_a_name_that_is_no_utf8_comes_out_as_its_bytes(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    name = b"photos/caf\xe9.png"
    (tmp_path / os.fsdecode(name)).write_bytes(tiny.square("red", "left"))
    done = clipkit("label", "photos", "-m", model, "-c", "a", "--to", "out.csv", "--json")
    assert os.fsencode(json.loads(done.out)[0]["image"]) == name
    assert (tmp_path / "out.csv").read_bytes() == b"image,label,score\n" + name + b",a,1.0000\n"
    done = clipkit("label", "photos", "-m", model, "-c", "a")
    assert done.out == "photos/caf\\udce9.png\ta 1.00\n"


def test_a_reader_that_leaves_ends_a_verb_quietly(monkeypatch):
    """As `clipkit env | head -c 0`: the pipe is closed before a line is written."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["clipkit", "env", "--json"])
    with os.fdopen(write, "w") as pipe:  # which is closed as the interpreter does it at its end
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 141


def test_ctrl_c_ends_a_verb_quietly(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("clipkit.evaluation.result.environment", interrupted)
    assert clipkit("env") == (130, "", "")


def test_a_file_that_may_not_be_read_is_an_error_in_words(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run.yaml"))

    (tmp_path / "run.yaml").touch()
    monkeypatch.setattr(Path, "read_text", refused)  # root may read everything
    done = clipkit("train", tmp_path / "run.yaml")
    assert (done.code, done.err) == (5, f"error: Permission denied\n  where: {tmp_path / 'run.yaml'}\n")
