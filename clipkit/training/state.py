"""What a run has to remember from one step to the next, in parts that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipkit.errors import CorruptArtefact

Tensors = Mapping[str, Tensor]


class Stateful(Protocol):
    """One thing that a run remembers. Equal on all ranks, so that rank 0 can speak for them."""

    def tensors(self) -> dict[str, Tensor]:
        """By name; on any device."""
        ...

    def facts(self) -> dict[str, Any]:
        """What goes into JSON."""
        ...

    def restore(self, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Become what `tensors` and `facts` gave."""
        ...


class Weights:
    """The trained parameters and the buffers of a module; frozen parameters are where the model came from."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names = [name for name, each in module.named_parameters() if each.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        trained = {name: self.module.get_parameter(name).detach() for name in self.names}
        return trained | dict(self.module.named_buffers())

    def facts(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        own = self.tensors()
        require_names("weights", tensors, own)
        with torch.no_grad():
            for name, each in own.items():
                each.copy_(tensors[name])


class Adam:
    """The moments of an optimizer, by the names of the parameters, and the scaler of fp16 where there is one."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module, scaler: Any = None) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        self.parameters = {name: each for name, each in module.named_parameters() if id(each) in known}

    def tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {
            f"{name}|{key}": value
            for name, each in self.parameters.items()
            for key, value in state.get(each, {}).items()
        }

    def facts(self) -> dict[str, Any]:
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def restore(self, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        states: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            parameter, _, key = name.rpartition("|")
            states.setdefault(parameter, {})[key] = value
        if unknown := states.keys() - self.parameters.keys():
            raise CorruptArtefact(f"the optimizer's state is of a parameter {min(unknown)!r} that is not trained here")
        self.optimizer.state.clear()
        for name, state in states.items():
            each = self.parameters[name]
            self.optimizer.state[each] = {key: _like(value, each) for key, value in state.items()}
        if self.scaler is not None and "scaler" in facts:
            self.scaler.load_state_dict(dict(facts["scaler"]))


class Facts:
    """A plain dictionary as a part: what it holds goes into JSON."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def facts(self) -> dict[str, Any]:
        return dict(self.values)

    def restore(self, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        self.values.clear()
        self.values.update(facts)


def require_names(what: str, found: Tensors, wanted: Tensors) -> None:
    """Refuse tensors that are not those of this model.

    Raises:
        CorruptArtefact: a name or a shape differs.
    """
    if found.keys() != wanted.keys():
        odd = min(found.keys() ^ wanted.keys())
        where = "checkpoint" if odd in found else "model"
        raise CorruptArtefact(f"the {what} of the checkpoint are of another model: {odd!r} is in the {where} alone")
    for name, each in wanted.items():
        if found[name].shape != each.shape:
            shapes = f"{tuple(found[name].shape)} and {tuple(each.shape)}"
            raise CorruptArtefact(f"the {what} of the checkpoint are of another model: {name!r} has shapes {shapes}")


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device, and with its memory layout where it is of its shape."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
