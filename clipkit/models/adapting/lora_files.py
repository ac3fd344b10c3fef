"""The folder of a LoRA adapter: what was trained, in safetensors, and for which base model.

    adapter.json            the base's fingerprint, the adapted layers, size and SHA-256 of every file
    image/, text/           peft's own files, for each adapted tower
    trained.safetensors     what else was trained: logit scale, bias, fresh heads, a tower trained without LoRA

peft drops the logit scale and bias (measured with 0.21), which is why they have a file of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit.errors import CorruptArtefact, ModelError, ModelMismatch, UsageError
from clipkit.extras import upgrade_command
from clipkit.files import dump_json, file_damage, list_files, publish, read_json
from clipkit.modality import MODALITIES, Modality
from clipkit.models.adapting.lora import ADAPTER, MARK, base, inject, require_peft
from clipkit.models.backend import Adapted, Backend, check_finite, root_of
from clipkit.models.fingerprint.fingerprint import Fingerprint, full_fingerprint, hash_weights
from clipkit.models.processor import Processor

NAME, REST = "adapter.json", "trained.safetensors"
SCHEMA = 1
_PREFIX = "base_model.model."  # of every name in peft's files
_AGAIN = "copy the adapter again"


def save(backend: Backend, processor: Processor, folder: Path, overwrite: bool, *, name: str) -> None:
    """What `DualEncoder.save_adapter` documents."""
    if backend.lora is None:
        raise UsageError("the model has no LoRA adapter", fix="model.add_lora(...), or save_pretrained for all of it")
    taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if taken and not (overwrite and (folder / NAME).is_file()):
        fix = "another folder" + ("" if overwrite else ", or overwrite=True for an adapter that stands there")
        raise UsageError("the folder exists and is not empty", where=folder, fix=fix)
    check_finite(backend, name)
    publish(folder, lambda fresh: _write(backend, processor, fresh, name), replace=True)


def _write(backend: Backend, processor: Processor, folder: Path, name: str) -> None:
    assert backend.lora is not None
    folder.mkdir()
    for part, adapted in backend.lora.parts.items():
        _write_peft(backend, part, adapted, folder / part, name)
    rest = _trained(backend)
    save_file(rest, folder / REST)
    files = list_files(folder, "sha256")
    body: dict[str, Any] = {"schema": SCHEMA, "base": name, "base_fingerprint": _base_record(backend, processor, rest)}
    body["parts"] = {part: asdict(adapted) for part, adapted in backend.lora.parts.items()}
    body["files"] = files
    (folder / NAME).write_text(dump_json({**body, "sha256": _hash(body)}), encoding="utf-8")


def _write_peft(backend: Backend, part: Modality, adapted: Adapted, folder: Path, name: str) -> None:
    top = f"{root_of(backend, part)}."
    matrices = {
        _PREFIX + weight_name.removeprefix(top).replace(f".{ADAPTER}.", "."): tensor.detach().cpu().contiguous()
        for weight_name, tensor in backend.state_dict().items()
        if MARK in weight_name and backend.belongs_to(part, weight_name)
    }
    config = require_peft().LoraConfig(
        r=adapted.rank, lora_alpha=adapted.alpha, lora_dropout=adapted.dropout, target_modules=list(adapted.layers)
    )
    config.base_model_name_or_path, config.inference_mode = name, True
    config.save_pretrained(folder)
    save_file(matrices, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _trained(backend: Backend) -> dict[str, Tensor]:
    """Logit scale and bias, and all that has gradients but LoRA's matrices, with the statistics beside it."""
    scalars = {id(p) for p in backend.logit_scale_and_bias() if p is not None}
    names = {n for n, p in backend.named_parameters() if (p.requires_grad or id(p) in scalars) and MARK not in n}
    for prefix, module in backend.named_modules():
        if any(f"{prefix}.{name}" in names for name, _ in module.named_parameters(recurse=False)):
            names |= {f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)}
    under = sorted(name for name in names if ".base_layer." in name)
    if under:
        message = "a weight trains together with the LoRA matrices on it, which an adapter cannot hold"
        raise ModelError(message, where=under[0], fix="save_pretrained, or freeze it before training")
    state = backend.state_dict()
    return {name: state[name].detach().cpu().contiguous().clone() for name in sorted(names & state.keys())}


