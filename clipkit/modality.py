"""The two modalities that share one space."""

from __future__ import annotations

from typing import Literal

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")
