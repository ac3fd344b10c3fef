"""Several processes that work together, without an interpreter for each: forked from one that has imported all."""

from __future__ import annotations

import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def together(function: Callable[..., Any], world: int, *arguments: Any) -> Any:
    """What `function(*arguments)` gives on the first of `world` gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        _start(_rank, world, folder, function, arguments)
        return torch.load(Path(folder) / "found.pt", weights_only=False)


def started(program: Path, world: int, *arguments: object) -> None:
    """Run a program as torchrun would start it on `world` processes; as python would on one."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    _start(_program, world, port, str(program), list(map(str, arguments)))


def _start(function: Callable[..., None], world: int, *arguments: Any) -> None:
    mp.start_processes(function, (world, *arguments), nprocs=world, start_method="forkserver")


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    found = function(*arguments)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def _program(rank: int, world: int, port: int, program: str, arguments: list[str]) -> None:
    if world > 1:
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in launch.items()} | {"MASTER_ADDR": "localhost"}
    sys.path.insert(0, str(Path(program).parent))
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
