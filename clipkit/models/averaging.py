"""Weight arithmetic: models between models (WiSE-FT, soups)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipkit.errors import ModelError, UsageError
from clipkit.modality import MODALITIES
from clipkit.models.adapting import lora
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.fingerprint import measure_processor


def interpolate(start: DualEncoder, tuned: DualEncoder, alpha: float) -> DualEncoder:
    """The model on the straight line between two: (1 - alpha) * start + alpha * tuned (WiSE-FT, Wortsman et al. 2022).

    After fine-tuning on one data set, some alpha between keeps much of what the model could do before.

    Args:
        start: the model before fine-tuning.
        tuned: the same model after it.
        alpha: from 0, which is `start`, to 1, which is `tuned`.

    Returns:
        A new model in eval mode, on the device of `start`. The logit scale is interpolated as the logarithm that
        it is. Integer buffers are those of `start`. BatchNorm statistics are interpolated, too, which is not
        what the interpolated weights would give: with BatchNorm, pass training images through it in training mode.

    Raises:
        UsageError: alpha outside [0, 1].
        ModelError: names or shapes of weights, or the processors differ; the first difference is named.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha goes from 0 (start) to 1 (tuned), found {alpha}")
    mixture = _combined([start, tuned], [1 - alpha, alpha])
    mixture.name = f"interpolate({start.name}, {tuned.name}, {alpha})"
    return mixture


def average(models: Sequence[DualEncoder]) -> DualEncoder:
    """The mean of several fine-tunings of one model (a soup, Wortsman et al. 2022).

    Returns and raises as `interpolate`; what cannot be averaged is that of the first model.

    Raises:
        UsageError: no models.
    """
    if not models:
        raise UsageError("no models to average")
    mixture = _combined(models, [1 / len(models)] * len(models))
    mixture.name = f"average({', '.join(model.name for model in models)})"
    return mixture


def _combined(models: Sequence[DualEncoder], parts: Sequence[float]) -> DualEncoder:
    plain = [DualEncoder(lora.merged(model.backend), model.processor, model.name) for model in models]
    for other in plain[1:]:
        _check_alike(plain[0], other)
    backend = copy.deepcopy(plain[0].backend)
    backend.fresh = frozenset()  # its heads are trained ones
    states = [model.backend.state_dict() for model in plain]
    with torch.no_grad():
        for name, target in backend.state_dict().items():
            if target.is_floating_point():
                target.copy_(weighted_sum([state[name] for state in states], parts))
    model = DualEncoder(backend, plain[0].processor, plain[0].name).eval()
    return model.to(models[0].device)


def weighted_sum(tensors: Sequence[Tensor], parts: Sequence[float]) -> Tensor:
    """The sum of parts * tensors, in float64 on the CPU; what has no part is not read."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, part in zip(tensors, parts, strict=True):
        if part:  # 0 * infinity would be NaN
            total += part * tensor.detach().cpu().double()
    return total


def _check_alike(first: DualEncoder, other: DualEncoder) -> None:
    where = f"{first.name} and {other.name}"
    mine, theirs = ({n: tuple(t.shape) for n, t in m.backend.state_dict().items()} for m in (first, other))
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            shapes = " and ".join("missing" if s is None else str(s) for s in (mine.get(name), theirs.get(name)))
            message = f"the models differ in the weight {name}: {shapes}"
            raise ModelError(message, where=where, fix="models that were tuned from one and the same model")
    settings, others = (_settings(model) for model in (first, other))
    for name in [*settings, *others]:
        if settings.get(name) != others.get(name):
            message = f"the models differ in {name}: {settings.get(name)} and {others.get(name)}"
            raise ModelError(message, where=where, fix="models with the same processor")


def _settings(model: DualEncoder) -> dict[str, Any]:
    described: dict[str, Any] = {"family": model.backend.family}
    for part, about in measure_processor(model.processor).items():
        described |= {f"{part}.{key}": value for key, value in about.items()}
    for part in MODALITIES:
        described |= {f"{part}.{key}": value for key, value in model.backend.describe(part).items()}
    return described
