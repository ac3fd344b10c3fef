"""How many threads torch uses for small work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on the calling thread alone while it lasts.

    For checks, probes and golden embeddings: many small operations, whose threads would wait for each other at each of
    them. On two busy cores that took ten times as long (golden embeddings of a ViT-B/32 3.3 s instead of 0.4).
    """
    import torch

    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
