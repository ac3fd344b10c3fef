"""What other libraries leave in a folder: where sentence-transformers keeps a tower, and what is no model at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.files import read_json

_MODULES = "modules.json"


class Module(NamedTuple):
    """One step of a model of sentence-transformers."""

    kind: str  # the class: Transformer, Pooling, Dense …
    folder: Path


def sentence_modules(folder: Path) -> list[Module]:
    """The steps of a model of sentence-transformers, in order; empty for a folder of any other kind.

    Raises:
        CorruptArtefact: modules.json is no JSON.
    """
    path = folder / _MODULES
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptArtefact(f"not a JSON file: {error}", where=path, fix="download the model again") from error
    listed = content if isinstance(content, list) else []  # any other program may have a file of this name
    steps = [(step.get("type"), step.get("path")) for step in listed if isinstance(step, dict)]
    return [Module(k.rpartition(".")[2], folder / p) for k, p in steps if isinstance(k, str) and isinstance(p, str)]


def tower_folder(folder: Path) -> Path:
    """Where config.json lies: the folder itself, or of sentence-transformers' older models `0_Transformer` in it."""
    if not (folder / "config.json").is_file():
        for module in sentence_modules(folder)[:1]:
            if (module.folder / "config.json").is_file():
                return module.folder
    return folder


def steps_after(tower: Path) -> list[Module]:
    """What sentence-transformers does to the output of the tower in this folder: pooling first, as a rule."""
    for root in (tower, tower.parent):
        modules = sentence_modules(root)
        if modules and modules[0].folder == tower:
            return modules[1:]
    return [Module("Pooling", tower / "1_Pooling")] if (tower / "1_Pooling" / "config.json").is_file() else []


def no_model(folder: Path) -> ModelError:
    """Of a folder without config.json, what it is and what opens it."""
    if (folder / "adapter.json").is_file():
        base = read_json(folder / "adapter.json").get("base")
        fix = f"open its base ({base}), then model.load_adapter({str(folder)!r})"
        return ModelError("a LoRA adapter of clipkit, not a whole model", where=folder, fix=fix)
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        fix = f"peft's PeftModel.from_pretrained(base, folder).merge_and_unload(), saved as a whole; its base is {base}"
        return ModelError("an adapter of peft, not a whole model", where=folder, fix=fix)
    if (folder / "open_clip_config.json").is_file():
        message = "a model of open_clip, whose towers cannot be taken apart"
        return ModelError(message, where=folder, fix="DualEncoder.from_pretrained opens it as a whole")
    if any(folder.glob("*.onnx")):
        message = "an ONNX export, which has no weights that could be trained or embedded with here"
        return ModelError(message, where=folder, fix="open the model that it was exported from")
    if pickles := [*folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")]:
        message = "checkpoints without a config, so the model's shape is unknown"
        return ModelError(message, where=folder, fix=f"if open_clip trained it: open_clip:ARCH/{max(pickles)}")
    below = sorted(path.parent.name for path in folder.glob("*/config.json") if not path.parent.name.startswith("."))
    fix = f"point to {' or '.join(below[:5])} in it" if below else "point to the folder that holds both"
    return ModelError("config.json is missing, so the model's shape is unknown", where=folder, fix=fix)
