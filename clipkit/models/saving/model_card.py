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
        forgetting: what the guardrail found, see `forgetting_lines`; it goes with the metrics.
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
        known = [each.name for each in fields(self) if each.name != "measured"]
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
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Card:
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in found.items() if key in known})


def base_of(name: str) -> str | None:
    """The hub's or open_clip's name of a model; None for a folder, which means nothing elsewhere."""
    rest = name.removeprefix("open_clip:").removeprefix("hf-hub:")
    return name if _HUB_NAME.fullmatch(rest) and not Path(rest).exists() else None


def write(folder: Path, card: Card, backend: Backend, processor: Processor, found: Fingerprint, form: str) -> None:
    """Write README.md; `form` is what clipkit.json says the folder is."""
    parts = [
        _front_matter(card, form),
        _what_it_is(card, backend, processor, found, form),
        _training(card),
        _use(backend, processor, form),
        _limits(card, processor),
    ]
    (folder / NAME).write_text("\n".join(parts), encoding="utf-8")


def _front_matter(card: Card, form: str) -> str:
    lines = [f"license: {json.dumps(card.license)}", f"library_name: {_LIBRARY.get(form, 'transformers')}"]
    lines += ["pipeline_tag: zero-shot-image-classification", "tags:"]
    lines += [f"- {tag}" for tag in dict.fromkeys(("clip", "contrastive", "clipkit", form))]
    if card.base_model and _HUB_NAME.fullmatch(card.base_model):
        lines.append(f"base_model: {card.base_model}")
    return "\n".join(["---", *lines, "---", ""])


