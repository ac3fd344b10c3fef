"""Train, measure and use text-image dual encoders: what "similar" means is yours to decide.

Every public name is loaded on first use: ``import clipkit`` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.data.check import check_data
    from clipkit.data.pairs import load_pairs
    from clipkit.data.split import split_pairs
    from clipkit.embedding.embed import embed
    from clipkit.embedding.store import EmbeddingStore
    from clipkit.errors import BadImage, ClipkitError
    from clipkit.evaluation.retrieval import RetrievalEvaluator
    from clipkit.evaluation.zero_shot import ZeroShotEvaluator
    from clipkit.images.load import load_image
    from clipkit.labelling.classifier import ZeroShotClassifier
    from clipkit.losses.contrastive import info_nce, sigmoid_loss
    from clipkit.losses.similarity import Graded, Paired, SameGroup, Views
    from clipkit.models.averaging import average, interpolate
    from clipkit.models.dual_encoder import DualEncoder
    from clipkit.models.fingerprint.fingerprint import Fingerprint
    from clipkit.search.index import EmbeddingIndex
    from clipkit.training.config.run import RunConfig
    from clipkit.training.config.train import TrainConfig
    from clipkit.training.run import run
    from clipkit.training.trainer import Trainer

__version__ = "0.1.0"

_HOME = {
    "BadImage": "errors",
    "ClipkitError": "errors",
    "DualEncoder": "models.dual_encoder",
    "EmbeddingIndex": "search.index",
    "EmbeddingStore": "embedding.store",
    "Fingerprint": "models.fingerprint.fingerprint",
    "Graded": "losses.similarity",
    "Paired": "losses.similarity",
    "RetrievalEvaluator": "evaluation.retrieval",
    "RunConfig": "training.config.run",
    "SameGroup": "losses.similarity",
    "TrainConfig": "training.config.train",
    "Trainer": "training.trainer",
    "Views": "losses.similarity",
    "ZeroShotClassifier": "labelling.classifier",
    "ZeroShotEvaluator": "evaluation.zero_shot",
    "average": "models.averaging",
    "check_data": "data.check",
    "embed": "embedding.embed",
    "info_nce": "losses.contrastive",
    "interpolate": "models.averaging",
    "load_image": "images.load",
    "load_pairs": "data.pairs",
    "run": "training.run",
    "sigmoid_loss": "losses.contrastive",
    "split_pairs": "data.split",
}

__all__ = [
    "BadImage",
    "ClipkitError",
    "DualEncoder",
    "EmbeddingIndex",
    "EmbeddingStore",
    "Fingerprint",
    "Graded",
    "Paired",
    "RetrievalEvaluator",
    "RunConfig",
    "SameGroup",
    "TrainConfig",
    "Trainer",
    "Views",
    "ZeroShotClassifier",
    "ZeroShotEvaluator",
    "average",
    "check_data",
    "embed",
    "info_nce",
    "interpolate",
    "load_image",
    "load_pairs",
    "run",
    "sigmoid_loss",
    "split_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"clipkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
