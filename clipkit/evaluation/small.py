"""The notice of a test set that is too small for its figures to mean much."""

from __future__ import annotations

from collections.abc import Mapping

from clipkit.models.text_notices import Notice

_FEW = 25  # queries, of which the 95 % interval of one half is 20 points to either side


def small_test(
    name: str, queries: Mapping[str, int], chance: Mapping[str, float], majority: Mapping[str, float] | None = None
) -> list[Notice]:
    """At most one notice: that there are few queries, and which figures are good whatever the model does.

    Args:
        name: of the evaluator, the prefix of the keys.
        queries: how many there are of each kind, by its plural: ``{"images": 3}``.
        chance: of each figure. One half is that of any test of two classes, and is not reported.
        majority: of each figure, what always naming the most frequent class gives.
    """
    remarks = [f"of {n} {item} each is worth {100 / n:.0f} points" for item, n in queries.items() if n < _FEW]
    certain = [key.removeprefix(f"{name}/") for key, value in chance.items() if value > 1 - 1e-9]
    likely = {key.removeprefix(f"{name}/"): value for key, value in chance.items() if 0.5 < value <= 1 - 1e-9}
    if certain:
        remarks.append(f"{', '.join(certain)} can only be 1")
    if likely:
        remarks.append(f"by chance {', '.join(f'{key} is {value:.2f}' for key, value in likely.items())}")
    if majority and not certain and min(majority.values()) == 1:
        remarks.append("all images are of one class")
    return [Notice("SMALL_TEST", f"{name}: this test set tells little: {'; '.join(remarks)}")] if remarks else []
