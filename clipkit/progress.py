"""Progress of a long job, on standard error: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

T = TypeVar("T")

WAIT = 10.0  # seconds between two lines; a hundredth of what has passed, where that is longer
SHORT = 3.0  # seconds that need no line


class Progress:
    """One long job, or a part of one: inside another `Progress` it is a second row of the same display.

    Lines of the log, warnings and notes that come while a bar is shown are printed above it.

    Args:
        total: how much there is to do.
        what: in a word, such as ``training``.
        unit: of `total`, in the singular.
        shown: false shows neither bar nor lines; notes are printed all the same.
        silent: true prints nothing at all: of the processes of a launcher one is enough.
        done: how much was done before.
    """

    _display: ClassVar[Bar | None] = None  # of this process: rich can draw one at a time
    _rows: ClassVar[int] = 0  # of it

    def __init__(
        self, total: int, what: str, *, unit: str = "step", shown: bool = True, silent: bool = False, done: int = 0
    ) -> None:
        self.total, self.what, self.unit, self.silent, self.done = total, what, unit, silent, done
        self.shown = shown and not silent and total > 0
        self.now, self.first, self.values, self.lines = done, done, "", 0
        self.start = self.last = time.monotonic()
        self.bar: Bar | None = None
        self.own = False  # whether the display is this one's
        self.before, self.moved = sys.stderr, list[logging.StreamHandler[Any]]()

    def __enter__(self) -> Progress:
        self.begin()
        if self.shown and _watched():
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is None:
            return
        self.bar.remove_task(self.task)
        self.bar.refresh()  # so that as many rows stand there as are counted
        Progress._rows -= 1
        if self.own:
            Progress._display = None
            self.bar.stop()
            for handler in self.moved:
                handler.setStream(self.before)
        self.bar = None

    def begin(self) -> None:
        """Start the clock here: what came before tells nothing of how long the rest takes."""
        self.start = self.last = time.monotonic()
        self.first = self.now

    def advance(self, count: int = 1) -> None:
        """Add `count` to what is done."""
        self.show(self.now + count)

    def show(self, done: int, **values: float) -> None:
        """Set how much is done; `values` are shown beside it."""
        self.now = done
        self.values = "".join(f"  {name} {value:.3g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=done, values=self.values)
        elif self.shown:
            self._line()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if not self.silent:
            console = _console() if Progress._display is None else Progress._display.console
            console.print(text, markup=False, soft_wrap=True)

    def _open(self) -> None:
        self.own = Progress._display is None
        self.bar = Progress._display or Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=_console(),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe is data
            speed_estimate_period=600,  # seconds: a step may take minutes
        )
        self.task = self.bar.add_task(self.what, total=self.total, completed=self.now, values="")
        if self.own:
            Progress._display, self.before = self.bar, sys.stderr
            self.bar.start()
            self.moved = [handler for handler in _handlers() if handler.stream is self.before]
            for handler in self.moved:
                handler.setStream(_Above(self.bar.console))
        self.bar.refresh()
        Progress._rows += 1

    def _line(self) -> None:
        now = time.monotonic()
        passed, over = now - self.start, self.now >= self.total
        due = now - self.last >= max(WAIT, passed / 100)
        if not (due or (over and (self.lines or passed >= SHORT))):
            return
        self.last, self.lines = now, self.lines + 1
        rate = pace(self.now - self.first, passed, self.unit)
        left = passed / max(1, self.now - self.first) * (self.total - self.now)
        ends = f"took {clock(passed)}" if over else f"{clock(left)} left"
        self.note(f"{self.what} {self.now:,}/{self.total:,}{self.values}  {rate}, {ends}")


def track(
    items: Iterable[T], total: int, what: str, *, unit: str, shown: bool = True, sizes: Iterable[int] | None = None
) -> Generator[T, None, None]:
    """The items, and how far they are.

    Args:
        items: each counts as done when the next one is asked for.
        total, what, unit, shown: as for `Progress`.
        sizes: how much each item counts; None: one.
    """
    with Progress(total, what, unit=unit, shown=shown) as progress:
        counts = None if sizes is None else iter(sizes)
        for item in items:
            yield item
            progress.advance(1 if counts is None else next(counts))


def aside(text: str) -> str:
    """A line as a handler of signals may write it to standard error: it takes no lock, and a bar comes again below."""
    rows = Progress._rows
    erase = "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (rows - 1) if rows else ""
    return f"{erase}{text}" + "\n" * max(1, rows)  # the bar goes up by its rows before it is drawn


class _Above:
    """A stream that prints above the bar, and leaves it to the terminal to wrap long lines."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, text: str) -> int:
        self.console.print(text.removesuffix("\n"), markup=False, soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Do nothing: every write prints at once."""


def pace(done: int, seconds: float, unit: str) -> str:
    """How fast: ``1.9 s/step``, or ``12.3 steps/s``.

    >>> pace(4, 6.0, "step"), pace(600, 4.0, "image")
    ('1.5 s/step', '150 images/s')
    """
    seconds_each = seconds / max(1, done)
    if seconds_each >= 1:
        value, measure = seconds_each, f"s/{unit}"
    else:
        value, measure = 1 / max(seconds_each, 1e-9), f"{unit}s/s"
    return f"{value:,.0f} {measure}" if value >= 100 else f"{value:.3g} {measure}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: ``0:01:05``."""
    return str(timedelta(seconds=round(seconds)))


def _console() -> Console:
    return Console(stderr=True, highlight=False)


def _watched() -> bool:
    """Whether standard error is a terminal that can move its cursor."""
    return Progress._display is not None or (sys.stderr.isatty() and not _console().is_dumb_terminal)


def _handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    return [handler for handler in dict.fromkeys(handlers) if isinstance(handler, logging.StreamHandler)]
