"""The commands that install a missing extra: clipkit's distribution is called clipkit-vl, and may be a checkout."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

DISTRIBUTION = "clipkit-vl"  # on PyPI, `clipkit` is another project


def install_command(extra: str) -> str:
    """Return the shell command that installs an extra, such as ``lora``, for the clipkit that is running.

    >>> install_command("lora").startswith("pip install ")
    True
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def upgrade_command() -> str:
    """Return the shell command that installs the newest clipkit."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"git -C {shlex.quote(str(checkout))} pull"
    return f"pip install -U {DISTRIBUTION}"


def missing_packages(*names: str) -> list[str]:
    """Return the packages, by their import names, that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]
