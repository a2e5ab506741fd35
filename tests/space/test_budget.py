from __future__ import annotations

import math

import pytest
from generators import BUDGET_UNITS, budgets
from hypothesis import given
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.space import Budget, Limit


@given(budgets)
def test_text_round_trip(text: str) -> None:
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget
    assert str(Budget.parse(str(budget))) == str(budget)


@given(budgets, st.integers(1, 10**12))
def test_resolved_budgets_round_trip_and_hold_at_their_limit(text: str, reference: int) -> None:
    resolved = Budget.parse(text).resolve(dict.fromkeys(BUDGET_UNITS, reference))
    assert not any(limit.relative for limit in resolved.limits)
    assert Budget.parse(str(resolved)) == resolved
    assert resolved.violations({limit.cost: limit.value for limit in resolved.limits}) == []
    beyond = {limit.cost: limit.value * (0.5 if limit.relation == ">=" else 2) for limit in resolved.limits}
    assert [violation.limit for violation in resolved.violations(beyond)] == list(resolved.limits)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs<=0.4x", Limit("macs", "<=", 0.4, "x", True)),
        ("params<=1M", Limit("params", "<=", 1_000_000, "", False)),
        ("params<=1.5k", Limit("params", "<=", 1500, "", False)),
        (" macs <= 3e8 ", Limit("macs", "<=", 300_000_000, "", False)),
        ("memory<=78000MiB", Limit("memory", "<=", 78000 * 2**20, "B", False)),
        ("memory<=1.5kB", Limit("memory", "<=", 1500, "B", False)),
        ("latency<=4ms", Limit("latency", "<=", 4, "ms", False)),
        ("latency<=0.1us", Limit("latency", "<=", 0.0001, "ms", False)),
        ("latency<=2s", Limit("latency", "<=", 2000, "ms", False)),
        ("throughput>=1200/s", Limit("throughput", ">=", 1200, "/s", False)),
        ("energy<=.5J", Limit("energy", "<=", 500, "mJ", False)),
    ],
)
def test_limits_are_stored_in_one_unit(text: str, expected: Limit) -> None:
    [limit] = Budget.parse(text).limits
    assert limit == expected
    assert type(limit.value) is type(expected.value)


