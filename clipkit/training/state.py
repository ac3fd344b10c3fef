"""What a run has to remember from one step to the next, in parts that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipkit.errors import CorruptArtefact

Tensors = Mapping[str, Tensor]


class Stateful(Protocol):
    """A part of a run that a checkpoint holds. It is equal on all ranks, so that rank 0 can save it for them."""

    def tensor_state(self) -> dict[str, Tensor]:
        """Return the tensors by name; on any device."""
        ...

    def json_state(self) -> dict[str, Any]:
        """Return everything else, as JSON can hold it."""
        ...

    def restore(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        """Take back what `tensor_state` and `json_state` returned."""
        ...


class Weights:
    """The trained parameters and the buffers of a module. Frozen parameters come from the model's own source."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]

    def tensor_state(self) -> dict[str, Tensor]:
        trained = {name: self.module.get_parameter(name).detach() for name in self.names}
        return trained | dict(self.module.named_buffers())

    def json_state(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        weights = self.tensor_state()
        require_names("weights", tensors, weights)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[name])


class Adam:
    """The moments of an optimizer, by the names of the parameters, and the scaler of fp16 where there is one."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module, scaler: Any = None) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.parameters = {
            name: parameter for name, parameter in module.named_parameters() if id(parameter) in optimized
        }

    def tensor_state(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = value
        return tensors

    def json_state(self) -> dict[str, Any]:
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def restore(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        states: dict[str, dict[str, Tensor]] = {}
        for tensor_name, value in tensors.items():
            name, _, key = tensor_name.rpartition("|")
            states.setdefault(name, {})[key] = value
        if unknown := states.keys() - self.parameters.keys():
            raise CorruptArtefact(f"the optimizer's state is of a parameter {min(unknown)!r} that is not trained here")
        self.optimizer.state.clear()
        for name, state in states.items():
            parameter = self.parameters[name]
            self.optimizer.state[parameter] = {key: _like(value, parameter) for key, value in state.items()}
        if self.scaler is not None and "scaler" in values:
            self.scaler.load_state_dict(dict(values["scaler"]))


class Facts:
    """A plain dictionary that goes into JSON, as a part of a run."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def tensor_state(self) -> dict[str, Tensor]:
        return {}

    def json_state(self) -> dict[str, Any]:
        return dict(self.values)

    def restore(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        self.values.clear()
        self.values.update(values)


def require_names(content: str, saved: Tensors, expected: Tensors) -> None:
    """Refuse tensors of a checkpoint that are not those of this model.

    Args:
        content: what the tensors are, for the message: ``weights``.
        saved: by name, from the checkpoint.
        expected: by name, from the model.

    Raises:
        CorruptArtefact: a name or a shape differs.
    """
    if saved.keys() != expected.keys():
        name = min(saved.keys() ^ expected.keys())
        owner = "checkpoint" if name in saved else "model"
        raise CorruptArtefact(f"the {content} of the checkpoint are of another model: only the {owner} has {name!r}")
    for name, tensor in expected.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{tuple(saved[name].shape)} and {tuple(tensor.shape)}"
            raise CorruptArtefact(f"the {content} of the checkpoint are of another model: {name!r} has shapes {shapes}")


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy on the parameter's device, in its memory layout where the shapes are equal."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
