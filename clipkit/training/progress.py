"""A bar where a person watches, a line every ten seconds where a log is kept."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Shows how far a loop is, on standard error.

    Args:
        total: steps.
        what: in a word.
        shown: false shows nothing.
        done: steps that were taken before.
    """

    def __init__(self, total: int, what: str, *, shown: bool = True, done: int = 0) -> None:
        self.total, self.what, self.shown, self.done = total, what, shown, done
        self.console = Console(stderr=True, highlight=False)
        self.live = shown and self.console.is_terminal
        self.fields, self.last, self.start = "", 0.0, time.monotonic()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task(what, total=total, completed=done, values="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, step: int, **values: float) -> None:
        """The state after `step` steps; `values` stay until the next."""
        if values:
            self.fields = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.bar.update(self.task, completed=step, values=self.fields)
        now = time.monotonic()
        if self.shown and not self.live and (now - self.last > SECONDS_BETWEEN_LINES or step == self.total):
            self.last, passed = now, now - self.start
            left = passed / max(1, step - self.done) * (self.total - step)
            self._print(f"{self.what} {step}/{self.total}  {self.fields}  {passed:.0f} s passed, {left:.0f} s left")

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.shown:
            self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
