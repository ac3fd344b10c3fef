"""Real runs in processes of their own, alone or as ranks, without the seconds that importing torch takes.

`fork` and `fork_ranks` copy this process, so that a test can hand over a closure and kill the process. `on_ranks` and
`run_program` start processes from a server that has imported everything: they share no threads and no state with the
test, which DDP and `runpy` need.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

mp.get_context("forkserver").set_forkserver_preload(
    [
        "pytest",
        "transformers.models.bert.modeling_bert",
        "transformers.models.vit.modeling_vit",
        "torch.testing",
        "clipkit.training.trainer",
        "clipkit.evaluation.retrieval",
    ]
)


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
    """Start `work` in a process of its own group, and return its id. It exits as the command line would."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking beside threads
        child = os.fork()
    if child:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(child, child)  # here as well: it may be killed before it begins
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
    """Wait for a process, and return its exit code, or minus the signal that ended it."""
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
    """Kill a process and its workers after so many seconds, unless it has ended; return whether it was killed."""
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
    """Return the hashes of the files that no interruption may change: weights, optimizer, best weights and the log."""
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    files = sorted(last.glob("*.safetensors"))
    assert {"weights.safetensors", "optimizer.safetensors"} <= {path.name for path in files}
    files += [folder / "metrics.jsonl", *sorted((folder / "model").rglob("*.safetensors"))]
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"checkpoint": last.name, **hashes}


def fork_ranks(count: int, work: Callable[[], Any], log: Path | None = None) -> list[int]:
    """Start `work` on several connected processes, as torchrun would, and return their ids, by rank."""
    port = _free_port()

    def on_rank(rank: int) -> Any:
        from accelerate import PartialState
        from accelerate.state import AcceleratorState

        _set_rank(rank, count, port)
        os.environ.update({"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"})
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        result = work()
        dist.destroy_process_group()
        return result

    def log_of(rank: int) -> Path | None:
        return log and log.with_name(f"{log.name}.{rank}")

    return [fork(partial(on_rank, rank), log_of(rank)) for rank in range(count)]


def on_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> Any:
    """Call `function(*arguments)` on `world` gloo processes, and return the result of the first."""
    with tempfile.TemporaryDirectory() as folder:
        _start(_call, world, folder, function, arguments)
        return torch.load(Path(folder) / "result.pt", weights_only=False)


def run_program(program: Path, world: int, *arguments: object) -> None:
    """Run a program as torchrun would start it on `world` processes, and as python would on one."""
    _start(_run, world, _free_port(), str(program), [str(argument) for argument in arguments])


def _start(function: Callable[..., None], world: int, *arguments: Any) -> None:
    mp.start_processes(function, (world, *arguments), nprocs=world, start_method="forkserver")


def _call(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    result = function(*arguments)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.destroy_process_group()


def _run(rank: int, world: int, port: int, program: str, arguments: list[str]) -> None:
    if world > 1:
        _set_rank(rank, world, port)
    sys.path.insert(0, str(Path(program).parent))
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def _set_rank(rank: int, world: int, port: int) -> None:
    """Set the environment variables that torchrun sets."""
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launch.items()})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
