"""Progress: lines where standard error is a pipe, a bar above which the log is printed where it is a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clipkit import progress
from clipkit.progress import Progress, clock, pace, track


@pytest.fixture
def time(monkeypatch):
    """A clock that stands until it is moved."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_tell_rate_and_time_left_of_this_very_step(time, capsys):
    with Progress(20, "training", done=10) as shown:
        time.now += 480  # reading, measuring: no part of the steps
        shown.begin()
        for step in range(11, 21):
            time.now += 6
            shown.show(step, loss=1 / step)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "training 12/20  loss 0.0833  6 s/step, 0:00:48 left",
        "training 14/20  loss 0.0714  6 s/step, 0:00:36 left",
        "training 16/20  loss 0.0625  6 s/step, 0:00:24 left",
        "training 18/20  loss 0.0556  6 s/step, 0:00:12 left",
        "training 20/20  loss 0.05  6 s/step, took 0:01:00",
    ]


def test_a_long_log_does_not_fill_with_lines(time, capsys):
    with Progress(10_000, "training") as shown:
        for step in range(1, 10_001):
            time.now += 10
            shown.show(step)
    assert len(capsys.readouterr().err.splitlines()) < 600  # of 28 hours


def test_what_is_short_needs_no_line(time, capsys):
    for seconds in (1, 5):
        for _ in track(range(3), 3, "embedding images", unit="image"):
            time.now += seconds / 3
    assert capsys.readouterr().err == "embedding images 3/3  1.67 s/image, took 0:00:05\n"


def test_progress_false_silences_the_lines_and_nothing_else(time, capsys):
    with Progress(2, "training", shown=False) as shown:
        shown.note("what the data allows")
        time.now += 60
        shown.show(2)
    with Progress(2, "training", silent=True) as other:  # of another rank
        other.note("what the data allows")
        time.now += 60
        other.show(2)
    assert capsys.readouterr().err == "what the data allows\n"


def test_pace_and_clock():
    assert [pace(4, 6, "step"), pace(25, 2, "image"), pace(600, 4, "image")] == [
        "1.5 s/step",
        "12.5 images/s",
        "150 images/s",
    ]
    assert [clock(5.4), clock(3725)] == ["0:00:05", "1:02:05"]


PROGRAM = """
import logging, os, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from clipkit.progress import Progress, aside, track
with Progress(3, "training") as bar:
    for step in (1, 2, 3):
        bar.show(step, loss=0.5)
        bar.note(f"note {step}")
        logging.info("log %d", step)
        for _ in track(range(2), 2, "embedding images", unit="image"):
            time.sleep(0.15)
            if step == 2:
                os.write(2, aside("a signal").encode())
        logging.info("log after %d " + "and long " * 20, step)
logging.info("the end")
"""


def on_a_terminal(program):
    """What a program writes to a terminal of 100 columns as its standard error."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program]
    child = subprocess.Popen(command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    seen = io.BytesIO()

    def read():
        with open(ours, "rb", buffering=0) as terminal:  # noqa: PTH123
            try:
                while part := terminal.read(4096):
                    seen.write(part)
            except OSError:  # how a terminal says that its program has gone
                pass

    reader = threading.Thread(target=read)
    reader.start()
    assert child.communicate(timeout=120)[0] == b""
    assert child.returncode == 0
    reader.join()
    return seen.getvalue().decode()


def screen(written):
    """What stands on the screen in the end: cursor up, to the line's start, erase the line."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return [line for line in lines if line.strip()]


def test_on_a_terminal_the_log_stands_above_the_bar_and_the_bar_goes():
    written = on_a_terminal(PROGRAM)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "embedding images" in plain  # while it lasts
    assert "1/3" in plain
    long = "and long " * 20  # and in one line: where it is wrapped is the terminal's business
    steps = [[f"note {step}", f"log {step}", f"log after {step} {long}"] for step in (1, 2, 3)]
    steps[1][2:2] = ["a signal"] * 2
    assert screen(written) == [*steps[0], *steps[1], *steps[2], "the end"]
