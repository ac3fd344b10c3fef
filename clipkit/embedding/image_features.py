"""Features of a frozen image tower, computed once: training then costs the text side alone."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from clipkit import distributed
from clipkit.data.batches.augment import Augmentation, augment
from clipkit.data.batches.collate import why_bad
from clipkit.data.batches.plan import hash64
from clipkit.data.dataset import as_dataset
from clipkit.embedding.decoding import require_unchanged
from clipkit.embedding.items import EmbedResult, batched, evaluating, reject, shown
from clipkit.embedding.store import EmbeddingStore, Key
from clipkit.errors import BadImage, ModelError, UsageError, option
from clipkit.files import content_hash
from clipkit.images.load import bytes_of, load_image
from clipkit.images.parallel import Workers, decode_batch, prepared
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.fingerprint import tower_hash
from clipkit.models.processor import Processor
from clipkit.progress import track

Vector: TypeAlias = NDArray[np.float32]


class AugmentedImage(NamedTuple):
    """One augmented version of one image; without augmentation there is only draw 0."""

    row: int
    draw: int


def with_image_features(
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
    """`pairs` with a column `image_features`, which `Trainer` takes in place of the images (LiT, Zhai et al. 2022).

    The features are those of `model.vision_features`, before the projection. Under several processes every one must
    call this; they share the work, and batches are the same however many share them.

    Args:
        model: its image tower must be frozen (``model.freeze("image")``); its heads may train on.
        pairs: a data set with a column `image`, as `Trainer` takes it.
        store: keeps features by the image's content, its augmentation and the tower's fingerprint, for the next run.
        augmentation: of the images, by name.
        draws: with an augmentation, how many versions of each image there are. The plan draws one of them for each
            batch. They depend on the image's content and their number alone, so that other runs find them again.
        batch_size, workers, progress: as for `embed`.
        on_bad: ``skip`` leaves the cell of an image that cannot be used empty; `Trainer` then leaves the row out and
            lists it, or stops, as it does with images.

    Raises:
        UsageError: the image tower is not frozen.
        BadImage: an image cannot be used, and `on_bad` is ``error``.
        ModelError: a feature is not finite.
    """
    trained = _trained(model)
    if trained:
        fix = option("model.freeze", "image", python='model.freeze("image")')
        raise UsageError(
            "features can be kept only of a frozen tower; a saved model is opened with nothing frozen",
            where=trained[0],
            fix=fix,
        )
    pairs = as_dataset(pairs)
    draws = 1 if augmentation == "none" else draws
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress, "on_bad": on_bad}
    return pairs.add_column("image_features", _cells(model, pairs["image"], store, augmentation, draws, **options))


def is_locked(model: DualEncoder) -> bool:
    """Whether the whole image tower is frozen; its head may train."""
    return not _trained(model)


def embed_locked(
    model: DualEncoder,
    images: Sequence[Any],
    store: EmbeddingStore,
    *,
    batch_size: int,
    workers: Workers,
    progress: bool,
    on_bad: Literal["error", "skip"],
) -> EmbedResult:
    """What `embed` gives of images, by way of the features of a locked tower."""
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress, "on_bad": on_bad}
    cells = _cells(model, images, store, "none", 1, **options)
    rows = [row for row, cell in enumerate(cells) if cell is not None]
    vectors = torch.zeros(len(rows), model.dim)
    with evaluating(model):
        for part in batched(range(len(rows)), batch_size):
            features = torch.from_numpy(np.asarray([cells[rows[number]] for number in part], dtype=np.float32))
            embedded = model(image_features=features.to(model.device)).image
            vectors[part] = embedded.float().cpu()
    if not vectors.isfinite().all():
        bad = rows[int((~vectors.isfinite().all(dim=1)).int().argmax())]
        raise ModelError("an image embedding is not finite", where=f"row {bad}", fix="check the model's weights")
    refused = [reject(row, images[row], why_bad(images[row])) for row, cell in enumerate(cells) if cell is None]
    return EmbedResult(vectors, rows, refused, [])


def _cells(
    model: DualEncoder,
    images: Sequence[Any],
    store: EmbeddingStore | None,
    augmentation: Augmentation,
    draws: int,
    *,
    batch_size: int,
    workers: Workers,
    progress: bool,
    on_bad: str,
) -> list[Vector | list[Vector] | None]:
    """The features of each image, or of each of several versions of it; None for an image that cannot be used."""
    hashed = store is not None or augmentation != "none"
    main = progress and distributed.is_main()
    read = track(images, len(images), "reading images", unit="image", shown=hashed and main)
    contents = [_content(image, on_bad) if hashed else b"" for image in read]
    numbers = range(draws)
    usable = [row for row, content in enumerate(contents) if content is not None]
    versions = [AugmentedImage(row, draw) for row in usable for draw in numbers]
    keys: dict[AugmentedImage, Key] = {}
    features: dict[AugmentedImage, Vector] = {}
    if store is not None:
        tower = tower_hash(model.backend, model.processor)
        kinds = ["image_features" if augmentation == "none" else f"image_features {augmentation} {n}" for n in numbers]
        for version in versions:
            keys[version] = Key(contents[version.row] or b"", kinds[version.draw], tower)
        stored = store.get(list(keys.values()))
        features = {version: stored[key] for version, key in keys.items() if key in stored}
    # of any process: another one may have put a row into the store a moment ago
    missing_by_rank = distributed.together(lambda: [version for version in versions if version not in features])
    missing = set().union(*missing_by_rank)
    batches = list(batched(sorted(missing), batch_size))[distributed.rank() :: distributed.world_size()]
    source = _Versions(images, contents, model.processor, augmentation, on_bad)

    def compute() -> dict[AugmentedImage, Vector]:
        done: dict[AugmentedImage, Vector] = {}
        loaded = prepared(source, batches, workers, model.device)
        with closing(shown(loaded, [len(batch) for batch in batches], "image", progress)) as parts:
            for part in parts:
                if isinstance(part, BadImage):
                    raise part
                fresh, pixels = part
                if fresh:
                    vectors = _features(model, pixels, fresh)
                    if store is not None:
                        store.put([keys[version] for version in fresh], vectors)
                    done.update(zip(fresh, vectors, strict=True))
        return done

    for share in distributed.together(compute):
        features |= share
    return [_cell(features, row, draws) for row in range(len(images))]


def _trained(model: DualEncoder) -> list[str]:
    """Names of the image tower's trainable parameters, without those of its head."""
    backend = model.backend
    return [n for n, p in backend.named_parameters() if p.requires_grad and backend.belongs_to("image", n, head=False)]


