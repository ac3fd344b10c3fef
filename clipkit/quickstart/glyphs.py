"""Glyphs: image-text pairs that every machine with matplotlib already has.

Every character that a text face of matplotlib's fonts can draw is an image; its Unicode name is the text, with the face
("bold serif: latin small letter e with acute") and without. Two tests are held out: characters that were never seen in
any face, and a face that was never seen.
"""

from __future__ import annotations

import io
import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont

from clipkit.errors import ResourceError, UsageError

SIDE = 32  # pixels


EM, BASELINE = 27, 25  # pixels; one em and one baseline for all, so that c and C, comma and apostrophe stay apart


MARGIN = 32  # ink outside the em box (combining marks, wide signs) is still caught before it is centred


FACES = {
    "DejaVuSans": "sans",
    "DejaVuSans-Bold": "bold sans",
    "DejaVuSans-Oblique": "oblique sans",
    "DejaVuSans-BoldOblique": "bold oblique sans",
    "DejaVuSansMono": "mono",
    "DejaVuSansMono-Bold": "bold mono",
    "DejaVuSansMono-Oblique": "oblique mono",
    "DejaVuSansMono-BoldOblique": "bold oblique mono",
    "DejaVuSerif": "serif",
    "DejaVuSerif-Bold": "bold serif",
    "DejaVuSerif-Italic": "italic serif",
    "DejaVuSerif-BoldItalic": "bold italic serif",
    "STIXGeneral": "stix",
    "STIXGeneralBol": "bold stix",
    "STIXGeneralItalic": "italic stix",
    "STIXGeneralBolIta": "bold italic stix",
}


TEST_FACE, UNSEEN_FACE = "sans", "stix"


SCRIPTS = ("latin", "greek", "cyrillic")


CASES = ("capital", "small")


ACCENTS = (
    *("acute", "grave", "circumflex", "tilde", "diaeresis", "macron", "breve", "caron", "cedilla", "ogonek"),
    *("dot above", "dot below", "ring above", "double grave", "inverted breve"),
)


IDEAS = {"script": SCRIPTS, "case": CASES, "accent": ACCENTS}


@dataclass(frozen=True)
class Glyph:
    """One character in one face."""

    char: str
    face: str
    png: bytes

    @property
    def name(self) -> str:
        return unicodedata.name(self.char).lower()

    def captions(self, draw: random.Random) -> list[str]:
        """With the face, without, and a part of the name: half of its words, drawn at random.

        Parts ("cyrillic letter", "small with acute") teach what a single word means; without them a prompt that names
        an idea is unlike any caption. One for each face, so that a character is met under many parts of its name.
        """
        words = self.name.split()
        part = [word for word in words if draw.random() < 0.5] or words[:1]
        return [f"{self.face}: {self.name}", self.name, " ".join(part)]


@dataclass(frozen=True)
class Glyphs:
    """The glyphs as `datasets.Dataset`s with columns image, texts, group, char, name, face, script, case, accent.

    `image` is {"bytes": PNG of 32x32 px, "path": None}. Characters that look alike (identical bitmaps) share their
    `group`; a group is in exactly one of `train`, `validation`, `unseen_characters`.
    """

    train: Any
    """all other characters in every face but STIX; three captions each: with the face, without, a part of the name"""
    validation: Any
    """groups for choosing a model, one image each in DejaVu Sans; texts: every name of the group"""
    unseen_characters: Any
    """groups of Latin, Greek and Cyrillic held out in every face, laid out like `validation`"""
    unseen_face: Any
    """groups of Latin, Greek and Cyrillic of `train`, one image each in STIXGeneral; texts: every name of the group"""

    def by_idea(self, pairs: Any, idea: str) -> Any:
        """The rows of `pairs` for which an idea is defined, with it as the ClassLabel column `label`.

        Args:
            pairs: one of the four data sets.
            idea: "script" (latin, greek, cyrillic), "case" (capital, small) or "accent" (the kind of accent, of the
                letters that have exactly one).

        Raises:
            UsageError: an unknown idea.
        """
        from datasets import ClassLabel, Dataset, Features

        if idea not in IDEAS:
            raise UsageError(f"expected an idea of {', '.join(IDEAS)}; found {idea!r}", where="by_idea(idea=)")
        rows = [i for i, value in enumerate(pairs[idea]) if value is not None]
        classes = ClassLabel(names=list(IDEAS[idea]))
        columns = pairs[rows]
        columns["label"] = classes.str2int(columns[idea])
        return Dataset.from_dict(columns, features=Features(pairs.features | {"label": classes}))


