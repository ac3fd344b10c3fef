"""No network, no cache of the user's, few threads and no window, set before anything else is imported; tiny models."""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import socket
import tempfile
from types import ModuleType
from typing import Any

import pytest

_home = tempfile.mkdtemp(prefix="clipkit-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "CLIPKIT_CACHE": _home + "/clipkit",
    "HF_HOME": _home,  # a test that passes only because of what is cached here fails elsewhere
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # read by torch when it starts; importing it here would slow every run
    "MKL_NUM_THREADS": "1",
}


class NetworkRefusedError(Exception):
    """Not an OSError: a library that retries on those would hide it."""


def _refuse_unless_local(host: Any) -> None:
    if host in (None, "", "localhost", socket.gethostname()):
        return
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        local = ipaddress.ip_address(name.split("%")[0]).is_loopback or name in ("0.0.0.0", "::")
    except ValueError:
        local = name == "localhost"
    if not local:
        raise NetworkRefusedError(f"a test wanted to reach {name}")


def _guarded(original: Any, address_at: int) -> Any:
    def call(self: socket.socket, *args: Any, **kwargs: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_unless_local(args[address_at][0])
        return original(self, *args, **kwargs)

    return call


_getaddrinfo = socket.getaddrinfo


def _resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_unless_local(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = _guarded(socket.socket.connect, 0)  # type: ignore[method-assign]
socket.socket.connect_ex = _guarded(socket.socket.connect_ex, 0)  # type: ignore[method-assign]
socket.socket.sendto = _guarded(socket.socket.sendto, -1)  # type: ignore[method-assign]
socket.getaddrinfo = _resolve


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The helpers of tests/tiny.py."""
    import tiny
    import torch

    torch.set_num_threads(1)
    return tiny


@pytest.fixture(scope="session")
def model(tiny: ModuleType) -> Any:
    """One tiny model; a test that changes a model makes its own."""
    return tiny.tiny_model()
