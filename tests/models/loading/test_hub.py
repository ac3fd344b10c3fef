from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from clipkit.errors import ModelError
from clipkit.models.checks.check_model import check_model
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.loading.hub import download, find_folder

CONFIGS = ["config.json", "tokenizer.json"]
OPEN_CLIP = "open_clip_config.json"

# library, files of the repository, which of them are fetched
CASES: dict[str, tuple[Any, list[str], set[str]]] = {
    "safetensors": (
        "transformers",
        [
            *CONFIGS,
            "model.safetensors",
            "pytorch_model.bin",
            "flax_model.msgpack",
            "onnx/model.onnx",
            "training_args.bin",
        ],
        {*CONFIGS, "model.safetensors"},
    ),
    "only pickles": (
        "transformers",
        [*CONFIGS, "pytorch_model.bin", "training_args.bin", "tf_model.h5"],
        {*CONFIGS, "pytorch_model.bin"},
    ),
    "shards": (
        "transformers",
        [*CONFIGS, "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        {*CONFIGS, "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"},
    ),
    "both libraries, for transformers": (
        "transformers",
        [*CONFIGS, OPEN_CLIP, "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"],
        {*CONFIGS, OPEN_CLIP, "model.safetensors"},
    ),
    "both libraries, for open_clip": (
        "open_clip",
        [*CONFIGS, OPEN_CLIP, "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"],
        {*CONFIGS, OPEN_CLIP, "open_clip_model.safetensors"},
    ),
    "open_clip's pickle": (
        "open_clip",
        [*CONFIGS, OPEN_CLIP, "open_clip_pytorch_model.bin"],
        {*CONFIGS, OPEN_CLIP, "open_clip_pytorch_model.bin"},
    ),
    "of open_clip alone, asked as transformers": (
        "transformers",
        [OPEN_CLIP, "tokenizer.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"],
        {OPEN_CLIP, "tokenizer.json"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pickles_are_fetched_only_without_safetensors(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, files, expected = CASES[case]
    for name in files:
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / name).write_text(name)

    def snapshot(
        name: str,
        revision: str | None,
        ignore_patterns: list[str] | None = None,
        allow_patterns: list[str] | None = None,
    ) -> str:
        """The hub's client, which filters the files of a repository by these patterns."""
        for chosen in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "cache" / chosen).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "hub" / chosen, tmp_path / "cache" / chosen)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    folder = download("org/name", None, library)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("runs/brids/model", "Did you mean runs/birds/model?"),
        ("runs/brids", "Did you mean runs/birds?"),  # which could be a name of the hub
        ("rnus/birds/model", "Did you mean runs/birds/model?"),
        ("./runs/birds/modle/", "Did you mean runs/birds/model?"),
        ("open_clip:runs/birds/modle", "Did you mean runs/birds/model?"),
        ("open_clip:runs/brids", "Did you mean runs/birds?"),
        ("runs/birds/some-other", None),
        ("runs/some-other", "In runs there are birds, cars."),
        ("openai/clip-vit-base-patch33", "Did you mean openai/clip-vit-base-patch32"),
    ],
)
def test_a_misspelt_path_brings_the_near_one(
    asked: str, hint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "birds" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "cars" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for use in (DualEncoder.from_pretrained, check_model):
        with pytest.raises(ModelError) as refused:
            use(asked)
        assert (hint or ".") in refused.value.message
        assert hint is not None or "Did you mean" not in refused.value.message
        assert refused.value.exit_code == 2


def test_the_folder_of_a_run_is_its_model(towers: DualEncoder, tmp_path: Path) -> None:
    saved = tmp_path / "run" / "model"
    towers.save_pretrained(saved)
    assert find_folder(tmp_path / "run") == tmp_path / "run"  # any folder may have one called model in it
    (tmp_path / "run" / "config.yaml").touch()
    assert find_folder(tmp_path / "run") == saved
    opened = DualEncoder.from_pretrained(tmp_path / "run")
    assert opened.fingerprint() == DualEncoder.from_pretrained(saved).fingerprint()
    assert "no clipkit.json" not in str(check_model(tmp_path / "run"))


def test_what_is_not_in_the_cache_is_an_error_offline() -> None:
    with pytest.raises(ModelError, match="not in the cache"):
        download("org/name", "v1")
