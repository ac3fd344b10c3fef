"""`clipkit check model`: what a model is, what is wrong with it, why that matters and how to fix it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.errors import ClipkitError
from clipkit.modality import MODALITIES
from clipkit.models.adapting import lora
from clipkit.models.checks import vocabulary
from clipkit.models.checks.behaviour import behaviour, changes, golden_findings
from clipkit.models.checks.family_rules import known_answers
from clipkit.models.checks.finding import Finding, why
from clipkit.models.checks.folder import damaged, file_findings, weight_findings
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint import image_transform as image_facts
from clipkit.models.fingerprint import tokenizer as text_facts
from clipkit.models.fingerprint.fingerprint import Fingerprint
from clipkit.models.fingerprint.golden import as_fp32_cpu, golden_embeddings
from clipkit.models.loading import manifest
from clipkit.models.loading.hub import find_folder, model_of_run
from clipkit.models.loading.load import open_model


@dataclass
class Report:
    """The result of `check_model`. ``str(report)`` is for people, `as_dict` for machines."""

    name: str
    about: dict[str, str] = field(default_factory=dict)
    """What the model is, in words; empty if it cannot be opened."""
    fingerprint: Fingerprint | None = None
    recorded: bool = False
    """Whether there is a clipkit.json to compare the model with."""
    findings: list[Finding] = field(default_factory=list)
    effects: list[str] = field(default_factory=list)
    """What the errors above do to embeddings, where they are known to be the cause."""

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
            return f"NOT HEALTHY: {_count(self.errors, 'thing')} wrong{beside}. Do not use it before that is fixed."
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
            "effects": self.effects,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def check_model(model: str | os.PathLike[str] | DualEncoder, *, trust_remote_code: bool = False) -> Report:
    """Check a model in every respect, and go on after an error.

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
        _examine_opened(report, model, None, None)
        return report
    report = Report(os.fspath(model))
    folder = _folder(model)
    if folder is not None:
        report.recorded = (folder / manifest.NAME).is_file()
        report.findings += [*file_findings(folder), *weight_findings(folder)]
    opened, body = _open(report, model, folder, trust_remote_code)
    if opened is not None:
        _examine_opened(report, opened, body, folder)
    return report


def _folder(name: str | os.PathLike[str]) -> Path | None:
    text = os.fspath(name)
    folder = Path(text.removeprefix("open_clip:")).expanduser()
    if folder.is_dir():
        return model_of_run(folder)
    return None if text.startswith("open_clip:") else find_folder(text)


def _open(
    report: Report, name: str | os.PathLike[str], folder: Path | None, trust_remote_code: bool
) -> tuple[DualEncoder | None, dict[str, Any] | None]:
    try:
        backend, processor, body, _ = open_model(name, None, trust_remote_code)
    except Exception as error:  # a damaged folder can fail with any error; the findings so far are reported
        if folder is None and isinstance(error, ClipkitError):
            raise  # there is nothing to examine
        foreign = [] if folder is None else list(vocabulary.of_folder(folder))
        finding = _unopened(error)
        if foreign and finding.about in ("pooling", "opening"):
            report.findings += foreign  # why its end of text, or its padding, is another
        elif report.ok or finding.about != "opening":
            report.findings.append(finding)
        return None, None
    return DualEncoder(backend, processor, os.fspath(name)).eval(), body


def _unopened(error: Exception) -> Finding:
    if not isinstance(error, ClipkitError):
        message = f"the model does not open: {type(error).__name__}: {error}"
        return Finding("error", "opening", message, "its files contradict each other", _AGAIN)
    topic = error.topic or "opening"
    reason = "opened in spite of it, it would give other embeddings, or none" if topic == "opening" else why(topic)
    return Finding("error", topic, f"the model does not open: {error.message}", reason, error.fix or _AGAIN)


_AGAIN = "download or save the model again"


def _examine_opened(report: Report, model: DualEncoder, body: dict[str, Any] | None, folder: Path | None) -> None:
    model = DualEncoder(as_fp32_cpu(lora.merged(model.backend)), model.processor, model.name)
    if body is not None and body.get("schema") != manifest.SCHEMA:
        body = None  # named already; its facts are not comparable
    report.findings += vocabulary.of_model(model)
    try:
        report.fingerprint = model.fingerprint()
    except _FAILURES as error:
        if report.ok:
            report.findings.append(_no_embeddings(error))
        return
    report.about = describe(model, report.fingerprint)
    if body is not None:
        report.findings += [f for f in changes(body, report.fingerprint) if not _named(report, f, folder)]
    report.findings += [f for f in known_answers(model, report.fingerprint) if not _named(report, f, folder)]
    try:
        embeddings = golden_embeddings(model.backend, model.processor)
        changed = [] if body is None else list(golden_findings(body, embeddings))
        if report.ok:
            report.findings += changed
        else:
            report.effects += [finding.what for finding in changed]
        report.findings += behaviour(model, embeddings)
    except _FAILURES as error:
        if not any(f.about in ("image size", "context length") for f in report.findings):
            report.findings.append(_no_embeddings(error))


_FAILURES = (ClipkitError, RuntimeError, ValueError, IndexError)  # of a model that is run


def _no_embeddings(error: Exception) -> Finding:
    message = f"the model gives no embeddings: {str(error).splitlines()[0]}"
    return Finding("error", "embeddings", message, "it cannot be used", "take another copy of it")


def _named(report: Report, finding: Finding, folder: Path | None) -> bool:
    """Whether the report has it already: by its own name, or as the damage to the file that it comes from."""
    if finding.about == "weights" and folder is not None:
        return any(name.endswith((".safetensors", ".bin")) for name in damaged(folder))
    topics = {reported.about for reported in report.findings}
    return finding.about in topics or ("vocabulary" in topics and finding.about in _BY_VOCABULARY)


_BY_VOCABULARY = ("token ids", "case", "start token", "end token (EOS)")


def describe(model: DualEncoder, fingerprint: Fingerprint) -> dict[str, str]:
    """Return what a model is: name of a line -> its text."""
    record = fingerprint.record
    backend = model.backend
    classes = " + ".join(dict.fromkeys(str(record[part].get("class")) for part in MODALITIES))
    parameters = sum(p.numel() for p in backend.parameters())
    scale = math.exp(float(record["logit_scale"])) if record["logit_scale"] < 100 else math.inf
    bias = "no bias" if record["logit_bias"] is None else f"bias {record['logit_bias']:g}"
    lines = {
        "what": f"{record['family']} ({classes}), {parameters:,} parameters, embeddings of {record['dim']} numbers",
        "fingerprint": fingerprint.hash,
    }
    for part in MODALITIES:
        facts = record[part]
        own = sum(p.numel() for name, p in backend.named_parameters() if backend.belongs_to(part, name))
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
    yield f"  {'record':<12} {_record(report)}"
    for finding in report.findings:
        yield ""
        yield f"{finding.level}: {finding.about}"
        for name, text in (("what", finding.what), ("why", finding.why), ("fix", finding.fix)):
            yield f"  {name:<5} {text}"
    yield ""
    for effect in report.effects:
        yield f"effect: {effect}"
    yield report.verdict


def _record(report: Report) -> str:
    if not report.recorded:
        return "none (no clipkit.json): unverified, checked by what is known of such models only"
    if not report.about:
        return "clipkit.json: files were compared with it; the model cannot be run, so its embeddings were not"
    return "clipkit.json: files, fingerprint and golden embeddings were compared with it"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
