"""The model card: README.md of a saved folder, for people and for the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import UsageError
from clipkit.metrics.ranking import greater_is_better
from clipkit.models.fingerprint.fingerprint import Fingerprint, measure_processor
from clipkit.models.processor import Processor
from clipkit.models.saving import standalone as plain_torch
from clipkit.suggest import near

if TYPE_CHECKING:
    from clipkit.models.backend import Backend

NAME = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARY = {"open_clip": "open_clip", "towers": "clipkit", "onnx": "onnxruntime"}  # all other forms are transformers'


@dataclass(frozen=True)
class Card:
    """What a card says that the weights do not.

    Attributes:
        license: as the hub spells it (`mit`, `cc-by-4.0`); whoever publishes a model has to say.
        base_model: what was fine-tuned, `org/name` or `open_clip:ARCH/TAG`.
        data: what it was trained on, in words.
        pairs: how many image-text pairs it was trained on.
        config: of the training.
        metrics: by key, of these very weights.
        n: how many images, texts and classes the metrics rest on.
        limits: what it should not be used for, in words.
        forgetting: what the guardrail measured, see `forgetting_lines`; it goes with the metrics.
        measured: fingerprint of the model that the metrics belong to; filled in when it is saved.
    """

    license: str = "unknown"
    base_model: str | None = None
    data: str | None = None
    pairs: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    n: Mapping[str, int] = field(default_factory=dict)
    limits: str | None = None
    forgetting: Mapping[str, Any] = field(default_factory=dict)
    measured: str | None = None

    def updated(self, facts: Mapping[str, Any]) -> Card:
        """With some facts replaced.

        Raises:
            UsageError: a card has no such fact.
        """
        known = [item.name for item in fields(self) if item.name != "measured"]
        for key in facts:
            if key not in known:
                message = f"a model card has no {key!r}.{near(str(key), known)}"
                raise UsageError(message, where="card", fix=f"one of: {', '.join(known)}")
        card = replace(self, **facts)
        if "metrics" not in facts:
            return card
        return replace(card, measured=None, forgetting=facts.get("forgetting", {}))  # of the same weights, or none

    def settled(self, name: str, fingerprint: Fingerprint) -> Card:
        """With the base model that a name tells, and without metrics of other weights."""
        card = self if self.base_model else replace(self, base_model=base_of(name))
        if not card.metrics:
            return card
        if card.measured not in (None, fingerprint.hash):
            return replace(card, metrics={}, n={}, forgetting={}, measured=None)
        return replace(card, measured=fingerprint.hash)

    def as_dict(self) -> dict[str, Any]:
        """For clipkit.json."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Card:
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in facts.items() if key in known})


def base_of(name: str) -> str | None:
    """The hub's or open_clip's name of a model; None for a folder, which means nothing elsewhere."""
    rest = name.removeprefix("open_clip:").removeprefix("hf-hub:")
    return name if _HUB_NAME.fullmatch(rest) and not Path(rest).exists() else None


def write(
    folder: Path, card: Card, backend: Backend, processor: Processor, fingerprint: Fingerprint, form: str
) -> None:
    """Write README.md from `model_card.md.jinja`; `form` is what clipkit.json says the folder is."""
    from jinja2 import Environment, StrictUndefined

    source = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    values = {
        "form": form,
        **_front_matter(card, form),
        **_architecture(backend, processor, fingerprint),
        **_training(card),
        **_use(backend, processor, form),
    }
    text = environment.from_string(source).render(card=card, **values)
    (folder / NAME).write_text(text, encoding="utf-8")


def _front_matter(card: Card, form: str) -> dict[str, Any]:
    on_hub = card.base_model is not None and _HUB_NAME.fullmatch(card.base_model)
    return {
        "license": json.dumps(card.license),
        "library": _LIBRARY.get(form, "transformers"),
        "tags": list(dict.fromkeys(("clip", "contrastive", "clipkit", form))),
        "hub_base": card.base_model if on_hub else None,
    }


