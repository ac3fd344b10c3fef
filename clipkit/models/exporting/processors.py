"""Tokenizers and image transforms of one library as the other's."""

from __future__ import annotations

import copy
import re
import string
from typing import Any

import open_clip
from tokenizers import Regex, normalizers
from transformers import CLIPImageProcessor, CLIPTokenizer, SiglipImageProcessor

from clipkit.errors import ModelError
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS

# Texts whose ids have to agree: case, accents, punctuation, digits, white space, too long, other scripts. None holds
# HTML entities or wrongly decoded letters, which open_clip repairs and transformers does not.
PROBES = (
    *GOLDEN_TEXTS,
    "It's 3 o'clock; we're late...",
    "  two   spaces\tand\nlines ",
    "naïve café, ÜBER",
    "snake_case & 100% @home",
    "日本語 🙂",
)

_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def _set_sides(image_processor: Any, name: str) -> dict[str, Any]:
    """Return the sides that a size of an image processor sets, without those that are None or 0."""
    sides = dict(getattr(image_processor, name, None) or {})
    return {key: side for key, side in sides.items() if side}


def open_clip_preprocess(image_processor: Any) -> dict[str, Any]:
    """preprocess_cfg of open_clip for an image processor of transformers.

    Raises:
        ModelError: it does what open_clip's transform cannot.
    """
    size = _set_sides(image_processor, "size")
    crop = _set_sides(image_processor, "crop_size")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(image_processor, step, False):
            raise ModelError(f"open_clip's transform always does what {step}=False leaves out")
    shortest, sides = size.get("shortest_edge"), {*size.values()}
    cropped = {*crop.values()} if getattr(image_processor, "do_center_crop", False) else sides
    if len(sides) != 1 or cropped != sides:
        raise ModelError(f"open_clip resizes to the size that it crops, here {size} and {crop}")
    resample = int(image_processor.resample)
    if resample not in _MODES:
        raise ModelError(f"open_clip's transform knows bicubic and bilinear, this one uses PIL's filter {resample}")
    return {
        "size": sides.pop(),
        "mode": "RGB",
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "interpolation": _MODES[resample],
        "resize_mode": "shortest" if shortest else "squash",
        "fill_color": 0,
    }


def transformers_images(settings: dict[str, Any], siglip: bool) -> Any:
    """An image processor of transformers for open_clip's preprocess_cfg."""
    size = settings["size"]
    side = size if isinstance(size, int) else size[0]
    if not isinstance(size, int) and len({*size}) != 1:
        raise ModelError(f"image processors of transformers give squares, this model takes {tuple(size)}")
    resample = {name: number for number, name in _MODES.items()}.get(settings["interpolation"])
    if resample is None or settings["resize_mode"] not in ("shortest", "squash"):
        mode = f"{settings['resize_mode']}, {settings['interpolation']}"
        raise ModelError(f"transformers has no image processor for {mode}")
    common: dict[str, Any] = {"resample": resample, "image_mean": [*settings["mean"]], "image_std": [*settings["std"]]}
    square = {"height": side, "width": side}
    if settings["resize_mode"] == "shortest":
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square, **common)
    if siglip:
        return SiglipImageProcessor(size=square, **common)
    return CLIPImageProcessor(size=square, do_center_crop=False, **common)


def simple_tokenizer_agrees(tokenizer: Any, length: int) -> bool:
    """Whether open_clip's own tokenizer gives the ids of this one of transformers on all probes."""
    simple = open_clip.SimpleTokenizer(context_length=length)
    return first_difference(simple, tokenizer, length, simple.eot_token_id) is None


def transformers_tokenizer(tokenizer: Any, length: int) -> Any:
    """A tokenizer of transformers that gives the ids of one of open_clip.

    Raises:
        ModelError: on a probe text it does not.
    """
    if hasattr(tokenizer, "tokenizer"):
        converted = copy.deepcopy(tokenizer.tokenizer)
        if getattr(tokenizer, "strip_sep_token", False) or getattr(tokenizer, "tokenizer_mode", ""):
            raise ModelError("transformers cannot strip separators or append a class token as this tokenizer does")
    else:
        converted = _as_clip_tokenizer(tokenizer)
    converted.model_max_length = length
    differs = first_difference(tokenizer, converted, length, None)
    if differs is not None and converted.is_fast:
        _clean_first(converted, tokenizer.clean_fn.__name__)
        differs = first_difference(tokenizer, converted, length, None)
    if differs is not None:
        raise ModelError(f"no tokenizer of transformers gives the same ids for {differs[:60]!r}")
    converted.backend_tokenizer.no_truncation()  # of the last call; it would be saved
    converted.backend_tokenizer.no_padding()
    return converted


def _as_clip_tokenizer(simple: Any) -> Any:
    if len(simple.all_special_ids) != 2:
        raise ModelError("open_clip's tokenizer has special tokens beside start and end of text")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in simple.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(simple.bpe_ranks))


def _clean_first(tokenizer: Any, clean: str) -> None:
    """open_clip cleans texts before its tokenizer sees them; here the tokenizer's own normalizer does."""
    steps: list[Any] = []
    if clean == "_clean_canonicalize":
        punctuation = Regex("[" + re.escape(string.punctuation) + "]")
        steps += [normalizers.Replace("_", " "), normalizers.Replace(punctuation, "")]
    if clean != "_clean_whitespace":
        steps.append(normalizers.Lowercase())
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    fast = tokenizer.backend_tokenizer
    fast.normalizer = normalizers.Sequence([*steps, *([fast.normalizer] if fast.normalizer else [])])


def first_difference(of_open_clip: Any, of_transformers: Any, length: int, end: int | None) -> str | None:
    """The first probe that the two turn into other ids, padding aside; None if there is none.

    Args:
        end: id of the end of text, after which rows are not compared; None: the tokenizer's own.
    """
    ids = of_transformers(list(PROBES), padding="max_length", truncation=True, max_length=length)["input_ids"]
    end = of_transformers.eos_token_id if end is None else end
    rows = zip(PROBES, of_open_clip(list(PROBES), context_length=length).tolist(), ids, strict=True)
    return next((text for text, ours, theirs in rows if _until(ours, end) != _until(theirs, end)), None)


def _until(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row
