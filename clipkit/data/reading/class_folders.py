"""Folders whose names are the classes of the images in them; and folders whose names cannot be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from clipkit.errors import DataError
from clipkit.paths import Tree, show

_SAY = (
    "say what is on the images: captions beside them (.txt, .caption or .json), a metadata.csv among them with the "
    "columns file_name and text, or one folder a class, named after it"
)


# Parts of a data set: train2014, val, test ...
_SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval|holdout|unlabell?ed)[-_ ]?\d*", re.I)


# What files are, not what is on them.
_KIND = re.compile(r"(images?|imgs?|jpe?gs?|pngs?|jpe?gimages)", re.I)


# Not classes if all folders have such names: collections, 00000 of img2dataset, years, days, cameras' folders.
_PLACE = re.compile(r"photos|pictures|pics|data|dataset|files|raw|all|masks|labels|annotations", re.I)
_NUMBER = re.compile(r"\d{4,}([-_]\d\d)*|(part|shard|chunk|batch)[-_]?\d+|\d{3}[A-Z_]{5}")


def classes_of(tree: Tree, images: Sequence[Path]) -> list[str]:
    """Return the class of each image: the name of the folder below the root that contains it.

    Raises:
        DataError: an image is in none; a folder holds no image; the names are not those of classes.
    """
    parts = [image.relative_to(tree.root).parts for image in images]
    loose = [image for image, inner in zip(images, parts, strict=True) if len(inner) == 1]
    if loose:
        message = f"{len(loose):,} images have no caption and lie in no class folder"
        raise DataError(message, where=show(loose[0]), fix=_SAY, code="NO_TEXT")
    classes = {inner[0] for inner in parts}
    _refuse_other_names(tree, sorted(classes), deep={inner[0] for inner in parts if len(inner) > 2})
    folders = {path.name for path in tree.folders[1:] if path.parent == tree.root}
    empty = sorted(folders - classes)
    if empty:
        fix = "remove it, or put images into it"
        where = show(tree.root)
        raise DataError(f"a class folder holds no image: {', '.join(empty)}", where=where, fix=fix, code="EMPTY_CLASS")
    return [inner[0] for inner in parts]


def _refuse_other_names(tree: Tree, names: list[str], deep: set[str]) -> None:
    splits = [name for name in names if _SPLIT.fullmatch(name)]
    kinds = [name for name in names if _KIND.fullmatch(name)]
    others = [name for name in names if _PLACE.fullmatch(name) or _NUMBER.fullmatch(name)]
    odd = [*splits, *kinds, *others]
    # One class may be called train, among cars and buses.
    if not kinds and len(splits) < 2 and len(odd) < len(names):
        return
    with_folders = [name for name in odd if name in deep]
    fix = f"read one of them: {show(tree.root / with_folders[0])}" if with_folders else _SAY
    raise DataError(
        f"these folders are named like parts of a data set, not like classes: {_some(odd)}",
        code="NO_CLASSES",
        where=show(tree.root),
        fix=fix,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
