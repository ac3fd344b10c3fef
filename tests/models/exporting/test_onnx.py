from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from plain import run_plain

from clipkit.errors import ModelError, UsageError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.exporting import onnx as onnx_export
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS, golden_images

pytest.importorskip("onnxruntime")
KINDS = ["clip", "siglip", "open_clip", "towers"]


class Listening(logging.Handler):
    """What the command line would print while a block runs: everything from INFO upwards."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(f"{record.name}: {record.getMessage()}")

    def __enter__(self) -> Listening:
        root = logging.getLogger()
        self.level = root.level
        root.addHandler(self)
        root.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger().removeHandler(self)
        logging.getLogger().setLevel(self.level)


HEARD: list[str] = []


@pytest.fixture(scope="module")
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[DualEncoder, Any]]:
    found: dict[str, tuple[DualEncoder, Any]] = {}

    def get(kind: str) -> tuple[DualEncoder, Any]:
        if kind not in found:
            model = build(kind, request)
            with Listening() as log:
                found[kind] = model, model.export(tmp_path_factory.mktemp("onnx") / kind, to="onnx")
            HEARD.extend(log.heard)
        return found[kind]

    return get


def build(kind: str, request: pytest.FixtureRequest) -> DualEncoder:
    torch.manual_seed(0)
    if kind == "open_clip":
        arch = request.getfixturevalue("open_clip_arch")("tiny-onnx")
        model, _, preprocess = open_clip.create_model_and_transforms(arch)
        return DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch)
    if kind == "towers":
        import tiny

        model: DualEncoder = tiny.make_model()
        return model
    return DualEncoder.from_pretrained(request.getfixturevalue(f"{kind}_folder"))


def test_the_exporter_keeps_its_doings_to_itself(exported: Callable[[str], tuple[DualEncoder, Any]]) -> None:
    exported("clip")
    assert HEARD == []


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_torchs_embeddings(kind: str, exported: Callable[[str], tuple[DualEncoder, Any]]) -> None:
    model, report = exported(kind)
    assert max(report.tensors.values()) < 1e-5
    assert report.pipeline["text"] > 0.99999
    image, text = (onnx_export._session(report.folder / f"{side}.onnx") for side in ("image", "text"))
    pixels = model.processor.images(golden_images() * 2)  # a batch of 8, which was never traced
    found = onnx_export._run(image, {"pixel_values": pixels})
    assert (found - model.encode_images(golden_images() * 2)).abs().max() < 1e-5
    for texts in (["a cat"], list(GOLDEN_TEXTS) * 2):
        found = onnx_export._run(text, model.processor.texts(texts))
        assert (found - model.encode_texts(texts)).abs().max() < 1e-5
    facts = json.loads((report.folder / "onnx.json").read_text())
    assert facts["fingerprint"]["hash"] == model.fingerprint().hash
    assert facts["scale"] == pytest.approx(float(model.logit_scale.detach().exp()))
    assert facts["similarity"] == model.similarity


def test_the_cards_block_runs_without_clipkit(exported: Callable[[str], tuple[DualEncoder, Any]]) -> None:
    model, report = exported("clip")
    golden_images()[3].save(report.folder / "photo.jpg")
    (block,) = re.findall(r"^```python\n(.*?)^```$", (report.folder / "README.md").read_text(), re.M | re.S)
    expected = model.encode_images([report.folder / "photo.jpg"]) @ model.encode_texts(["a caption"]).T
    assert float(run_plain(block, report.folder)) == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_keeps_its_mode_and_an_export_its_place(
    exported: Callable[[str], tuple[DualEncoder, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, report = exported("towers")
    traced = shutil.copytree(report.folder, tmp_path / "traced")  # tracing takes seconds, and is the same each time
    monkeypatch.setattr(onnx_export, "_trace", lambda *given: shutil.copy(traced / given[-1].name, given[-1]))
    with pytest.raises(UsageError, match="not empty"):
        model.export(report.folder, to="onnx")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="only a model"):
        model.export(tmp_path, to="onnx", overwrite=True)
    model.train()
    modes = [module.training for module in model.modules()]
    model.export(report.folder, to="onnx", overwrite=True)
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_a_graph_that_differs_is_not_written(
    towers: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(onnx_export._Image):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return super().forward(pixel_values.flip(3))

    monkeypatch.setattr(onnx_export, "_Image", Wrong)
    with pytest.raises(ModelError, match="image side gives other embeddings"):
        towers.export(tmp_path / "there", to="onnx")
    assert not (tmp_path / "there").exists()


def test_a_missing_extra_is_named(towers: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(UsageError, match=r"needs onnxscript\n.*pip install -e \S*\[onnx\]"):
        towers.export(tmp_path / "there", to="onnx")
