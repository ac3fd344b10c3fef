"""Captions in files of the images' names, beside them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from clipkit.data.reading.table import Unusable
from clipkit.data.reading.tables import json_object
from clipkit.data.reading.text_files import read_text
from clipkit.errors import DataError, ResourceError
from clipkit.paths import Tree, show
from clipkit.texts import is_blank

SUFFIXES = (".txt", ".caption", ".json")


class CaptionFiles:
    """The caption files of a tree: of each image the first of .txt, .caption and .json, in any case, that is there.

    Files of text hold one caption a line; a .json file, as img2dataset writes it, an object with the key ``caption``
    (a file without that key is not a caption file).

    Attributes:
        read: the files whose captions were asked for.
    """

    def __init__(self, tree: Tree, encoding: str) -> None:
        self.encoding = encoding
        self._read: dict[Path, list[Any] | Unusable] = {}
        self._of: dict[Path, dict[str, Path]] = {}
        for path in tree.files:
            if (suffix := path.suffix.lower()) in SUFFIXES:
                self._of.setdefault(path.with_suffix(""), {})[suffix] = path

    @property
    def read(self) -> list[Path]:
        return list(self._read)

    def of(self, image: Path) -> list[Any] | Unusable | None:
        """The captions of an image; None where there is no file of them."""
        there = self._of.get(image.with_suffix(""), {})
        for path in (there[suffix] for suffix in SUFFIXES if suffix in there):
            captions = self._read.get(path)
            if captions is None:
                captions = self._open(path)
            if captions is not None:
                self._read[path] = captions
                return captions
        return None

    def _open(self, path: Path) -> list[Any] | Unusable | None:
        try:
            text = read_text(path, self.encoding, empty_ok=True)
            return _of_json(text) if path.suffix.lower() == ".json" else _lines(text)
        except DataError as error:
            return Unusable(error.code or "BAD_DATA", f"{error.detail} ({error.where}); {error.fix}")
        except ResourceError as error:
            return Unusable("UNREADABLE", f"{error.message} ({error.where})")
        except (ValueError, RecursionError) as error:
            return Unusable("BAD_JSON", f"{error} ({show(path)})")


def _lines(text: str) -> list[str]:
    lines = [line.rstrip("\n") for line in io.StringIO(text, newline=None)]
    return [line for line in lines if not is_blank(line)]


def _of_json(text: str) -> list[Any] | None:
    mapping = json_object(text)
    if "caption" not in mapping:
        return None
    caption = mapping["caption"]
    return caption if isinstance(caption, list) else [caption]