def _architecture(backend: Backend, processor: Processor, fingerprint: Fingerprint) -> dict[str, Any]:
    record = fingerprint.record
    towers = {
        side: {key: record[side].get(key) for key in ("class", "activation", "pooling")} for side in ("image", "text")
    }
    return {
        **towers,
        "dim": backend.dim,
        "image_size": processor.image_size,
        "context_length": processor.context_length,
        "sigmoid": record["logit_bias"] is not None,
        "parameters": f"{sum(parameter.numel() for parameter in backend.parameters()):,}",
        "fingerprint": fingerprint.hash,
    }


def _training(card: Card) -> dict[str, Any]:
    pairs = f"{card.pairs:,} image-text pairs" if card.pairs else None
    return {
        "data": "; ".join(text for text in (card.data, pairs) if text),
        "config": json.dumps(_plain(card.config), indent=2, ensure_ascii=False) if card.config else None,
        "counts": ", ".join(f"{key} {count:,}" for key, count in card.n.items()),
        "forgetting": "\n".join(forgetting_lines(card.forgetting)) if card.forgetting else None,
    }


def _use(backend: Backend, processor: Processor, form: str) -> dict[str, Any]:
    """Return what the program of this form needs: the loader of towers, or how transformers pads texts."""
    if form == "open_clip":
        return {}
    if form == "towers":
        from clipkit.models.backends.towers import TowersBackend

        assert isinstance(backend, TowersBackend)
        loader = plain_torch.program(backend.joint, processor, *backend.classes(), as_block=True)
        return {"loader": loader.rstrip("\n")}
    text = measure_processor(processor)["text"]
    return {"padding": text["padding"], "uses_attention_mask": text["attention_mask"] == "given"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def forgetting_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return lines of Markdown on what a training lost, and which weights were chosen.

    Args:
        facts: `domain` and `reference` (metric keys), `baseline`, `budget`, `points` (with `alpha`, `domain`,
            `reference`), `chosen` (its alpha), `held` (whether any point is within the budget), `greater_is_better`
            (whether higher values of the reference are better).
    """
    lines = [_verdict(facts), ""]
    lines += [f"| alpha | {facts['domain']} | {facts['reference']} | lost | |", "|---|---|---|---|---|"]
    for point in facts["points"]:
        lost = _lost(facts, point)
        notes = []
        if point["alpha"] == 0:
            notes.append("before")
        if point["alpha"] == 1:
            notes.append("fine-tuned")
        if point["alpha"] == facts["chosen"]:
            notes.append("chosen")
        note = ", ".join(notes)
        lines.append(
            f"| {point['alpha']:.1f} | {point['domain']:.4f} | {point['reference']:.4f} | {lost:+.4f} | {note} |"
        )
    return lines


def _nothing_kept(facts: Mapping[str, Any]) -> str:
    within = sum(_lost(facts, point) <= facts["budget"] + 1e-9 for point in facts["points"])
    return "No other alpha is within that" if within == 1 else "No other alpha within that does better in the domain"


def _lost(facts: Mapping[str, Any], point: Mapping[str, Any]) -> float:
    lost = float(facts["baseline"]) - float(point["reference"])
    greater = facts.get("greater_is_better", greater_is_better(facts["reference"]))  # earlier versions did not write it
    return lost if greater else -lost


def _verdict(facts: Mapping[str, Any]) -> str:
    budget = f"{facts['reference']} was {facts['baseline']:.4f} before training; {facts['budget']:g} of it may be lost."
    alpha = f"{facts['chosen']:g}"
    if not facts["held"]:
        return f"{budget} No alpha is within that: {alpha}, which lost least, was chosen, and the budget is not held."
    if facts["chosen"] == 0:
        return f"{budget} {_nothing_kept(facts)}: alpha 0 was chosen, the weights before training."
    return f"{budget} Weights = (1 - alpha) * before + alpha * fine-tuned; alpha {alpha} was chosen."
