"""Which way is better: the one place that knows it of a metric by its key."""

from __future__ import annotations


def lower_is_better(key: str) -> bool:
    """Whether a metric is the better the lower it is: keys that end in ``loss`` or ``_rank``."""
    return key.endswith(("loss", "_rank"))


def worth(key: str, value: float) -> float:
    """A metric's value with the sign that makes the higher one the better one."""
    return -value if lower_is_better(key) else value
