"""The command line: every verb, and how it ends. Bodies import late, so that `clipkit --help` answers at once."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

# isort: off
from clipkit.cli import quickstart, train, evaluate, label, index, export, check, env  # noqa: F401  # in help's order

# isort: on
from clipkit.cli.app import app
from clipkit.cli.shell import never_fail_on_a_name
from clipkit.errors import exit_with_message


def main() -> NoReturn:
    """The console script: exit codes as in `clipkit.errors`."""
    never_fail_on_a_name()
    # OpenMP threads that spin while they wait make a step ten times slower once another program wants their core;
    # threads that never spin make it a fifth slower when none does
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("clipkit").setLevel(logging.INFO)  # and no other library: theirs would fill the screen
    if not sys.stderr.isatty():  # or their bars would fill a log
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    exit_with_message(app)
    sys.exit(0)
