"""Check that a run that continues has the config, data and model it began with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from clipkit import distributed
from clipkit.data.fingerprint import data_fingerprint, images_identity
from clipkit.errors import CorruptArtefact, UsageError, option
from clipkit.evaluation.evaluator import Evaluator
from clipkit.files import write_json
from clipkit.losses.similarity import Similarity, key_columns
from clipkit.models.fingerprint.fingerprint import hash_weights, measure_processor
from clipkit.training.checkpoints.checkpoint import Checkpoints
from clipkit.training.config.train import TrainConfig
from clipkit.training.heads import ModelWithHeads
from clipkit.training.run_folder.ownership import IDENTITY, clean_up, what_stands

# May change between the attempts of one run: where it runs and how it is shown, not what it computes.
# What an error advises to change (skip_nonfinite, max_bad, best) may change, too.
_PLACE = (
    "output_dir",
    "resume",
    "save_minutes",
    "save_steps",
    "workers",
    "micro_batch",
    "tile",
    "trackers",
    "progress",
)

FREE = frozenset((*_PLACE, "skip_nonfinite", "max_bad", "best"))


def run_fingerprint(
    config: TrainConfig,
    learner: ModelWithHeads,
    similar: Sequence[Similarity],
    pairs: Any,
    evaluators: Sequence[Evaluator],
) -> dict[str, Any]:
    """Return all that decides about a run's results, as JSON: equal values mean equal global batches and one model.

    The trained weights are not in it, because a checkpoint holds them; frozen ones are.
    """
    codes, numbers = key_columns(similar)
    planned = [*config.distinct, *filter(None, (config.balanced, config.grouped))]
    model = learner.model
    trained = [(name, list(p.shape)) for name, p in learner.named_parameters() if p.requires_grad]
    frozen = {name: p for name, p in learner.named_parameters() if not p.requires_grad}
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    identity = {
        "train": settings,
        "similar": [str(similarity) for similarity in similar],
        "data": data_fingerprint(
            pairs, [*codes, *numbers, *planned], progress=config.progress and distributed.is_main()
        ),
        "evaluators": [_evaluator(evaluator) for evaluator in evaluators],
        "model": {
            "trained parameters": hashlib.sha256(json.dumps(trained).encode()).hexdigest()[:16],
            "frozen weights": hash_weights(frozen),
            "processor": measure_processor(model.processor),
        },
    }
    return dict(json.loads(json.dumps(identity)))  # as it will be read again: tuples are lists


def _evaluator(evaluator: Evaluator) -> dict[str, Any]:
    settings = evaluator.identity()
    images = settings.pop("images", None)
    content = json.dumps(settings, default=_listed, sort_keys=True).encode()
    content += b"" if images is None else images_identity(images).encode()
    return {"name": evaluator.name, "set-up": hashlib.sha256(content).hexdigest()[:16]}


def _listed(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return one line for every setting that differs, ``train.seed: 0 before, 1 now``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    if isinstance(before, list) and isinstance(now, list):
        pairs = enumerate(zip_longest(before, now))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{name}[{i}]")]
    if before == now:
        return []
    one = json.dumps(before, ensure_ascii=False)
    other = json.dumps(now, ensure_ascii=False)
    same = min(len(one), len(other))
    for index, (character, other_character) in enumerate(zip(one, other, strict=False)):
        if character != other_character:
            same = index
            break
    return [f"{name}: {_short(one, same)} before, {_short(other, same)} now"]


def _short(text: str, same: int) -> str:
    """Return about 60 characters of a text, around the character number `same`."""
    start = max(0, same - 30) if len(text) > 60 else 0
    return ("…" if start else "") + text[start : start + 60] + ("…" if len(text) > start + 60 else "")


def check_same_run(folder: Path, now: Mapping[str, Any]) -> None:
    """Compare with the run that the folder holds; on rank 0.

    Raises:
        UsageError: something changed; lists all of it.
        CorruptArtefact: the record cannot be read.
    """
    path = folder / IDENTITY
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptArtefact(f"the run's identity cannot be read: {error}", where=path) from error
    if changed := differences(before, now):
        raise UsageError(
            "this is not the run that the folder holds:\n  " + "\n  ".join(changed),
            where=folder,
            fix=f"undo these changes to go on with it, or choose another {option('output_dir')}",
        )


def find_checkpoint(folder: Path, checkpoints: Checkpoints, now: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint that a run continues from, or None for a new run, which the folder then records; on rank 0.

    Raises:
        UsageError: the folder's run is another one.
        CorruptArtefact: there were checkpoints, and all of them are damaged.
    """
    clean_up(folder)
    if not what_stands(folder):
        write_json(folder / IDENTITY, now)
        return None
    check_same_run(folder, now)
    newest = checkpoints.newest()
    if newest is None and (damaged := checkpoints.damaged()):
        raise CorruptArtefact(
            f"none of the run's checkpoints can be used; {len(damaged)} were set aside as damaged",
            where=checkpoints.folder,
            fix="restore one from a copy, or remove the run folder to start again",
        )
    return newest


def check_same_on_ranks(now: Mapping[str, Any]) -> None:
    """Refuse ranks that do not see the same data, config and model.

    Raises:
        UsageError: names the rank and what differs from rank 0.
    """
    every = distributed.all_gather_object(dict(now))
    for rank, identity in enumerate(every):
        if changed := differences(every[0], identity):
            lines = "\n  ".join(line.replace(" before, ", " on rank 0, ").replace(" now", "") for line in changed)
            raise UsageError(
                f"rank {rank} does not run what rank 0 runs:\n  {lines}",
                fix="start every process with the same config, data and model",
            )
