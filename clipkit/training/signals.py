"""Being asked to stop: a flag that the loop reads between two steps."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger("clipkit")

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While entered, the first SIGTERM, SIGINT or SIGUSR1 sets `name`; a second one ends the process at once.

    Nothing is saved inside a handler: a step may be half done there. Outside the main thread, where Python takes no
    handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in STOPS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.name = signal.Signals(number).name
        # not through logging: its lock may be held by the very code that was interrupted
        os.write(2, f"{self.name}: saving after this step; once more ends at once\n".encode())
