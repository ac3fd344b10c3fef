"""The memory that a training step needs, and advice if it does not fit; no setting is changed silently."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import resource
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clipkit.data.batches.batch import Batch
from clipkit.errors import ResourceError, option
from clipkit.models.allocator import give_back_freed_memory
from clipkit.training.config.train import TrainConfig
from clipkit.training.heads import ModelWithHeads
from clipkit.training.step import outputs

_FEW, _MORE = 2, 4  # samples of the two measurements; their difference is what one more sample needs


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        weights: of the model, with buffers.
        training: gradients and AdamW's two moments of the trained weights.
        allocated: the part of `training` that was already allocated when memory ran out.
        sample: activations of one sample with all its views and captions, kept for the backward pass.
        checkpointed: the same with gradient checkpointing; None if the model does not support it or uses it already.
        free: free memory without the step's activations and gradients; None if the system does not tell.
        lora: whether the model has LoRA already.
    """

    weights: int
    training: int
    allocated: int
    sample: float
    checkpointed: float | None
    free: int | None
    lora: bool = False

    def chunk(self, sample: float) -> int:
        """Return the largest power of two of samples that would fit, of so many bytes each; 0: none."""
        if self.free is None:
            return 0
        # a tenth is left for what the estimate does not count
        room = 0.9 * self.free - (self.training - self.allocated)
        if room < sample:
            return 0
        return 1 << (int(room / sample).bit_length() - 1)


@contextmanager
def explain_out_of_memory(
    learner: ModelWithHeads, batch: Batch, config: TrainConfig, optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Turn an out-of-memory error into a ResourceError that says what the step needed and what would fit.

    Args:
        learner: the model that is trained.
        batch: of the step.
        config: of the loop.
        optimizer: of the run; it has its moments from the first step on.
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
    """Whether an error says that memory ran out: torch has several classes for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory"))


def advice(needs: MemoryEstimate | None, rows: int, config: TrainConfig, cause: str) -> ResourceError:
    """Return the error with settings that would fit; a smaller global batch is never among them.

    Args:
        needs: the estimate; None if there was no memory to make one.
        rows: of this rank's part of the batch.
        config: of the loop.
        cause: message of the original error.
    """
    chunk = rows if config.micro_batch is None else min(rows, config.micro_batch)
    same = f"the gradients, and the {config.batch_size} pairs of the global batch, stay what they are"
    if needs is None:
        fix = f"{option('micro_batch', max(1, chunk // 2))} or less ({same}), gradient checkpointing, or LoRA"
        return ResourceError(f"the training step ran out of memory ({cause})", where=f"{chunk} samples", fix=fix)
    total = needs.training + chunk * needs.sample
    free = "" if needs.free is None else f", and {_gb(needs.free)} were free"
    message = (
        f"the training step ran out of memory: besides {_gb(needs.weights)} of weights it needs about {_gb(total)} "
        f"({_gb(needs.training)} of gradients and optimizer, {chunk} samples of {_gb(needs.sample)}){free}"
    )
    return ResourceError(message, where=cause, fix=_advised_settings(needs, chunk, same, config.precision))


def _advised_settings(needs: MemoryEstimate, chunk: int, same: str, precision: str) -> str:
    settings = []
    fits = min(needs.chunk(needs.sample), chunk // 2)
    if fits:
        total = _gb(needs.training + fits * needs.sample)
        settings.append(f"{option('micro_batch', fits)}: about {total}, for one more forward pass; {same}")
    if needs.checkpointed is not None:
        settings.append(_advise_checkpointing(needs, needs.checkpointed, chunk))
    if not needs.lora:
        # LoRA needs hardly any gradients and moments; the memory of those that are allocated becomes free
        with_lora = replace(
            needs,
            training=needs.training // 100,
            allocated=needs.allocated // 100,
            free=(needs.free or 0) + needs.allocated,
        )
        fits = min(with_lora.chunk(needs.sample), chunk)
        if fits:
            with_chunk = "" if fits >= chunk else f" with {option('micro_batch', fits)}"
            setting = option("model.lora", "{}", python="model.add_lora()")
            settings.append(f"LoRA ({setting}): hardly any gradients and moments, fits{with_chunk}")
    if precision == "fp32":
        settings.append(f"{option('precision', 'bf16')} on a device that has it: about half of the activations")
    if not settings:
        return "micro_batch, gradient checkpointing and LoRA are not enough: take a smaller model"
    return "; ".join(settings)


def _advise_checkpointing(needs: MemoryEstimate, sample: float, chunk: int) -> str:
    fits = min(needs.chunk(sample), chunk)
    if fits >= chunk:
        limit = ""
    elif fits:
        limit = f", and fits with {option('micro_batch', fits)}"
    else:
        limit = ", which is still too much"
    setting = option("model.gradient_checkpointing", True, python="model.gradient_checkpointing()")
    return f"gradient checkpointing ({setting}): about {_gb(needs.training + chunk * sample)}{limit}"


def _measured(learner: ModelWithHeads, batch: Batch, optimizer: torch.optim.Optimizer) -> MemoryEstimate | None:
    """Return the estimate; None if there is not even the memory to measure."""
    parameters = list(learner.parameters())
    weights = _bytes([*parameters, *learner.buffers()])
    trained = _bytes([parameter for parameter in parameters if parameter.requires_grad])
    state_values = [value for state in optimizer.state.values() for value in state.values()]
    allocated = _bytes([value for value in state_values if isinstance(value, Tensor)])
    free = _free(learner.model.device)
    with contextlib.suppress(Exception):  # an error in the advice must not hide the error that it is about
        sample = _sample(learner, batch)
        checkpointed = _checkpointed_sample(learner, batch, sample)
        has_lora = learner.model.lora is not None
        return MemoryEstimate(weights, 3 * trained, allocated, sample, checkpointed, free, has_lora)
    return None


def _checkpointed_sample(learner: ModelWithHeads, batch: Batch, sample: float) -> float | None:
    """Return the bytes of one sample with gradient checkpointing; None if it cannot be used or saves little."""
    with contextlib.suppress(Exception):
        checkpointing = copy.deepcopy(learner)
        checkpointing.model.gradient_checkpointing()
        checkpointed = _sample(checkpointing, batch)
        return checkpointed if checkpointed < 0.9 * sample else None
    return None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sample(learner: ModelWithHeads, batch: Batch) -> float:
    """Return the bytes that one more sample keeps for the backward pass."""
    few, more = _kept(learner, batch, _FEW), _kept(learner, batch, _MORE)
    return max(1.0, (more - few) / (_MORE - _FEW))


def _kept(learner: ModelWithHeads, batch: Batch, count: int) -> int:
    """Return the bytes that `count` samples keep for the backward pass, weights excluded."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in learner.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    part = {name: rows[: math.ceil(len(rows) * count / len(batch))] for name, rows in batch.inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = outputs(learner(**part))  # its storages must live until they are counted, or addresses come twice
    return sum(kept.values()) if graph else 0


def _free(device: torch.device) -> int | None:
    """Return the bytes that this process may still allocate; None if the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    give_back_freed_memory()
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                limits.append(1024 * int(line.split()[1]))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limits.append(limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits)) if limits else None


def _gb(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
