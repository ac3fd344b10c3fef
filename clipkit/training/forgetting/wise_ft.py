"""The straight line between the weights before and after training; the model takes the weights of any point on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit import distributed
from clipkit.errors import CorruptArtefact, UsageError
from clipkit.files import publish, sha256_file
from clipkit.models.adapting.lora import MARK, UPDATE
from clipkit.models.averaging import weighted_sum
from clipkit.models.dual_encoder import DualEncoder


class WeightInterpolation:
    """Sets a model to (1 - alpha) * start + alpha * tuned, for any alpha (WiSE-FT, Wortsman et al. 2022).

    The trained weights and the floating buffers are interpolated. These are not:

    * frozen weights, which are the same at both ends;
    * weights that began at random (`model.fresh`), because they have no start to go back to: they stay as trained;
    * the matrices A of LoRA. Its update is scale * B A and begins at B = 0, so that scaling only B by alpha gives the
      line between the merged models.

    Args:
        model: without a wrapper of DDP; `save_start` saves its start.
        path: the file for the start, in the run's folder; it is saved once, and not in every checkpoint.

    Raises:
        UsageError: all that is trained began at random.
    """

    def __init__(self, model: DualEncoder, path: Path) -> None:
        self.model, self.path = model, path
        self.sha256: str | None = None
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        fresh = model.fresh
        self.names = sorted(name for name in trained if name not in fresh or UPDATE in name)
        self.fresh = sorted(name for name in trained & fresh if MARK not in name)  # not interpolated
        if not self.names:
            raise UsageError(
                "all that is trained began at random, so there is nothing that could be forgotten",
                where="forget_budget",
                fix="leave it out, or start from a pretrained model",
            )
        self.names += sorted(name for name, buffer in model.named_buffers() if buffer.is_floating_point())
        self.ends: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def save_start(self) -> None:
        """Write the start, bit for bit, before the first step.

        Raises:
            UsageError: LoRA that was trained before: its update does not begin at 0.
        """
        weights = self._weights()
        trained_before = [name for name, weight in weights.items() if UPDATE in name and bool(weight.any())]
        if trained_before:
            raise UsageError(
                "this LoRA was trained before, so that scaling its update does not lead back to the start",
                where=trained_before[0],
                fix="model.merge_lora(), then model.add_lora(…) anew",
            )
        tensors = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}

        def write() -> str:
            publish(self.path, lambda fresh: save_file(tensors, fresh), replace=True)
            return sha256_file(self.path)

        self.sha256 = distributed.on_main(write)

    def check(self) -> None:
        """Check on rank 0 that the file is the one that `save_start` wrote.

        Raises:
            CorruptArtefact: it is another one, or there is none.
        """
        distributed.on_main(self._check)

    def load_ends(self) -> None:
        """Load the start from its file as one end; the model's current weights are the other."""
        self.check()
        start: list[Mapping[str, Tensor]] = []
        distributed.together(lambda: start.append(self._read()))
        tuned = {name: weight.detach().cpu().clone() for name, weight in self._weights().items()}
        moved = [name for name, weight in tuned.items() if not weight.equal(start[0][name])]
        self.ends = {name: start[0][name] for name in moved}, {name: tuned[name] for name in moved}

    def set_alpha(self, alpha: float) -> None:
        """Set the weights to those at `alpha`: 0 is the start, 1 the tuned model; at both ends bit for bit."""
        assert self.ends is not None
        start, tuned = self.ends
        weights = self._weights()
        with torch.no_grad():
            for name in start:
                if alpha == 0:
                    value = start[name]
                elif alpha == 1:
                    value = tuned[name]
                else:
                    value = weighted_sum([start[name], tuned[name]], [1 - alpha, alpha])
                weights[name].copy_(value)

    def _weights(self) -> dict[str, Tensor]:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: tensors[name] for name in self.names}

    def _check(self) -> None:
        if not self.path.is_file() or sha256_file(self.path) != self.sha256:
            state = "another file (its SHA-256 differs)" if self.path.is_file() else "none"
            raise CorruptArtefact(
                f"expected the weights before training, as the run wrote them at its start; found {state}",
                where=self.path,
                fix="restore the file from a copy: without it the guardrail cannot lead back to the start",
            )

    def _read(self) -> dict[str, Tensor]:
        try:
            return dict(load_file(self.path))
        except (OSError, SafetensorError) as error:
            raise CorruptArtefact(f"the weights before training cannot be read: {error}", where=self.path) from error
