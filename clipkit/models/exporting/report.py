"""What an export was checked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """What an export was checked for.

    Attributes:
        folder, to: where the exported model is, and its format.
        tensors: largest difference of an embedding's component on identical pixels and token ids, by `image` and
            `text`. It is at most 1e-5 (ONNX: 1e-4), or nothing would have been written.
        pipeline: smallest cosine between both models' embeddings of the same photos and captions, every model with
            its own preprocessing. It falls below 1 where the other library resizes or crops otherwise.
        notes: what else to know.
    """

    folder: Path
    to: str
    tensors: dict[str, float]
    pipeline: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.to}"]
        lines += [
            f"  identical tensors, {side}: largest difference {difference:.1e}"
            for side, difference in self.tensors.items()
        ]
        lines += [
            f"  own preprocessing, {side}: smallest cosine {cosine:.6f}" for side, cosine in self.pipeline.items()
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
