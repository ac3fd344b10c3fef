"""ZeroShotEvaluator: the accuracy of ZeroShotClassifier itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from clipkit.data.reading.rejects import Reject
from clipkit.embedding.embed import embed
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import DataError, UsageError, option
from clipkit.evaluation.dataset import Subset, require_columns
from clipkit.evaluation.evaluator import Evaluator
from clipkit.evaluation.small import small_test
from clipkit.evaluation.zero_shot_result import ClassFigures, ZeroShotResult
from clipkit.images.parallel import Workers
from clipkit.labelling.classifier import Predictions, ZeroShotClassifier
from clipkit.metrics import classification as metrics
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.text_notices import Notice, tell
from clipkit.prompts import DEFAULT_TEMPLATE, Names, Templates, prompts


class ZeroShotEvaluator(Evaluator):
    """Classifies the images of a labelled data set by class names alone, with `ZeroShotClassifier`.

    Inputs: a model, on every process where there are several. It returns ``{name}/top1``, ``{name}/mean_per_class``
    (the mean recall of the classes that are present) and, with more than five classes, ``{name}/top5``.

    When to prefer it: images with labels; where classes are of unequal size read ``mean_per_class``.

    Relations: `RetrievalEvaluator` scores captions; `ZeroShotClassifier` labels images without known labels.

    Args:
        pairs: a data set with ``image`` and a column of labels: `datasets.ClassLabel`, class names, or numbers from 0.
        class_names: names for the prompts. Left out, the labels' own names. A list is in the order of the labels (for
            labels that are names: any order); a mapping goes from each label's name to the names its prompts use.
        templates: one or several, with the slot ``{}`` or ``{c}``; or a mapping from each class to its own templates or
            whole prompts.
        label: the column of labels.
        name: the prefix of the metric keys.
        store: keeps the embeddings by content, for the next evaluation of the same weights.
        features, batch_size, workers, progress: as for `embed`.
        on_bad: "skip" leaves an image that cannot be used out and lists it in ``rejected``.

    Raises:
        DataError: no row, a row without a label, or a label that is not one of the classes.
        UsageError: a column is missing, or the class names do not fit the labels.

    ``notices`` holds, and the log tells, what the data set is too small to tell and what the model cannot see of the
    classes.

    References:
        Radford et al. 2021 (CLIP), section 3.1.

    Example: with `model` a `DualEncoder` and `labelled` a data set with the classes red and blue.
        >>> evaluator = ZeroShotEvaluator(labelled, templates="a {} square")
        >>> list(evaluator(model))
        ['zero_shot/top1', 'zero_shot/mean_per_class']
    """

    def __init__(
        self,
        pairs: Any,
        *,
        class_names: Names | None = None,
        templates: Templates = DEFAULT_TEMPLATE,
        label: str = "label",
        name: str = "zero_shot",
        store: EmbeddingStore | None = None,
        features: EmbeddingStore | None = None,
        batch_size: int = 64,
        workers: Workers = "auto",
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "error",
    ) -> None:
        require_columns(pairs, ["image", label])
        own_names = getattr(pairs.features[label], "names", None)
        self.class_names, self.labels = _align(list(pairs[label]), own_names, class_names, label)
        prompts(self.class_names, templates)  # wrong names and templates are told now, not after an hour of training
        self.name, self.templates, self.store, self.features = name, templates, store, features
        self.batch_size, self.workers, self.progress, self.on_bad = batch_size, workers, progress, on_bad
        self.images: Sequence[Any] = pairs["image"]
        self.last: ZeroShotResult | None = None
        self.rejected: list[Reject] = []
        self._rows = list(range(len(self.images)))  # of the data set
        self.notices = self._small()

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """The figures of this model, the same on every process.

        Raises:
            ModelError: the model gives embeddings that are not finite.
            BadImage: an image cannot be used.
        """
        classifier = ZeroShotClassifier(
            model, self.class_names, templates=self.templates, store=self.store, progress=self.progress
        )
        embedded = embed(
            model,
            self.images,
            store=self.store,
            features=self.features,
            batch_size=self.batch_size,
            workers=self.workers,
            progress=self.progress,
            on_bad=self.on_bad,
        )
        if embedded.rejected:  # left out for this and every later call
            self.rejected += [replace(reject, row=self._rows[reject.row]) for reject in embedded.rejected]
            self._rows = [self._rows[row] for row in embedded.rows]
            self.images, self.labels = Subset(self.images, embedded.rows), self.labels[embedded.rows]
        figures, self.last = self._score(classifier, embedded.vectors)
        self.notices = [*self._small(), *classifier.notices]
        return figures

    def _score(self, classifier: ZeroShotClassifier, vectors: Tensor) -> tuple[dict[str, float], ZeroShotResult]:
        """The figures and the report; the scores of a part of the images are held at once."""
        classes = len(classifier.class_names)
        if not len(vectors):
            raise DataError("there is nothing to score: no labelled row")
        hits, predicted = {1: torch.zeros(len(vectors), dtype=torch.float64)}, torch.zeros(len(vectors)).long()
        if classes > 5:
            hits[5] = torch.zeros(len(vectors), dtype=torch.float64)
        for start, stop in classifier.tiles(len(vectors)):
            logits = classifier.logits(vectors[start:stop])
            for k in hits:
                hits[k][start:stop] = metrics.hits(logits, self.labels[start:stop], k)
            predicted[start:stop] = logits.argmax(1)
        figures = {f"{self.name}/top{k}": float(hit.mean()) for k, hit in hits.items()}
        recall = metrics.recall_of_hits(hits[1], self.labels, classes)
        figures[f"{self.name}/mean_per_class"] = float(recall.nanmean())
        predictions = Predictions(classifier.class_names, *classifier.best(vectors), range(len(vectors)))
        confusion = metrics.confusion_of(predicted, self.labels, classes)
        images, named = confusion.sum(1).tolist(), confusion.sum(0).tolist()
        rows = []
        for name, n, part, times in zip(classifier.class_names, images, recall.tolist(), named, strict=True):
            rows.append(ClassFigures(name, n, part if n else None, times))
        names, labels = classifier.class_names, self.labels
        return figures, ZeroShotResult(figures, names, labels, hits[1], predictions, confusion, rows)

    def keys(self) -> list[str]:
        """The keys of the metrics, in their order."""
        return list(self.chance())

    def chance(self) -> dict[str, float]:
        """The figures of guessing, under the same keys."""
        classes = len(self.class_names)
        figures = {f"{self.name}/top1": metrics.chance(classes)}
        if classes > 5:
            figures[f"{self.name}/top5"] = metrics.chance(classes, 5)
        return figures | {f"{self.name}/mean_per_class": metrics.chance(classes)}

    def majority(self) -> dict[str, float]:
        """The figures of always naming the most frequent classes of this very data set, under the same keys."""
        classes = len(self.class_names)
        figures = {f"{self.name}/top1": metrics.majority(self.labels, classes)}
        if classes > 5:
            figures[f"{self.name}/top5"] = metrics.majority(self.labels, classes, 5)
        return figures | {f"{self.name}/mean_per_class": 1 / self._present()}

    def baselines(self) -> dict[str, dict[str, float]]:
        return {"chance": self.chance(), "majority": self.majority()}

    def identity(self) -> dict[str, Any]:
        return {
            "labels": self.labels,
            "class_names": self.class_names,
            "templates": self.templates,
            "images": self.images,
        }

    def counts(self) -> dict[str, int]:
        """How many images, how many classes, and of how many classes there is an image."""
        counts = {"images": len(self.labels), "classes": len(self.class_names), "classes_present": self._present()}
        return {f"{self.name}/{item}": count for item, count in counts.items()}

    def _small(self) -> list[Notice]:
        notices = small_test(self.name, {"images": len(self.labels)}, self.chance(), self.majority())
        tell(notices, self)
        return notices

    def _present(self) -> int:
        return int((torch.bincount(self.labels) > 0).sum())


def _align(
    labels: list[Any], own_names: Sequence[str] | None, class_names: Names | None, column: str
) -> tuple[Names, Tensor]:
    """The classes, in the order of the numbers that are the labels beside them."""
    missing = [row for row, label in enumerate(labels) if label is None or label == -1]
    if missing:
        where = f"column {column!r}, row {missing[0]}"
        raise DataError(f"every row needs a label; {len(missing)} of {len(labels)} have none", where=where)
    if all(isinstance(label, str) for label in labels):
        own_names = list(class_names) if class_names is not None else sorted(set(labels))
        number = {name: i for i, name in enumerate(own_names)}
        unknown = [row for row, label in enumerate(labels) if label not in number]
        if unknown:
            message = (
                f"the label {labels[unknown[0]]!r} is none of the {len(number)} classes ({len(unknown)} such rows)"
            )
            raise DataError(message, where=f"column {column!r}, row {unknown[0]}", fix="name it in class_names")
        return class_names if class_names is not None else own_names, torch.tensor([number[label] for label in labels])
    if not all(isinstance(label, int) for label in labels):
        raise DataError("labels must be class numbers or class names", where=f"column {column!r}")
    names = _numbered(own_names, class_names, column)
    bad = [row for row, label in enumerate(labels) if not 0 <= label < len(names)]
    if bad:
        message = f"a label must lie in 0..{len(names) - 1}, found {labels[bad[0]]}"
        raise DataError(message, where=f"column {column!r}, row {bad[0]}", fix="give a name to every class")
    return names, torch.tensor(labels)


def _numbered(own_names: Sequence[str] | None, class_names: Names | None, column: str) -> Names:
    if class_names is None:
        if own_names is None:
            raise UsageError(
                f"the labels in {column!r} are bare numbers",
                fix=option("evaluate.zero_shot", "COLUMN", python="class_names=[…], in their order"),
            )
        return own_names
    if own_names is None:
        return class_names
    if isinstance(class_names, Mapping):
        if set(class_names) != set(own_names):
            lost, more = sorted(set(own_names) - set(class_names)), sorted(set(class_names) - set(own_names))
            raise UsageError(f"class_names must have the data set's classes as keys; missing {lost}, unknown {more}")
        return {name: class_names[name] for name in own_names}
    if len(class_names) != len(own_names):
        raise UsageError(f"the data set has {len(own_names)} classes, class_names has {len(class_names)}")
    return class_names
