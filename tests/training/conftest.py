from __future__ import annotations

import pytest
import runs
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pairs():
    return tiny.make_pairs()


@pytest.fixture
def make_model():
    return tiny.make_model


class CutError(Exception):
    pass


@pytest.fixture
def cut(monkeypatch):
    """Ends a run right after the checkpoint of a step, as a kill would; the next run goes on."""

    def at(folder, step, **changes):
        from clipkit.training.checkpoints.checkpoint import Checkpoints

        whole = Checkpoints.save

        def save(self, now, parts, **options):
            path = whole(self, now, parts, **options)
            if now == step:
                raise CutError
            return path

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", save)
            with pytest.raises(CutError):
                runs.train(folder, **changes)

    return at
