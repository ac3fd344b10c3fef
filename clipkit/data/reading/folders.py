"""Folders as data: images with captions beside them, with metadata files, or in one folder a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clipkit.data.reading.caption_files import SUFFIXES, CaptionFiles
from clipkit.data.reading.class_folders import classes_of
from clipkit.data.reading.columns import TEXT_NAMES, obvious
from clipkit.data.reading.metadata_files import is_metadata, read_metadata
from clipkit.data.reading.rejects import LoadReport, unreadable_folders
from clipkit.data.reading.table import Table, Unusable
from clipkit.data.reading.tables import TABLE_SUFFIXES
from clipkit.data.reading.text_files import TextFormat
from clipkit.errors import DataError
from clipkit.images.load import find_images
from clipkit.paths import Tree, show, walk
from clipkit.prompts import DEFAULT_TEMPLATE

_NAMES = 10  # classes or files that one line names


def read_folder(folder: Path, ledger: LoadReport, form: TextFormat) -> Table:
    """The images below a folder, with their captions, their metadata, or their class (column `label`).

    Captions and labels are looked for wherever the images are: metadata files at any level, and beside each image a
    caption file of its name. Only where there is neither, the folders are the classes. What was decided becomes a note,
    and so does what was not read; a folder that cannot be listed is a reject.

    Raises:
        DataError: no layout fits; the message lists the files.
    """
    tree = walk(folder)
    images = find_images(tree)
    if not images:
        raise _no_images(tree)
    captions = CaptionFiles(tree, form.encoding)
    texts = [captions.of(image) for image in images]
    metadata = [path for path in tree.files if is_metadata(path)]
    absolute, places = [str(image.absolute()) for image in images], [show(image) for image in images]
    used = [*images, *metadata, *captions.read]
    if metadata:
        table = read_metadata(tree, images, metadata, captions, form)
        decided = _sources(table, [show(path.relative_to(folder)) for path in metadata], captions.read)
    elif any(text is not None and not _is_broken_json(text) for text in texts):
        no_text = f"there is no caption beside the image, in a file that ends in {', '.join(SUFFIXES)}"
        table = Table(show(folder), folder, {"image": absolute, "texts": texts}, places=places, no_text=no_text)
        decided = _sources(table, [], captions.read)
    else:
        _refuse_tables(tree)
        labels = classes_of(tree, images)
        columns = {"image": absolute, "label": labels}
        table = Table(show(folder), folder, columns, places=places, templates=(DEFAULT_TEMPLATE,))
        names, used = sorted(set(labels)), images
        decided = f"{len(names):,} class{'es' if len(names) > 1 else ''}: {_some(names)}"
    table.rejects.extend(unreadable_folders(tree, len(table)))
    ledger.note(f"{show(folder)}: {decided}")
    if line := tree.passed_over(used):
        ledger.note(line)
    return table


def _is_broken_json(text: list[str] | Unusable) -> bool:
    return isinstance(text, Unusable) and text.code == "BAD_JSON"


def _sources(table: Table, metadata: Sequence[str], captions: Sequence[Path]) -> str:
    """Where the captions, or the labels alone, come from."""
    kinds = Counter(path.suffix.lower() for path in captions)
    sources = [_some(metadata)] if metadata else []
    sources += [f"{n:,} {suffix} file{'s' if n > 1 else ''}" for suffix, n in kinds.most_common()]
    what = "captions" if obvious(table.names, TEXT_NAMES) else "labels"
    return f"{what} from {' and '.join(sources)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def _tables(tree: Tree) -> list[Path]:
    """Tables that may say what is on the images; a .json file beside an image is not a table."""
    beside = {path.with_suffix("") for path in find_images(tree)}
    return [path for path in tree.files if path.suffix.lower() in TABLE_SUFFIXES and path.with_suffix("") not in beside]


def _refuse_tables(tree: Tree) -> None:
    if tables := _tables(tree):
        raise DataError(
            "the folder holds images and a table, but no captions beside the images",
            where=show(tree.root),
            fix=f"pass the table itself: {show(tables[0])}; if the folders are the classes, move it out of them",
        )


def _no_images(tree: Tree) -> DataError:
    tables = _tables(tree)
    fix = f"pass the table itself: {show(tables[0])}" if tables else "check the folder"
    reason = tree.passed_over([]) or "the folder is empty"
    return DataError(f"expected images; found none ({reason})", where=show(tree.root), fix=fix, code="EMPTY_TABLE")
