"""Two processes give the figures of one: to the bit, with uneven shares, whatever fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import toy

from clipkit.embedding.embed import embed
from clipkit.embedding.store import EmbeddingStore
from clipkit.evaluation.retrieval import RetrievalEvaluator
from clipkit.evaluation.zero_shot import ZeroShotEvaluator
from clipkit.metrics import ranking
from clipkit.search.index import EmbeddingIndex

N = 11


def measure(folder: Path, model) -> dict:
    """All that ranks share, as JSON can hold it."""
    images = [str(folder / f"{i:03}.png") for i in range(N)]
    texts = [[f"number {i} of it", f"photo {i}", f"a {i % 4}"][: 1 + i % 3] for i in range(N)]
    table = {"image": images, "texts": texts, "label": [i % 3 for i in range(N)]}
    pairs = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))
    found: dict = {}
    ranking._TILE = 60  # several tiles, so that both processes rank
    for evaluator in (
        RetrievalEvaluator(pairs, batch_size=4),
        RetrievalEvaluator(pairs, batch_size=4, group="label", name="grouped"),
        ZeroShotEvaluator(pairs, class_names=["a photo", "number", "of"], batch_size=4),
    ):
        found |= evaluator(model) | {f"chance {k}": v for k, v in evaluator.chance().items()}
        if isinstance(evaluator, RetrievalEvaluator):
            found |= {f"{evaluator.name} ranks": evaluator.last.text_to_image.above.tolist()}
            found |= {f"{evaluator.name} top": evaluator.last.text_to_image.top.tolist()}
    bad = [*images, str(folder / "none.png"), *images[:3]]
    for name, store in (("none", None), ("memory", EmbeddingStore())):
        result = embed(model, bad, batch_size=2, on_bad="skip", store=store)
        found |= {f"embed {name}": [result.vectors.tolist(), result.rows, [r.row for r in result.rejected]]}
        if store:
            found["stored"] = len(store)
    found["one item"] = embed(model, images[:1]).vectors.tolist()  # a rank without work
    index = EmbeddingIndex.build(model, folder, folder.parent / "i.index", batch_size=3)
    found["index"] = [[hit.path.name for hit in index.search(f"photo {i}")] for i in range(3)]
    try:
        embed(model, bad, batch_size=2)  # one rank meets the bad image; none may wait for it
    except Exception as error:
        found["error"] = [type(error).__name__, str(error).splitlines()[0]]
    return found


CHILD = """
import json, os, runpy, sys
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
sys.path.insert(0, sys.argv[2])
import toy
figures = runpy.run_path(sys.argv[1])["measure"](Path(sys.argv[3]), toy.toy_model())
Path(sys.argv[4] + os.environ["RANK"]).write_text(json.dumps(figures))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tiny, tmp_path: Path, monkeypatch) -> None:
    tiny.write_pictures(tmp_path / "two" / "photos", range(N))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out = str(tmp_path / "out")
    helpers = str(Path(toy.__file__).parent)
    command = [sys.executable, "-c", CHILD, __file__, helpers, str(tmp_path / "two" / "photos"), out]
    children = [subprocess.Popen(command, env={**shared, "RANK": str(r)}, stderr=subprocess.PIPE) for r in range(2)]
    try:
        errors = [child.communicate(timeout=300)[1].decode() for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    tiny.write_pictures(tmp_path / "one" / "photos", range(N))
    monkeypatch.setattr(ranking, "_TILE", ranking._TILE)
    alone = json.loads(json.dumps(measure(tmp_path / "one" / "photos", toy.toy_model())))
    alone["error"][1] = alone["error"][1].replace("/one/", "/two/")
    for rank in range(2):
        found = json.loads(Path(f"{out}{rank}").read_text())
        assert found.keys() == alone.keys()
        for key in alone:
            assert found[key] == alone[key], key
