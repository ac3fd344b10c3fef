"""The content of result.json: figures with what is needed to trust them, and a description of the machine."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from clipkit import distributed
from clipkit.errors import ClipkitError, UsageError
from clipkit.evaluation.evaluator import Measure, as_evaluator
from clipkit.extras import DISTRIBUTION
from clipkit.models.dual_encoder import DualEncoder

logger = logging.getLogger("clipkit")

_PACKAGES = (
    *(DISTRIBUTION, "torch", "transformers", "open_clip_torch", "datasets", "accelerate"),
    *("tokenizers", "timm", "numpy", "pillow"),
)


def build_result(
    model: DualEncoder,
    metrics: Mapping[str, float],
    evaluators: Sequence[Measure],
    seed: int | None,
    seconds: float,
    **more: Any,
) -> dict[str, Any]:
    """The content of result.json.

    ``metrics`` flat; ``chance`` and ``majority`` (always naming the most frequent class) under the same keys; ``n`` by
    evaluator; ``warnings``: their notices, each with ``code``, ``message`` and ``texts``; ``seed``, ``seconds``,
    ``versions``, ``system``, and the model's name and ``fingerprint``.

    Args:
        model: as it was measured.
        metrics: what the evaluators gave.
        evaluators: those that gave them; see `Evaluator` for what each tells of its figures.
        seed: of the run; None where nothing was drawn.
        seconds: of wall clock.
        more: further keys, added as they are.

    Raises:
        ClipkitError: a figure is NaN or infinite: such a number is never written as a score.
        UsageError: ``more`` has a key that is taken.
    """
    figures: dict[str, dict[str, Any]] = {"metrics": dict(metrics), "chance": {}, "majority": {}, "n": {}}
    described = [as_evaluator(measure) for measure in evaluators]
    for evaluator in described:
        figures["n"] |= evaluator.counts()
        for baseline, values in evaluator.baselines().items():
            figures[baseline] |= values
    for part in figures.values():
        _require_finite(part)
    result = {
        **figures,
        "warnings": [notice.as_dict() for evaluator in described for notice in evaluator.notices],
        "seed": seed,
        "seconds": round(seconds, 3),
        "versions": versions(),
        "system": {"platform": platform.platform(), "device": str(model.device), "processes": distributed.world_size()},
        "model": model.name,
        "fingerprint": model.fingerprint().as_dict(),
    }
    taken = result.keys() & more.keys()
    if taken:
        raise UsageError(f"result.json has a key {min(taken)!r} already")
    return result | more


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a figure; those not installed are left out."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed["clipkit" if package == DISTRIBUTION else package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def environment() -> dict[str, str]:
    """Versions, devices and threads, one line each: what a bug report needs."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions(),
        "platform": platform.platform(),
        "device": "cpu" if accelerator is None else str(accelerator),
        "gpus": ", ".join(names) or "none",
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
    }


def _require_finite(figures: Mapping[str, float]) -> None:
    for key, value in figures.items():
        if not math.isfinite(value):
            fix = "the evaluator is wrong, or the model gives unusable embeddings"
            raise ClipkitError(f"a figure must be a finite number, found {value}", where=key, fix=fix)
