"""Who decodes, and what is opened again, counted."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.embedding import decoding
from clipkit.embedding import distinct as module
from clipkit.embedding.embed import embed
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import BadImage, UsageError
from clipkit.images.parallel import decoders, prepared


@pytest.fixture
def photos(tiny: Any, tmp_path: Path) -> list[Path]:
    tiny.write_pictures(tmp_path / "photos", range(12))
    return sorted((tmp_path / "photos").iterdir())


@pytest.mark.parametrize("workers", ["auto", 0, 2])
def test_all_workers_give_the_same(model: Any, photos: list[Path], workers: Any) -> None:
    expected = model.encode_images(photos, batch_size=4, workers=0)
    assert torch.equal(embed(model, photos, batch_size=4, workers=workers).vectors, expected)
    assert torch.equal(model.encode_images(photos, batch_size=4, workers=workers), expected)


def test_as_many_threads_decode_as_torch_computes_with(model: Any, photos: list[Path], monkeypatch: Any) -> None:
    threads: set[str] = set()
    load, together = decoding.load_image, threading.Barrier(2, timeout=20)

    def counting(item: Any, **options: Any) -> Any:
        threads.add(threading.current_thread().name)
        together.wait()  # two at once, or this times out
        return load(item, **options)

    monkeypatch.setattr(decoding, "load_image", counting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    embed(model, photos, batch_size=6)
    assert len(threads) == decoders(torch.device("cpu")) == 2


class Source:
    """Batches that say which of them is prepared."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.prepared: list[int] = []

    def __getitem__(self, batch: int) -> int:
        self.prepared.append(batch)
        if batch == 7:
            raise OSError("the drive is gone")
        return batch * 10


def test_beside_an_accelerator_batches_are_prepared_ahead() -> None:
    source = Source()
    batches = prepared(source, range(6), "auto", torch.device("meta"))
    assert next(batches) == 0
    end = time.monotonic() + 20
    while len(source.prepared) < 3 and time.monotonic() < end:
        time.sleep(0.001)
    assert source.prepared == [0, 1, 2]
    assert list(batches) == [10, 20, 30, 40, 50]
    assert source.pool is None
    with pytest.raises(OSError, match="drive"):
        list(prepared(Source(), range(5, 9), "auto", torch.device("meta")))


def test_what_cannot_be_used_is_named_whoever_decodes(model: Any, photos: list[Path]) -> None:
    photos[5].write_bytes(b"no image")
    for workers in ("auto", 0, 2):
        assert [reject.row for reject in embed(model, photos, workers=workers, on_bad="skip").rejected] == [5]
        with pytest.raises(BadImage, match="NOT_IMAGE"):
            model.encode_images(photos, workers=workers)


class Opened:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        bytes_of = module.bytes_of

        def counting(item: Any) -> bytes:
            self.paths.append(Path(item).name)
            return bytes_of(item)

        monkeypatch.setattr(module, "bytes_of", counting)

    def by(self, *arguments: Any, **options: Any) -> list[str]:
        self.paths.clear()
        embed(*arguments, **options)
        return self.paths


def age(paths: list[Path]) -> None:
    """As if they had been written a day ago: what was written just now may be written again within its time."""
    for path in paths:
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 86_400 * 10**9))


def test_known_files_are_not_opened_again(model: Any, photos: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    opened = Opened(monkeypatch)
    with EmbeddingStore(tmp_path / "store") as store:
        assert len(opened.by(model, photos, store=store)) == 12
        assert len(opened.by(model, photos, store=store)) == 12  # too new to be sure of
        age(photos)
        assert len(opened.by(model, photos, store=store)) == 12
        first = embed(model, photos, store=store)
        assert opened.by(model, photos, store=store) == []
        monkeypatch.chdir(photos[0].parent)
        assert opened.by(model, [path.name for path in photos], store=store) == []
        data, before = photos[3].read_bytes(), photos[3].stat()
        photos[3].write_bytes(photos[4].read_bytes())  # another content
        os.utime(photos[3], ns=(before.st_atime_ns, before.st_mtime_ns - 1))
        photos[5].rename(photos[5].with_name("x.png"))  # another inode under the same name, size and time
        photos[5].write_bytes(photos[5].with_name("x.png").read_bytes())
        os.utime(photos[5], ns=(before.st_atime_ns, photos[5].with_name("x.png").stat().st_mtime_ns))
        assert opened.by(model, photos, store=store) == [photos[3].name, photos[5].name]
        changed = embed(model, photos, store=store)
    assert torch.equal(changed.vectors[3], first.vectors[4])
    assert len(data) > 0


def test_exact_and_fast_are_kept_apart(model: Any, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    path = tmp_path / "large.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    with EmbeddingStore() as store:
        exact, fast = (embed(model, [path], store=store, decode=decode).vectors for decode in ("exact", "fast"))
        assert not torch.equal(exact, fast)
        assert len(store) == 2
        assert torch.equal(embed(model, [path], store=store).vectors, exact)
        assert torch.equal(embed(model, [path], store=store, decode="fast").vectors, fast)
    with pytest.raises(UsageError, match="exact, fast"):
        embed(model, [path], decode="quick")  # type: ignore[arg-type]
