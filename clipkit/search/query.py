"""Queries to an index: how they are read, and their embeddings."""

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
QueryType = Literal["text", "image", "vector"]


def embed_queries(queries: Sequence[Query], model: Callable[[], DualEncoder], dim: int) -> Tensor:
    """Return (queries, dim) float32 embeddings of unit length.

    The log names what the model cannot see of a text. This does not use `embed`: one process searches by itself, and
    ranks do not share the work.

    Args:
        queries: texts, images and embeddings, mixed.
        model: opens the model; not called if all queries are embeddings.
        dim: length of an embedding.

    Raises:
        BadText: a text has bytes that are not UTF-8.
        UsageError: a text is empty, something is not a query, or an embedding has another size.
    """
    rows_of: dict[QueryType, list[int]] = {"text": [], "image": [], "vector": []}
    for row, query in enumerate(queries):
        rows_of[query_type(query)].append(row)
    vectors = torch.zeros(len(queries), dim)
    if rows := rows_of["text"]:
        texts: list[Any] = [queries[row] for row in rows]
        vectors[rows] = model().encode_texts(texts)
        tell(text_notices(model().processor, texts), model().processor.text_side)
    if rows := rows_of["image"]:
        images: list[Any] = [queries[row] for row in rows]
        vectors[rows] = model().encode_images(images)
    for row in rows_of["vector"]:
        embedding: Any = queries[row]
        vectors[row] = _normalized(embedding, dim)
    return vectors


def query_type(query: object) -> QueryType:
    """Return how a query is read.

    Raises:
        BadImage: it is the path of an image that does not exist or cannot be opened.
        UsageError: it is empty, or not a query.
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
        probe_image(query)  # fails before a model is opened
    if isinstance(query, (str, os.PathLike, bytes, Image.Image, np.ndarray, Mapping)):
        return "image"
    raise UsageError(f"a query is a text, an image or an embedding; found {type(query).__name__}")


def is_path(query: str) -> bool:
    """Whether a query is a path: the file exists, or the name has an image's suffix and either a separator or no space.

    A word that is also the name of a folder, such as a class, is read as a text, and the log says so.

    >>> is_path("photos/a dog.jpg"), is_path("dog.jpg"), is_path("a dog, not a .jpg"), is_path("cat/dog")
    (True, True, False, False)
    """
    separated = "/" in query or os.sep in query
    if is_image_name(query) and (separated or " " not in query):
        return True
    if os.path.isfile(query):  # noqa: PTH113 (Path raises for a long text)
        return True
    if os.path.isdir(query):  # noqa: PTH112
        if separated:
            return True
        log.info("there is a folder %s; it is searched for as a text", query)
    return False


def _normalized(vector: Tensor, dim: int) -> Tensor:
    v = vector.detach().float().cpu()
    if v.shape != (dim,) or not bool(torch.isfinite(v).all()) or not bool(v.any()):
        raise UsageError(f"expected a finite embedding of shape ({dim},), found {tuple(v.shape)}")
    return torch.nn.functional.normalize(v, dim=0)
