"""The public surface: frozen names, a light import, a wheel with one top-level name, a fast --help."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import clipkit

ROOT = Path(__file__).parents[1]

NAMES = {
    "BadImage",
    "ClipkitError",
    "DualEncoder",
    "EmbeddingIndex",
    "EmbeddingStore",
    "Fingerprint",
    "Graded",
    "Paired",
    "RetrievalEvaluator",
    "RunConfig",
    "SameGroup",
    "TrainConfig",
    "Trainer",
    "Views",
    "ZeroShotClassifier",
    "ZeroShotEvaluator",
    "average",
    "check_data",
    "embed",
    "info_nce",
    "interpolate",
    "load_image",
    "load_pairs",
    "run",
    "sigmoid_loss",
    "split_pairs",
}


def test_the_public_names_are_these():
    assert set(clipkit.__all__) == NAMES
    for name in NAMES:
        assert getattr(clipkit, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Dual'"):
        clipkit.Dual  # noqa: B018


def heavy(code):
    script = f"import sys; {code}; print(*sorted({{'torch', 'transformers', 'datasets', 'rich'}} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_importing_clipkit_or_its_command_loads_nothing_heavy():
    assert heavy("import clipkit") == []
    assert heavy("import clipkit.cli.main") == []
    assert "torch" in heavy("import clipkit; clipkit.DualEncoder")


def test_open_clip_is_loaded_only_by_its_backend():
    code = "import clipkit, sys; clipkit.Trainer, clipkit.RetrievalEvaluator; print('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
def test_the_wheel_holds_clipkit_alone(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "clipkit = clipkit.cli.main:main" in wheel.read(entry).decode()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"clipkit"}
    assert {"clipkit/html_report.html", "clipkit/py.typed"} <= set(names)


def test_version_is_that_of_the_project():
    assert f'version = "{clipkit.__version__}"' in (ROOT / "pyproject.toml").read_text()
