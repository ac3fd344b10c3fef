"""Print which losses of the field give the gradients of the big batch: the table of train/README.md.

The same two small encoders and the same 24 pairs go, in float64, through each library's own loss: once in one
process that holds the whole batch, and once as people run it, on several ranks under DDP or in chunks. The table
has, for each encoder, the length of the second gradient over that of the first, and the cosine between them; for the
logit scale, the ratio alone. 1.000 / 1.000 is the big batch. The program starts its own processes:

    python train/gradient_parity.py
    python train/gradient_parity.py --ranks 2 4 --to parity.md

Needs `pip install sentence-transformers pytorch-metric-learning` beside clipkit.
"""

import argparse
import logging
import math
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from open_clip_train.train import train_one_epoch
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from clipkit import Paired, SameGroup, info_nce, sigmoid_loss
from clipkit.data.batches.batch import Batch, RowKeys
from clipkit.losses.contrastive import EmbeddedBatch
from clipkit.training.step import backward

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides DDP's notes on parameters that a loss does not train
logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # hides warnings on gathering in one process

N = 24  # pairs
CHUNKS = 4  # of a batch that is processed in parts
UNEVEN = {2: (15, 9), 4: (9, 7, 5, 3)}  # rows of each rank where the ranks differ


class Encoders(nn.Module):
    """Two encoders and a scale, with the outputs of open_clip's models."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8)) for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.double()

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


class Columns(nn.Module):
    """The same encoders with the interface of sentence-transformers: one column at a time."""

    def __init__(self, encoders: Encoders) -> None:
        super().__init__()
        self.encoders = encoders

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        if "pixel_values" in features:
            return {"sentence_embedding": self.encoders.image(features["pixel_values"])}
        return {"sentence_embedding": self.encoders.text(features["input_ids"])}


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Return images, texts correlated with them, and classes of four pairs each."""
    torch.manual_seed(1)
    shared = torch.randn(N, 12, dtype=torch.float64)
    images, texts = (shared + 0.5 * torch.randn(N, 12, dtype=torch.float64) for _ in range(2))
    return images, texts, torch.arange(N) % 6


# --- each library's loss: (outputs, numbers of the rows, classes, rank, world) -> the loss of this rank


def open_clip_loss(out: dict, rows: Tensor, labels: Tensor, rank: int, world: int, **options: bool) -> Tensor:
    return open_clip.ClipLoss(rank=rank, world_size=world, **options)(**out)


def clipkit_sigmoid(out: dict, rows: Tensor, labels: Tensor, rank: int, world: int) -> Tensor:
    image, text = (EmbeddedBatch(out[side], {"row": rows}) for side in ("image_features", "text_features"))
    return sigmoid_loss(image, text, Paired(), out["logit_scale"], torch.tensor(-5.0).double()).loss


def open_clip_siglip(out: dict, rows: Tensor, labels: Tensor, rank: int, world: int) -> Tensor:
    return SigLipLoss(rank=rank, world_size=world)(**out, logit_bias=torch.tensor(-5.0).double())


def transformers_loss(out: dict, rows: Tensor, labels: Tensor, rank: int, world: int) -> Tensor:
    return image_text_contrastive_loss(out["logit_scale"] * out["text_features"] @ out["image_features"].T)


