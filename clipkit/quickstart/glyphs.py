"""Glyphs: image-text pairs drawn with the fonts of matplotlib, so that nothing is downloaded.

Every character that a text face of matplotlib's fonts can draw is an image; its Unicode name is the text, with the face
("bold serif: latin small letter e with acute") and without. Two tests are held out: characters that are in no face of
the training data, and a face that is not in it.
"""

from __future__ import annotations

import random
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.errors import UsageError
from clipkit.quickstart.drawing import Glyph, draw_all

TEST_FACE = "sans"
UNSEEN_FACE = "stix"

SCRIPTS = ("latin", "greek", "cyrillic")
CASES = ("capital", "small")
ACCENTS = (
    "acute",
    "grave",
    "circumflex",
    "tilde",
    "diaeresis",
    "macron",
    "breve",
    "caron",
    "cedilla",
    "ogonek",
    "dot above",
    "dot below",
    "ring above",
    "double grave",
    "inverted breve",
)
IDEAS = {"script": SCRIPTS, "case": CASES, "accent": ACCENTS}


@dataclass(frozen=True)
class Glyphs:
    """The glyphs as `datasets.Dataset`s with columns image, texts, group, char, name, face, script, case, accent.

    `image` is {"bytes": PNG of 32x32 px, "path": None}. Characters that look alike (identical bitmaps) share their
    `group`; a group is in exactly one of `train`, `validation`, `unseen_characters`.
    """

    train: Any
    """all other characters in every face but STIX, with three captions each: see `Glyph.captions`"""
    validation: Any
    """groups for choosing a model, one image each in DejaVu Sans; texts: every name of the group"""
    unseen_characters: Any
    """groups of Latin, Greek and Cyrillic held out in every face, laid out like `validation`"""
    unseen_face: Any
    """groups of Latin, Greek and Cyrillic of `train`, one image each in STIXGeneral; texts: every name of the group"""

    def by_idea(self, pairs: Any, idea: str) -> Any:
        """Return the rows of `pairs` for which an idea is defined, with the ClassLabel column `label` for it.

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
    """Draw the glyphs and split them.

    Args:
        seed: which groups are held out.
        unseen: number of groups of Latin, Greek and Cyrillic for the test of unseen characters.
        validation: number of further such groups for choosing a model.

    Raises:
        ResourceError: matplotlib is installed without its fonts.
        UsageError: there are fewer groups than asked for.
    """
    return split(draw_all(), seed, unseen=unseen, validation=validation)


def split(drawn: Sequence[Glyph], seed: int, *, unseen: int, validation: int) -> Glyphs:
    """Group the characters that look alike and hold out whole groups; arguments as in `glyphs`."""
    group = _groups(drawn)
    members: dict[int, list[str]] = defaultdict(list)
    for char, code in group.items():
        members[code].append(char)
    letters = {code for code, chars in members.items() if any(script_of(char) for char in chars)}
    testable = sorted(letters & {group[g.char] for g in drawn if g.face == TEST_FACE})
    if unseen + validation >= len(testable):
        raise UsageError(f"expected unseen + validation below {len(testable)}, found {unseen} + {validation}")
    held_out = random.Random(seed).sample(testable, unseen + validation)  # groups
    test_groups = set(held_out[:unseen])
    validation_groups = set(held_out[unseen:])
    not_train = test_groups | validation_groups
    train = [g for g in drawn if not g.face.endswith(UNSEEN_FACE) and group[g.char] not in not_train]
    train_groups = letters & {group[g.char] for g in train}
    draw = random.Random(seed)
    return Glyphs(
        train=_dataset(train, group, [g.captions(draw) for g in train]),
        validation=_one_each(drawn, TEST_FACE, validation_groups, group, members),
        unseen_characters=_one_each(drawn, TEST_FACE, test_groups, group, members),
        unseen_face=_one_each(drawn, UNSEEN_FACE, train_groups, group, members),
    )


def script_of(char: str) -> str | None:
    """Return "latin", "greek" or "cyrillic", by the first word of the character's name; else None."""
    first = unicodedata.name(char).split()[0].lower()
    return first if first in SCRIPTS else None


def case_of(char: str) -> str | None:
    """Return "capital" or "small"; None for characters without a case, and for small capitals."""
    words = unicodedata.name(char).lower().split()
    cases = [case for case in CASES if case in words]
    return cases[0] if len(cases) == 1 else None


def accent_of(char: str) -> str | None:
    """Return the accent of a character that decomposes into a letter and one accent; else None."""
    marks = [mark for mark in unicodedata.normalize("NFD", char)[1:] if unicodedata.combining(mark)]
    if len(marks) != 1:
        return None
    accent = unicodedata.name(marks[0]).lower().removeprefix("combining ").removesuffix(" accent")
    return accent if accent in ACCENTS else None


def _groups(drawn: Iterable[Glyph]) -> dict[str, int]:
    """Return the group of each character: 0, 1, …

    Characters that share a bitmap, directly or through others, are one group (union-find).
    """
    parent: dict[str, str] = {}

    def root(char: str) -> str:
        while parent[char] != char:
            parent[char] = char = parent[parent[char]]
        return char

    first: dict[bytes, str] = {}
    for glyph in drawn:
        parent.setdefault(glyph.char, glyph.char)
        a, b = sorted((root(glyph.char), root(first.setdefault(glyph.png, glyph.char))))
        parent[b] = a  # the smallest code point represents the group, in any order of the fonts
    roots = sorted({root(char) for char in parent})
    number = {char: index for index, char in enumerate(roots)}
    return {char: number[root(char)] for char in sorted(parent)}


def _one_each(
    drawn: Iterable[Glyph], face: str, codes: set[int], group: dict[str, int], members: dict[int, list[str]]
) -> Any:
    """The data set with one image of each group, of its first character in the face, and every name of the group."""
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

    labels = {idea: _labels_by_group(group, label_of) for idea, label_of in _LABEL_OF.items()}
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": g.png, "path": None} for g in rows],
        "texts": list(texts),
        "group": [group[g.char] for g in rows],
        "char": [g.char for g in rows],
        "name": [g.name for g in rows],
        "face": [g.face for g in rows],
    }
    for idea in IDEAS:
        columns[idea] = [labels[idea][group[g.char]] for g in rows]
    text = Value("string")
    features = dict.fromkeys(columns, text) | {
        "image": ImageFeature(decode=False),
        "texts": List(text),
        "group": Value("int64"),
    }
    return Dataset.from_dict(columns, features=Features(features))


_LABEL_OF = {"script": script_of, "case": case_of, "accent": accent_of}


def _labels_by_group(group: dict[str, int], label_of: Callable[[str], str | None]) -> dict[int, str | None]:
    """The label that all Latin, Greek and Cyrillic characters of a group share, else None.

    The A of all three scripts, for example, has no script.
    """
    labels: dict[int, set[str | None]] = {code: set() for code in group.values()}
    for char, code in group.items():
        if script_of(char):
            labels[code].add(label_of(char))
    return {code: values.pop() if len(values) == 1 else None for code, values in labels.items()}
