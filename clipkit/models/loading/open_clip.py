"""From open_clip's name of a model, or from a folder, to the model itself: no weight at random unless asked for."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from transformers import AutoConfig

from clipkit.errors import ModelError
from clipkit.files import read_json
from clipkit.models.backend import check_finite
from clipkit.models.backends.open_clip import CONFIG, TEXT_CONFIG, OpenClipBackend, unknown_architecture, wrap
from clipkit.models.backends.quiet import quiet
from clipkit.models.loading.hub import near_folders
from clipkit.models.loading.remote_code import refuse_code
from clipkit.models.loading.transformers import holds_vocabulary
from clipkit.models.loading.weights import check_weights, weight_shapes
from clipkit.models.processor import Processor
from clipkit.suggest import near

Config = dict[str, Any]


# In the order of preference; other files of a hub model are often transformers' copies of the same weights.
_PICKLED = ("*.bin", "*.pt", "*.pth")
_PREFERRED = ("open_clip_*.safetensors", *(f"open_clip_{pattern}" for pattern in _PICKLED), "*.safetensors", *_PICKLED)


def open_by_name(name: str, trust_remote_code: bool = False) -> tuple[OpenClipBackend, Processor]:
    """`ARCH/TAG`, or `ARCH/FILE` with a checkpoint of open_clip's own training."""
    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        raise unknown_architecture(arch, near_folders(name))
    config = open_clip.get_model_config(arch)
    if tag and Path(tag).expanduser().is_file():
        return _create(name, arch, config, trust_remote_code, weights=Path(tag).expanduser())
    tags = open_clip.list_pretrained_tags_by_model(arch)
    choice = f"open_clip:{arch}/TAG with TAG one of {', '.join(tags)}" if tags else "no weights are published for it"
    known = open_clip.get_pretrained_cfg(arch, tag) if tag else None
    if not known:
        message = f"no weights called {tag!r} for {arch}.{near(tag, tags)}" if tag else f"which weights of {arch}?"
        raise ModelError(message, where=f"open_clip:{name}", fix=f"{choice}; at random: DualEncoder.from_config")
    trained_quick, built_quick = (bool(c.get("quick_gelu", False)) for c in (known, config))
    if built_quick and not trained_quick:
        message = f"{arch} computes QuickGELU, but {tag!r} was trained without"
        raise ModelError(message, where=f"open_clip:{name}", fix=f"open_clip:{arch.replace('-quickgelu', '')}/{tag}")
    # A model of the wrong activation is 2.7 points worse on ImageNet; open_clip only warns.
    config["quick_gelu"] = trained_quick
    options: dict[str, Any] = {"pretrained": tag, "require_pretrained": True, "force_quick_gelu": trained_quick}
    return _create(name, arch, config, trust_remote_code, **options)


def open_folder(
    folder: Path, name: str | None = None, trust_remote_code: bool = False
) -> tuple[OpenClipBackend, Processor]:
    """A folder with open_clip_config.json and weights; `name` stands for it in messages."""
    config = _folder_config(folder, trust_remote_code)
    path = check_weights(folder, _PREFERRED)[0]
    named = name or str(folder)
    return _create(named, f"local-dir:{folder}", config, trust_remote_code, folder=folder, weights=path)