def _what_it_is(card: Card, backend: Backend, processor: Processor, found: Fingerprint, form: str) -> str:
    image, text = (found.record[side] for side in ("image", "text"))
    sigmoid = found.record["logit_bias"] is not None
    rows = {
        "format": form,
        "image side": f"{image['class']}, activation {image.get('activation')}, pooling {image.get('pooling')}",
        "text side": f"{text['class']}, activation {text.get('activation')}, pooling {text.get('pooling')}",
        "embedding": f"{backend.dim} numbers, unit length",
        "image size": f"{processor.image_size} pixels",
        "context": f"{processor.context_length} tokens, special ones included; longer texts are cut",
        "similarity": "sigmoid (scale and bias)" if sigmoid else "softmax (scale)",
        "parameters": f"{sum(p.numel() for p in backend.parameters()):,}",
        "fingerprint": f"`{found.hash}`",
        "base model": card.base_model or "not said",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    intro = "A dual encoder: images and texts in one space, where what belongs together lies close."
    return f"# A text-image dual encoder\n\n{intro}\n\n| | |\n|---|---|\n{table}\n"


def _training(card: Card) -> str:
    pairs = f"{card.pairs:,} image-text pairs" if card.pairs else None
    known = "; ".join(each for each in (card.data, pairs) if each)
    lines = ["## Training", "", f"Data: {known or 'not said'}.", ""]
    if card.config:
        lines += ["```json", json.dumps(_plain(card.config), indent=2, ensure_ascii=False), "```", ""]
    lines += ["## Metrics", ""]
    if not card.metrics:
        return "\n".join([*lines, "None were given for these weights.", ""])
    lines += ["| metric | value |", "|---|---|", *(f"| {key} | {value:.4f} |" for key, value in card.metrics.items())]
    counts = ", ".join(f"{key} {count:,}" for key, count in card.n.items())
    lines += ["", f"n: {counts or 'not said'}.", ""]
    if card.forgetting:
        lines += ["## Forgetting", "", *forgetting_lines(card.forgetting), ""]
    return "\n".join(lines)


def _use(backend: Backend, processor: Processor, form: str) -> str:
    blocks = [_native(backend, processor, form)]
    if form != "onnx":
        blocks.insert(0, ("clipkit", _CLIPKIT))
    parts = ["## Use", "", "Prints the similarity of a photo and a caption; to be started in this folder."]
    for title, block in blocks:
        parts += ["", f"With {title}:", "", "```python", block.rstrip("\n"), "```"]
    return "\n".join([*parts, ""])


def _native(backend: Backend, processor: Processor, form: str) -> tuple[str, str]:
    if form == "open_clip":
        return "open_clip", _OPEN_CLIP
    if form == "towers":
        from clipkit.models.backends.towers import TowersBackend

        assert isinstance(backend, TowersBackend)
        block = plain_torch.program(backend.joint, processor, *backend.classes(), as_block=True)
        return "transformers and safetensors (the same as without_clipkit.py)", block
    text = measure_processor(processor)["text"]
    if form == "onnx":
        return "onnxruntime", _ONNX.format(padding=text["padding"], length=processor.context_length)
    no_mask = (
        "" if text["attention_mask"] == "given" else 'inputs.pop("attention_mask", None)  # it was trained without\n'
    )
    code = _TRANSFORMERS.format(padding=text["padding"], length=processor.context_length, no_mask=no_mask)
    return "transformers", code


_CLIPKIT = """from clipkit import DualEncoder

model = DualEncoder.from_pretrained(".")
print((model.encode_images(["photo.jpg"]) @ model.encode_texts(["a caption"]).T).item())
"""


_TRANSFORMERS = """import torch, torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(".", dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(".")
image, text = Image.open("photo.jpg").convert("RGB"), "a caption"
settings = {{"padding": "{padding}", "truncation": True, "max_length": {length}, "return_tensors": "pt"}}
inputs = processor(images=[image], text=[text], **settings)
{no_mask}with torch.no_grad():
    output = model(**inputs)
print(F.cosine_similarity(output.image_embeds, output.text_embeds).item())
"""


_ONNX = """import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

def embed(side, inputs):
    session = onnxruntime.InferenceSession(f"{{side}}.onnx")
    return session.run(None, {{each.name: inputs[each.name] for each in session.get_inputs()}})[0]

image, text = Image.open("photo.jpg").convert("RGB"), "a caption"
pixels = AutoImageProcessor.from_pretrained(".")(images=[image], return_tensors="np")
settings = {{"padding": "{padding}", "truncation": True, "max_length": {length}, "return_tensors": "np"}}
ids = AutoTokenizer.from_pretrained(".")([text], **settings)
print(float((embed("image", pixels) @ embed("text", ids).T).item()))
"""


_OPEN_CLIP = """import open_clip, torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
image, text = Image.open("photo.jpg").convert("RGB"), "a caption"
with torch.no_grad():
    image_embedding = model.eval().encode_image(preprocess(image)[None], normalize=True)
    text_embedding = model.encode_text(tokenizer([text]), normalize=True)
print((image_embedding @ text_embedding.T).item())
"""


def _limits(card: Card, processor: Processor) -> str:
    lines = [
        "## Limits",
        "",
        card.limits or "Nothing was said about what it should not be used for; measure it on your own data first.",
        "",
        "* A similarity is no probability, and comparable only within this model.",
        f"* A text is cut after {processor.context_length} tokens, an image seen at {processor.image_size} pixels.",
        "* clipkit turns photos upright by their EXIF flag and puts transparent ones over white; the code without"
        " clipkit takes them as they are.",
        "* Edit this file as you like: of the files here, clipkit.json holds all others to what was saved.",
        "",
    ]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def forgetting_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown.

    Args:
        found: `domain` and `reference` (metric keys), `baseline`, `budget`, `points` (each with `alpha`, `domain`,
            `reference`), `chosen` (its alpha), `held` (whether any point is within the budget), `greater_is_better`
            (whether higher values of the reference are better).
    """
    lines = [_verdict(found), ""]
    lines += [f"| alpha | {found['domain']} | {found['reference']} | lost | |", "|---|---|---|---|---|"]
    for point in found["points"]:
        lost = _lost(found, point)
        what = {0: "before"}.get(point["alpha"], "fine-tuned" if point["alpha"] == 1 else "")
        note = ", ".join(each for each in (what, "chosen" if point["alpha"] == found["chosen"] else "") if each)
        lines.append(
            f"| {point['alpha']:.1f} | {point['domain']:.4f} | {point['reference']:.4f} | {lost:+.4f} | {note} |"
        )
    return lines


def _nothing_kept(found: Mapping[str, Any]) -> str:
    within = sum(_lost(found, point) <= found["budget"] + 1e-9 for point in found["points"])
    return "No other alpha is within that" if within == 1 else "No other alpha within that does better in the domain"


def _lost(found: Mapping[str, Any], point: Mapping[str, Any]) -> float:
    lost = float(found["baseline"]) - float(point["reference"])
    greater = found.get("greater_is_better", greater_is_better(found["reference"]))  # earlier versions did not write it
    return lost if greater else -lost


def _verdict(found: Mapping[str, Any]) -> str:
    said = f"{found['reference']} was {found['baseline']:.4f} before training; {found['budget']:g} of it may be lost."
    alpha = f"{found['chosen']:g}"
    if not found["held"]:
        return f"{said} No alpha is within that: {alpha}, which lost least, was chosen, and the budget is not held."
    if found["chosen"] == 0:
        return f"{said} {_nothing_kept(found)}: alpha 0 was chosen, the weights before training."
    return f"{said} Weights = (1 - alpha) * before + alpha * fine-tuned; alpha {alpha} was chosen."
