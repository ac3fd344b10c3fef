"""The best weights of a run so far, and the folder that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UsageError, option
from clipkit.metrics.ranking import worth
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.saving.model_card import Card
from clipkit.models.saving.save import Saved, check_saved, save
from clipkit.progress import Progress
from clipkit.training.state import require_names


class BestModel:
    """Keeps the weights of the best evaluation, in memory and in output_dir/model. A part of the run.

    The first folder is opened again at once, so that a model that cannot be saved is known early; those that
    replace it hold other weights in the same form, and only the last of them is opened, in `restore_best`.
    """

    def __init__(self, model: DualEncoder, folder: Path, key: str | None) -> None:
        self.model, self.folder, self.key = model, folder, key
        self.name = "model"  # of the model's own folder
        self.value, self.step = -math.inf, 0
        self.since = 0  # evaluations since the best one
        self.card = model.card
        self.trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        self.saved: Saved | None = None
        self.unopened = False
        self.metrics: dict[str, float] = {}
        self.n: dict[str, int] = {}
        self.weights: dict[str, Tensor] = {}

    def update(self, step: int, metrics: dict[str, float], n: Mapping[str, int], progress: Progress) -> None:
        """Metrics of the model as it stands after `step`; `n` is what they rest on."""
        self.key = self.key or next(iter(metrics))
        if self.key not in metrics:
            raise UsageError(
                f"no evaluator gives the metric {self.key!r} that `best` names",
                fix=f"{option('best', next(iter(metrics)))}, or another of: {', '.join(metrics)}",
            )
        value = worth(self.key, metrics[self.key])
        best = " (best so far)" if value > self.value else ""
        progress.note(f"step {step}: {self.key} {metrics[self.key]:.4f}{best}")
        self.since += 1
        if value > self.value:
            self.since = 0
            self.value, self.step, self.metrics, self.n = value, step, metrics, dict(n)
            self.weights = {name: weight.detach().clone() for name, weight in self._state()}
            self._save()

    def restore_best(self, total: int) -> tuple[dict[str, float], int]:
        """Put the best weights into the model and its folder; their metrics, and the step after which they stood."""
        if not self.weights:  # nothing was measured: the last weights are all there is
            self._save()
            return {}, total
        with torch.no_grad():
            for name, weight in self._state():
                weight.copy_(self.weights[name])
        if self.saved is None:  # the folder is an earlier attempt's: of another step, perhaps
            self._save()
        self.model.card = self.card
        if self.unopened:
            distributed.on_main(lambda: check_saved(self.folder / self.name, self.model.name))
        return self.metrics, self.step

    def tensors(self) -> dict[str, Tensor]:
        return self.weights

    def facts(self) -> dict[str, Any]:
        value = self.value if self.weights else None
        best = {"key": self.key, "value": value, "step": self.step, "since": self.since}
        return {**best, "metrics": self.metrics, "n": self.n}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        if facts["value"] is not None:
            if self.key not in (None, facts["key"]):
                raise UsageError(
                    f"the best weights so far were chosen by {facts['key']!r}, not by {self.key!r}",
                    where="best",
                    fix=f"leave {option('best')} as it was, or choose another {option('output_dir')}",
                )
            self.key = facts["key"]
        self.step, self.since = facts["step"], facts["since"]
        self.metrics, self.n = facts["metrics"], facts["n"]
        self.value = -math.inf if facts["value"] is None else facts["value"]
        own = dict(self._state())
        if tensors:
            require_names("best weights", tensors, own)
        self.weights = {name: tensors[name].to(own[name].device) for name in own if tensors}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        model = self.model
        yield from (pair for pair in model.named_parameters() if pair[0] in self.trained)
        yield from model.named_buffers()

    def _write(self) -> tuple[Saved, Card]:
        model, folder = self.model, self.folder / self.name
        about: dict[str, Any] = {"name": model.name, "card": model.card, "proven": self.saved}
        return save(model.backend, model.processor, folder, True, **about)

    def _save(self) -> None:
        self.model.card = self.model.card.updated({"metrics": self.metrics, "n": self.n})
        self.unopened = self.saved is not None
        self.saved, self.model.card = distributed.on_main(self._write)
        self.card = self.model.card
