"""Python in a process that cannot import clipkit: what a person has who was only given the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_BLOCKED = """
import sys, warnings
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "clipkit":
            raise ImportError("clipkit is blocked")
sys.meta_path.insert(0, Blocker())
warnings.simplefilter("ignore")
try:
    import clipkit
except ImportError:
    pass
else:
    raise SystemExit("clipkit could be imported")
"""


def run_plain(script: str, cwd: Path) -> str:
    """Standard output of `script`, run in `cwd`."""
    command = [sys.executable, "-c", _BLOCKED + script]
    done = subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
