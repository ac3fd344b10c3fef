"""The lock of a run's folder and the signals that end it, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clipkit.errors import UsageError
from clipkit.training.lock import locked
from clipkit.training.signals import StopSignal

LOOP = """
import sys, time
from clipkit.training.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.name or "stubborn" in sys.argv:
        time.sleep(0.01)
print(stop.name, flush=True)
"""
HOLD = """
import sys, time
from pathlib import Path
from clipkit.training.lock import locked
with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_asks(number: signal.Signals) -> None:
    process = start(LOOP)
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert (out, process.returncode) == (f"{number.name}\n", 0)
    assert error == f"{number.name}: saving after this step; once more ends at once\n"


def test_the_second_ends_at_once() -> None:
    process = start(LOOP, "stubborn")
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.communicate()


def test_handlers_are_put_back_and_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before

    def inside() -> None:
        with StopSignal():
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()


def test_a_second_writer_is_refused_by_name_until_the_first_is_gone(tmp_path: Path) -> None:
    process = start(HOLD, str(tmp_path))
    with pytest.raises(UsageError, match=f"another process is writing here: {process.pid}@"), locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()}@")
