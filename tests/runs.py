"""Real runs in forked processes: a second import of torch would take longer than the run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch


def train(folder: Path, **changes: Any) -> Any:
    """A run with dropout, augmentation and an evaluation of 32 pairs: 12 steps in 3 epochs, each saved."""
    from clipkit import RetrievalEvaluator, TrainConfig, Trainer

    pairs = tiny.make_pairs()
    settings = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "augmentation": "crop", "log_every": 1}
    settings |= {"evaluate_every": 3, "save_steps": 1, "resume": "auto", "progress": False, **changes}
    evaluators = [RetrievalEvaluator(pairs)] if settings.pop("evaluators", True) else []
    model = tiny.make_model(dropout=settings.pop("dropout", 0.1))
    config = TrainConfig(str(folder), **settings)
    return Trainer(model, pairs, config, evaluators=evaluators).train()


def fork(work: Callable[[], Any], log: Path | None = None) -> int:
    """Start `work` in a process of its own group; its number. It exits as the command line would."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking beside threads
        child = os.fork()
    if child:
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # here as well: it may be killed before it begins
            os.setpgid(child, child)
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        code = _exit_code(work)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _exit_code(work: Callable[[], Any]) -> int:
    from clipkit.errors import ClipkitError

    try:
        work()
    except ClipkitError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(child: int, seconds: float = 120) -> int:
    """Its exit code; minus the signal that ended it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the process did not end in {seconds} s")


def killed_after(child: int, seconds: float) -> bool:
    """Kill the process and its workers after so many seconds, unless it has ended; whether it was killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the run failed by itself"
            return False
        time.sleep(0.001)
    os.killpg(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def outcome(folder: Path) -> dict[str, str]:
    """What must be the same however often a run was interrupted: weights, optimizer, best weights and the log."""
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    files = sorted(last.glob("*.safetensors"))
    assert {"weights.safetensors", "optimizer.safetensors"} <= {each.name for each in files}
    files += [folder / "metrics.jsonl", *sorted((folder / "model").rglob("*.safetensors"))]
    found = {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
    return {"checkpoint": last.name, **found}


def ranks(count: int, work: Callable[[], Any], log: Path | None = None) -> list[int]:
    """Start `work` on several connected processes, as torchrun would; their numbers, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def on(rank: int) -> Callable[[], Any]:
        def start() -> Any:
            from accelerate import PartialState
            from accelerate.state import AcceleratorState

            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            os.environ.update({name: str(value) for name, value in where.items()})
            AcceleratorState._reset_state(True)
            PartialState._reset_state()
            done = work()
            torch.distributed.destroy_process_group()
            return done

        return start

    return [fork(on(rank), log and log.with_name(f"{log.name}.{rank}")) for rank in range(count)]