def glyphs(seed: int = 0, *, unseen: int = 250, validation: int = 100) -> Glyphs:
    """Draw the embedded data set and split it.

    Args:
        seed: which groups are held out.
        unseen: number of groups of Latin, Greek and Cyrillic for the test of unseen characters.
        validation: number of further such groups for choosing a model.

    Raises:
        ResourceError: matplotlib came without its fonts.
        UsageError: fewer groups than asked for.
    """
    return split(draw_all(), seed, unseen=unseen, validation=validation)


def draw_all() -> list[Glyph]:
    """Every character in every face; some five seconds."""
    return [glyph for file, face in FACES.items() for glyph in draw_face(_font_file(file), face)]


def split(drawn: Sequence[Glyph], seed: int, *, unseen: int, validation: int) -> Glyphs:
    """Group the look-alikes and hold out whole groups; arguments as in `glyphs`."""
    group = _groups(drawn)
    members: dict[int, list[str]] = defaultdict(list)
    for char, code in group.items():
        members[code].append(char)
    letters = {code for code, chars in members.items() if any(script_of(char) for char in chars)}
    testable = sorted(letters & {group[g.char] for g in drawn if g.face == TEST_FACE})
    if unseen + validation >= len(testable):
        raise UsageError(f"expected unseen + validation below {len(testable)}, found {unseen} + {validation}")
    held_out = random.Random(seed).sample(testable, unseen + validation)
    test, valid = set(held_out[:unseen]), set(held_out[unseen:])
    seen = [g for g in drawn if not g.face.endswith(UNSEEN_FACE) and group[g.char] not in test | valid]
    known = letters & {group[g.char] for g in seen}
    parts = random.Random(seed)
    return Glyphs(
        train=_dataset(seen, group, [g.captions(parts) for g in seen]),
        validation=_one_each(drawn, TEST_FACE, valid, group, members),
        unseen_characters=_one_each(drawn, TEST_FACE, test, group, members),
        unseen_face=_one_each(drawn, UNSEEN_FACE, known, group, members),
    )


def draw_face(file: Path, face: str) -> Iterator[Glyph]:
    """Every named character of a font that leaves ink, in the order of code points."""
    from matplotlib.ft2font import FT2Font

    sizes = [ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC) for size in range(EM, 3, -1)]
    drawable = FT2Font(str(file)).get_charmap()  # code point -> index in the font; 0 is the box for "no such character"
    for char in (chr(code) for code in sorted(drawable) if drawable[code]):
        if unicodedata.name(char, "") and (picture := draw(char, sizes)) is not None:
            yield Glyph(char, face, _png(picture))


