"""What can be asked of an index, and its embedding."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import UsageError
from clipkit.images.load import ImageSource, is_image_name, probe_image
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.text_notices import tell, text_notices
from clipkit.texts import checked_text, is_blank

log = logging.getLogger("clipkit")

Query: TypeAlias = "ImageSource | Tensor"


def embed_queries(queries: Sequence[Query], model: Callable[[], DualEncoder], dim: int) -> Tensor:
    """(queries, dim) float32, unit length. What the model cannot see of a text is told in the log.

    Encoded here and not by `embed`: a search is one process's own affair, not work that ranks share. The model is asked
    for only where a query is not an embedding already.

    Raises:
        BadText: a text with bytes that are no UTF-8.
        UsageError: an empty text, something that is no query, or an embedding of another size.
    """
    kinds = [kind_of(query) for query in queries]
    vectors = torch.zeros(len(queries), dim)
    for kind in ("text", "image", "vector"):
        rows = [row for row, found in enumerate(kinds) if found == kind]
        some: list[Any] = [queries[row] for row in rows]
        if not rows:
            continue
        if kind == "vector":
            vectors[rows] = torch.stack([_unit(vector, dim) for vector in some])
        elif kind == "image":
            vectors[rows] = model().encode_images(some)
        else:
            vectors[rows] = model().encode_texts(some)
            tell(text_notices(model().processor, some), model().processor.text_side)
    return vectors


def kind_of(query: object) -> Literal["text", "image", "vector"]:
    """How a query is read.

    Raises:
        BadImage: it is a path, and no image that can be opened is there.
        UsageError: it is empty, or no query.
    """
    if isinstance(query, Tensor):
        return "vector"
    if isinstance(query, str):
        if is_blank(query):
            raise UsageError("the query is empty", fix="ask for something, such as 'two dogs on a beach'")
        if not is_path(query):
            checked_text(query)
            return "text"
    if isinstance(query, (str, os.PathLike)):
        probe_image(query)  # before a model is opened for it
    if isinstance(query, (str, os.PathLike, bytes, Image.Image, np.ndarray, Mapping)):
        return "image"
    raise UsageError(f"a query is a text, an image or an embedding; found {type(query).__name__}")


def is_path(query: str) -> bool:
    """Whether a query means a file: there is one, or it has an image's suffix and either a separator or no space.

    A word that is also the name of a folder, such as a class, is a text, and the log says so.

    >>> is_path("photos/a dog.jpg"), is_path("dog.jpg"), is_path("a dog, not a .jpg"), is_path("cat/dog")
    (True, True, False, False)
    """
    separated = "/" in query or os.sep in query
    if (is_image_name(query) and (separated or " " not in query)) or os.path.isfile(query):  # noqa: PTH113
        return True
    if os.path.isdir(query):  # noqa: PTH112 (Path raises for a long text)
        if separated:
            return True
        log.info("there is a folder %s; it is searched for as a text", query)
    return False


def _unit(vector: Tensor, dim: int) -> Tensor:
    v = vector.detach().float().cpu()
    if v.shape != (dim,) or not bool(torch.isfinite(v).all()) or not bool(v.any()):
        raise UsageError(f"expected a finite embedding of shape ({dim},), found {tuple(v.shape)}")
    return torch.nn.functional.normalize(v, dim=0)
