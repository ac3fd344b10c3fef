"""Features of a frozen text tower, computed once a caption: training then costs what is left of the model alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch

from clipkit import distributed
from clipkit.data.batches.augment import Augmentation
from clipkit.data.dataset import as_dataset
from clipkit.embedding.image_features import Vector, is_locked, with_image_features
from clipkit.embedding.items import EmbedResult, batched, evaluating, shown
from clipkit.embedding.store import EmbeddingStore, Key
from clipkit.errors import ModelError, UsageError, option
from clipkit.files import content_hash
from clipkit.images.parallel import Workers
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.fingerprint import tower_hash

_KIND = "text_features"


def with_features(
    model: DualEncoder,
    pairs: Any,
    *,
    store: EmbeddingStore | None = None,
    augmentation: Augmentation = "none",
    draws: int = 1,
    batch_size: int = 64,
    workers: Workers = "auto",
    progress: bool = False,
    on_bad: Literal["error", "skip"] = "error",
) -> Any:
    """`pairs` with the features of each tower that is frozen: what `Trainer` then takes in place of images or texts.

    Args:
        model: one of its towers must be frozen, or both (``model.freeze("text")``); its heads may train on.
        pairs, store, augmentation, draws, batch_size, workers, progress, on_bad: as for `with_image_features`; only
            images are augmented.

    Raises:
        UsageError: no tower is frozen.
        BadImage, ModelError: as `with_image_features`.
    """
    if not is_locked(model) and not is_text_locked(model):
        fix = option("model.freeze", "image", python='model.freeze("image")')
        message = "features can be kept only of a frozen tower; a saved model is opened with nothing frozen"
        raise UsageError(message, fix=fix)
    if is_locked(model):
        pairs = with_image_features(
            model, pairs, store=store, augmentation=augmentation, draws=draws, batch_size=batch_size, workers=workers,
            progress=progress, on_bad=on_bad,
        )  # fmt: skip
    if is_text_locked(model):
        pairs = with_text_features(model, pairs, store=store, batch_size=batch_size, progress=progress)
    return pairs


def with_text_features(
    model: DualEncoder,
    pairs: Any,
    *,
    store: EmbeddingStore | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Any:
    """`pairs` with a column `text_features`: of each row a list with one vector for each of its texts.

    The features are those of `model.text_features`, before the projection; each caption is computed once. Under several
    processes every one must call this; they share the work.

    Args:
        model: its text tower must be frozen (``model.freeze("text")``); its heads may train on.
        pairs: a data set with a column `texts`, as `Trainer` takes it.
        store: keeps features by the text and the tower's fingerprint, for the next run.
        batch_size: texts at once.
        progress: whether the main process shows how far it is.

    Raises:
        UsageError: the text tower is not frozen.
        ModelError: a feature is not finite.
    """
    trained = _trained(model)
    if trained:
        fix = option("model.freeze", "text", python='model.freeze("text")')
        message = "features can be kept only of a frozen tower; a saved model is opened with nothing frozen"
        raise UsageError(message, where=trained[0], fix=fix)
    pairs = as_dataset(pairs)
    captions = list(pairs["texts"])
    texts = list(dict.fromkeys(text for own in captions for text in own))
    features = _features(model, texts, store, batch_size=batch_size, progress=progress)
    return pairs.add_column(_KIND, [[features[text] for text in own] for own in captions])


def is_text_locked(model: DualEncoder) -> bool:
    """Whether the whole text tower is frozen; its head may train."""
    return not _trained(model)


def embed_locked_texts(
    model: DualEncoder, texts: Sequence[str], store: EmbeddingStore, *, batch_size: int, progress: bool
) -> EmbedResult:
    """What `embed` gives of texts, by way of the features of a frozen tower."""
    distinct = list(dict.fromkeys(texts))
    features = _features(model, distinct, store, batch_size=batch_size, progress=progress)
    vectors = torch.zeros(len(distinct), model.dim)
    with evaluating(model):
        for rows in batched(range(len(distinct)), batch_size):
            part = torch.from_numpy(np.stack([features[distinct[row]] for row in rows]))
            embedded = model(text_features=part.to(model.device)).text
            vectors[rows] = embedded.float().cpu()
    row_of = {text: row for row, text in enumerate(distinct)}
    return EmbedResult(vectors[[row_of[text] for text in texts]], list(range(len(texts))), [], [])


def _features(
    model: DualEncoder, texts: list[str], store: EmbeddingStore | None, *, batch_size: int, progress: bool
) -> dict[str, Vector]:
    """The features of distinct texts."""
    features: dict[str, Vector] = {}
    keys: dict[str, Key] = {}
    if store is not None:
        tower = tower_hash(model.backend, model.processor, "text")
        keys = {text: Key(content_hash(text), _KIND, tower) for text in texts}
        stored = store.get(list(keys.values()))
        features = {text: stored[key] for text, key in keys.items() if key in stored}
    missing = _missing_anywhere(texts, features)
    batches = list(batched(missing, batch_size))[distributed.rank() :: distributed.world_size()]

    def compute() -> dict[str, Vector]:
        done: dict[str, Vector] = {}
        with closing(shown(iter(batches), [len(part) for part in batches], "text", progress)) as parts:
            for part in parts:
                vectors = _compute(model, part)
                if store is not None:
                    store.put([keys[text] for text in part], vectors)
                done.update(zip(part, vectors, strict=True))
        return done

    for share in distributed.together(compute):
        features |= share
    return features


def _missing_anywhere(texts: Iterable[str], features: dict[str, Vector]) -> list[str]:
    """What any process lacks: another one may have put a text into the store a moment ago."""
    by_rank = distributed.together(lambda: [text for text in texts if text not in features])
    return sorted(set().union(*by_rank), key=len)  # texts of like length, so that little is padded


def _compute(model: DualEncoder, texts: list[str]) -> Vector:
    inputs = {name: tensor.to(model.device) for name, tensor in model.processor.texts(texts).items()}
    with evaluating(model):
        vectors: Vector = model.text_features(**inputs).float().cpu().numpy()
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        text = texts[int((~finite).argmax())]
        raise ModelError("a text feature is not finite", where=repr(text), fix="check the model's weights")
    return vectors


def _trained(model: DualEncoder) -> list[str]:
    """Names of the text tower's trainable parameters, without those of its head."""
    backend = model.backend
    return [n for n, p in backend.named_parameters() if p.requires_grad and backend.belongs_to("text", n, head=False)]
