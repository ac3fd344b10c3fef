"""The straight line between what a model was before training and what training made of it, walked in place."""

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
    """The models (1 - alpha) * start + alpha * tuned (WiSE-FT, Wortsman et al. 2022), one at a time, in the model.

    On the line are the trained weights and the floating buffers. What is not:

    * frozen weights, which are the same at both ends;
    * weights that began at random (`model.fresh`), for there is nothing to go back to: they stay as trained;
    * of LoRA the matrices A. Its update is scale * B A and begins at B = 0, so that B alone is scaled by alpha, which
      is the line between the merged models.

    Args:
        model: without a wrapper of DDP; its start is kept by `save_start`.
        path: the file for the start, in the run's folder; it stands there once, and not in every checkpoint.

    Raises:
        UsageError: all that is trained began at random.
    """

    def __init__(self, model: DualEncoder, path: Path) -> None:
        self.model, self.path = model, path
        self.sha256: str | None = None
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        fresh = model.fresh
        self.names = sorted(name for name in trained if name not in fresh or UPDATE in name)
        self.fresh = sorted(name for name in trained & fresh if MARK not in name)  # that is not on the line
        if not self.names:
            raise UsageError(
                "all that is trained began at random, so there is nothing that could be forgotten",
                where="forget_budget",
                fix="leave it out, or start from a pretrained model",
            )
        self.names += sorted(name for name, each in model.named_buffers() if each.is_floating_point())
        self.ends: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def save_start(self) -> None:
        """Write the start, bit for bit, before the first step.

        Raises:
            UsageError: LoRA that was trained before: its update does not begin at 0.
        """
        moved = [name for name, each in self._own().items() if UPDATE in name and bool(each.any())]
        if moved:
            raise UsageError(
                "this LoRA was trained before, so that scaling its update does not lead back to the start",
                where=moved[0],
                fix="model.merge_lora(), then model.add_lora(…) anew",
            )
        tensors = {name: each.detach().cpu().clone().contiguous() for name, each in self._own().items()}

        def write() -> str:
            publish(self.path, lambda fresh: save_file(tensors, fresh), replace=True)
            return sha256_file(self.path)

        self.sha256 = distributed.on_main(write)

    def check(self) -> None:
        """See that the start is still what `save_start` wrote, on rank 0.

        Raises:
            CorruptArtefact: it is not, or it is gone.
        """
        distributed.on_main(self._check)

    def load_ends(self) -> None:
        """Take the start from its file and the model as it stands as the two ends."""
        self.check()
        start: list[Mapping[str, Tensor]] = []
        distributed.together(lambda: start.append(self._read()))
        tuned = {name: each.detach().cpu().clone() for name, each in self._own().items()}
        moved = [name for name, each in tuned.items() if not each.equal(start[0][name])]
        self.ends = {name: start[0][name] for name in moved}, {name: tuned[name] for name in moved}

    def set_alpha(self, alpha: float) -> None:
        """Make the model the one at `alpha`: from 0, the start, to 1, the tuned one; at both ends to the bit."""
        assert self.ends is not None
        start, tuned = self.ends
        ends = {0.0: start, 1.0: tuned}
        with torch.no_grad():
            own = self._own()
            for name in start:
                pair = [start[name], tuned[name]]
                own[name].copy_(ends[alpha][name] if alpha in ends else weighted_sum(pair, [1 - alpha, alpha]))

    def _own(self) -> dict[str, Tensor]:
        found = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: found[name] for name in self.names}

    def _check(self) -> None:
        if not self.path.is_file() or sha256_file(self.path) != self.sha256:
            found = "another one (its SHA-256 differs)" if self.path.is_file() else "none"
            raise CorruptArtefact(
                f"expected the weights before training, as the run wrote them at its start; found {found}",
                where=self.path,
                fix="restore the file from a copy: without it the guardrail cannot lead back to the start",
            )

    def _read(self) -> dict[str, Tensor]:
        try:
            return dict(load_file(self.path))
        except (OSError, SafetensorError) as error:
            raise CorruptArtefact(f"the weights before training cannot be read: {error}", where=self.path) from error
