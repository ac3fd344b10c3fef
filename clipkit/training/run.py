"""A run from a config, start to end: seed > model > data > train > evaluate > save. Read this file first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from clipkit import distributed
from clipkit.data.dataset import has_texts, require_texts
from clipkit.data.overlap import overlap
from clipkit.data.pairs import load_pairs
from clipkit.data.split import split_pairs
from clipkit.embedding.store import EmbeddingStore
from clipkit.embedding.text_features import with_features
from clipkit.errors import UsageError, option, within
from clipkit.evaluation.evaluator import Evaluator
from clipkit.evaluation.result import build_result
from clipkit.evaluation.retrieval import RetrievalEvaluator
from clipkit.evaluation.validation_loss import ValidationLoss
from clipkit.evaluation.zero_shot import ZeroShotEvaluator
from clipkit.files import write_json, write_text
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.checkpoints.resume import FREE, differences
from clipkit.training.checks.gradients import GradientCheck, check_gradients
from clipkit.training.config.model import ModelConfig
from clipkit.training.config.run import RunConfig
from clipkit.training.config.sections import DataConfig, EvaluateConfig, ReferenceConfig
from clipkit.training.config.train import TrainConfig
from clipkit.training.result import TrainResult
from clipkit.training.run_folder.ownership import claim_folder, locked, what_stands
from clipkit.training.setup import TrainSetup
from clipkit.training.trainer import Trainer

logger = logging.getLogger("clipkit")


@dataclass(frozen=True)
class Run:
    """The trained model, the result of the training, and the folder of the run."""

    model: DualEncoder
    result: TrainResult
    folder: Path


def run(config: RunConfig) -> Run:
    """Carry out a run from start to end; every process of a launcher calls this.

    Writes into ``train.output_dir``: `config.yaml`, `metrics.jsonl`, `model/` (the best weights), `result.json`,
    `checkpoints/`, `attempts.jsonl`, `curves/`, and `rejects.jsonl` where rows were left out; with a forget_budget
    `last/` (the fine-tuned weights), `start.safetensors` and `forgetting.json`.

    Raises:
        ClipkitError: anything that is wrong, before the first step if it can be known by then.
    """
    distributed.start()
    torch.manual_seed(config.train.seed)  # fresh heads start alike on every rank
    folder = claim_folder(Path(config.train.output_dir), may_resume=config.train.resume == "auto")
    with locked(folder):
        distributed.on_main(lambda: write_config(folder, config))
        return _run(config, folder)


def _run(config: RunConfig, folder: Path) -> Run:
    model = open_model(config.model)
    train, test = open_data(config.data, config.train, folder)
    path = config.data.features
    with nullcontext() if path is None else EmbeddingStore(path) as features:
        if features is not None:
            train = keep_features(model, train, features, config.data.num_augmentations, config.train)
        trainer = Trainer(
            model,
            train,
            config.train,
            similar=[section.build() for section in config.similar],
            evaluators=evaluators(config.evaluate, test, config.train, features),
            reference=reference(config.evaluate, config.train, folder),
        )
        model.card = model.card.updated({"data": config.data.train, "config": asdict(config)})
        result = trainer.train()
    save_result(folder, model, result, trainer.measured(), config.train.seed)
    return Run(model, result, folder)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.yaml, word for word; a run that is resumed must have the config that it had.

    Raises:
        UsageError: they differ, in more than what may change between attempts; lists how.
    """
    path = folder / "config.yaml"
    if what_stands(folder) and path.is_file():
        changed = differences(_fixed_settings(RunConfig.load(path)), _fixed_settings(config))
        if changed:
            raise UsageError(
                "this is not the config of the run in the folder:\n  " + "\n  ".join(changed),
                where=path,
                fix=f"undo these changes to go on with it, or choose another {option('output_dir')}",
            )
    write_text(path, config.dump())


def _fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that must be equal for all attempts of a run."""
    train = {key: value for key, value in asdict(config.train).items() if key not in FREE}
    return {**asdict(config), "train": train}


def check_run_gradients(config: RunConfig) -> GradientCheck:
    """Compare the first step of a run, under this launcher, with the big batch; trains and writes nothing."""
    distributed.start()
    torch.manual_seed(config.train.seed)
    model = open_model(config.model)
    train, _ = open_data(config.data, config.train, claim_folder(Path(config.train.output_dir)))
    return check_gradients(
        TrainSetup(model, train, config.train, similar=[section.build() for section in config.similar])
    )


def open_model(config: ModelConfig) -> DualEncoder:
    """Return the model that a config names, frozen and adapted as it says."""
    if config.name is not None:
        opener = DualEncoder.from_config if config.scratch else DualEncoder.from_pretrained
        logger.info("model: opening %s", config.name)
        model = opener(config.name)
        _warn_if_unfrozen(model, config)
    else:
        assert config.vision is not None  # ModelConfig checked both
        assert config.text is not None
        logger.info("model: joining %s and %s", config.vision, config.text)
        model = DualEncoder.from_towers(
            config.vision, config.text, config.tokenizer or config.text, dim=config.dim, head=config.head
        )
    change_model(model, config)
    return model


def _warn_if_unfrozen(model: DualEncoder, config: ModelConfig) -> None:
    """Warn about a tower that was frozen in the model's own training and now is not: freezing is not saved."""
    before = model.card.config.get("model")
    if not isinstance(before, Mapping) or not distributed.is_main():
        return
    for tower in before.get("freeze", ()):
        adapted = config.lora is not None and config.lora.part in (tower, "both")
        if tower not in config.freeze and tower not in config.freeze_blocks and not adapted:
            message = "%s was trained with a frozen %s tower, which is trained now: model.freeze=%s freezes it again"
            logger.warning(message, config.name, tower, tower)


