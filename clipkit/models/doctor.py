"""`clipkit check model`: what a model is, what is wrong with it, why that matters and how to mend it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipkit.errors import ClipkitError
from clipkit.models import artefact, image_facts, lora, text_facts
from clipkit.models.backend import PARTS
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint import Fingerprint, words
from clipkit.models.known_answers import Finding, about, known_answers, why
from clipkit.models.names import find_folder
from clipkit.models.open_model import open_model
from clipkit.models.saving import golden, reference

if TYPE_CHECKING:
    from clipkit.models.backend import Part

_COLLAPSED = 1e-6  # of any component between the embeddings of unlike inputs
_BF16_COSINE = 0.98  # of the same input; tiny random models reach 0.999
_UNDO = (
    "copy or download the model again, or install the library versions it was saved with; "
    "if the change is meant, save it as a new model"
)
_PREFIXES = ("module.", "_orig_mod.")
_READ_BY_LIBRARIES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".bin")


@dataclass
class Report:
    """What `examine` found. ``str(report)`` is for people, `as_dict` for machines."""

    name: str
    about: dict[str, str] = field(default_factory=dict)
    """What the model is, in words; empty if it cannot be opened."""
    fingerprint: Fingerprint | None = None
    recorded: bool = False
    """Whether there is a clipkit.json to hold the model to."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; warnings are allowed."""
        return self.errors == 0

    @property
    def exit_code(self) -> int:
        """0, or 6 (corrupt or wrong)."""
        return 0 if self.ok else 6

    @property
    def verdict(self) -> str:
        """One line."""
        warnings = len(self.findings) - self.errors
        beside = f"; {_count(warnings, 'thing')} unusual, see above" if warnings else ""
        if not self.ok:
            return f"NOT HEALTHY: {_count(self.errors, 'thing')} wrong{beside}. Do not use it before that is mended."
        if self.recorded:
            return f"healthy: it is the model that was saved{beside}"
        return f"healthy as far as can be told without a clipkit.json{beside}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "model": self.name,
            "ok": self.ok,
            "verified": self.ok and self.recorded,
            "verdict": self.verdict,
            "about": self.about,
            "fingerprint": None if self.fingerprint is None else self.fingerprint.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def examine(model: str | os.PathLike[str] | DualEncoder, *, trust_remote_code: bool = False) -> Report:
    """Look at a model from all sides, and go on after what is found wrong.

    Files against clipkit.json, weights (finite, complete, unprefixed), the fingerprint and the golden embeddings
    against those that were saved, what is known of its family, and how it behaves: other embeddings for other inputs,
    the same alone and in a batch, finite, and close in bfloat16.

    Args:
        model: a name as `DualEncoder.from_pretrained` takes it, or a model that is open.
        trust_remote_code: whether a model may run Python code that it brings along.

    Raises:
        ModelError: there is no such model at all.
    """
    if isinstance(model, DualEncoder):
        report = Report(model.name)
        _examine_opened(report, model, None)
        return report
    report, folder = Report(os.fspath(model)), _folder(model)
    if folder is not None:
        report.recorded = (folder / artefact.NAME).is_file()
        report.findings += [*_files(folder), *_weights(folder)]
    opened, body = _open(report, model, trust_remote_code)
    if opened is not None:
        _examine_opened(report, opened, body)
    return report


def _folder(name: str | os.PathLike[str]) -> Path | None:
    text = os.fspath(name)
    folder = Path(text.removeprefix("open_clip:")).expanduser()
    if folder.is_dir():
        return folder
    return None if text.startswith("open_clip:") else find_folder(text)


def _open(
    report: Report, name: str | os.PathLike[str], trust_remote_code: bool
) -> tuple[DualEncoder | None, dict[str, Any] | None]:
    try:
        backend, processor, body, _ = open_model(name, None, trust_remote_code, check=False)
    except Exception as error:  # a damaged folder fails in any way; what was found so far is to be told
        if report.ok:
            known = isinstance(error, ClipkitError)
            what = error.message if isinstance(error, ClipkitError) else f"{type(error).__name__}: {error}"
            fix = (error.fix if isinstance(error, ClipkitError) else None) or "download or save the model again"
            reason = "weights would be random or misplaced" if known else "its files contradict each other"
            report.findings.append(Finding("error", "opening", f"the model does not open: {what}", reason, fix))
        return None, None
    return DualEncoder(backend, processor, os.fspath(name)).eval(), body


