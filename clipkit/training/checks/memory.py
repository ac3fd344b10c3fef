"""What a training step needs, and what to change where it does not fit: said, never done silently."""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clipkit.data.batches.batch import Batch
from clipkit.errors import ResourceError, option
from clipkit.training.config.train import TrainConfig
from clipkit.training.heads import ModelWithHeads
from clipkit.training.step import outputs

_PROBED = (2, 4)  # samples: what they differ by is what two of them need


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        weights: of the model, with buffers.
        training: gradients and AdamW's two moments of what is trained.
        held: what of `training` was there when memory ran out.
        sample: activations of one sample with all its views and captions, kept for the backward pass.
        checkpointed: the same with gradient checkpointing; None where the model cannot or does already.
        free: there is without the step's activations and gradients; None where the system does not tell.
        lora: whether the model is adapted already.
    """

    weights: int
    training: int
    held: int
    sample: float
    checkpointed: float | None
    free: int | None
    lora: bool = False

    def chunk(self, sample: float) -> int:
        """The largest power of two of samples that would fit; 0: none."""
        # a tenth for what no one counts
        room = 0 if self.free is None else 0.9 * self.free - (self.training - self.held)
        return 0 if room < sample else 1 << (int(room / sample).bit_length() - 1)


@contextmanager
def explain_out_of_memory(
    learner: ModelWithHeads, batch: Batch, config: TrainConfig, optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Turns running out of memory into a ResourceError that says what the step needed and what would fit.

    Args:
        learner: that is trained.
        batch: of the step.
        config: of the loop.
        optimizer: of the run; holds its moments after the first step.
    """
    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        message = str(error).partition("\n")[0]
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
    learner.zero_grad(set_to_none=True)
    if learner.model.device.type == "cuda":
        torch.cuda.empty_cache()
    raise advice(_measured(learner, batch, optimizer), len(batch), config, message)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no more memory: torch has no one class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory"))


def advice(needs: MemoryEstimate | None, rows: int, config: TrainConfig, cause: str) -> ResourceError:
    """The error, with the ways out that would fit; the global batch is not one of them."""
    chunk = rows if config.micro_batch is None else min(rows, config.micro_batch)
    same = f"the gradients, and the {config.batch_size} pairs of the global batch, stay what they are"
    if needs is None:
        fix = f"{option('micro_batch', max(1, chunk // 2))} or less ({same}), gradient checkpointing, or LoRA"
        return ResourceError(f"the training step ran out of memory ({cause})", where=f"{chunk} samples", fix=fix)
    total = needs.training + chunk * needs.sample
    free = "" if needs.free is None else f", and {_gb(needs.free)} were free"
    message = (
        f"the training step ran out of memory: beside {_gb(needs.weights)} of weights it needs about {_gb(total)} "
        f"({_gb(needs.training)} of gradients and optimizer, {chunk} samples of {_gb(needs.sample)}){free}"
    )
    return ResourceError(message, where=cause, fix=_ways(needs, chunk, same, config.precision))


def _ways(needs: MemoryEstimate, chunk: int, same: str, precision: str) -> str:
    ways = []
    fits = min(needs.chunk(needs.sample), chunk // 2)
    if fits:
        about = _gb(needs.training + fits * needs.sample)
        ways.append(f"{option('micro_batch', fits)}: about {about}, for one more forward pass; {same}")
    if needs.checkpointed is not None:
        total = needs.training + chunk * needs.checkpointed
        fits = min(needs.chunk(needs.checkpointed), chunk)
        small = (
            ""
            if fits >= chunk
            else f", and fits with {option('micro_batch', fits)}"
            if fits
            else ", which is still too much"
        )
        way = option("model.gradient_checkpointing", True, python="model.gradient_checkpointing()")
        ways.append(f"gradient checkpointing ({way}): about {_gb(total)}{small}")
    lean = replace(needs, training=needs.training // 100, held=needs.held // 100, free=(needs.free or 0) + needs.held)
    if not needs.lora and (fits := min(lean.chunk(needs.sample), chunk)):
        with_chunk = "" if fits >= chunk else f" with {option('micro_batch', fits)}"
        way = option("model.lora", "{}", python="model.add_lora()")
        ways.append(f"LoRA ({way}): hardly any gradients and moments, fits{with_chunk}")
    if precision == "fp32":
        ways.append(f"{option('precision', 'bf16')} on a device that has it: about half of the activations")
    return "; ".join(ways) or "nothing of micro_batch, gradient checkpointing and LoRA is enough: take a smaller model"


def _measured(learner: ModelWithHeads, batch: Batch, optimizer: torch.optim.Optimizer) -> MemoryEstimate | None:
    """None where there is not even room to measure."""
    weights = sum(each.numel() * each.element_size() for each in [*learner.parameters(), *learner.buffers()])
    trained = sum(each.numel() * each.element_size() for each in learner.parameters() if each.requires_grad)
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    held = sum(each.numel() * each.element_size() for each in moments)
    free = _free(learner.model.device)
    with contextlib.suppress(Exception):  # this is advice: whatever fails in it must not hide what it is about
        sample, checkpointed = _sample(learner, batch), None
        with contextlib.suppress(Exception):
            other = copy.deepcopy(learner)
            other.model.gradient_checkpointing()
            found = _sample(other, batch)
            checkpointed = found if found < 0.9 * sample else None
        return MemoryEstimate(weights, 3 * trained, held, sample, checkpointed, free, learner.model.lora is not None)
    return None


def _sample(learner: ModelWithHeads, batch: Batch) -> float:
    """Bytes that the backward pass of one more sample keeps."""
    few, more = (_kept(learner, batch, count) for count in _PROBED)
    return max(1.0, (more - few) / (_PROBED[1] - _PROBED[0]))


def _kept(learner: ModelWithHeads, batch: Batch, count: int) -> int:
    seen: dict[int, int] = {}
    own = {each.untyped_storage().data_ptr() for each in learner.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    part = {name: each[: -(-len(each) * count // len(batch))] for name, each in batch.inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = outputs(learner(**part))
    return sum(seen.values()) if found else 0


def _free(device: torch.device) -> int | None:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            found.append(limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found)) if found else None


def _gb(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
