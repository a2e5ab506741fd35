"""Which children a step trains."""

from __future__ import annotations

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Given, Ordinal, ProductSpace, When
from archsmith.supernet.sampling import BalancedByCost, Sandwich, StrongestFirst, Uniform


class Ends:
    """Ten widths of four options and a depth that hides one of them."""

    def __init__(self) -> None:
        elements = {"depth": Ordinal((1, 2)), **{f"w{i}": Ordinal((1, 2, 3, 4)) for i in range(10)}}
        self.space = ProductSpace("ends", {**elements, "inner": Given(When("depth", 2), Ordinal((1, 5)))})

    def largest(self) -> Architecture:
        return self.space.validate({"depth": 2, **{f"w{i}": 4 for i in range(10)}, "inner": 5})

    def smallest(self) -> Architecture:
        return self.space.validate({"depth": 1, **{f"w{i}": 1 for i in range(10)}})


def cost(architecture: Architecture) -> float:
    return float(sum(v for v in architecture.values() if isinstance(v, int)))


def test_uniform_children_learn_from_the_labels() -> None:
    children = Uniform(Ends(), 3).children(np.random.default_rng(0))
    assert len({child.architecture for child in children}) == 3
    assert all(child.labels == 1 and child.regularised and not child.inplace for child in children)


def test_a_sandwich_is_largest_random_and_smallest() -> None:
    ends = Ends()
    first, *middle, last = Sandwich(ends, 4).children(np.random.default_rng(0))
    assert first.architecture == ends.largest() and first.teaches and first.regularised and first.labels == 1
    assert last.architecture == ends.smallest() and len(middle) == 2
    assert all(c.inplace == 1 and not c.labels and not c.regularised and not c.teaches for c in (*middle, last))
    again = Sandwich(ends, 4).children(np.random.default_rng(0))
    assert [c.architecture for c in again] == [c.architecture for c in (first, *middle, last)]


def test_the_strongest_come_first_and_all_in_the_end() -> None:
    ends = Ends()
    rule = StrongestFirst(ends, 4, warmup=0.5)
    rng = np.random.default_rng(1)
    assert all(child.architecture == ends.largest() for child in rule.children(rng, 0.0))
    half = [c.architecture for _ in range(20) for c in rule.children(rng, 0.25)]
    assert min(a["w0"] for a in half) == 3 and min(a["depth"] for a in half) == 2
    *_, last = rule.children(rng, 0.5)
    assert last.architecture == ends.smallest()
    late = [rule.random(rng, 1.0)["w0"] for _ in range(200)]
    assert set(late) == {1, 2, 3, 4}


def test_costs_are_balanced() -> None:
    ends = Ends()
    rule = BalancedByCost(ends, cost, bins=8, pool=800, seed=0)
    rng = np.random.default_rng(2)
    low, high = cost(ends.smallest()), cost(ends.largest())
    balanced = np.array([cost(rule.random(rng, 0.0)) for _ in range(400)])
    uniform = np.array([cost(ends.space.sample(rng)) for _ in range(400)])
    counts = [np.histogram(each, bins=8, range=(low, high))[0] for each in (balanced, uniform)]
    # 400 draws over 8 bins: 50 each, four standard deviations of a binomial are 26
    assert counts[0].min() >= 24 and counts[0].max() <= 76
    assert counts[1].min() < 10


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Sandwich(Ends(), 1), "an integer from 2"),
        (lambda: Uniform(Ends(), 0), "an integer from 1"),
        (lambda: StrongestFirst(Ends(), warmup=0.0), "a share of the training"),
        (lambda: BalancedByCost(Ends(), cost, bins=0), "numbers from 1"),
    ],
)
def test_numbers_that_make_no_rule_are_refused(make: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make()  # type: ignore[operator]
