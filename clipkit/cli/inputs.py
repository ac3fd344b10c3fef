"""What a verb opens: a model, the config of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipkit.errors import UsageError

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder
    from clipkit.training.config.run import RunConfig


def run_config(settings: Sequence[str]) -> RunConfig:
    from clipkit.training.config.errors import is_override
    from clipkit.training.config.run import RunConfig

    files = [each for each in settings if not is_override(each)]
    if len(files) > 1:
        raise UsageError(f"expected one YAML file, found {len(files)}: {', '.join(files)}")
    return RunConfig.load(files[0] if files else None, [each for each in settings if is_override(each)])


def open_model(model: str) -> DualEncoder:
    logging.getLogger("clipkit").info("opening %s", model)
    from clipkit import distributed
    from clipkit.models.dual_encoder import DualEncoder

    return DualEncoder.from_pretrained(model, device=distributed.start())