def _examine_opened(report: Report, model: DualEncoder, body: dict[str, Any] | None) -> None:
    model = reference(lora.merged(model))
    report.fingerprint = model.fingerprint()
    report.about = describe(model, report.fingerprint)
    report.findings += _changes(body, report.fingerprint) if body is not None else []
    named = {finding.about for finding in report.findings}
    report.findings += [f for f in known_answers(model, report.fingerprint) if f.about not in named]
    try:
        found = golden(model)
    except (ClipkitError, RuntimeError, ValueError, IndexError) as error:
        if not any(f.about in ("image size", "context length") for f in report.findings):
            what = f"the model gives no embeddings: {str(error).splitlines()[0]}"
            report.findings.append(Finding("error", "embeddings", what, "it cannot be used", "take another copy of it"))
        return
    report.findings += [*(_golden(body, found) if body is not None else ()), *_behaviour(model, found)]


# ------------------------------------------------------------------------------------------------ files and weights


def _files(folder: Path) -> Iterator[Finding]:
    for damage in artefact.damages(folder):
        name = damage.path.relative_to(folder).as_posix()
        if damage.prose:
            yield Finding("warning", "files", f"{name} was edited", "it does not change the model", "nothing to do")
        else:
            reason = "the file was damaged, cut or edited after the model was saved"
            yield Finding("error", "files", f"{name}: {damage.message}", reason, "copy or download that file again")
    body = _body(folder)
    if body is None:
        return
    if body.get("schema") != artefact.SCHEMA:
        what = f"{artefact.NAME} has schema {body.get('schema')}, expected {artefact.SCHEMA}"
        yield Finding(
            "error",
            "files",
            what,
            "another version of clipkit wrote it",
            "pip install -U clipkit, or save the model again",
        )
    listed = set(body.get("files") or ())
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _READ_BY_LIBRARIES and path.name not in {*listed, artefact.NAME}:
            what = f"{path.name} was not there when the model was saved"
            yield Finding("warning", "files", what, "libraries may read it in place of another file", "remove it")


def _body(folder: Path) -> dict[str, Any] | None:
    try:
        return artefact.read(folder, check=False)
    except ClipkitError:
        return None  # named by its damage


def _weights(folder: Path) -> Iterator[Finding]:
    """What can be said of weight files without building the model."""
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
                bad = [key for key in keys if not _finite(file.get_tensor(key))]
        except (SafetensorError, OSError) as error:
            yield Finding(
                "error",
                "weights",
                f"{name} cannot be read: {error}",
                "the file was cut or damaged",
                "copy or download it again",
            )
            continue
        if bad:
            what = f"{name}: {_count(len(bad), 'weight')} with NaN or infinity, the first is {bad[0]}"
            yield Finding("error", "weights", what, "every embedding becomes NaN", "use an earlier checkpoint")
        prefix = next((p for p in _PREFIXES if keys and all(key.startswith(p) for key in keys)), None)
        if prefix:
            what = f"{name}: every name begins with {prefix!r}, the mark of a wrapper"
            reason = "libraries find no weight by its name, and transformers then opens a random model"
            yield Finding("error", "weights", what, reason, "save the model inside the wrapper (model.module)")


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


# ------------------------------------------------------------------------------------------ against what was saved


def _changes(body: dict[str, Any], now: Fingerprint) -> Iterator[Finding]:
    saved = Fingerprint.from_dict(body.get("fingerprint") or {})
    for key, before, after in saved.changes(now):
        if key.endswith(".class"):
            continue
        name = about(key)
        if name == "weights":
            what = f"{words(key)} are not those that were saved"
            yield Finding(
                "error", "weights", what, "embeddings are those of another model", "copy or download the weights again"
            )
        else:
            what = f"{words(key)} was {before} when the model was saved and is {after} now"
            fix = _UNDO
            yield Finding("error", name, what, why(name), fix)


