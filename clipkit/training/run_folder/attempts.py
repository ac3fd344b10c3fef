"""What a run folder records about a run: its attempts, their environment, and the curves."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clipkit import distributed
from clipkit.evaluation.result import versions
from clipkit.files import write_text
from clipkit.html_report import line_chart

NAME = "attempts.jsonl"


class Attempts:
    """attempts.jsonl: one line where an attempt at a run begins, one where it ends; a killed one has no end.

    Args:
        folder: of the run.
        config: of the training.
        topology: the machine and its settings, as `environment` returns them.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], topology: Mapping[str, Any]) -> None:
        self.path, self.config, self.topology = folder / NAME, config, topology

    def last(self) -> dict[str, Any]:
        """Return the topology of the attempt before this one; empty if there is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for line in reversed(lines):
            try:
                attempt = json.loads(line)
            except ValueError:  # a line that was cut when the process was killed
                continue
            if "topology" in attempt:
                return dict(attempt["topology"])
        return {}

    def begin(self, step: int) -> None:
        """Record that an attempt continues after `step`; 0 at the start."""
        self._write(
            {
                "begins_after_step": step,
                "time": _now(),
                "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
                "folder": str(Path.cwd()),
                "process": f"{os.getpid()} on {socket.gethostname()}",
                "git": git_state(),
                "versions": versions(),
                "topology": dict(self.topology),
                "config": dict(self.config),
            }
        )

    def end(self, step: int, outcome: str) -> None:
        """Record that the attempt ended after `step`: ``done``, or the error."""
        with contextlib.suppress(OSError):  # such as a full disk, which the run has reported already
            self._write({"ends_after_step": step, "time": _now(), "how": outcome})

    def _write(self, line: Mapping[str, Any]) -> None:
        if distributed.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def environment(device: torch.device, precision: str, micro_batch: int | None) -> dict[str, Any]:
    """Return what the last bits of a result depend on, besides config and data; equal ones resume bit for bit."""
    name = torch.get_device_module(device).get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "processes": distributed.world_size(),
        "device": f"{device.type}, {name}",
        "threads": torch.get_num_threads(),
        "precision": precision,
        "micro_batch": micro_batch,
        "torch": torch.__version__,
    }


def git_state() -> dict[str, Any] | None:
    """Return the commit of the working directory, and whether files were changed since; None without git."""

    def git(*arguments: str) -> str:
        process = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        return process.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def draw_curves(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw curves/*.svg: the loss, the logit scale, and each family of metrics, by step."""
    charts: dict[str, dict[str, tuple[list[int], list[float]]]] = {}  # chart -> key -> steps and values
    for line in history:
        for key, value in line.items():
            if isinstance(value, int | float) and key not in ("step", "epoch"):
                steps, values = charts.setdefault(_chart_name(key), {}).setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    for chart, curves in charts.items():
        write_text(folder / f"{chart}.svg", line_chart(curves, "step", chart.replace("_", " ")))


def _chart_name(key: str) -> str:
    """Return the chart that shows a key of metrics.jsonl: ``retrieval`` for ``retrieval/text_to_image_recall@1``."""
    if key in ("loss", "kl"):
        return "loss"
    return key.rpartition("/")[0].replace("/", "_") or key


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