def ranking_loss(out: dict, rows: Tensor, labels: Tensor, rank: int, world: int, gather: bool) -> Tensor:
    loss = MultipleNegativesRankingLoss(
        nn.Identity(),
        scale=10.0,
        gather_across_devices=gather,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    return loss.compute_loss_from_embeddings([out["image_features"], out["text_features"]], labels)


def supcon(out: dict, rows: Tensor, labels: Tensor, rank: int, world: int, efficient: bool) -> Tensor:
    loss = SupConLoss(temperature=0.1)
    both = torch.cat([out["image_features"], out["text_features"]])
    if world > 1:
        loss = DistributedLossWrapper(loss, efficient=efficient)
    return loss(both, torch.cat([labels, labels]))


def clipkit_loss(out: dict, rows: Tensor, labels: Tensor, rank: int, world: int, group: bool = False) -> Tensor:
    keys = {"row": rows, "class": labels}
    image, text = (EmbeddedBatch(out[side], keys) for side in ("image_features", "text_features"))
    return info_nce(image, text, SameGroup("class") if group else Paired(), out["logit_scale"]).loss


OVER_RANKS: dict[str, Callable[..., Tensor]] = {
    "clipkit": clipkit_loss,
    "clipkit, uneven ranks": clipkit_loss,
    "clipkit, shared classes": partial(clipkit_loss, group=True),
    "clipkit, sigmoid": clipkit_sigmoid,
    "open_clip, as it is by default": open_clip_loss,
    "open_clip --gather-with-grad": partial(open_clip_loss, gather_with_grad=True),
    "open_clip --local-loss": partial(open_clip_loss, local_loss=True),
    "open_clip --local-loss --gather-with-grad": partial(open_clip_loss, local_loss=True, gather_with_grad=True),
    "open_clip SigLipLoss": open_clip_siglip,
    "transformers (run_clip: each rank its own negatives)": transformers_loss,
    "sentence-transformers, as it is by default": partial(ranking_loss, gather=False),
    "sentence-transformers gather_across_devices": partial(ranking_loss, gather=True),
    "pytorch-metric-learning SupCon": partial(supcon, efficient=False),
    "pytorch-metric-learning SupCon efficient": partial(supcon, efficient=True),
}


# --- chunks in one process: (encoders, images, texts, classes) to gradients, compared with one big step


def big_step(encoders: Encoders, images: Tensor, texts: Tensor, passes: int, by_column: bool) -> None:
    """Run the batch in one graph, with the dropout masks that chunks draw in their pass number `passes`.

    Args:
        encoders, images, texts: as for each chunked step.
        passes: how often the chunked step encodes each chunk.
        by_column: encode all chunks of images before the texts, so that the images draw their masks first.
    """
    image_chunks, text_chunks = images.chunk(CHUNKS), texts.chunk(CHUNKS)
    for _ in range(passes):
        if by_column:
            image = [encoders.image(chunk) for chunk in image_chunks]
            text = [encoders.text(chunk) for chunk in text_chunks]
        else:
            image, text = [], []
            for image_chunk, text_chunk in zip(image_chunks, text_chunks, strict=True):
                image.append(encoders.image(image_chunk))
                text.append(encoders.text(text_chunk))
    image_features, text_features = (F.normalize(torch.cat(encoded), dim=-1) for encoded in (image, text))
    open_clip.ClipLoss()(image_features, text_features, encoders.logit_scale.exp()).backward()


def open_clip_accumulation(encoders: Encoders, images: Tensor, texts: Tensor) -> None:
    """Run open_clip's own training loop with --accum-freq."""
    parts = list(zip(images.chunk(CHUNKS), texts.chunk(CHUNKS), strict=True))
    settings = {"device": "cpu", "precision": "fp64", "accum_freq": CHUNKS, "skip_scheduler": True, "distill": False}
    settings |= {"grad_clip_norm": None, "horovod": False, "rank": 0, "world_size": 1, "log_every_n_steps": 10**9}
    settings |= {"wandb": False, "batch_size": N // CHUNKS, "trackio": False, "local_rank": 0}
    split = SimpleNamespace(dataloader=_Loader(parts), set_epoch=lambda epoch: None)
    optimizer = torch.optim.SGD(encoders.parameters(), lr=0.0)  # keeps the gradients
    train_one_epoch(
        encoders, {"train": split}, open_clip.ClipLoss(), 0, optimizer, None, None, None, SimpleNamespace(**settings)
    )


class _Loader(list):
    num_batches, num_samples = CHUNKS, N


def sentence_transformers_cached(encoders: Encoders, images: Tensor, texts: Tensor) -> None:
    loss = CachedMultipleNegativesRankingLoss(
        nn.Sequential(Columns(encoders)),
        scale=10.0,
        mini_batch_size=N // CHUNKS,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    loss([{"pixel_values": images}, {"input_ids": texts}], None).backward()


class NamedOutputs(nn.Module):
    """The same encoders with the outputs that clipkit's step reads."""

    def __init__(self, encoders: Encoders) -> None:
        super().__init__()
        self.encoders = encoders

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        image, text, scale = self.encoders(pixel_values, input_ids).values()
        return {"image": image, "text": text, "scale": scale}


def clipkit_cached(encoders: Encoders, images: Tensor, texts: Tensor) -> None:
    rows = RowKeys({"row": torch.arange(N)})
    batch = Batch({"pixel_values": images, "input_ids": texts}, {"image": rows, "text": rows}, N)
    backward(NamedOutputs(encoders), batch, [Paired()], micro_batch=N // CHUNKS)


# --- running them


def gradients(encoders: Encoders) -> dict[str, Tensor]:
    """Return the gradient of each encoder as one vector, and that of the scale if the loss trains it."""
    result = {}
    for modality in ("image", "text"):
        parameters = getattr(encoders, modality).parameters()
        result[modality] = torch.cat([parameter.grad.flatten() for parameter in parameters])
    if encoders.logit_scale.grad is not None:
        result["scale"] = encoders.logit_scale.grad.reshape(1)
    return result


def over_ranks(world: int) -> dict[str, dict[str, Tensor]]:
    """Return the gradients of each loss on `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, _free_port(), folder)
        torch.multiprocessing.start_processes(on_rank, arguments, nprocs=world, start_method="fork")
        by_loss: dict[str, dict[str, Tensor]] = torch.load(Path(folder) / f"{world}.pt")
        return by_loss


def on_rank(rank: int, world: int, port: int, folder: str) -> None:
    """Run every loss on one of several processes; rank 0 saves the gradients of DDP."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.distributed.nn, in the libraries' code
    in_one_process = one_process()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    images, texts, labels = data()
    by_loss = {}
    for name, loss in OVER_RANKS.items():
        rows = torch.arange(N).split(UNEVEN[world] if "uneven" in name else N // world)[rank]
        unused = "scale" not in in_one_process[name]
        by_loss[name] = one_step(loss, images, texts, labels, rows, rank, world, has_unused_parameters=unused)
    if rank == 0:
        torch.save(by_loss, Path(folder) / f"{world}.pt")
    dist.destroy_process_group()


def one_process() -> dict[str, dict[str, Tensor]]:
    """Return the gradients of the whole batch, by each loss."""
    return {name: one_step(loss, *data(), torch.arange(N)) for name, loss in OVER_RANKS.items()}


def one_step(
    loss: Callable[..., Tensor],
    images: Tensor,
    texts: Tensor,
    labels: Tensor,
    rows: Tensor,
    rank: int = 0,
    world: int = 1,
    has_unused_parameters: bool = False,
) -> dict[str, Tensor]:
    """Return the gradients after a step with this rank's `rows`."""
    encoders = Encoders()
    model: nn.Module = encoders
    if world > 1:
        model = DistributedDataParallel(encoders, find_unused_parameters=has_unused_parameters)
    loss(model(images[rows], texts[rows]), rows, labels[rows], rank, world).backward()
    return gradients(encoders)


def in_chunks(
    step: Callable[..., None], passes: int, by_column: bool, dropout: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of `step`, and those of the big batch with the same dropout masks."""
    images, texts, _ = data()

    def run(function: Callable[..., None]) -> dict[str, Tensor]:
        encoders = Encoders(dropout).train()
        torch.manual_seed(2)
        function(encoders, images, texts)
        return gradients(encoders)

    return run(step), run(partial(big_step, passes=passes, by_column=by_column))


def row(name: str, launch: str, measured: dict[str, Tensor], big: dict[str, Tensor]) -> str:
    """Return a row of the table: the measured gradients beside those of the big batch."""
    cells = [name, launch]
    for part in ("image", "text", "scale"):
        if part not in measured or part not in big:
            cells.append("not trained")
        elif part == "scale":
            cells.append(f"{float(measured[part] / big[part]):.3f}")
        else:
            ratio = float(measured[part].norm() / big[part].norm())
            cosine = float(F.cosine_similarity(measured[part], big[part], dim=0))
            cells.append(f"{ratio:.3f} / {cosine:.3f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=sorted(UNEVEN), help="processes")
    parser.add_argument("--to", type=Path, help="Markdown file for the table")
    options = parser.parse_args()

    lines = ["| loss | run as | image encoder | text encoder | logit scale |", "|---|---|---|---|---|"]
    by_world = {world: over_ranks(world) for world in options.ranks}  # forks, so before autograd starts threads here
    big = one_process()
    for world, by_loss in by_world.items():
        lines += [row(name, f"{world} ranks", measured, big[name]) for name, measured in by_loss.items()]

    chunked: dict[str, tuple] = {  # the step, the passes and the order of its encoding
        "clipkit micro_batch": (clipkit_cached, 1, False),
        "open_clip --accum-freq": (open_clip_accumulation, 2, False),
        "sentence-transformers, cached": (sentence_transformers_cached, 1, True),
    }
    for dropout in (0.0, 0.1):
        launch = f"{CHUNKS} chunks, dropout {dropout}" if dropout else f"{CHUNKS} chunks"
        for name, (step, passes, by_column) in chunked.items():
            measured, whole = in_chunks(step, passes, by_column, dropout)
            lines.append(row(name, launch, measured, whole))

    table = "\n".join(lines) + "\n"
    print(table)
    if options.to:
        options.to.write_text(table, encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
