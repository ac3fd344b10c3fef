from __future__ import annotations

import json
import math

import pytest

from clipkit import DualEncoder
from clipkit.errors import ClipkitError, UsageError
from clipkit.evaluation.evaluator import Evaluator
from clipkit.evaluation.result import build_result, environment
from clipkit.files import dump_json


class Fixed(Evaluator):
    name = "z"

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        return {"z/top1": 0.5}

    def baselines(self) -> dict[str, dict[str, float]]:
        return {"chance": {"z/top1": 0.1}, "majority": {"z/top1": 0.4}}

    def counts(self) -> dict[str, int]:
        return {"z/images": 7}


def test_result_has_all_it_takes_to_believe_it(model) -> None:
    result = build_result(model, {"z/top1": 0.5}, [Fixed(), lambda model: {}], 3, 1.23456, photos="p")
    assert json.loads(dump_json(result)) == result
    assert result["metrics"] == {"z/top1": 0.5}
    assert (result["chance"], result["majority"], result["n"]) == ({"z/top1": 0.1}, {"z/top1": 0.4}, {"z/images": 7})
    assert (result["seed"], result["seconds"], result["photos"]) == (3, 1.235, "p")
    assert {"python", "torch", "transformers", "clipkit"} <= set(result["versions"])
    assert result["fingerprint"]["hash"] == model.fingerprint().hash


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_never_written(model, bad: float) -> None:
    with pytest.raises(ClipkitError, match="finite") as error:
        build_result(model, {"z/top1": 0.5, "z/top5": bad}, [], 0, 1.0)
    assert error.value.where == "z/top5"


def test_keys_are_not_overwritten(model) -> None:
    with pytest.raises(UsageError, match="'fingerprint' already"):
        build_result(model, {}, [], 0, 1.0, fingerprint="x")


def test_environment() -> None:
    facts = environment()
    assert facts["torch"]
    assert all(isinstance(value, str) for value in facts.values())
