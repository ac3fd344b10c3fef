"""An exponential moving average of the weights, measured and kept in place of the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.training.state import Tensors, require_names


class EMA:
    """Keeps ``average = d average + (1 - d) weights``, updated after each step, in fp32 or wider. A part of the run.

    After t updates d is at most (1 + t) / (10 + t), so that the average soon forgets the first weights (as in
    TensorFlow's ExponentialMovingAverage).

    Args:
        module: the module with the weights.
        names: of its parameters that are averaged.
        decay: d, in [0, 1).
    """

    def __init__(self, module: nn.Module, names: Sequence[str], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = {name: module.get_parameter(name) for name in names}
        self.averages = {name: _wide(weight).clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Average the weights after a step that was applied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [_wide(weight) for weight in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module while the context lasts; after it, put the weights back."""
        weights = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self.restore_average()
        try:
            yield
        finally:
            self._copy(weights)

    def restore_average(self) -> None:
        """Put the average into the module for good."""
        self._copy(self.averages)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.parameters.items():
            weight.copy_(values[name])

    def tensor_state(self) -> dict[str, Tensor]:
        return self.averages

    def json_state(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def restore(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        require_names("averaged weights", tensors, self.averages)
        self.updates = values["updates"]
        for name, weight in self.averages.items():
            weight.copy_(tensors[name])


def _wide(weight: Tensor) -> Tensor:
    """Return the weight in fp32 or wider."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
