"""From class names and templates to one text embedding for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.embedding.embed import embed
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import UsageError
from clipkit.models.dual_encoder import DualEncoder

DEFAULT_TEMPLATE = "a photo of a {}."
_SLOTS = ("{}", "{c}")


def prompts(
    class_names: Sequence[str] | Mapping[str, str | Sequence[str]], templates: str | Sequence[str] = DEFAULT_TEMPLATE
) -> dict[str, list[str]]:
    """The prompts of each class: each of its names in each template.

    Args:
        class_names: the names; or a mapping from each class to the name or names that are written into the prompts,
            such as ``{"happy": ["happy", "smiling"]}``.
        templates: one or several; each holds the slot ``{}`` or ``{c}``, which the name replaces as it stands (other
            braces are plain text).

    Raises:
        UsageError: no class, a class or a name twice, an empty name, or a template without a slot.

    >>> prompts({"cat": ["cat", "kitten"]}, "a {}.")
    {'cat': ['a cat.', 'a kitten.']}
    """
    names = _names(class_names)
    patterns = _templates(templates)
    return {c: [_fill(pattern, name) for name in own for pattern in patterns] for c, own in names.items()}


def class_embeddings(
    model: DualEncoder,
    class_prompts: Mapping[str, Sequence[str]],
    *,
    store: EmbeddingStore | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """(classes, dim), unit length: the prompts' unit embeddings, averaged per class and normalised again.

    Radford et al. 2021, 3.1.4. The mean of a class's logits or probabilities would be another number.

    Raises:
        UsageError: the prompts of a class cancel out.
    """
    texts = [text for own in class_prompts.values() for text in own]
    found = embed(model, texts, kind="text", store=store, batch_size=batch_size, progress=progress)
    vectors = normalize(found.vectors, dim=1)
    parts = torch.split(vectors, [len(own) for own in class_prompts.values()])
    means = torch.stack([part.mean(0) for part in parts])
    lost = (means.norm(dim=1) < 1e-6).nonzero().flatten().tolist()
    if lost:
        raise UsageError("the prompts of a class average to nothing", where=list(class_prompts)[lost[0]])
    return normalize(means, dim=1)


def _fill(template: str, name: str) -> str:
    # not str.format: "{c.__class__}" would look up attributes, and any other brace would raise
    for slot in _SLOTS:
        template = template.replace(slot, "\0")
    return template.replace("\0", name)


def _templates(templates: str | Sequence[str]) -> list[str]:
    found = [templates] if isinstance(templates, str) else list(templates)
    if not found:
        raise UsageError("expected at least one template", fix=f'for example "{DEFAULT_TEMPLATE}"')
    for template in found:
        if not any(slot in template for slot in _SLOTS):
            raise UsageError(
                "a template needs the slot {} or {c}, where the class name goes",
                where=repr(template),
                fix=f'for example "{DEFAULT_TEMPLATE}"',
            )
    if len(set(found)) < len(found):
        raise UsageError("a template is given twice", where=repr(_twice(found)))
    return found


def _names(class_names: Sequence[str] | Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    if isinstance(class_names, str):
        raise UsageError(
            f"expected a list of class names, found the text {class_names!r}", fix=f"[{class_names!r}, ...]"
        )
    if isinstance(class_names, Mapping):
        own = {c: [n] if isinstance(n, str) else list(n) for c, n in class_names.items()}
    else:
        own = {name: [name] for name in class_names}
        if len(own) < len(class_names):
            raise UsageError("a class name is given twice", where=repr(_twice(class_names)), fix="drop one")
    if not own:
        raise UsageError("expected at least one class name, found none")
    every = [name for names in own.values() for name in names]
    for c, names in own.items():
        if not names or not all(isinstance(name, str) and name.strip() for name in [c, *names]):
            raise UsageError("every class needs a name, and no name may be empty", where=repr(c))
    if len(set(every)) < len(every):
        raise UsageError("two classes share a name, so no image could be told apart", where=repr(_twice(every)))
    return own


def _twice(values: Sequence[str]) -> str:
    return next(value for i, value in enumerate(values) if value in values[:i])