def from_config(
    name: str, device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> tuple[OpenClipBackend, Processor]:
    """An architecture or a folder's config with random weights, drawn from torch's random state."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = _folder_config(folder, trust_remote_code)
        return _create(name, f"local-dir:{folder}", config, trust_remote_code, folder=folder, device=device)
    if name not in open_clip.list_models():
        raise unknown_architecture(name)
    return _create(name, name, open_clip.get_model_config(name), trust_remote_code, device=device)


def _folder_config(folder: Path, trust_remote_code: bool) -> Config:
    path = folder / CONFIG
    if not path.is_file():
        fix = f"a folder that holds {CONFIG} beside the weights"
        raise ModelError(f"{CONFIG} is missing, so the model's shape is unknown", where=folder, fix=fix)
    for place in (folder, folder / TEXT_CONFIG):
        refuse_code(place, trust_remote_code=trust_remote_code)
    config = read_json(path).get("model_cfg")
    if not isinstance(config, dict):
        raise ModelError("model_cfg is missing", where=path)
    return config


def _create(
    name: str,
    source: str,
    config: Config,
    trust_remote_code: bool,
    *,
    folder: Path | None = None,
    weights: Path | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> tuple[OpenClipBackend, Processor]:
    """Model, transform and tokenizer as open_clip itself makes them; `source` is its name of the config."""
    tokenizer_needs, text_needs = _needs(config, folder)
    with _open_clip_errors(name, tokenizer_needs + text_needs), quiet():
        tokenizer = _tokenizer(source, config, folder, trust_remote_code)
    if folder is not None and (folder / TEXT_CONFIG / "config.json").is_file():
        options["text_cfg"] = {**config["text_cfg"], **_saved_text_config(folder)}
    elif "hf_model_name" in config["text_cfg"]:
        with _open_clip_errors(name, text_needs), quiet():
            _refuse_code_of_tower(config["text_cfg"]["hf_model_name"], trust_remote_code)
    with _open_clip_errors(name, text_needs), quiet(), torch.device(device):
        options = options if "pretrained" in options else {**options, "load_weights": False}
        model = open_clip.create_model(source, precision="fp32", device=device, pretrained_text=False, **options)
        if weights is not None:
            _check_shapes(weights, model, config)
            open_clip.load_checkpoint(model, str(weights), weights_only=True)
        elif "pretrained" not in options:
            _draw_what_open_clip_leaves_empty(model)
    if not model.logit_scale.is_meta:
        check_finite(model, name)
    preprocess = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
    return wrap(model.eval(), preprocess, tokenizer, config)


def _draw_what_open_clip_leaves_empty(model: Any) -> None:
    """CoCa's decoder has a projection that open_clip allocates and never fills: any bits, NaN included."""
    projection = getattr(getattr(model, "text_decoder", None), "text_projection", None)
    if isinstance(projection, torch.nn.Parameter):
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


def _saved_text_config(folder: Path) -> Config:
    return {"hf_model_name": str(folder / TEXT_CONFIG), "hf_model_pretrained": False}


def _tokenizer(source: str, config: Config, folder: Path | None, trust_remote_code: bool) -> Any:
    """open_clip's tokenizer for a config. A folder's own goes before the one that its config names."""
    text = config["text_cfg"]
    named = text.get("hf_tokenizer_name")
    consent = {"trust_remote_code": trust_remote_code} if named else {}  # the user's, whatever the config says
    own = folder is not None and (named == "." or holds_vocabulary(folder))
    if named and not own:
        refuse_code(Path(named), trust_remote_code=trust_remote_code)
    if folder is None or not named or own:
        return open_clip.get_tokenizer(source, **consent)
    options = {**(text.get("tokenizer_kwargs") or {}), "tokenizer_mode": text.get("tokenizer_mode")}
    return HFTokenizer(named, context_length=text.get("context_length", 77), **(options | consent))


def _refuse_code_of_tower(named: str, trust_remote_code: bool) -> None:
    """open_clip leaves the question to transformers, which would ask whoever sits at the terminal."""
    refuse_code(Path(named), trust_remote_code=trust_remote_code)
    AutoConfig.from_pretrained(named, trust_remote_code=trust_remote_code)


def _needs(config: Config, folder: Path | None) -> tuple[list[str], list[str]]:
    """The files that an architecture takes from the hub: of its tokenizer, and of its text tower's config."""
    text = config["text_cfg"]
    tokenizer, tower = text.get("hf_tokenizer_name"), text.get("hf_model_name")
    if folder is not None and holds_vocabulary(folder):
        tokenizer = None
    if folder is not None and (folder / TEXT_CONFIG).is_dir():
        tower = None
    return [f"the tokenizer of {tokenizer}"] * bool(tokenizer), [f"the config of {tower}"] * bool(tower)


def _check_shapes(path: Path, model: Any, config: Mapping[str, Any]) -> None:
    """Refuse what open_clip would make fit: positions of another length, a bias that it would set to 0."""
    shapes = {name.removeprefix("module."): shape for name, shape in weight_shapes(path).items()}
    for name, tensor in model.state_dict().items():
        if name in shapes and shapes[name] != tuple(tensor.shape) and tensor.numel() != 1:
            message = f"weight {name} has shape {shapes[name]}, the config asks for {tuple(tensor.shape)}"
            raise ModelError(
                message, where=path, fix="config and weights must come from the same model", topic="weights"
            )
    if config.get("init_logit_bias") is not None and "logit_bias" not in shapes:
        raise ModelError("weight logit_bias is missing; open_clip would take 0", where=path)


@contextmanager
def _open_clip_errors(name: str, needs: list[str]) -> Iterator[None]:
    # open_clip reports through the root logger, and gives it a handler for good if it has none.
    root, handler = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError, TypeError, pickle.UnpicklingError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        wanted = f"; it needs {' and '.join(needs)} from the hub" if needs else ""
        message = f"open_clip cannot open it{wanted}: {' '.join(lines[:3])[:400]}"
        fix = "check the name; offline, only what was downloaded before can be opened"
        raise ModelError(message, where=name, fix=fix) from error
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
