"""An exponential moving average of the weights, measured and kept in place of the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.training.state import Tensors, require_names


class EMA:
    """``average = d average + (1 - d) weights`` after each update, in fp32 at least. A part of the run.

    With t updates so far d is at most (1 + t) / (10 + t), so that the first weights are soon forgotten (as in
    TensorFlow's ExponentialMovingAverage).

    Args:
        module, names: whose parameters of these names are averaged.
        decay: d, in [0, 1).
    """

    def __init__(self, module: nn.Module, names: Sequence[str], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = {name: module.get_parameter(name) for name in names}
        self.held = {name: _wide(weight).clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After a step that was applied."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [_wide(weight) for weight in self.parameters.values()]
        torch._foreach_lerp_(list(self.held.values()), now, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average stands in the module for a while; then the weights themselves, whatever happened."""
        raw = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self.restore_average()
        try:
            yield
        finally:
            self._copy(raw)

    def restore_average(self) -> None:
        """Put the average into the module for good."""
        self._copy(self.held)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.parameters.items():
            weight.copy_(values[name])

    def tensors(self) -> dict[str, Tensor]:
        return self.held

    def facts(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def restore(self, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        require_names("averaged weights", tensors, self.held)
        self.updates = facts["updates"]
        for name, weight in self.held.items():
            weight.copy_(tensors[name])


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
