"""Signals that ask a run to stop: noted at once, obeyed between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from clipkit.progress import aside

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While this is entered, a first SIGTERM, SIGINT or SIGUSR1 is kept in `received`; a second one ends the process.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        with contextlib.suppress(OSError):  # not through a logger, which may hold a lock at this moment
            os.write(2, aside(f"{self.received.name}: saving after this step; once more ends at once").encode())
