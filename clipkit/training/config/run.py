"""The config of a run: immutable, validated, and readable as YAML.

RunConfig
├── model: ModelConfig          which model, which part is frozen
├── data: DataConfig            which pairs, what to hold out
├── similar: [SimilarConfig]    the notions of similarity
├── train: TrainConfig          the loop
└── evaluate: EvaluateConfig    what to measure
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from clipkit.data.reading.tables import TABLE_SUFFIXES
from clipkit.errors import ConfigError, option, speaking
from clipkit.training.config.errors import as_setting, as_yaml, config_error, no_config
from clipkit.training.config.fields import STRICT
from clipkit.training.config.model import ModelConfig
from clipkit.training.config.sections import DataConfig, EvaluateConfig, SimilarConfig
from clipkit.training.config.train import TrainConfig
from clipkit.training.config.typed import fit
from clipkit.training.config.yaml_file import dump_yaml, read_yaml, set_value


@dataclass(frozen=True)
class RunConfig:
    """The config of a run, with the sections of a YAML file."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    similar: tuple[SimilarConfig, ...] = (SimilarConfig(),)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.evaluate.reference is not None and self.train.forget_budget is None:
            message = "a reference is given, but no forget_budget that uses it"
            raise ConfigError(
                message, where="evaluate.reference", fix=f"{option('forget_budget', 0.01)}, or leave it out"
            )
        if self.data.features is not None and not self.model.freeze:
            message = "features can be stored only of a frozen tower; a saved model is opened with nothing frozen"
            raise ConfigError(message, where="data.features", fix=option("model.freeze", ["image"]))

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
        """Read a YAML file and ``key.sub=value`` overrides, or overrides alone.

        Raises:
            ConfigError: no such file, an unknown key (with the near ones), a value of the wrong type.
        """
        if path is not None and (not Path(path).is_file() or Path(path).suffix.lower() in TABLE_SUFFIXES):
            raise no_config(Path(path))
        values = {} if path is None else read_yaml(Path(path))
        for override in overrides:
            set_value(values, override)
        return cls._parse(values, path, overrides)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Read nested mappings, as YAML gives them."""
        return cls._parse(values, None, ())

    @classmethod
    def _parse(cls, values: Mapping[str, Any], path: str | Path | None, overrides: Sequence[str]) -> RunConfig:
        with speaking(as_setting if overrides else as_yaml):  # a user who types overrides gets fixes as overrides
            try:
                return TypeAdapter(cls).validate_python(fit(values, cls))
            except ValidationError as error:
                raise config_error(error, path, overrides) from None

    def dump(self) -> str:
        """Return YAML that `load` reads back to an equal config."""
        return dump_yaml(dataclasses.asdict(self))
