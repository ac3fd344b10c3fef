"""Silence for libraries that print while they build or load a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no table of keys from transformers: what matters of them becomes an error."""
    root = logging.getLogger("transformers")
    level, bars = root.level, transformers_logging.is_progress_bar_enabled()
    root.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        root.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
