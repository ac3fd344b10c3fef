"""A finding of `clipkit check model`, and why its topic matters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`error`) or unusual (`warning`) with a model."""

    level: Level
    about: str
    """The thing in a word or two: activation, resize filter, padding ..."""
    what: str
    why: str
    fix: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


# The part of a model, then the thing itself, by the keys of a fingerprint.
ABOUT = {
    "filter": "resize filter",
    "mean": "mean and std",
    "std": "mean and std",
    "crop_rounding": "crop",
    "padding_side": "padding",
    "pad_token": "padding",
    "attention_mask": "attention mask",
    "end_token": "end token (EOS)",
    "end_when_cut": "end token (EOS)",
    "start_token": "start token",
    "ids": "token ids",
    "tokenizer": "vocabulary",
    "logit_scale": "logit scale",
    "logit_bias": "logit bias",
    "context_length": "context length",
    "size": "image size",
    "attention_heads": "attention heads",
    "norm_eps": "norm epsilon",
}


# Why it matters. Measured figures: open_clip #771, clip-as-service #904, mteb #1424.
WHY = {
    "activation": "weights work with the function they were trained with; with another one the model still runs and is "
    "quietly worse (a CLIP fell from 62.9 to 60.2 on ImageNet)",
    "resize filter": "the tower sees softer or sharper pixels than those it was trained on, and than those behind "
    "embeddings that were stored",
    "antialias": "shrinking without it turns fine detail into noise: a photo's embedding moved to a cosine of 0.94",
    "crop": "the tower sees another part of the image than in training",
    "resize": "the tower sees images of another shape or another part of them than in training",
    "mean and std": "every pixel value is shifted or stretched against those of training",
    "padding": "a tower that reads the padding gets another text; SigLIP padded to the longest of a batch fell from 80 "
    "to 10 on MNIST",
    "attention mask": "the tower was trained to see the padding, or not to: with the other one it reads another text",
    "case": "capital letters become other tokens than those the tower was trained on",
    "end token (EOS)": "the embedding is read at the end token: where it is missing, another token's state is taken",
    "logit scale": "probabilities, thresholds and training start from a wrong temperature; rankings do not show it",
    "logit bias": "probabilities and thresholds are wrong; rankings do not show it",
    "pooling": "the embedding is read from another place than the weights were trained to put it in",
    "token ids": "the tower is given other tokens for the same text",
    "vocabulary": "the tower is given other tokens for the same text",
    "context length": "long texts are cut at another place",
}

_OTHER = "embeddings are not those of the model that was meant"


def about(key: str) -> str:
    """`image.filter` to `resize filter`."""
    last = key.rsplit(".", 1)[-1]
    return ABOUT.get(last, last.replace("_", " "))


def why(about: str) -> str:
    return WHY.get(about, _OTHER)
