"""What a run folder tells about how the run was made: each attempt, its surroundings, and the curves."""

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
        topology: what the bits of a result depend on beside the config, as `environment` gives it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], topology: Mapping[str, Any]) -> None:
        self.path, self.config, self.topology = folder / NAME, config, topology

    def last(self) -> dict[str, Any]:
        """The topology of the attempt before this one; empty where there is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for line in reversed(lines):
            try:
                found = json.loads(line)
            except ValueError:  # a line that a kill has cut
                continue
            if "topology" in found:
                return dict(found["topology"])
        return {}

    def begin(self, step: int) -> None:
        """An attempt goes on after `step`; 0 at the start."""
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

    def end(self, step: int, how: str) -> None:
        with contextlib.suppress(OSError):  # of a full disk, say, which the run has told of already
            self._write({"ends_after_step": step, "time": _now(), "how": how})

    def _write(self, line: Mapping[str, Any]) -> None:
        if distributed.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def environment(device: torch.device, precision: str, micro_batch: int | None) -> dict[str, Any]:
    """What the last bits of a result depend on beside config and data: equal ones resume bit for bit."""
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
    """Commit of the folder that the program was started in, and whether it was changed since; None without git."""

    def ask(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def draw_curves(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """curves/*.svg: the loss, the logit scale, and each family of metrics, by step."""
    columns: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in history:
        for key, value in line.items():
            if isinstance(value, int | float) and key not in ("step", "epoch"):
                chart = "loss" if key in ("loss", "kl") else key.rpartition("/")[0].replace("/", "_") or key
                columns.setdefault(chart, {}).setdefault(key, []).append((line["step"], value))
    for chart, lines in columns.items():
        points = {key: ([x for x, _ in each], [y for _, y in each]) for key, each in lines.items()}
        write_text(folder / f"{chart}.svg", line_chart(points, "step", chart.replace("_", " ")))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
