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
from clipkit.embedding.image_features import with_image_features
from clipkit.embedding.store import EmbeddingStore
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
    """What `run` gives: the trained model, what training gave, and the folder that holds both."""

    model: DualEncoder
    result: TrainResult
    folder: Path


def run(config: RunConfig) -> Run:
    """Carry out a whole run; every process of a launcher calls this.

    Writes into ``train.output_dir``: `config.yaml`, `metrics.jsonl`, `model/` (the best weights), `result.json`,
    `checkpoints/`, `attempts.jsonl`, `curves/`, and `rejects.jsonl` where rows were left out; with a forget_budget
    `last/` (the fine-tuned weights as they are), `start.safetensors` and `forgetting.json`.

    Raises:
        ClipkitError: whatever is wrong, before the first step wherever that can be known.
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
            similar=[each.build() for each in config.similar],
            evaluators=evaluators(config.evaluate, test, config.train, features),
            reference=reference(config.evaluate, config.train, folder),
        )
        model.card = model.card.updated({"data": config.data.train, "config": asdict(config)})
        result = trainer.train()
    save_result(folder, model, result, trainer.measured(), config.train.seed)
    return Run(model, result, folder)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.yaml, word for word; a run that goes on must have the one that it had.

    Raises:
        UsageError: they differ, in more than what may change between attempts; lists how.
    """
    path = folder / "config.yaml"
    if what_stands(folder) and path.is_file():
        before, now = ({**asdict(each), "train": _fixed(each.train)} for each in (RunConfig.load(path), config))
        if changed := differences(before, now):
            raise UsageError(
                "this is not the config of the run that the folder holds:\n  " + "\n  ".join(changed),
                where=path,
                fix=f"undo these changes to go on with it, or choose another {option('output_dir')}",
            )
    write_text(path, config.dump())


def _fixed(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key not in FREE}


def check_run_gradients(config: RunConfig) -> GradientCheck:
    """Compare the first step of a run, under this launcher, with the big batch; trains and writes nothing."""
    distributed.start()
    torch.manual_seed(config.train.seed)
    model = open_model(config.model)
    train, _ = open_data(config.data, config.train, claim_folder(Path(config.train.output_dir)))
    return check_gradients(TrainSetup(model, train, config.train, similar=[each.build() for each in config.similar]))


def open_model(config: ModelConfig) -> DualEncoder:
    """The model that a config names, changed as it says."""
    if config.name is not None:
        opener = DualEncoder.from_config if config.scratch else DualEncoder.from_pretrained
        logger.info("model: opening %s", config.name)
        model = opener(config.name)
        _say_thawed(model, config)
    else:
        assert config.vision is not None  # ModelConfig checked both
        assert config.text is not None
        logger.info("model: joining %s and %s", config.vision, config.text)
        model = DualEncoder.from_towers(
            config.vision, config.text, config.tokenizer or config.text, dim=config.dim, head=config.head
        )
    change_model(model, config)
    return model


def _say_thawed(model: DualEncoder, config: ModelConfig) -> None:
    """A saved model is opened with nothing frozen, however it was trained."""
    before = model.card.config.get("model")
    for part in before.get("freeze", ()) if isinstance(before, Mapping) else ():
        adapted = config.lora is not None and config.lora.part in (part, "both")
        if part not in config.freeze and part not in config.freeze_blocks and not adapted and distributed.is_main():
            words = "%s was trained with a frozen %s tower, which is trained now: model.freeze=%s freezes it again"
            logger.warning(words, config.name, part, part)


def change_model(model: DualEncoder, config: ModelConfig) -> None:
    """Resize, freeze and adapt a model in place, in the order in which these things build on each other."""
    if config.image_size is not None or config.context_length is not None:
        model.resize(image_size=config.image_size, context_length=config.context_length)
    for part in config.freeze:
        model.freeze(part)
    for part, first in config.freeze_blocks.items():
        model.freeze(part, blocks=first)
    if config.lora is not None:
        model.add_lora(**vars(config.lora))
    if config.gradient_checkpointing:
        model.gradient_checkpointing()
    if config.patch_dropout:
        model.patch_dropout(config.patch_dropout)


def open_data(config: DataConfig, loop: TrainConfig, folder: Path) -> tuple[Any, Any]:
    """Training and test pairs; what was left out is listed in `folder`, in rejects.jsonl and test_rejects.jsonl."""

    train = _load(config.train, config, loop, folder / "rejects.jsonl")
    require_texts(train)
    if config.test == 0:
        return train, None
    if isinstance(config.test, str):
        test = _load(config.test, config, loop, folder / "test_rejects.jsonl")
        if distributed.is_main() and (shared := str(overlap(train, test))):
            logger.warning("data.test: %s", shared)
    else:
        size = int(config.test) if config.test >= 1 else config.test
        train, test = split_pairs(train, test=size, by=config.split_by, seed=loop.seed)
    logger.info("data: %s rows to train on, %s held out", f"{len(train):,}", f"{len(test):,}")
    return train, test


def _load(source: str, columns: DataConfig | ReferenceConfig, loop: TrainConfig, rejects: Path) -> Any:
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
        )


def keep_features(model: DualEncoder, train: Any, store: EmbeddingStore, draws: int, loop: TrainConfig) -> Any:
    """The training pairs with what the locked image tower makes of them, as far as `store` has it not yet."""
    model.to(distributed.start())
    return with_image_features(
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
    """What a config asks to be measured on the held-out pairs; nothing where none are held out."""
    if test is None:
        return []
    wanted: list[Evaluator] = []
    options: dict[str, Any] = {"on_bad": loop.on_bad, "workers": loop.workers, "progress": loop.progress}
    options["features"] = features
    if config.retrieval and not has_texts(test):
        logger.info("the held-out images have labels, but no texts: retrieval is not measured")
    elif config.retrieval:
        wanted.append(RetrievalEvaluator(test, group=config.group, **options))
    if config.loss:
        wanted.append(ValidationLoss(test, **options))
    if config.zero_shot:
        wanted.append(ZeroShotEvaluator(test, label=config.zero_shot, templates=config.templates, **options))
    if not wanted:
        more = "evaluate.retrieval=true or evaluate.loss=true" if has_texts(test) else "evaluate.zero_shot=label"
        fix = f"set {more}; data.test=0 holds nothing out"
        raise UsageError("nothing would be measured", where="evaluate", fix=fix)
    return wanted


def reference(config: EvaluateConfig, loop: TrainConfig, folder: Path) -> Evaluator | None:
    """The evaluator of what must not be forgotten; None for the built-in one, and where there is no guardrail."""
    if config.reference is None:
        return None
    with within("evaluate.reference", [each.name for each in fields(ReferenceConfig)]):
        pairs = _load(config.reference.data, config.reference, loop, folder / "reference_rejects.jsonl")
        require_texts(pairs)
    options: dict[str, Any] = {"on_bad": loop.on_bad, "workers": loop.workers, "progress": loop.progress}
    return RetrievalEvaluator(pairs, name="reference", **options)


def save_result(
    folder: Path, model: DualEncoder, result: TrainResult, measured: Sequence[Evaluator], seed: int
) -> None:
    """Write result.json: the metrics of the weights that were kept, and what they are to be compared with."""
    if distributed.is_main():
        early = result.stopped_early
        alpha = None if result.forgetting is None else result.forgetting.alpha
        more = {"step": result.step, "steps": result.steps, "stopped_early": early, "alpha": alpha}
        write_json(folder / "result.json", build_result(model, result.metrics, measured, seed, result.seconds, **more))
        logger.info("%s: step %d of %d was best", folder, result.step, result.steps)
