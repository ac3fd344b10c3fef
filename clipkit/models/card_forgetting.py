"""What the forgetting guardrail found, in words and as a table: for the log and for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipkit.metrics.direction import worth


def forgetting_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown.

    Args:
        found: `domain` and `reference` (metric keys), `baseline`, `budget`, `points` (each with `alpha`, `domain`,
            `reference`), `chosen` (its alpha), `held` (whether any point is within the budget).
    """
    lines = [_verdict(found), ""]
    lines += [f"| alpha | {found['domain']} | {found['reference']} | lost | |", "|---|---|---|---|---|"]
    for point in found["points"]:
        lost = _lost(found, point)
        what = {0: "before"}.get(point["alpha"], "fine-tuned" if point["alpha"] == 1 else "")
        note = ", ".join(each for each in (what, "chosen" if point["alpha"] == found["chosen"] else "") if each)
        lines.append(
            f"| {point['alpha']:.1f} | {point['domain']:.4f} | {point['reference']:.4f} | {lost:+.4f} | {note} |"
        )
    return lines


def _nothing_kept(found: Mapping[str, Any]) -> str:
    within = sum(_lost(found, point) <= found["budget"] + 1e-9 for point in found["points"])
    return "No other alpha is within that" if within == 1 else "No other alpha within that does better in the domain"


def _lost(found: Mapping[str, Any], point: Mapping[str, Any]) -> float:
    key = str(found["reference"])
    return worth(key, float(found["baseline"])) - worth(key, float(point["reference"]))


def _verdict(found: Mapping[str, Any]) -> str:
    said = f"{found['reference']} was {found['baseline']:.4f} before training; {found['budget']:g} of it may be lost."
    alpha = f"{found['chosen']:g}"
    if not found["held"]:
        return f"{said} No alpha is within that: {alpha}, which lost least, was chosen, and the budget is not held."
    if found["chosen"] == 0:
        return f"{said} {_nothing_kept(found)}: alpha 0 was chosen, the weights before training."
    return f"{said} Weights = (1 - alpha) * before + alpha * fine-tuned; alpha {alpha} was chosen."
