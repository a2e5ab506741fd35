from __future__ import annotations

import json
import math

import numpy as np
import pytest
from generators import decisions, json_objects
from hypothesis import given
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.space import Architecture, FrozenDict, Objective, Result, Trial

numbers = st.dictionaries(st.text(max_size=4), st.integers() | st.floats(), max_size=4)


@given(decisions, json_objects, st.none() | st.integers(1, 9) | st.floats(0.1, 9), st.none() | st.integers(0, 9))
def test_trials_survive_json(values: dict, info: dict, fidelity: float | None, parent: int | None) -> None:
    trial = Trial(
        id=3, architecture=Architecture(values, space="s"), fidelity=fidelity, parent=parent, seed=-7, info=info
    )
    again = Trial.from_json(json.loads(json.dumps(trial.to_json(), allow_nan=False)))
    assert again == trial
    assert repr(again) == repr(trial)
    assert hash(again) == hash(trial)


@given(numbers, numbers, st.floats(0, 1e9))
def test_results_survive_json_with_nan_and_infinity(metrics: dict, costs: dict, seconds: float) -> None:
    result = Result(metrics=metrics, costs=costs, seconds=seconds, weights="key")
    again = Result.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert repr(again) == repr(result)  # NaN differs from itself under ==, not in its repr


@pytest.mark.parametrize(
    "objective", [Objective("accuracy"), Objective("macs", "minimize", 10**9), Objective("loss", "minimize", 0.1)]
)
def test_objectives_survive_json(objective: Objective) -> None:
    assert repr(Objective.from_json(json.loads(json.dumps(objective.to_json())))) == repr(objective)


def test_failures_are_results() -> None:
    failed = Result.failed("loss is NaN at step 7", seconds=1.5)
    assert (failed.status, failed.reason, failed.seconds) == ("failed", "loss is NaN at step 7", 1.5)
    infeasible = Result.infeasible("macs is 101", costs={"macs": 101})
    assert (infeasible.status, infeasible.costs["macs"]) == ("infeasible", 101)
    assert Result.from_json(failed.to_json()) == failed
    assert Result.from_json(infeasible.to_json()) == infeasible


def test_values_are_frozen() -> None:
    metrics = {"accuracy": np.float32(0.5), "right": np.int64(3)}
    result = Result(metrics=metrics)
    metrics["accuracy"] = 1.0
    assert repr(result.metrics) == "{'accuracy': 0.5, 'right': 3}"
    with pytest.raises(TypeError):
        result.metrics["accuracy"] = 1.0
    assert FrozenDict({"a": [1, {"b": 2}]})["a"][1] == FrozenDict({"b": 2})
    assert hash(FrozenDict({"a": 1, "b": 2})) == hash(FrozenDict({"b": 2, "a": 1}))


def test_objective_values() -> None:
    accuracy, macs = Objective("accuracy"), Objective("macs", "minimize")
    result = Result(metrics={"accuracy": 0.9}, costs={"macs": 100})
    assert (accuracy.value(result), macs.value(result)) == (0.9, 100.0)
    assert math.isnan(Objective("loss").value(result))
    assert math.isnan(accuracy.value(Result(status="failed", reason="r", metrics={"accuracy": 0.9})))
    assert accuracy.is_better(0.9, 0.8)
    assert macs.is_better(1, 2)
    assert not accuracy.is_better(0.8, 0.8)
    assert accuracy.is_better(-math.inf, math.nan)
    assert not macs.is_better(math.nan, math.inf)
    assert not macs.is_better(math.nan, math.nan)


ARCHITECTURE = Architecture({}, space="s")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trial(id=-1, architecture=ARCHITECTURE), r"Trial\.id: got -1; allowed: an integer"),
        (lambda: Trial(id=True, architecture=ARCHITECTURE), r"Trial\.id: got True"),
        (lambda: Trial(id=0, architecture={}), r"Trial\.architecture: got \{\}; allowed: an Architecture"),
        (lambda: Trial(id=0, architecture=ARCHITECTURE, fidelity=math.nan), r"Trial\.fidelity: got nan"),
        (
            lambda: Trial(id=0, architecture=ARCHITECTURE, info={"p": [math.inf]}),
            r"Trial\.info\['p'\]: got inf; allowed: finite",
        ),
        (lambda: Trial.from_json({"id": 1}), r"trial: got \{'id': 1\}; allowed: an object with exactly the fields"),
        (
            lambda: Result(status="great"),
            r"Result\.status: got 'great'; allowed: one of \['ok', 'failed', 'infeasible'\]",
        ),
        (lambda: Result(status="failed"), r"Result\.reason: got None; allowed: a text when"),
        (lambda: Result(reason="why"), r"Result\.reason: got 'why'"),
        (lambda: Result(metrics={"a": "0.5"}), r"Result\.metrics: got \{'a': '0.5'\}; allowed: numbers only"),
        (lambda: Result(seconds=-1.0), r"Result\.seconds: got -1\.0; allowed: >= 0"),
        (lambda: Result(seconds=math.inf), r"Result\.seconds: got inf"),
        (
            lambda: Result.from_json({**Result().to_json(), "metrics": {"a": "big"}}),
            r"Result\.metrics: got 'big'; .*'NaN'",
        ),
        (lambda: Objective(""), r"Objective\.metric: got ''"),
        (lambda: Objective("a", "up"), r"Objective\.direction: got 'up'; allowed: one of \['maximize', 'minimize'\]"),
        (lambda: Objective("a", reference=math.nan), r"Objective\.reference: got nan; allowed: finite"),
    ],
)
def test_bad_values_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
