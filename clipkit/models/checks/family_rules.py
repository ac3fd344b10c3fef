"""What is known of a family of models, whatever its files say: how CLIP and SigLIP were trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from clipkit.models.checks.finding import Finding, Level, about, why
from clipkit.models.checks.sizes import PREPROCESSING, size_findings

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder
    from clipkit.models.fingerprint.fingerprint import Fingerprint


class _Rule(NamedTuple):
    key: str
    accepted: tuple[str, ...]  # how the value begins
    level: Level
    says: str
    fix: str


_CLIP_ACTIVATION = [
    _Rule(
        f"{part}.activation",
        ("quick_gelu",),
        "warning",
        "OpenAI's CLIP, MetaCLIP and DFN compute quick_gelu, LAION's gelu",
        'if the weights are of the first kind: hidden_act "quick_gelu" in config.json, or open_clip\'s -quickgelu '
        "architecture",
    )
    for part in ("image", "text")
]

_CLIP_COLOURS = [
    _Rule(
        "image.mean",
        ("0.4815 0.4578 0.4082",),
        "warning",
        "CLIP's is 0.4815 0.4578 0.4082",
        f"image_mean in {PREPROCESSING}",
    ),
    _Rule(
        "image.std",
        ("0.2686 0.2613 0.2758",),
        "warning",
        "CLIP's is 0.2686 0.2613 0.2758",
        f"image_std in {PREPROCESSING}",
    ),
]

_CLIP = [
    _Rule(
        "image.resize",
        ("shortest side", "none"),
        "warning",
        "CLIP resizes the shortest side",
        f"size in {PREPROCESSING}",
    ),
    _Rule("image.crop", ("centre",), "warning", "CLIP crops the centre", f"do_center_crop in {PREPROCESSING}"),
    _Rule(
        "text.case",
        ("lower-cased", "unknown"),
        "warning",
        "CLIP's tokenizer lower-cases",
        "take tokenizer.json from the original model",
    ),
    _Rule(
        "text.end_when_cut",
        ("kept",),
        "error",
        "CLIP reads the end token also of a text that is cut",
        "take the tokenizer's files from the original model; let it truncate, do not slice ids",
    ),
]

_END_TOKEN = _Rule(
    "text.pooling",
    ("end token", "not measured"),
    "error",
    "CLIP reads the state of the end token",
    "eos_token_id in the text config must be the id that the tokenizer ends texts with",
)

_FIRST_TOKEN = _Rule(
    "text.pooling",
    ("first token", "not measured"),
    "error",
    "this family reads the first token",
    "take config.json and the tokenizer's files from the original model; it pads on the right",
)

_SIGLIP = [
    _Rule("image.mean", ("0.5 0.5 0.5",), "warning", "SigLIP's is 0.5", f"image_mean in {PREPROCESSING}"),
    _Rule("image.std", ("0.5 0.5 0.5",), "warning", "SigLIP's is 0.5", f"image_std in {PREPROCESSING}"),
    _Rule("image.resize", ("squash",), "warning", "SigLIP squashes images to a square", f"size in {PREPROCESSING}"),
    _Rule("image.crop", ("none",), "warning", "SigLIP does not crop", f"do_center_crop in {PREPROCESSING}"),
    _Rule(
        "text.case",
        ("lower-cased", "unknown"),
        "warning",
        "SigLIP's tokenizers lower-case",
        "take the tokenizer's files from the original model, or give it text.lower()",
    ),
    _Rule("text.padding", ("max_length",), "error", "SigLIP pads every text to full length", 'padding="max_length"'),
    _Rule(
        "text.attention_mask", ("not given",), "error", "SigLIP was trained without a mask", "give it no attention_mask"
    ),
    _Rule(
        "text.pooling",
        ("last", "not measured"),
        "error",
        "SigLIP reads the last position",
        "take config.json from the original model",
    ),
]

_ANY = [
    _Rule(
        "image.antialias",
        ("on", "-", "unlike"),
        "warning",
        "hardly any published model does without",
        "resize with antialias=True",
    ),
    _Rule(
        "image.filter",
        ("bicubic", "-", "unlike"),
        "warning",
        "CLIP, SigLIP and most others use bicubic",
        f"resample 3 in {PREPROCESSING}",
    ),
]

_MADE_WITH_CLIP_TOKENS = "49407"


def training_family(model: DualEncoder, facts: Fingerprint) -> str:
    """Return the family that the model was trained like: `clip`, `siglip`, or `other` if that is not known."""
    family = model.backend.family
    if family in ("clip", "siglip"):
        return family
    if family != "open_clip":
        return "other"
    if facts.record["text"]["end_token"] == _MADE_WITH_CLIP_TOKENS:
        return "clip"
    return "siglip" if model.logit_bias is not None else "other"


def known_answers(model: DualEncoder, facts: Fingerprint) -> Iterator[Finding]:
    """Report what is wrong or unusual by what is known of the model's family, and of any model."""
    siglip2 = list(_siglip2(model, facts))
    reported = {finding.about for finding in siglip2}
    for rule in _rules(model, facts):
        value = _value(facts.record, rule.key)
        name = about(rule.key)
        if value is None or str(value).startswith(rule.accepted) or name in reported:
            continue
        part = rule.key.split(".")[0]
        yield Finding(rule.level, name, f"{part} {name}: {value}; {rule.says}", why(name), rule.fix)
    yield from siglip2
    yield from _scale(facts)
    yield from size_findings(model, training_family(model, facts))


