"""Which way a metric is good."""

from __future__ import annotations

_LOW = ("_rank", "loss")


def worth(key: str, value: float) -> float:
    """The metric with its sign turned where low values are good (keys that end in ``_rank`` or ``loss``)."""
    return -value if key.endswith(_LOW) else value
