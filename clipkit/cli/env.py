"""`clipkit env`."""

from __future__ import annotations

from clipkit.cli.options import Json
from clipkit.cli.output import print_json, say


def env(as_json: Json = False) -> None:
    """Versions, devices and threads: what to put into a bug report."""
    from clipkit.evaluation.result import environment

    facts = environment()
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        say(f"{name:<{width}}  {value}")
