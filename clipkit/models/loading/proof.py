"""Which saved models were proved on this machine: opened, and their golden embeddings compared."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeAlias

from clipkit.files import json_hash, write_json
from clipkit.paths import cache_folder

Verify: TypeAlias = Literal["once", "always", "files"]
"""What is checked when a folder that clipkit saved is opened; see `DualEncoder.from_pretrained`."""

_DECIDE = ("clipkit-vl", "torch", "transformers", "open_clip_torch", "timm", "tokenizers", "sentencepiece", "pillow",
           "torchvision", "numpy")  # fmt: skip


class Proof:
    """That a content gave its golden embeddings with these versions of the libraries, on this kind of processor.

    Args:
        body: of clipkit.json. Its own SHA-256 stands for the content, for it lists the hashes of all files.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        key = json_hash({"content": body["sha256"], "environment": _environment()})
        self._path = cache_folder("verified") / f"{key}.json"
        self._facts = {"name": body.get("name"), "content": body["sha256"], **_environment()}

    def is_known(self) -> bool:
        return self._path.is_file()

    def remember(self) -> None:
        """Write it down; where that is not possible, it is proved again next time."""
        with contextlib.suppress(Exception):
            write_json(self._path, self._facts)


@cache
def _environment() -> dict[str, str]:
    versions = {}
    for name in _DECIDE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {**versions, "python": platform.python_version(), "machine": f"{platform.machine()} {_processor()}"}


def _processor() -> str:
    """Which vector instructions torch uses: its kernels differ by them."""
    import torch

    return torch.backends.cpu.get_cpu_capability()
