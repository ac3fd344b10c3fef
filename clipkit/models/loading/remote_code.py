"""The JSON configs of a model's folder, refused where one makes a library run code and the user did not agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.errors import ModelError, option
from clipkit.files import read_json

# What transformers, open_clip, timm and peft read; other files with such names (data_config.json, ds_config.json) are
# not read by any of them. `config.4.57.0.json` is what config.json may name for another version of transformers.
_READ = (
    "config.json",
    "config.*.json",
    "adapter_config.json",
    "audio_tokenizer_config.json",
    "generation_config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)


# transformers imports what the first three name, and peft the last. open_clip hands `tokenizer_kwargs` to transformers
# as they stand, so that a config would agree to its own code.
_RUNS_CODE = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "auto_mapping")


# "sdpa" and its like are names of transformers' own functions; "org/name" is compiled code of the hub.
_RUNS_KERNELS = ("attn_implementation", "experts_implementation")


def refuse_code(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Look at every config in a folder that a library reads, at any depth of its JSON.

    Args:
        folder: its own configs are looked at, those of folders below it are not, and neither is any other file.
        trust_remote_code: whether the user has agreed.

    Raises:
        ModelError: a config asks for code; file and keys are named.
        CorruptArtefact: a config is no JSON object.
    """
    if trust_remote_code:
        return
    for path in sorted({path for name in _READ for path in folder.glob(name) if path.is_file()}):
        asked = list(_asked(read_json(path)))
        if asked:
            agree = option("trust_remote_code", True, python="trust_remote_code=True with a fixed revision=")
            fix = f"read that code, then {agree}"
            raise ModelError(
                f"the model asks to run its own code ({', '.join(asked[:5])})", where=path, fix=fix, topic="remote code"
            )


def _asked(value: Any, at: str = "") -> Iterator[str]:
    """The dotted keys that ask for code. An empty or false value asks for none."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        name = str(key)
        kernel = name.strip("_").removesuffix("_internal") in _RUNS_KERNELS and "/" in str(inner)
        if inner and (name in _RUNS_CODE or kernel):
            yield at + name
        else:
            yield from _asked(inner, f"{at}{name}.")
