"""What can be asked of an index, and its embedding."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import UsageError
from clipkit.images import ImageSource, is_image_name
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.text_notices import tell, text_notices

Query: TypeAlias = "ImageSource | Tensor"


def embed_queries(queries: Sequence[Query], model: Callable[[], DualEncoder], dim: int) -> Tensor:
    """(queries, dim) float32, unit length. What the model cannot see of a text is told in the log.

    Encoded here and not by `embed`: a search is one process's own affair, not work that ranks share. The model is asked
    for only where a query is not an embedding already.

    Raises:
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
    """How a query is read. A str is a text, unless it is the name of an image file that exists."""
    if isinstance(query, Tensor):
        return "vector"
    if isinstance(query, str):
        if not query.strip():
            raise UsageError("the query is empty", fix="ask for something, such as 'two dogs on a beach'")
        return "image" if is_image_name(query) and Path(query).is_file() else "text"
    if isinstance(query, (os.PathLike, bytes, Image.Image, np.ndarray, Mapping)):
        return "image"
    raise UsageError(f"a query is a text, an image or an embedding; found {type(query).__name__}")


def _unit(vector: Tensor, dim: int) -> Tensor:
    v = vector.detach().float().cpu()
    if v.shape != (dim,) or not bool(torch.isfinite(v).all()) or not bool(v.any()):
        raise UsageError(f"expected a finite embedding of shape ({dim},), found {tuple(v.shape)}")
    return torch.nn.functional.normalize(v, dim=0)
