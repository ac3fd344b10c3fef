"""Tokenizers that belong to another model: named by the doctor, whether the model opens with them or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from clipkit.models.checks.check_model import Report, check_model
from clipkit.models.checks.compare_models import compare_models
from clipkit.models.checks.vocabulary import vocabulary_findings
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.exporting import processors as convert_inputs


def errors(report: Report) -> list[str]:
    return [finding.about for finding in report.findings if finding.level == "error"]


@pytest.fixture
def swap(family_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A family's folder with the tokenizer of another."""

    def make(family: str, donor: str, *, recorded: bool = False) -> Path:
        folder = tmp_path / "swapped"
        if recorded:
            DualEncoder.from_pretrained(family_folder(family)).save_pretrained(folder)
        else:
            shutil.copytree(family_folder(family), folder)
        for path in [*folder.glob("*token*"), *folder.glob("spiece*")]:
            path.unlink()
        for path in [*family_folder(donor).glob("*token*"), *family_folder(donor).glob("spiece*")]:
            shutil.copy(path, folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("family", "donor", "words"),
    [
        ("clip", "chinese_clip", "BERT's word pieces, and clip was trained on CLIP's byte pairs"),  # does not open
        ("clip", "siglip2", "SentencePiece's pieces, and clip was trained on CLIP's byte pairs"),
        ("siglip2", "clip", "CLIP's byte pairs, and siglip was trained on SentencePiece's pieces"),
        ("align", "metaclip_2", "SentencePiece's pieces, and align was trained on BERT's word pieces"),
        ("metaclip_2", "chinese_clip", "BERT's word pieces, and metaclip_2 was trained on SentencePiece's pieces"),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_foreign_tokenizer_is_named_once(
    family: str, donor: str, words: str, recorded: bool, swap: Callable[..., Path]
) -> None:
    report = check_model(swap(family, donor, recorded=recorded))
    (found,) = [finding for finding in report.findings if finding.about == "vocabulary"]
    assert words in found.what
    assert "the tokenizer has" in found.what
    assert "original model" in found.fix
    # nothing that follows from it stands beside it
    assert not {"token ids", "case", "start token", "end token (EOS)"} & {each.about for each in report.findings}
    assert ("files" in errors(report)) == recorded
    assert report.exit_code == (6 if found.level == "error" or not report.ok else 0)


def test_ids_beyond_the_table_are_counted(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "larger")
    published = convert_inputs._as_clip_tokenizer(open_clip.SimpleTokenizer())
    published.model_max_length = 24
    published.save_pretrained(folder)
    report = check_model(folder)
    assert errors(report) == ["vocabulary"]
    rows = DualEncoder.from_pretrained(clip_folder).backend.model.text_model.get_input_embeddings().num_embeddings
    assert f"49,408 tokens (as CLIP), the text tower embeds {rows}; ids {rows} to 49,407" in report.findings[0].what


@pytest.mark.parametrize(
    ("family", "mark", "count", "table", "level"),
    [
        ("clip", "</w>", 49408, 49408, None),
        ("clip", "##", 30522, 49408, "error"),  # BERT's tokenizer before CLIP's table
        ("clip", "▁", 49408, 49408, "warning"),  # of the right size by chance
        ("siglip", "▁", 256000, 32000, "error"),  # SigLIP 2's tokenizer before SigLIP's table
        ("siglip", "▁", 32000, 256000, "error"),  # and the other way round, where every id has an embedding
        ("siglip", "▁", 32000, 32000, None),
        ("align", "##", 30522, 30522, None),
        ("open_clip", "##", 30522, 32000, None),  # CLIPA
        ("towers", "", 7, 200, None),
        ("towers", "", 201, 200, "error"),
    ],
)
def test_published_sizes(family: str, mark: str, count: int, table: int, level: str | None) -> None:
    tokens = {(f"{n}{mark}" if mark == "</w>" else f"{mark}{n}"): n for n in range(count)}
    found = list(vocabulary_findings(family, tokens, table))
    assert [each.level for each in found] == ([] if level is None else [level])
    if count == 256000:
        assert "256,000 tokens (as Gemma and SigLIP 2), the text tower embeds 32,000 (as SigLIP)" in found[0].what


def test_any_model_of_its_own_tokenizer_has_none(any_model: DualEncoder) -> None:
    assert "vocabulary" not in {finding.about for finding in check_model(any_model).findings}


# ------------------------------------------------------------------------------------------- one cause, told once


@pytest.fixture
def saved(clip_folder: Path, tmp_path: Path) -> Path:
    DualEncoder.from_pretrained(clip_folder).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def flip(path: Path, at: int = -5000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_weight_file_is_one_finding(how: str, saved: Path) -> None:
    weights = saved / "model.safetensors"
    if how == "flipped":
        flip(weights)
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    report = check_model(saved)
    assert errors(report) == ["files"]
    assert report.findings[0].what.startswith("model.safetensors ")
    assert ("cannot be run" in str(report)) == (how == "cut")
    assert report.exit_code == 6


def test_what_a_fault_does_to_embeddings_is_no_second_fault(saved: Path) -> None:
    path = saved / "preprocessor_config.json"
    path = path if path.is_file() else saved / "processor_config.json"
    path.write_text(path.read_text().replace('"resample": 3', '"resample": 2'))
    report = check_model(saved)
    assert errors(report) == ["files", "resize filter"]
    assert "effect: image embeddings of the built-in images differ by" in str(report)


@pytest.mark.parametrize("how", ["flipped", "cut", "same embeddings"])
def test_a_comparison_with_a_damaged_folder_fails_and_says_of_what(how: str, saved: Path, clip_folder: Path) -> None:
    from command import clipkit

    weights = saved / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "flipped":
        flip(weights)
    else:
        path = saved / "tokenizer_config.json"
        path.write_text(path.read_text() + " ")
    for pair, letter in (((clip_folder, saved), "B"), ((saved, clip_folder), "A")):
        done = clipkit("check", "model", *pair)
        assert done.code == 6
        said = done.out + done.err
        if how == "flipped":
            assert f"{letter} is damaged: model.safetensors is not what was saved (its SHA-256 differs)" in said
        if how == "cut":
            assert "model.safetensors has" in said
        if how == "same embeddings":
            assert f"{letter} is not what was saved: do not use it before that is fixed. Their embeddings" in said
        assert f"clipkit check model {saved} tells more" in said


def test_a_comparison_with_nothing_says_so(clip_folder: Path) -> None:
    from clipkit.errors import ModelError

    misspelt = clip_folder.with_name("clipp")
    with pytest.raises(ModelError, match=f"no such model folder. Did you mean {clip_folder}"):
        compare_models(clip_folder, misspelt)


def test_saved_twice_is_the_same_model(saved: Path, clip_folder: Path) -> None:
    torch.manual_seed(0)
    found = compare_models(saved, clip_folder)
    assert found.ok
    assert found.damage == {}
