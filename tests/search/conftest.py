from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TINY = Path(__file__).parents[1] / "embedding" / "tiny.py"


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The helpers of tests/embedding/tiny.py."""
    torch.set_num_threads(1)
    return SimpleNamespace(**runpy.run_path(str(TINY)) | {"__file__": str(TINY)})


@pytest.fixture(scope="session")
def model(tiny: SimpleNamespace):
    """One tiny model; a test that changes a model makes its own."""
    return tiny.tiny_model()