def draw(char: str, sizes: Sequence[ImageFont.FreeTypeFont]) -> Image.Image | None:
    """A character in black on white, its ink centred across; None where it leaves no ink.

    The first of `sizes` (largest first) whose ink fits whole is used. Ink that would cross the upper or lower edge is
    moved inside; everything else stands on the common baseline.
    """
    for font in sizes:
        ink = Image.new("L", (SIDE + 2 * MARGIN, SIDE + 2 * MARGIN))
        ImageDraw.Draw(ink).text((MARGIN, MARGIN + BASELINE), char, fill=255, font=font, anchor="ls")
        box = ink.getbbox()
        if box is None:
            return None
        left, top, right, bottom = box
        inside = min(box) > 0 and max(box) < SIDE + 2 * MARGIN
        if inside and max(right - left, bottom - top) <= SIDE:
            picture = Image.new("L", (SIDE, SIDE))
            y = min(max(top - MARGIN, 0), SIDE - (bottom - top))
            picture.paste(ink.crop(box), ((SIDE - (right - left)) // 2, y))
            return ImageChops.invert(picture)
    return None


def script_of(char: str) -> str | None:
    """ "latin", "greek" or "cyrillic", by the first word of the character's name; else None."""
    first = unicodedata.name(char).split()[0].lower()
    return first if first in SCRIPTS else None


def case_of(char: str) -> str | None:
    """ "capital" or "small"; None for what has no case, and for small capitals."""
    words = unicodedata.name(char).lower().split()
    found = [case for case in CASES if case in words]
    return found[0] if len(found) == 1 else None


def accent_of(char: str) -> str | None:
    """The kind of accent of a character that decomposes into a letter and one accent; else None."""
    marks = [mark for mark in unicodedata.normalize("NFD", char)[1:] if unicodedata.combining(mark)]
    if len(marks) != 1:
        return None
    kind = unicodedata.name(marks[0]).lower().removeprefix("combining ").removesuffix(" accent")
    return kind if kind in ACCENTS else None


def _font_file(name: str) -> Path:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not file.is_file():
        raise ResourceError(
            "expected the fonts that come with matplotlib, found none", where=file, fix="reinstall matplotlib with pip"
        )
    return file


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _groups(drawn: Iterable[Glyph]) -> dict[str, int]:
    """Characters -> codes 0, 1, …; one code for all that share a bitmap, directly or through others (union-find)."""
    parent: dict[str, str] = {}

    def root(char: str) -> str:
        while parent[char] != char:
            parent[char] = char = parent[parent[char]]
        return char

    first: dict[bytes, str] = {}
    for glyph in drawn:
        parent.setdefault(glyph.char, glyph.char)
        a, b = sorted((root(glyph.char), root(first.setdefault(glyph.png, glyph.char))))
        parent[b] = a  # the smallest code point names the group, whatever the order of the fonts
    codes = {char: code for code, char in enumerate(sorted({root(char) for char in parent}))}
    return {char: codes[root(char)] for char in sorted(parent)}


def _one_each(
    drawn: Iterable[Glyph], face: str, codes: set[int], group: dict[str, int], members: dict[int, list[str]]
) -> Any:
    """One image of each group in a face, that of its first character there, with every name of the group."""
    chosen: dict[int, Glyph] = {}
    for glyph in drawn:
        if glyph.face == face and group[glyph.char] in codes:
            chosen.setdefault(group[glyph.char], glyph)
    names = {code: [unicodedata.name(char).lower() for char in members[code]] for code in chosen}
    rows = [chosen[code] for code in sorted(chosen)]
    return _dataset(rows, group, [names[group[g.char]] for g in rows])


def _dataset(rows: Sequence[Glyph], group: dict[str, int], texts: Sequence[list[str]]) -> Any:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    agreed = {idea: _agreed(group, label) for idea, label in _LABELS.items()}
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": g.png, "path": None} for g in rows],
        "texts": list(texts),
        "group": [group[g.char] for g in rows],
        "char": [g.char for g in rows],
        "name": [g.name for g in rows],
        "face": [g.face for g in rows],
        **{idea: [agreed[idea][group[g.char]] for g in rows] for idea in IDEAS},
    }
    text = Value("string")
    features = dict.fromkeys(columns, text) | {
        "image": ImageFeature(decode=False),
        "texts": List(text),
        "group": Value("int64"),
    }
    return Dataset.from_dict(columns, features=Features(features))


_LABELS = {"script": script_of, "case": case_of, "accent": accent_of}


def _agreed(group: dict[str, int], label: Any) -> dict[int, str | None]:
    """What the Latin, Greek and Cyrillic characters of each group agree on: A of all three scripts has no script."""
    found: dict[int, set[str | None]] = defaultdict(set)
    for char, code in group.items():
        found[code] |= {label(char)} if script_of(char) else set()
    return {code: values.pop() if len(values) == 1 else None for code, values in found.items()}
