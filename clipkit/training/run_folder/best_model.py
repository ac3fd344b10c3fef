"""The best weights of a run so far, and the folder that holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UsageError, option
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.saving.model_card import Card
from clipkit.models.saving.save import Saved, save
from clipkit.progress import Progress
from clipkit.training.state import require_names


class BestModel:
    """Keeps the weights of the best evaluation, in memory and in output_dir/model. A part of the run.

    The first folder is saved in full and opened again at once, to find out early whether the model can be saved. Those
    that replace it are written without golden embeddings, fingerprint and SHA-256, and not opened: `restore_best` saves
    the last of them in full.

    Args:
        model: the trained model.
        folder: of the run.
        key: of the metric that decides; None: the first one that is measured.
        greater_is_better: whether a higher value is better, by the key of a metric that was measured.
    """

    def __init__(
        self, model: DualEncoder, folder: Path, key: str | None, greater_is_better: Callable[[str], bool]
    ) -> None:
        self.model, self.folder, self.key, self.greater_is_better = model, folder, key, greater_is_better
        self.name = "model"  # name of the folder for the model
        self.value, self.step = -math.inf, 0  # the value is negated where lower is better
        self.since = 0  # evaluations since the best one
        self.card = model.card
        self.trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        self.saved: Saved | None = None
        self.unproven = False
        self.metrics: dict[str, float] = {}
        self.n: dict[str, int] = {}
        self.weights: dict[str, Tensor] = {}

    def update(self, step: int, metrics: dict[str, float], n: Mapping[str, int], progress: Progress) -> None:
        """Keep the weights if they are the best so far.

        Args:
            step: taken last.
            metrics: of the current weights.
            n: how many items the metrics rest on.
            progress: shows the value.

        Raises:
            UsageError: the metric that decides is not among them.
        """
        self.key = self.key or next(iter(metrics))
        if self.key not in metrics:
            raise UsageError(
                f"no evaluator gives the metric {self.key!r} that `best` names",
                fix=f"{option('best', next(iter(metrics)))}, or another of: {', '.join(metrics)}",
            )
        value = metrics[self.key] if self.greater_is_better(self.key) else -metrics[self.key]
        best = " (best so far)" if value > self.value else ""
        progress.note(f"step {step}: {self.key} {metrics[self.key]:.4f}{best}")
        self.since += 1
        if value > self.value:
            self.since = 0
            self.value, self.step, self.metrics, self.n = value, step, metrics, dict(n)
            self.weights = {name: weight.detach().clone() for name, weight in self._state()}
            self._save()

    def restore_best(self, total: int) -> tuple[dict[str, float], int]:
        """Put the best weights into the model and its folder.

        Args:
            total: number of steps taken.

        Returns:
            Their metrics, and the step after which the model had them.
        """
        if not self.weights:  # nothing was measured: keep the last weights
            self._save()
            return {}, total
        with torch.no_grad():
            for name, weight in self._state():
                weight.copy_(self.weights[name])
        if self.unproven or self.saved is None:  # or an earlier attempt wrote the folder, perhaps after another step
            self.saved = None
            self._save()
        self.model.card = self.card
        return self.metrics, self.step

    def tensor_state(self) -> dict[str, Tensor]:
        return self.weights

    def json_state(self) -> dict[str, Any]:
        value = self.value if self.weights else None
        best = {"key": self.key, "value": value, "step": self.step, "since": self.since}
        return {**best, "metrics": self.metrics, "n": self.n}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        if values["value"] is not None:
            if self.key not in (None, values["key"]):
                raise UsageError(
                    f"the best weights so far were chosen by {values['key']!r}, not by {self.key!r}",
                    where="best",
                    fix=f"leave {option('best')} as it was, or choose another {option('output_dir')}",
                )
            self.key = values["key"]
        self.step, self.since = values["step"], values["since"]
        self.metrics, self.n = values["metrics"], values["n"]
        self.value = -math.inf if values["value"] is None else values["value"]
        self.weights = {}
        if tensors:
            state = dict(self._state())
            require_names("best weights", tensors, state)
            self.weights = {name: tensors[name].to(weight.device) for name, weight in state.items()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if name in self.trained:
                yield name, parameter
        yield from self.model.named_buffers()

    def _write(self) -> tuple[Saved, Card]:
        model, folder = self.model, self.folder / self.name
        return save(model.backend, model.processor, folder, True, name=model.name, card=model.card, proven=self.saved)

    def _save(self) -> None:
        self.model.card = self.model.card.updated({"metrics": self.metrics, "n": self.n})
        self.unproven = self.saved is not None
        self.saved, self.model.card = distributed.on_main(self._write)
        self.card = self.model.card