def _base_record(backend: Backend, processor: Processor, without: Iterable[str]) -> dict[str, Any]:
    """The fingerprint of a model without its adapter and without the tensors that an adapter brings."""
    plain = base(backend)
    record = dict(full_fingerprint(plain, processor).record)
    left_out, state = set(without), plain.state_dict()
    for part in MODALITIES:
        names = [name for name in state if plain.belongs_to(part, name) and name not in left_out]
        record[part] = {**record[part], "weights": hash_weights({name: state[name] for name in names})}
    kept = {key: value for key, value in record.items() if key not in ("logit_scale", "logit_bias")}
    read_back: dict[str, Any] = json.loads(json.dumps(kept))  # tuples as the file will hold them
    return read_back


def load(backend: Backend, processor: Processor, folder: Path) -> None:
    """What `DualEncoder.load_adapter` documents."""
    if backend.lora is not None:
        raise UsageError("the model has a LoRA adapter already", fix="open the base model again, or merge_lora()")
    body = _read(folder)
    rest = _tensors(folder / REST)
    present = Fingerprint(_base_record(backend, processor, rest))
    differs = Fingerprint(body["base_fingerprint"]).difference(present)
    if differs:
        message = f"the adapter was trained on another model than this one: {'; '.join(differs[:3])}"
        raise ModelMismatch(message, where=folder, fix=f"open its base first: {body['base']}")
    state = backend.state_dict()
    lost = [name for name in rest if name not in state or state[name].shape != rest[name].shape]
    if lost:
        raise ModelMismatch(f"the model has no place for {lost[0]}", where=folder / REST, fix=f"open {body['base']}")
    for part, about in body["parts"].items():
        inject(backend, part, Adapted(**{**about, "layers": tuple(about["layers"])}))
        _fill(backend, part, folder / part / "adapter_model.safetensors")
    _restore(backend, rest)


def _fill(backend: Backend, part: Modality, path: Path) -> None:
    top, tensors = f"{root_of(backend, part)}.", _tensors(path)
    wanted = {
        _PREFIX + name.removeprefix(top).replace(f".{ADAPTER}.", "."): p
        for name, p in backend.named_parameters()
        if MARK in name and backend.belongs_to(part, name)
    }
    if wanted.keys() != tensors.keys():
        raise CorruptArtefact(f"its layers are not those of {NAME}", where=path, fix=_AGAIN)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def _restore(backend: Backend, rest: Mapping[str, Tensor]) -> None:
    state, parameters = backend.state_dict(), dict(backend.named_parameters())
    with torch.no_grad():
        for name, tensor in rest.items():
            state[name].copy_(tensor)
            if name in parameters:
                parameters[name].requires_grad_(True)


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / NAME).is_file():
        raise ModelError(f"no LoRA adapter of clipkit: {NAME} is missing", where=folder)
    body = read_json(folder / NAME)
    if body.get("schema", 0) > SCHEMA:
        message = f"written by a newer clipkit (schema {body['schema']}, known up to {SCHEMA})"
        raise ModelError(message, where=folder, fix=upgrade_command())
    if body.get("sha256") != _hash({key: value for key, value in body.items() if key != "sha256"}):
        raise CorruptArtefact("its content is not what was saved", where=folder / NAME, fix=_AGAIN)
    for name, expected in body["files"].items():
        path = folder / name
        damage = file_damage(path, expected, "sha256", "adapter")
        if damage is not None:
            raise CorruptArtefact(damage, where=path, fix=_AGAIN)
    return body


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CorruptArtefact(f"not a readable safetensors file: {error}", where=path, fix=_AGAIN) from error
    return tensors


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
