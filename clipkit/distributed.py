"""Every collective of clipkit. All of them are no-ops in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.errors import ClipkitError, UsageError, option

T = TypeVar("T")


def initialised() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if initialised() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if initialised() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def all_gather_object(value: T) -> list[T]:
    """Every process's `value`, in order of rank. Values are pickled: keep them small."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def together(work: Callable[[], T]) -> list[T]:
    """Every process's result. If one fails all raise, where they would otherwise wait for it for ever."""
    if world_size() == 1:
        return [work()]
    result: T | None = None
    error: ClipkitError | None = None
    try:
        result = work()
    except ClipkitError as own:
        error = own
    except Exception as own:
        error = ClipkitError(f"rank {rank()}: {type(own).__name__}: {own}")
        error.__cause__ = own
    shares = all_gather_object((result, error))
    for _, failure in shares:
        if failure is not None:
            raise error or failure
    return [share for share, _ in shares]  # type: ignore[misc]


def on_main(work: Callable[[], T]) -> T:
    """Rank 0's result of `work`, on every process; what fails there is raised everywhere."""
    return together(lambda: work() if is_main() else None)[0]  # type: ignore[return-value]


@contextmanager
def lost_processes() -> Iterator[None]:
    """Raise a plain error where a collective ends because another process is gone.

    Gloo notices a closed connection at once; a process that hangs is noticed by the time-out of the group.
    """
    try:
        yield
    except (dist.DistBackendError, dist.DistNetworkError, RuntimeError) as error:
        if world_size() == 1 or not any(word in str(error) for word in _LOST):
            raise
        raise ClipkitError(
            f"another process of this run is gone; rank {rank()} of {world_size()} cannot go on alone",
            fix=f"see what ended it; {option('resume', 'auto')} goes on from the last checkpoint",
        ) from error


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "imed out", "remote process exited")


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes through the block first, then the others: for caches that one process fills."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()  # also after an error, or the others wait for ever


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every process's `values`, of one shape; without gradient."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_ranks(values: Tensor) -> Tensor:
    """The highest of every process's `values`, of one shape; without gradient."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values, operation)
    return values


def rows_before(count: int) -> int:
    """How many rows the processes of lower rank hold, where this one holds `count`."""
    return sum(all_gather_object(count)[: rank()])


def gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """The rows of all processes, in order of rank; lengths may differ, an empty one included.

    Gradients flow back to the process that owns a row, summed over all processes that used it
    (the exact adjoint of a gather, so that DDP's mean over ranks of ``world_size x local loss``
    is the gradient of the one-process loss).

    Args:
        rows: (n_local, ...), the same trailing shape and dtype on every process.
        counts: the `n_local` of every process, where it is known already.

    Returns:
        (sum of n_local, ...).
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, counts or all_gather_object(len(rows)))
    return gathered


class _GatherRows(torch.autograd.Function):
    # Padded to the longest: gloo's all_gather returns garbage for uneven lengths, without an error.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        start = sum(ctx.counts[: rank()])
        return grad[start : start + ctx.counts[rank()]], None


def start() -> torch.device:
    """Join the processes that a launcher started, through Accelerate; the device of this one.

    Needed once before anything that shares work over ranks; harmless in one process.

    Raises:
        UsageError: the launcher announced more processes than Accelerate found, which would otherwise
            be unconnected runs that overwrite each other.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced > 1 and state.num_processes != announced:
        raise UsageError(
            f"the launcher announced {announced} processes (WORLD_SIZE), Accelerate joined {state.num_processes}",
            fix="start with `torchrun --nproc_per_node N PROGRAM` or an `accelerate config` of several processes",
        )
    device: torch.device = state.device
    return device
