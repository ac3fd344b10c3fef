"""The name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the known names that are most like a name, the best first; case is ignored.

    Args:
        name: as it was typed.
        known: the names that there are.
        count: return at most so many.
        cutoff: the least likeness, in [0, 1], as `difflib.get_close_matches` measures it.

    >>> closest("Captoin", ["image", "caption"])
    ['caption']
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=cutoff)]


def near(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the closest matches, or nothing: " Did you mean a, b?"."""
    matches = closest(name, sorted(set(known)), count=3, cutoff=0.5)
    return f" Did you mean {', '.join(matches)}?" if matches else ""