def _content(image: Any, on_bad: str) -> bytes | None:
    """SHA-256 of an image; None if it cannot be read."""
    try:
        return content_hash(bytes_of(image))
    except BadImage as error:
        if on_bad == "error":
            raise error.or_skip() from error
        return None


def _cell(features: dict[AugmentedImage, Vector], row: int, draws: int) -> Vector | list[Vector] | None:
    versions = [AugmentedImage(row, draw) for draw in range(draws)]
    cells = [features[version] for version in versions if version in features]
    if not cells:
        return None
    return cells[0] if draws == 1 else cells


def _features(model: DualEncoder, pixels: torch.Tensor, versions: list[AugmentedImage]) -> Vector:
    with evaluating(model):
        vectors: Vector = model.vision_features(pixels.to(model.device)).float().cpu().numpy()
    if not np.isfinite(vectors).all():
        bad = versions[int((~np.isfinite(vectors).all(axis=1)).argmax())].row
        raise ModelError("an image feature is not finite", where=f"row {bad}")
    return vectors


class _Versions(Dataset[Any]):
    """Batches of versions to pixels. Goes to the workers, so it carries no weights; errors come back as values."""

    def __init__(
        self,
        images: Sequence[Any],
        contents: list[bytes | None],
        processor: Processor,
        augmentation: Augmentation,
        on_bad: str,
    ) -> None:
        self.images, self.contents, self.processor = images, contents, processor
        self.augmentation, self.on_bad = augmentation, on_bad
        self.pool: ThreadPoolExecutor | None = None

    def __getitem__(self, batch: list[AugmentedImage]) -> tuple[list[AugmentedImage], torch.Tensor] | BadImage:
        opened, refused = decode_batch(batch, self._open, self.pool)
        if refused and self.on_bad == "error":
            _, error = refused[0]
            return error.or_skip()
        pixels = self.processor.images(list(opened.values())) if opened else torch.zeros(0)
        return list(opened), pixels

    def _open(self, version: AugmentedImage) -> Image.Image:
        image, content = self.images[version.row], self.contents[version.row]
        if content:
            require_unchanged(image, content)
        seed = hash64(int.from_bytes((content or b"")[:8], "little"), version.draw)
        return augment(load_image(image), self.augmentation, seed)
