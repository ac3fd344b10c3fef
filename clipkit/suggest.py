"""The name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest matches, or nothing: " Did you mean a, b?"."""
    names = sorted(set(known))
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    return f" Did you mean {', '.join(close)}?" if close else ""
