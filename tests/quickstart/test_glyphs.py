"""The embedded glyphs: what is drawn, what is held out, and that nothing of the tests leaks into training."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFont

from clipkit.errors import ResourceError, UsageError
from clipkit.quickstart import drawing
from clipkit.quickstart import glyphs as module
from clipkit.quickstart.drawing import FACES, Glyph
from clipkit.quickstart.glyphs import Glyphs, glyphs

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def drawn() -> list[Glyph]:
    return drawing.draw_all()


@pytest.fixture(scope="module")
def built(drawn: list[Glyph]) -> Glyphs:
    return module.split(drawn, seed=0, unseen=250, validation=100)


@pytest.fixture(scope="module")
def sans(drawn: list[Glyph]) -> dict[str, np.ndarray]:
    return {glyph.char: pixels(glyph.png) for glyph in drawn if glyph.face == "sans"}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def rows_of_ink(picture: np.ndarray) -> tuple[int, int]:
    rows = np.flatnonzero((picture < 128).any(axis=1))
    return int(rows[0]), int(rows[-1])


def test_over_thirty_thousand_images_with_captions(built: Glyphs) -> None:
    assert len(built.train) > 30_000
    row = next(row for row in built.train if row["char"] == "é" and row["face"] == "bold serif")
    assert row["texts"][:2] == ["bold serif: latin small letter e with acute", "latin small letter e with acute"]
    assert (row["script"], row["case"], row["accent"]) == ("latin", "small", "acute")
    assert row["image"]["path"] is None
    with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (32, 32), "L")


def test_every_letter_of_the_three_alphabets_is_drawn(sans: dict[str, np.ndarray]) -> None:
    alphabets = [
        *range(0x41, 0x5B),
        *range(0x61, 0x7B),
        *range(0x391, 0x3A2),
        *range(0x3B1, 0x3CA),
        *range(0x400, 0x460),
    ]
    assert not [chr(code) for code in alphabets if chr(code) not in sans]


def test_no_picture_is_blank_or_the_box_of_a_missing_character(sans: dict[str, np.ndarray]) -> None:
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", drawing.EM, layout_engine=ImageFont.Layout.BASIC)
    box = drawing.draw("\U000e0fff", [font])  # no font has it, so FreeType draws the box
    assert box is not None
    assert not [char for char, picture in sans.items() if (picture == np.asarray(box)).all()]
    assert all((picture < 255).any() for picture in sans.values())
    assert " " not in sans


def test_size_and_position_survive(sans: dict[str, np.ndarray]) -> None:
    """Centring each glyph by its own ink, or scaling it to fill the picture, would make these pairs alike."""
    assert rows_of_ink(sans["C"])[0] < rows_of_ink(sans["c"])[0]
    assert rows_of_ink(sans["C"])[1] == rows_of_ink(sans["c"])[1]
    assert rows_of_ink(sans["'"])[1] < rows_of_ink(sans[","])[0]
    assert rows_of_ink(sans["ḋ"])[0] < rows_of_ink(sans["ḍ"])[0]


def test_ink_that_does_not_fit_is_moved_or_shrunk_but_never_cut() -> None:
    file = FONTS / "DejaVuSans.ttf"
    sizes = [ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC) for size in range(27, 3, -1)]
    wide = drawing.draw("⨌", sizes)  # four integral signs
    assert wide is not None
    assert drawing.draw("⨌", sizes[:1]) is None  # at full size it does not fit
    ink = np.asarray(wide) < 255
    columns = np.flatnonzero(ink.any(axis=0))
    assert 24 <= columns[-1] - columns[0] + 1 <= 32


def test_a_look_alike_group_is_wholly_seen_or_wholly_unseen(built: Glyphs) -> None:
    groups = {name: set(getattr(built, name)["group"]) for name in ("train", "validation", "unseen_characters")}
    assert not groups["train"] & groups["validation"]
    assert not groups["train"] & groups["unseen_characters"]
    assert not groups["validation"] & groups["unseen_characters"]
    assert set(built.unseen_face["group"]) <= groups["train"]


def test_no_test_picture_or_name_is_in_training(built: Glyphs) -> None:
    pictures = {image["bytes"] for image in built.train["image"]}
    texts = {text for row in built.train["texts"] for text in row[:2]}  # the third is a part, shared by many names
    for held_out in (built.unseen_characters, built.validation):
        assert not pictures & {image["bytes"] for image in held_out["image"]}
        assert not texts & {text for row in held_out["texts"] for text in row}


def test_characters_are_grouped_through_others() -> None:
    drawn = [
        Glyph("b", "x", b"1"),
        Glyph("c", "x", b"1"),
        Glyph("c", "y", b"2"),
        Glyph("a", "y", b"2"),
        Glyph("d", "x", b"3"),
    ]
    assert module._groups(drawn) == {"a": 0, "b": 0, "c": 0, "d": 1}


def test_latin_greek_and_cyrillic_a_are_one_group_without_a_script(drawn: list[Glyph]) -> None:
    alike = [glyph for glyph in drawn if glyph.char in "AΑАbвγ"]
    rows = [row for row in module.split(alike, 0, unseen=0, validation=0).train if row["char"] in "AΑА"]
    rows = [row for row in rows if row["face"] == "sans"]
    assert len(rows) == 3
    assert len({row["group"] for row in rows}) == 1
    assert {row["script"] for row in rows} == {None}
    assert {row["case"] for row in rows} == {"capital"}


def test_the_two_tests_are_as_described(built: Glyphs) -> None:
    characters, face = built.unseen_characters, built.unseen_face
    assert len(characters) == len(set(characters["group"])) == 250
    assert set(characters["face"]) == {"sans"}
    assert set(face["face"]) == {"stix"}
    assert 350 < len(face) == len(set(face["group"])) < 450
    assert not any(name.endswith("stix") for name in set(built.train["face"]))
    for tests in (characters, face):
        assert all(row["name"] in row["texts"] for row in tests)
        assert not any(text.startswith(f"{name}:") for row in tests for text in row["texts"] for name in FACES.values())
        assert all(any(text.split()[0] in module.SCRIPTS for text in row["texts"]) for row in tests)


def test_the_seed_decides_what_is_held_out(drawn: list[Glyph]) -> None:
    few = [glyph for glyph in drawn if glyph.face in ("sans", "stix") and module.script_of(glyph.char)]
    first, again, other = (
        module.split(few, seed, unseen=20, validation=10).unseen_characters["char"] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("char", "script", "case", "accent"),
    [
        ("é", "latin", "small", "acute"),
        ("Ё", "cyrillic", "capital", "diaeresis"),
        ("ά", "greek", "small", "acute"),
        ("ế", "latin", "small", None),  # two accents
        ("ø", "latin", "small", None),  # a stroke is no accent
        ("ᴀ", "latin", None, None),  # LATIN LETTER SMALL CAPITAL A is neither
        ("7", None, None, None),
    ],
)
def test_ideas_of_a_character(char: str, script: str | None, case: str | None, accent: str | None) -> None:
    assert (module.script_of(char), module.case_of(char), module.accent_of(char)) == (script, case, accent)


@pytest.mark.parametrize("idea", ["script", "case", "accent"])
def test_rows_by_idea_carry_a_class_label(built: Glyphs, idea: str) -> None:
    rows = built.by_idea(built.unseen_characters, idea)
    names = rows.features["label"].names
    assert 0 < len(rows) < 250
    assert [names[label] for label in rows["label"]] == rows[idea]
    for row in rows:
        if idea != "accent":
            texts = [text.split() for text in row["texts"]]
            assert {row[idea] in words for words in texts if words[0] in module.SCRIPTS} == {True}


def test_an_unknown_idea_is_refused(built: Glyphs) -> None:
    with pytest.raises(UsageError, match="script, case, accent"):
        built.by_idea(built.train, "colour")


def test_more_held_out_than_there_is_is_refused(drawn: list[Glyph]) -> None:
    with pytest.raises(UsageError, match="unseen"):
        module.split(drawn[:500], 0, unseen=5000, validation=0)


def test_fonts_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(ResourceError, match="DejaVuSans"):
        glyphs()


def test_the_third_caption_is_a_part_of_the_name(built: Glyphs) -> None:
    parts = [(row["name"].split(), row["texts"][2].split()) for row in built.train.select(range(0, 40_000, 40))]
    for words, part in parts:
        rest = iter(words)
        assert part
        assert all(word in rest for word in part)  # in the order of the name
    kept = sum(len(part) for _, part in parts) / sum(len(words) for words, _ in parts)
    assert 0.45 < kept < 0.6


def test_names_are_lower_case_unicode_names() -> None:
    assert Glyph("é", "sans", b"").name == unicodedata.name("é").lower()
