"""What a model cannot see of its texts: unknown words, ends that are cut, texts that become the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

from clipkit import distributed
from clipkit.models.processor import Processor, TextSide

logger = logging.getLogger("clipkit")

Code: TypeAlias = Literal["UNKNOWN", "PARTLY_UNKNOWN", "CUT", "SAME", "CASE", "SMALL_TEST"]

_NOBODY_KNOWS = "\U00010000"  # a syllable of Linear B: no vocabulary of words has it
_CHUNK = 1024  # texts tokenized at once


@dataclass(frozen=True)
class Notice:
    """Something that is not an error, but that a user should know before a result is believed.

    Attributes:
        code: ``UNKNOWN``: every token of the text is unknown to the model, or it has none; ``PARTLY_UNKNOWN``: a word
            is; ``CUT``: its end is beyond the context length; ``SAME``: texts become the same tokens; ``CASE``: classes
            differ by case alone; ``SMALL_TEST``: a test set that cannot tell much.
        message: in words.
        texts: which ones, as they were typed, or which classes.
    """

    code: Code
    message: str
    texts: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"code": self.code, "message": self.message, "texts": list(self.texts)}


def text_notices(processor: Processor, texts: Sequence[str]) -> list[Notice]:
    """What the model cannot see of these texts, such as queries."""
    distinct = list(dict.fromkeys(texts))
    notices = [*_unknown(processor.text_side, distinct), *_cut(processor, distinct)]
    groups = _alike({text: [text] for text in distinct}, processor.text_side)
    for group in groups:
        notices.append(Notice("SAME", f"the model cannot tell {_and(group)} apart: the same tokens", group))
    return notices


def caption_notices(processor: Processor, captions: Sequence[str]) -> list[Notice]:
    """The same of many texts, counted: those of which the model knows nothing, and those that become the same."""
    side, total = processor.text_side, len(captions)
    notices = []
    if nothing := [text for text, known, _ in _known(side, captions) if not known]:
        message = f"the model knows nothing of {len(nothing)} of {total} captions, such as {_short(nothing[0])}"
        notices.append(Notice("UNKNOWN", message, tuple(nothing)))
    if groups := _alike({text: [text] for text in captions}, side):
        same = [text for own in groups for text in own]
        message = (
            f"{len(same)} of {total} captions become the same tokens as another, such as {_and(groups[0])}: they tie"
        )
        notices.append(Notice("SAME", message, tuple(same)))
    return notices


def class_notices(
    processor: Processor, names: Mapping[str, Sequence[str]], prompts: Mapping[str, Sequence[str]]
) -> list[Notice]:
    """What the model cannot see of the classes.

    Args:
        processor: the model's.
        names: of each class; a template around an unknown name would hide it.
        prompts: of each class.

    Returns:
        Notices whose ``texts`` are the classes.
    """
    typed = {c: _as_typed(names[c], prompts[c]) for c in names}
    notices = _of_classes(_unknown(processor.text_side, _flat(typed)), typed)
    cut = _of_classes(_cut(processor, _flat(prompts)), prompts)
    notices += {notice.texts: notice for notice in reversed(cut)}.values()  # one for each class, not for each template
    alike = _alike(prompts, processor.text_side)
    for classes in alike:
        message = f"the model cannot tell the classes {_and(classes)} apart: their prompts become the same tokens"
        notices.append(Notice("SAME", message, classes))
    for classes in _grouped(names, lambda c: " ".join(c.casefold().split())):
        if not any(set(classes) <= set(own) for own in alike):
            notices.append(Notice("CASE", f"the classes {_and(classes)} differ by case alone: are they one?", classes))
    return notices


_told: WeakKeyDictionary[object, set[Notice]] = WeakKeyDictionary()


def tell(notices: Iterable[Notice], about: object) -> None:
    """A line in the log of the main process for each, once for each tokenizer or evaluator that it is ``about``.

    An evaluator asks again at every evaluation. Of texts that are cut `DualEncoder.encode_texts` tells.
    """
    told = _told.setdefault(about, set())
    for notice in notices:
        if notice.code != "CUT" and notice not in told and distributed.is_main():
            logger.warning("%s", notice.message)
        told.add(notice)


def _flat(texts: Mapping[str, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(text for own in texts.values() for text in own))


def _of_classes(notices: Iterable[Notice], texts: Mapping[str, Sequence[str]]) -> list[Notice]:
    return [replace(notice, texts=tuple(c for c, own in texts.items() if notice.texts[0] in own)) for notice in notices]


def _as_typed(names: Sequence[str], prompts: Sequence[str]) -> Sequence[str]:
    """The names that stand in the prompts; or the prompts, where they were written whole."""
    return [name for name in names if any(name in prompt for prompt in prompts)] or prompts


def _unknown(side: TextSide, texts: list[str]) -> list[Notice]:
    notices = []
    for text, known, unknown in _known(side, texts):
        if not known:
            message = f"the model knows nothing of {_short(text)}: whatever it answers has nothing to do with it"
            notices.append(Notice("UNKNOWN", message, (text,)))
        elif unknown:
            parts = [word for word, _, not_known in _known(side, list(dict.fromkeys(text.split()))) if not_known]
            which = f"{_and(parts)} in {_short(text)}" if parts else f"all of {_short(text)}"
            notices.append(Notice("PARTLY_UNKNOWN", f"the model does not know {which}", (text,)))
    return notices


def _known(side: TextSide, texts: Sequence[str]) -> Iterator[tuple[str, bool, bool]]:
    """For each text whether it has a token that is known, and whether it has one that is not."""
    unknown = side.unknown_id
    for chunk in (texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK)):
        *rows, empty, strange = (set(row) for row in side([*chunk, "", _NOBODY_KNOWS])["input_ids"].tolist())
        # beside start, end and padding, what stands before any word (a space of its own in SentencePiece)
        says_nothing = empty | (strange if unknown in strange - empty else set())
        for text, row in zip(chunk, rows, strict=True):
            yield text, bool(row - says_nothing - {unknown}), unknown in row - empty


def _cut(processor: Processor, texts: list[str]) -> list[Notice]:
    length = processor.context_length
    long = [text for text in texts if len(text.encode(errors="replace")) + 4 > length]  # a token has a byte or more
    counts = processor.token_counts(long) if long else []
    cut = [(text, count) for text, count in zip(long, counts, strict=True) if count > length]
    seen = f"of which the model reads {length}: the end is not seen"
    return [Notice("CUT", f"{_short(text)} has {count} tokens, {seen}", (text,)) for text, count in cut]


def _alike(texts: Mapping[str, Sequence[str]], side: TextSide) -> list[tuple[str, ...]]:
    """Groups of names whose texts become the same tokens, as far as they are read."""
    rows = _token_rows(side, _flat(texts))
    return _grouped(texts, lambda name: frozenset(rows[text] for text in texts[name]))


def _token_rows(side: TextSide, texts: Sequence[str]) -> dict[str, bytes]:
    """A hash of the tokens of each text. One that is over-long pads every batch to the same length."""
    digests: dict[str, bytes] = {}
    longest = "a " * side.context_length
    for chunk in (texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK)):
        rows = side([*chunk, longest])["input_ids"].numpy()
        for text, row in zip(chunk, rows, strict=False):
            digests[text] = blake2b(row.tobytes(), digest_size=16).digest()
    return digests


def _grouped(names: Iterable[str], key: Callable[[str], Hashable]) -> list[tuple[str, ...]]:
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [tuple(own) for own in groups.values() if len(own) > 1]


def _and(texts: Sequence[str]) -> str:
    shown = [_short(text) for text in texts[:5]] + ([f"{len(texts) - 5} more"] if len(texts) > 5 else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}…{text[-19:]}")
