"""The `Trainer`: it takes a model, pairs and a config, and trains the model to its best weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipkit import distributed
from clipkit.evaluation.evaluator import Evaluator, Measure
from clipkit.losses.similarity import Paired, Similarity
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.checkpoints.signals import StopSignal
from clipkit.training.config.train import TrainConfig
from clipkit.training.loop import Loop
from clipkit.training.result import TrainResult
from clipkit.training.run_folder.ownership import locked
from clipkit.training.setup import TrainSetup


class Trainer:
    """Trains a dual encoder on pairs, with any notion of similarity, on any number of processes.

    Start the program with ``python``, ``torchrun`` or ``accelerate launch``; the global batches, and with
    dropout off the gradients, are the same. After `train` the model has the best weights, which are also
    saved in ``output_dir/model``.

    A checkpoint is saved every few minutes, and when a signal asks to stop. With ``resume="auto"`` the same program,
    started again, goes on from the newest one: bit for bit on the same set-up, with the same global batches on any.

    Args:
        model: is trained in place; parts that were frozen do not change.
        pairs: a data set with `image` and `texts`, as `load_pairs` gives it, or anything with `len` and `pairs[i]`
            (a list of dicts, a map-style torch Dataset). A column `image_features` replaces the images of a
            locked tower (see `with_image_features`).
        config: the settings of the loop.
        similar: the notions of similarity; several are added, each times its weight.
        evaluators: each is called on every rank with the model and returns metrics by key. A function will do; an
            `Evaluator` says more about its metrics.
        reference: an evaluator of what the model must not forget, for ``config.forget_budget``: the budget is a loss of
            its first metric, and all of its metrics are logged as ``reference/…``. None: `SimilarityReference`, on data
            that ship with clipkit. With a budget the first evaluator (or ``config.best``) judges the domain, the run
            keeps the model that `Forgetting` describes, and ``output_dir/last`` holds the fine-tuned one.

    Raises:
        UsageError: the folder holds another run (see `resume`); the batch is larger than the data; trained BatchNorm
            on several ranks or with micro-batches; a sigmoid loss without a bias; a launcher that does not
            connect its processes; a stream in place of data.
        DataError: scores that are not weights; a row without captions.
    """

    def __init__(
        self,
        model: DualEncoder,
        pairs: Any,
        config: TrainConfig,
        *,
        similar: Similarity | Sequence[Similarity] = Paired(),
        evaluators: Sequence[Measure] = (),
        reference: Measure | None = None,
    ) -> None:
        self.setup = TrainSetup(model, pairs, config, similar=similar, evaluators=evaluators, reference=reference)
        self.model, self.config, self.folder = self.setup.model, self.setup.config, self.setup.folder
        self.plan, self.loader, self.accelerator = self.setup.plan, self.setup.loader, self.setup.accelerator

    def train(self) -> TrainResult:
        """Train, evaluate and keep the best weights; see the class.

        Raises:
            Interrupted: SIGTERM, SIGINT or SIGUSR1 came; a checkpoint was saved.
            ResourceError: the disk cannot hold the checkpoints.
            CorruptArtefact: all checkpoints to resume from are damaged.
        """
        with locked(self.folder), distributed.lost_processes(), StopSignal() as stop:
            return Loop(self.setup, stop).run()

    def measured(self) -> list[Evaluator]:
        """Return the evaluators, and the guardrail last; an evaluation calls them all."""
        return self.setup.measured()
