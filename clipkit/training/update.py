"""One update of the weights from one global batch."""

from __future__ import annotations

import math

import torch
from torch import nn

from clipkit import distributed
from clipkit.data.batches.batch import Batch
from clipkit.data.batches.plan import hash64
from clipkit.losses.contrastive import Loss
from clipkit.training.checkpoints.non_finite import NonFinite
from clipkit.training.checks.memory import explain_out_of_memory
from clipkit.training.ema import EMA
from clipkit.training.optimizer import clip_gradients, schedule
from clipkit.training.setup import TrainSetup
from clipkit.training.step import backward, mean_over_ranks


class Updater:
    """Takes the steps of a run: random state, learning rate, gradients, clipping, AdamW, moving average.

    Args:
        setup: of the run.
        wrapped: the model with its heads, as Accelerate wrapped it.
        optimizer: as Accelerate wrapped it.
        average: moving average of the weights; None: none.
        nonfinite: counts the steps that are not applied.
    """

    def __init__(
        self,
        setup: TrainSetup,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: EMA | None,
        nonfinite: NonFinite,
    ) -> None:
        self.setup, self.config, self.accelerator = setup, setup.config, setup.accelerator
        self.model, self.learner, self.wrapped = setup.model, setup.learner, wrapped
        self.optimizer, self.average, self.nonfinite = optimizer, average, nonfinite
        self.scaler = getattr(self.accelerator, "scaler", None)
        # the logit scale of a loaded model may already be above 100
        self.max_logit_scale = max(math.log(100), float(self.model.logit_scale.detach()))

    def warm_up_ddp(self) -> None:
        """Let DDP arrange its buckets before the first step.

        It arranges them anew after the first backward pass, and the last bits of a sum over three or more ranks depend
        on where a gradient lies in its bucket: without this a resumed run would begin with other buckets.
        """
        if distributed.world_size() < 3:
            return
        self._backward(self.setup.first_batch().to(self.accelerator.device))
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, step: int, batch: Batch) -> tuple[Loss, float]:
        """Update the weights, unless loss or gradient are not finite.

        Args:
            step: number of the step, from 1.
            batch: this rank's part of the global batch, on the device.

        Returns:
            The loss, as the mean over ranks, and the norm of the gradient before clipping.

        Raises:
            ResourceError: the step ran out of memory; says what would fit.
            ClipkitError: more steps than `skip_nonfinite` allows were not finite.
        """
        config = self.config
        torch.manual_seed(hash64(config.seed, step, distributed.rank()) >> 1)
        factor = schedule(step - 1, self.setup.total, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        # Here, not after the update: memory that is freed here is used again at once; otherwise malloc would give it
        # back to the system and ask for it again page by page (3 % of a step on the CPU).
        self.optimizer.zero_grad(set_to_none=True)
        with explain_out_of_memory(self.learner, batch, config, self.optimizer):
            loss = self._backward(batch)
        norm = clip_gradients(self.accelerator, self.wrapped, self.learner, config.clip_grad_norm)
        # gradients are summed over ranks before this, so that all ranks see the same norm; a loss is a rank's own
        loss = mean_over_ranks(loss)
        if self._is_finite(loss, norm):
            self._apply(batch)
        else:
            self.nonfinite.refuse(step, float(loss.loss), norm, self.learner)
            if self.scaler is not None:
                self.scaler.update()
        return loss, norm

    def _backward(self, batch: Batch) -> Loss:
        setup, micro_batch = self.setup, self.config.micro_batch
        send = self.accelerator.backward
        return backward(self.wrapped, batch, setup.similar, setup.loss_config, micro_batch=micro_batch, send=send)

    def _is_finite(self, loss: Loss, norm: float) -> bool:
        """Whether a step can be applied.

        fp16 begins with too large a scale and halves it until the gradients are finite: such a step is not an error.
        """
        lowering_scale = self.scaler is not None and self.scaler.get_scale() >= 1
        return math.isfinite(float(loss.loss)) and (math.isfinite(norm) or lowering_scale)

    def _apply(self, batch: Batch) -> None:
        with explain_out_of_memory(self.learner, batch, self.config, self.optimizer):
            self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=self.max_logit_scale)
        if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
            self.average.update()
