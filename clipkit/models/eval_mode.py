"""Eval mode for a while, with every module's own mode given back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clipkit.models.backend import Backend

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder


@contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """In eval mode for a while; every module is left in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def in_eval_mode(backend: Backend) -> Iterator[None]:
    """Every module in eval mode for a while, and then as it was."""
    modes = [(module, module.training) for module in backend.modules()]
    backend.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
