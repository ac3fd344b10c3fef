from __future__ import annotations

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pairs():
    return tiny.make_pairs()


@pytest.fixture
def make_model():
    return tiny.make_model