def _rules(model: DualEncoder, facts: Fingerprint) -> list[_Rule]:
    family = model.backend.family
    if family in ("altclip", "chinese_clip", "metaclip_2"):
        return [*_CLIP_COLOURS, _END_TOKEN if family == "metaclip_2" else _FIRST_TOKEN, *_ANY]
    if family == "align":
        return [_FIRST_TOKEN, *_ANY[:1]]
    known = training_family(model, facts)
    if known == "clip":
        return [*(_CLIP_ACTIVATION if family == "clip" else ()), *_CLIP, *_CLIP_COLOURS, _END_TOKEN, *_ANY]
    return [*_SIGLIP, *_ANY] if known == "siglip" else _ANY[:1]


def _value(record: Mapping[str, Any], key: str) -> Any:
    part, name = key.split(".")
    return record[part].get(name)


def _siglip2(model: DualEncoder, facts: Fingerprint) -> Iterator[Finding]:
    tokenizer = getattr(model.processor.text_side, "tokenizer", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    gemma = type(tokenizer).__name__.startswith(("Gemma", "Siglip2"))
    if gemma and training_family(model, facts) == "siglip" and facts.record["text"]["case"] == "kept":
        says = "text case: kept; SigLIP 2 (a SigLIP with Gemma's tokenizer) was trained on lower-cased texts"
        yield Finding(
            "error", "case", says, why("case"), "transformers 5 with tokenizer_class Siglip2Tokenizer, or text.lower()"
        )


def _scale(facts: Fingerprint) -> Iterator[Finding]:
    log = float(facts.record["logit_scale"])
    if log > 8:
        what = f"logit scale: {log:g} is stored, which stands for exp({log:g})"
        fix = f"store its logarithm, {math.log(log):.4f}"
        yield Finding(
            "error", "logit scale", what + ": it was stored without taking the logarithm", why("logit scale"), fix
        )
    elif not -0.7 < log < 5.3:
        what = f"logit scale: {math.exp(log):.3g}; trained models lie between 1 and 200"
        yield Finding("warning", "logit scale", what, why("logit scale"), "compare it with the original model")
    elif log == 0:
        what = "logit scale: 1, as before any training (its logarithm is 0)"
        yield Finding(
            "warning", "logit scale", what, why("logit scale"), "if the model was trained, its scale was not saved"
        )
