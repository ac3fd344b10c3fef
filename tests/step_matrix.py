"""Every case of the matrix on this many ranks: how far each is from the float64 big batch.

    torchrun --nproc_per_node 2 tests/step_matrix.py errors.json [case …] [mode …]

writes the errors to a file; `runs.on_ranks` returns them without starting an interpreter for each rank. For each bug
that is named, one case is measured with the engine broken that way.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from functools import partial, partialmethod
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from step_cases import CASES, CUTS, MICRO, N, batch, gradients, learner, reference
from torch.nn.parallel import DistributedDataParallel

from clipkit import distributed
from clipkit.losses import softmax
from clipkit.training import step
from clipkit.training.step import LossConfig, backward

MODES = {"plain": (None, None), "tiled": (5, None), "cached": (None, MICRO), "tiled+cached": (4, MICRO)}
BUGS = {  # measured in other libraries -> the case that has to see it
    "1/W": "paired",
    "scale x K": "paired",
    "gather without gradient": "paired",
    "mean per rank": "paired",
    "no RNG replay": "dropout",
}


def measure(name, loss, mode, precision):
    """Loss and gradients of the global batch, as this launch gives them."""
    cuts, rank = CUTS[distributed.world_size()], distributed.rank()
    case, model = CASES[name], learner(name, loss)
    if precision == "bf16":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as Accelerate does
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    tile, micro = MODES[mode]
    contrast = LossConfig(loss, label_smoothing=case.smoothing, matryoshka=case.dims, tile=tile)
    torch.manual_seed(rank)
    loss_value = backward(wrapped, batch(name, sum(cuts[:rank]), cuts[rank]), case.similar, contrast, micro_batch=micro)
    return {"loss": distributed.sum_over_ranks(loss_value.loss) / len(cuts), **gradients(model)}


@functools.cache
def expected(name, loss, micro):
    return reference(name, loss, distributed.world_size(), micro)


def error(name, loss, mode, precision):
    micro = MODES[mode][1] if CASES[name].dropout else None  # nothing but dropout depends on the chunks
    return distances(measure(name, loss, mode, precision), expected(name, loss, micro))


def distances(measured, expected):
    """Relative errors, and for the encoders the cosine and the ratio of norms."""
    result = {}
    for name, value in expected.items():
        result[name] = float((measured[name].double() - value).norm() / value.norm())
    ours, theirs = measured["encoders"], expected["encoders"]
    ratio = float(ours.norm() / theirs.norm())
    return result | {"cosine": float(ours @ theirs / ours.norm() / theirs.norm()), "ratio": ratio}


def sabotage(bug):
    """The engine with a bug that was measured in other libraries, while the block runs."""
    if bug == "1/W":
        return patch.object(softmax, "distributed", _One())
    if bug == "scale x K":
        cut = step._split_gradients
        return patch.object(
            step, "_split_gradients", lambda leaves, seen: [e | step._scalar_grads(leaves) for e in cut(leaves, seen)]
        )
    if bug == "gather without gradient":
        return patch.object(distributed, "gather_rows", partial(_own_slot_only, distributed.gather_rows))
    if bug == "mean per rank":
        return patch.object(softmax.RunningSums, "finish", partialmethod(_per_rank, softmax.RunningSums.finish))
    if bug == "no RNG replay":
        return patch.object(step, "_set_random_state", lambda *_: None)
    raise ValueError(bug)


def _own_slot_only(gather, rows, counts):
    gathered, start = gather(rows.detach()), distributed.rows_before(len(rows))
    return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])


def _per_rank(self, finish, weight, total, smoothing):
    own = CUTS[distributed.world_size()][distributed.rank()]
    finish(self, weight, total if len(weight) == N else total * 0 + own * distributed.world_size(), smoothing)


class _One:
    """`distributed`, with a world of one wherever the loss multiplies by its size."""

    def __getattr__(self, name):
        return (lambda: 1) if name == "world_size" else getattr(distributed, name)


def errors(cases=CASES, modes=MODES, bugs=()):
    """How far each case is from float64, by its name; and how far a case is with each bug."""
    torch.set_num_threads(1)
    by_case = {}
    for name, loss, precision, mode in itertools.product(cases, ("info_nce", "sigmoid"), ("fp32", "bf16"), modes):
        by_case[f"{loss} {name} {precision} {mode}"] = error(name, loss, mode, precision)
    for bug in bugs:
        with sabotage(bug):
            by_case[bug] = error(BUGS[bug], "info_nce", "cached", "fp32")
    return by_case


def main(out, *names):
    dist.init_process_group("gloo")
    cases = [name for name in names if name in CASES] or list(CASES)
    modes = [name for name in names if name in MODES] or list(MODES)
    by_case = errors(cases, modes)
    if distributed.is_main():
        Path(out).write_text(json.dumps(by_case))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