def test_resolution_is_exact() -> None:
    # Exactly 18716063855546729.6...: a float that is whole, so it must be stored, and printed, as an integer.
    rounded = Budget.parse("macs<=13159386.7291x").resolve({"macs": 1422259581})
    assert Budget.parse(str(rounded)) == rounded
    with pytest.raises(UserError, match=r"budget: got macs<=10{300}x; allowed: a share"):
        Budget.parse("macs<=1e300x").resolve({"macs": 1e10})
    resolved = Budget.parse("macs<=0.29x, latency<=4ms").resolve({"macs": 100})
    assert resolved.limits[0] == Limit("macs", "<=", 29, "", False)
    assert 0.29 * 100 < 29  # what floats would give
    assert str(resolved) == "macs<=29, latency<=4ms"
    assert Budget.parse("macs<=0.4x").resolve({"macs": 1_521_035_776}).limits[0].value == 608414310.4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"budget: got ''; allowed: limits joined by commas, like 'macs<=0\.4x"),
        (None, r"budget: got None"),
        ("0.4x", r"got '0\.4x'; allowed: a cost name before the limit.*Write macs<=0\.4x"),
        ("<=0.4x", r"a cost name before the limit.*Write macs<=0\.4x"),
        ("4", r"Write macs<=4\."),
        ("flops<=1G", r"got 'flops<=1G'; allowed: costs \['macs', 'params', 'memory', .*'flops' is not a cost"),
        ("macs<=", r"'macs<=' cannot be read as a limit"),
        ("macs 0.4x or less", r"cannot be read as a limit"),
        ("macs<=0.4x,", r"'' cannot be read as a limit"),
        ("macs<=1,5M", r"a cost name before the limit"),
        ("macs<=0", r"limit on macs that is positive and finite\. 'macs<=0' is not"),
        ("macs<=-3M", r"positive and finite\. 'macs<=-3M' is not"),
        ("macs<=-0.5x", r"positive and finite"),
        ("macs<=nan", r"positive and finite\. 'macs<=nan' is not"),
        ("macs<=inf", r"positive and finite"),
        ("macs<=1e400", r"positive and finite"),
        ("macs<=0.1e-400", r"positive and finite"),
        ("latency<=1e306s", r"positive and finite"),
        ("macs<=0.4x, macs<=3M", r"one limit per cost\. Remove one of the limits on macs"),
        ("macs>=0.4x", r"allowed: <= for macs\. Write macs<=0\.4x"),
        ("macs=0.4x", r"allowed: <= for macs"),
        ("macs<0.4x", r"allowed: <= for macs"),
        ("throughput<=1200/s", r"allowed: >= for throughput\. Write throughput>=1200/s"),
        ("latency<=4", r"for latency the units 'us', 'ms', 's', 'x'\. In 'latency<=4' there is none"),
        ("latency<=4min", r"In 'latency<=4min' 'min' is not one"),
        ("memory<=4M", r"'B', 'kB', 'MB', 'GB', 'KiB', 'MiB', 'GiB', 'x'.*'M' is not one"),
        ("macs<=1m", r"for macs the units no unit, 'k', 'K', 'M', 'G', 'x'.*'m' is not one"),
    ],
)
def test_bad_budgets_are_refused(text: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget.parse(text)


def test_violations() -> None:
    budget = Budget.parse("macs<=100, throughput>=10/s")
    assert budget.violations({"macs": 100, "throughput": 10.0, "params": 5}) == []
    assert list(map(str, budget.violations({"macs": 101, "throughput": 9.5}))) == [
        "macs is 101, the budget says macs<=100",
        "throughput is 9.5/s, the budget says throughput>=10/s",
    ]
    assert len(budget.violations({"macs": math.nan, "throughput": math.nan})) == 2
    with pytest.raises(
        UserError, match=r"costs: got \['macs'\]; allowed: every cost of the budget; 'throughput' is missing"
    ):
        budget.violations({"macs": 1})
    with pytest.raises(UserError, match=r"budget: got macs<=0\.4x; allowed: absolute limits here\. Call resolve"):
        Budget.parse("macs<=0.4x").violations({"macs": 1})


@pytest.mark.parametrize("reference", [{}, {"macs": 0}, {"macs": math.nan}, {"macs": math.inf}])
def test_relative_limits_need_a_reference(reference: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"budget limit macs<=0\.4x: got .*a positive macs of the largest network"):
        Budget.parse("macs<=0.4x").resolve(reference)


SMALLEST = {"macs": 10, "params": 5, "throughput": 500.0}
LARGEST = {"macs": 1000, "params": 50, "throughput": 20.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "macs<=1000",
            r"budget: got macs<=1000; allowed: macs below 1000, what the largest network has\. .*above the supernet",
        ),
        ("macs<=1x", r"budget: got macs<=1x \(macs<=1000\); allowed: macs below 1000"),
        ("macs<=2G", r"above the supernet"),
        (
            "macs<=9",
            r"budget: got macs<=9; allowed: macs at least 10, what the smallest network reaches\. .*below the smallest",
        ),
        ("params<=0.01x", r"got params<=0\.01x \(params<=0\.5\); allowed: params at least 5"),
        ("throughput>=501/s", r"allowed: throughput at most 500\.0/s, what the smallest network reaches"),
        ("throughput>=20/s", r"allowed: throughput above 20\.0/s, what the largest network has"),
    ],
)
def test_hopeless_and_pointless_budgets_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget.parse(text).check_feasible(smallest=SMALLEST, largest=LARGEST)


def test_feasible_budgets_pass_and_unknown_costs_are_named() -> None:
    budget = Budget.parse("macs<=10, params<=0.98x, throughput>=20.5/s, latency<=4ms, memory<=0.5x")
    assert budget.check_feasible(smallest=SMALLEST, largest=LARGEST) == ("latency", "memory")
    assert Budget().check_feasible(smallest={}, largest={}) == ()
