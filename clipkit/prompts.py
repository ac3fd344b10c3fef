"""Texts from class names: prompts for labelling and evaluation, captions for training.

>>> prompts(["sea_lion"])
{'sea_lion': ['a photo of a sea lion.']}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from clipkit.errors import UsageError
from clipkit.texts import is_blank

Names: TypeAlias = "Sequence[str] | Mapping[str, str | Sequence[str]]"
"""Classes; or for each class the name or names that its prompts use."""
Templates: TypeAlias = "str | Sequence[str] | Mapping[str, str | Sequence[str]]"
"""Texts with a slot for the name; or for each class its own templates or whole prompts."""

DEFAULT_TEMPLATE = "a photo of a {}."
_SLOTS = ("{}", "{c}")
_NEAR_SLOTS = re.compile(r"\{[^{}]*\}|%s|<\w+>|\[\w+\]")  # what other tools write


def words(label: str) -> str:
    """A label as it is written into a prompt: underscores are spaces, and there are none at its ends or two in a row.

    >>> words("sea_lion ")
    'sea lion'
    """
    return " ".join(label.replace("_", " ").split()) or label.strip()


def prompts(class_names: Names, templates: Templates = DEFAULT_TEMPLATE) -> dict[str, list[str]]:
    """The prompts of each class: each of its names in each template.

    Args:
        class_names: the classes, of which `words` makes the names; or a mapping from each class to the name or names
            that are written into the prompts as they stand, such as ``{"happy": ["happy", "smiling"]}``.
        templates: one or several with the slot ``{}`` or ``{c}``, which the name replaces (other braces are plain
            text); or a mapping from each class to its own, where a text without a slot is a whole prompt.

    Raises:
        UsageError: no class, a class or a name twice, an empty name; no template, one twice or without a slot; a
            mapping of templates without one of the classes.

    >>> prompts({"cat": ["cat", "kitten"]}, "a {}.")
    {'cat': ['a cat.', 'a kitten.']}
    """
    names = names_of(class_names)
    patterns = check_templates(templates)
    return {c: _filled(_own(patterns, c), own) for c, own in names.items()}


def captions(labels: Iterable[str], templates: Templates = DEFAULT_TEMPLATE) -> dict[str, list[str]]:
    """The texts of each label, for training: as `prompts`, but labels may read alike, and templates may have more.

    Raises:
        UsageError: of the templates, as `prompts`.
    """
    patterns = check_templates(templates)
    return {label: _filled(_own(patterns, label), [words(label)]) for label in labels}


def check_templates(templates: Templates) -> list[str] | dict[str, list[str]]:
    """Templates as a list; a mapping's as a list for each class.

    Raises:
        UsageError: there is none, one is given twice, one has no slot and belongs to no class, or a prompt is empty.
    """
    if isinstance(templates, Mapping):
        own = {c: _listed(patterns, where=repr(c)) for c, patterns in templates.items()}
        if not own:
            raise UsageError("expected prompts for each class, found none")
        return own
    shared = _listed(templates, where=None)
    for template in shared:
        if not any(slot in template for slot in _SLOTS):
            near = _NEAR_SLOTS.sub("{}", template, count=1)
            raise UsageError(
                f"a template needs the slot {{}}, where the name of the class goes; found {template!r}",
                fix=f'for example "{near if near != template else DEFAULT_TEMPLATE}"',
            )
    return shared


def names_of(class_names: Names) -> dict[str, list[str]]:
    """The names of each class, as they are written into prompts.

    Raises:
        UsageError: see `prompts`.
    """
    if isinstance(class_names, str):
        fix = f"[{class_names!r}, ...]"
        raise UsageError(f"expected a list of class names, found the text {class_names!r}", fix=fix)
    if isinstance(class_names, Mapping):
        own = {c: [names] if isinstance(names, str) else list(names) for c, names in class_names.items()}
    else:
        _check_named({c: [c] for c in class_names})
        own = {c: [words(c)] for c in class_names}
        if len(own) < len(class_names):
            raise UsageError("a class name is given twice", where=repr(_twice(class_names)), fix="drop one")
    if not own:
        raise UsageError("expected at least one class name, found none")
    _check_named(own)
    by_name: dict[str, str] = {}
    named = [(c, name) for c, names in own.items() for name in names]
    for c, name in named:
        if name in by_name:
            fix = "make them one class, or give each a name of its own"
            if by_name[name] == c:
                raise UsageError(f"the name {name!r} is given twice", where=repr(c), fix="drop one")
            message = f"two classes share the name {name!r}, so no image could be told apart"
            raise UsageError(message, where=f"{by_name[name]!r} and {c!r}", fix=fix)
        by_name[name] = c
    return own


def _check_named(own: Mapping[str, Sequence[str]]) -> None:
    for number, (c, names) in enumerate(own.items(), 1):
        if not names or not all(isinstance(name, str) and not is_blank(name) for name in [c, *names]):
            where = f"class {number} of {len(own)}: {c!r}"
            raise UsageError(
                "every class needs a name, and no name may be empty", where=where, fix="name it, or leave it out"
            )


def _listed(templates: str | Sequence[str], where: str | None) -> list[str]:
    listed = [templates] if isinstance(templates, str) else list(templates)
    if not listed:
        fix = f'for example "{DEFAULT_TEMPLATE}"'
        raise UsageError("expected at least one template, found none", where=where, fix=fix)
    if not all(isinstance(template, str) and not is_blank(template) for template in listed):
        raise UsageError("a template or prompt is a text, and not empty", where=where, fix="write it, or leave it out")
    if len(set(listed)) < len(listed):
        raise UsageError("a template is given twice", where=repr(_twice(listed)), fix="drop one")
    return listed


def _own(patterns: list[str] | dict[str, list[str]], c: str) -> list[str]:
    if isinstance(patterns, list):
        return patterns
    if c not in patterns:
        fix = f"add it: {{{c!r}: [{DEFAULT_TEMPLATE.replace('{}', words(c))!r}], ...}}"
        raise UsageError(f"templates has no prompt for the class {c!r}, only for {_few(patterns)}", fix=fix)
    return patterns[c]


def _filled(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(_fill(pattern, name) for name in names for pattern in patterns))


def _fill(template: str, name: str) -> str:
    # not str.format: "{c.__class__}" would look up attributes, and any other brace would raise
    for slot in _SLOTS:
        template = template.replace(slot, "\0")
    return template.replace("\0", name)


def _twice(values: Sequence[str]) -> str:
    return next(value for i, value in enumerate(values) if value in values[:i])


def _few(values: Iterable[str]) -> str:
    shown = [repr(value) for value in values]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
