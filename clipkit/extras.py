"""What a missing extra is installed with: clipkit's distribution is called clipkit-vl, and may be a checkout."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

DISTRIBUTION = "clipkit-vl"  # the index's `clipkit` is another project's


def install_command(extra: str) -> str:
    """The shell command that installs an extra, such as ``lora``, beside the clipkit that is running.

    >>> install_command("lora").startswith("pip install ")
    True
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def upgrade_command() -> str:
    """The shell command that brings a newer clipkit."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"git -C {shlex.quote(str(checkout))} pull"
    return f"pip install -U {DISTRIBUTION}"


def missing_packages(*names: str) -> list[str]:
    """Those of the packages, by their import names, that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]