def _golden(body: dict[str, Any], found: artefact.Goldens) -> Iterator[Finding]:
    try:
        worst = artefact.golden_differences(body, found)
    except (KeyError, TypeError, ValueError) as error:
        yield Finding(
            "error",
            "golden embeddings",
            f"clipkit.json holds none that can be read: {error!r}",
            "the model cannot be held to them",
            "copy it again",
        )
        return
    for side, value in worst.items():
        if value > artefact.TOLERANCE:
            what = (
                f"{side} embeddings of the built-in {side}s differ by {value:.2g} from those it gave when it was saved"
            )
            reason = f"more than {artefact.TOLERANCE:g} is no rounding: results are not those of the saved model"
            yield Finding(
                "error",
                "golden embeddings",
                what,
                reason,
                "mend what is named above, or install the library versions it was saved with",
            )


# ------------------------------------------------------------------------------------------------------ behaviour


def _behaviour(model: DualEncoder, found: artefact.Goldens) -> Iterator[Finding]:
    for side in PARTS:
        apart = (found[side][:, None] - found[side][None]).abs().amax(-1)
        if float(apart.max()) < _COLLAPSED:
            what = f"all {side}s get the same {side} embedding"
            yield Finding(
                "error",
                "collapsed",
                what,
                "nothing can be told apart",
                "take an earlier checkpoint; look at its weights",
            )
    alone = _alone(model)
    for side in PARTS:
        worst = float((alone[side] - found[side]).abs().max())
        if not worst <= artefact.TOLERANCE:
            what = f"{side} embeddings differ by {worst:.2g} alone and in a batch of unequal {side}s"
            reason = "an item's embedding depends on what it happens to be batched with"
            yield Finding(
                "error", "batch", what, reason, "give the attention mask, pad to full length, and use eval mode"
            )
    half = {"image": model.encode_images(artefact.golden_images(), dtype=torch.bfloat16)}
    half["text"] = model.encode_texts(artefact.GOLDEN_TEXTS, dtype=torch.bfloat16)
    for side in PARTS:
        cosine = float((half[side] * found[side]).sum(1).min())
        if not cosine >= _BF16_COSINE:
            what = f"{side} embeddings in bfloat16 have a cosine of {cosine:.3f} only to those in float32"
            yield Finding("warning", "bfloat16", what, "half precision changes results", "encode in float32")


def _alone(model: DualEncoder) -> dict[Part, Tensor]:
    return {
        "image": model.encode_images(artefact.golden_images(), batch_size=1, dtype=torch.float32),
        "text": model.encode_texts(artefact.GOLDEN_TEXTS, batch_size=1, dtype=torch.float32),
    }


# --------------------------------------------------------------------------------------------------------- report


def describe(model: DualEncoder, found: Fingerprint) -> dict[str, str]:
    """What a model is, line by line."""
    record, backend = found.record, model.backend
    classes = " + ".join(dict.fromkeys(str(record[part].get("class")) for part in PARTS))
    parameters = sum(p.numel() for p in backend.parameters())
    scale = math.exp(float(record["logit_scale"])) if record["logit_scale"] < 100 else math.inf
    bias = "no bias" if record["logit_bias"] is None else f"bias {record['logit_bias']:g}"
    lines = {
        "what": f"{record['family']} ({classes}), {parameters:,} parameters, embeddings of {record['dim']} numbers",
        "fingerprint": found.hash,
    }
    for part in PARTS:
        own = sum(p.numel() for name, p in backend.named_parameters() if backend.owns(part, name))
        facts = record[part]
        lines[f"{part} tower"] = f"{own:,} parameters, activation {facts['activation']}, pooling: {facts['pooling']}"
    lines["images"] = image_facts.readable(record["image"])
    lines["texts"] = text_facts.readable(record["text"])
    lines["logits"] = (
        f"scale {scale:.4g} (its logarithm {record['logit_scale']:g} is stored), {bias}: {model.similarity}"
    )
    return lines


def _lines(report: Report) -> Iterator[str]:
    yield report.name
    for name, text in report.about.items():
        yield f"  {name:<12} {text}"
    yield f"  {'record':<12} " + (
        "clipkit.json: files, fingerprint and golden embeddings were compared with it"
        if report.recorded
        else "none (no clipkit.json): unverified, checked by what is known of such models only"
    )
    for finding in report.findings:
        yield ""
        yield f"{finding.level}: {finding.about}"
        for name, text in (("what", finding.what), ("why", finding.why), ("mend", finding.fix)):
            yield f"  {name:<5} {text}"
    yield ""
    yield report.verdict


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
