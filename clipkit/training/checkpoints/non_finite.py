"""NaN and infinity: seen before a weight changes, written down, and counted."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from clipkit import distributed
from clipkit.data.batches.plan import Plan
from clipkit.errors import ClipkitError, option
from clipkit.files import resource_errors
from clipkit.training.state import Facts

logger = logging.getLogger("clipkit")
NAME = "nonfinite.jsonl"


class NonFinite(Facts):
    """Counts the steps whose loss or gradient was not a number; more than `allowed` end the run.

    Args:
        folder: of the run; the rows of every such batch are written into its nonfinite.jsonl.
        plan: tells which rows these are.
        allowed: steps that may be left out.
    """

    def __init__(self, folder: Path, plan: Plan, allowed: int) -> None:
        super().__init__(steps=0)
        self.folder, self.plan, self.allowed = folder, plan, allowed

    def refuse(self, step: int, loss: float, norm: float, learner: torch.nn.Module) -> None:
        """Called on every rank where a step, counted from 1, is not applied.

        Raises:
            ClipkitError: too many of them.
        """
        self.values["steps"] += 1
        epoch, k = divmod(step - 1, self.plan.steps_per_epoch)
        names = [n for n, p in learner.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        reason = f"the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        line: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "loss": str(loss),
            "gradient_norm": str(norm),
            "parameters": names[:20],
            "rows": [{"row": draw.row, "caption": draw.caption} for draw in self.plan.batch(epoch, k)],
        }
        if distributed.is_main():
            with resource_errors(self.folder), (self.folder / NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        count = self.values["steps"]
        if count > self.allowed:
            message = f"{reason}; the step was not applied"
            if self.allowed:
                message += f" ({count} such, skip_nonfinite={self.allowed} allows fewer)"
            raise ClipkitError(
                message,
                where=self.folder / NAME,
                fix=f"look at these rows for broken images or captions, lower {option('learning_rate')}, or use "
                f"{option('precision', 'fp32')}; {option('skip_nonfinite', 3)} leaves out three such steps",
            )
        if distributed.is_main():
            logger.warning(
                "step %d: %s; the step was not applied (%d of %d allowed)", step, reason, count, self.allowed
            )
