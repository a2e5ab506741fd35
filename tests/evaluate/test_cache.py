"""The cache around an evaluator: equal networks cost nothing again, and are counted."""

from __future__ import annotations

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.evaluate.base import Evaluator, WeightStore
from archsmith.evaluate.cache import CachedEvaluator
from archsmith.families.cell_spaces import cell_from_string, nas_bench_201_space
from archsmith.space import Architecture, Result, Trial

FIRST = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|skip_connect~2|"
TWIN = "|none~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|skip_connect~2|"
OTHER = "|none~0|+|nor_conv_1x1~0|none~1|+|none~0|none~1|skip_connect~2|"


class Counting:
    """Takes 3 seconds and returns how often it was asked; fails where the seed is 13."""

    def __init__(self) -> None:
        self.asked = 0

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        self.asked += 1
        if trial.seed == 13:
            return Result.failed("unlucky", seconds=1.0)
        return Result(metrics={"asked": float(self.asked)}, seconds=3.0)


def trial(text: str, number: int = 1, **fields: float) -> Trial:
    return Trial(id=number, architecture=cell_from_string(text), **fields)  # type: ignore[arg-type]


def test_equal_networks_are_free_and_counted() -> None:
    inner = Counting()
    cached = CachedEvaluator(inner)
    assert isinstance(cached, Evaluator)
    assert not cached.is_known(trial(FIRST))
    first = cached.evaluate(trial(FIRST))
    assert first.seconds == 3.0
    for text in (FIRST, TWIN):
        assert cached.is_known(trial(text, 2))
        again = cached.evaluate(trial(text, 2))
        assert (again.metrics, again.seconds) == (first.metrics, 0.0)
    assert cached.evaluate(trial(OTHER)).metrics["asked"] == 2
    assert (cached.evaluations, cached.repetitions, inner.asked, len(cached)) == (2, 2, 2, 2)


def test_an_architecture_from_json_is_the_same_network() -> None:
    cached = CachedEvaluator(Counting())
    cached.evaluate(trial(FIRST))
    again = Architecture.from_json(cell_from_string(TWIN).to_json())
    assert cached.is_known(Trial(id=3, architecture=again))


def test_fidelities_are_different_evaluations_and_seeds_where_asked() -> None:
    cached = CachedEvaluator(Counting())
    for fidelity in (None, 12, 200):
        cached.evaluate(trial(FIRST, fidelity=fidelity))
    assert cached.evaluations == 3
    cached.evaluate(trial(FIRST, seed=1))
    assert cached.repetitions == 1
    seeded = CachedEvaluator(Counting(), by_seed=True)
    for seed in (0, 1, 0):
        seeded.evaluate(trial(FIRST, seed=seed))
    assert (seeded.evaluations, seeded.repetitions) == (2, 1)


def test_failures_are_remembered_or_tried_again() -> None:
    cached = CachedEvaluator(Counting())
    assert cached.evaluate(trial(FIRST, seed=13)).status == "failed"
    assert cached.evaluate(trial(FIRST, seed=14)).status == "failed"
    again = CachedEvaluator(Counting(), failures=False)
    assert again.evaluate(trial(FIRST, seed=13)).status == "failed"
    assert again.evaluate(trial(FIRST, seed=14)).status == "ok"


def test_the_first_result_stays_and_the_oldest_leaves() -> None:
    cached = CachedEvaluator(Counting(), limit=1)
    cached.remember(trial(FIRST), Result(metrics={"asked": -1.0}))
    cached.remember(trial(TWIN), Result(metrics={"asked": -2.0}))
    assert cached.evaluate(trial(TWIN)).metrics["asked"] == -1
    cached.evaluate(trial(OTHER))
    assert len(cached) == 1 and not cached.is_known(trial(FIRST))
    with pytest.raises(UserError, match="limit: got 0; allowed: an integer from 1"):
        CachedEvaluator(Counting(), limit=0)


def test_a_search_over_the_space_finds_the_classes() -> None:
    space, rng = nas_bench_201_space(), np.random.default_rng(0)
    cached = CachedEvaluator(Counting())
    drawn = [space.sample(rng) for _ in range(3000)]
    for number, architecture in enumerate(drawn):
        cached.evaluate(Trial(id=number, architecture=architecture))
    assert cached.evaluations == len({each.network_digest for each in drawn})
    assert cached.evaluations + cached.repetitions == 3000
    assert cached.evaluations < len(set(drawn))