def change_model(model: DualEncoder, config: ModelConfig) -> None:
    """Resize, freeze and adapt a model in place, in an order in which no step undoes another."""
    if config.image_size is not None or config.context_length is not None:
        model.resize(image_size=config.image_size, context_length=config.context_length)
    for tower in config.freeze:
        model.freeze(tower)
    for tower, first in config.freeze_blocks.items():
        model.freeze(tower, blocks=first)
    if config.lora is not None:
        model.add_lora(**vars(config.lora))
    if config.gradient_checkpointing:
        model.gradient_checkpointing()
    if config.patch_dropout:
        model.patch_dropout(config.patch_dropout)


def open_data(config: DataConfig, loop: TrainConfig, folder: Path) -> tuple[Any, Any]:
    """Return training and test pairs; the rows left out are listed in `folder`, in (test_)rejects.jsonl."""
    train = _load(config.train, config, loop, folder / "rejects.jsonl")
    require_texts(train)
    if config.test == 0:
        return train, None
    if isinstance(config.test, str):
        test = _load(config.test, config, loop, folder / "test_rejects.jsonl")
        shared = str(overlap(train, test)) if distributed.is_main() else ""
        if shared:
            logger.warning("data.test: %s", shared)
    else:
        size = int(config.test) if config.test >= 1 else config.test
        train, test = split_pairs(train, test=size, by=config.split_by, seed=loop.seed)
    logger.info("data: %s rows to train on, %s held out", f"{len(train):,}", f"{len(test):,}")
    return train, test


def _load(source: str, columns: DataConfig | ReferenceConfig, loop: TrainConfig, rejects: Path) -> Any:
    """Return the pairs of a source; rank 0 reads them first, so that the others find the cache."""
    with distributed.main_first():
        return load_pairs(
            source,
            image=columns.image,
            text=list(columns.text) if isinstance(columns.text, tuple) else columns.text,
            label=columns.label,
            split=columns.split,
            templates=columns.templates,
            separator=columns.separator,
            encoding=columns.encoding,
            quoting=columns.quoting,
            on_bad=loop.on_bad,
            max_bad=loop.max_bad,
            rejects=rejects if loop.on_bad == "skip" else None,
            progress=loop.progress and distributed.is_main(),
        )


def keep_features(model: DualEncoder, train: Any, store: EmbeddingStore, draws: int, loop: TrainConfig) -> Any:
    """Return the training pairs with the features of each frozen tower; compute those that `store` lacks."""
    model.to(distributed.start())
    return with_features(
        model,
        train,
        store=store,
        augmentation=loop.augmentation,
        draws=draws,
        workers=loop.workers,
        progress=loop.progress,
        on_bad=loop.on_bad,
    )


def evaluators(
    config: EvaluateConfig, test: Any, loop: TrainConfig, features: EmbeddingStore | None = None
) -> list[Evaluator]:
    """Return the evaluators that a config asks for on the held-out pairs; none if no pairs are held out."""
    if test is None:
        return []
    chosen: list[Evaluator] = []
    options: dict[str, Any] = {"on_bad": loop.on_bad, "workers": loop.workers, "progress": loop.progress}
    options["features"] = features
    if config.retrieval and not has_texts(test):
        logger.info("the held-out images have labels, but no texts: retrieval is not measured")
    elif config.retrieval:
        chosen.append(RetrievalEvaluator(test, group=config.group, **options))
    if config.loss:
        chosen.append(ValidationLoss(test, **options))
    if config.zero_shot:
        chosen.append(ZeroShotEvaluator(test, label=config.zero_shot, templates=config.templates, **options))
    if not chosen:
        setting = "evaluate.retrieval=true or evaluate.loss=true" if has_texts(test) else "evaluate.zero_shot=label"
        fix = f"set {setting}; data.test=0 holds nothing out"
        raise UsageError("nothing would be measured", where="evaluate", fix=fix)
    return chosen


def reference(config: EvaluateConfig, loop: TrainConfig, folder: Path) -> Evaluator | None:
    """Return the evaluator of what must not be forgotten; None for the built-in one, or without a guardrail."""
    if config.reference is None:
        return None
    with within("evaluate.reference", [field.name for field in fields(ReferenceConfig)]):
        pairs = _load(config.reference.data, config.reference, loop, folder / "reference_rejects.jsonl")
        require_texts(pairs)
    options: dict[str, Any] = {"on_bad": loop.on_bad, "workers": loop.workers, "progress": loop.progress}
    return RetrievalEvaluator(pairs, name="reference", **options)


def save_result(
    folder: Path, model: DualEncoder, result: TrainResult, evaluators: Sequence[Evaluator], seed: int
) -> None:
    """Write result.json: the metrics of the weights that were kept, and the baselines to compare them with."""
    if distributed.is_main():
        training = {
            "step": result.step,
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "alpha": None if result.forgetting is None else result.forgetting.alpha,
        }
        content = build_result(model, result.metrics, evaluators, seed, result.seconds, **training)
        write_json(folder / "result.json", content)
        logger.info("%s: step %d of %d was best", folder, result.step, result.steps)
