import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.cost import LookupTable, Row
from archsmith.cost.additivity import fit_whole_networks

TABLE = LookupTable({"a": Row(1.0), "b": Row(2.0), "c": Row(5.0)}, device="here", overhead=0.5)


def networks(count, rng):
    return [[str(key) for key in rng.choice(["a", "b", "c"], size=rng.integers(2, 9))] for _ in range(count)]


def test_scale_and_overhead_are_found_and_nothing_is_left_over():
    rng = np.random.default_rng(0)
    drawn = networks(25, rng)
    measured = [0.8 * (TABLE.cost(keys) - 0.5) + 3.0 for keys in drawn]
    fitted, report = fit_whole_networks(TABLE, drawn, measured)
    assert (report.scale, report.overhead) == pytest.approx((0.8, 3.0))
    assert fitted.cost(["a", "c"]) == pytest.approx(0.8 * 6 + 3)
    assert report.median_error < 1e-9 and report.spearman == pytest.approx(1.0)
    assert report.trustworthy and report.networks == 25
    assert report.sum_ratio == pytest.approx(
        np.median([TABLE.cost(k) / m for k, m in zip(drawn, measured, strict=True)])
    )


def test_the_error_is_of_networks_that_the_fit_did_not_see():
    drawn = [["a"] * (1 + number % 3) for number in range(19)] + [["c"] * 50]
    measured = [TABLE.cost(keys) for keys in drawn]
    measured[-1] /= 2
    _, report = fit_whole_networks(TABLE, drawn, measured)
    # Fitted with it, the line would go through so large a network; without it, it is foretold at twice its cost.
    assert report.largest_error == pytest.approx(1.0, abs=0.02)


def test_costs_that_follow_no_sum_are_not_trusted():
    rng = np.random.default_rng(2)
    drawn = networks(40, rng)
    measured = [TABLE.cost(keys) * float(rng.uniform(0.2, 5)) for keys in drawn]
    assert not fit_whole_networks(TABLE, drawn, measured)[1].trustworthy


def test_few_networks_are_not_enough():
    with pytest.raises(UserError, match="networks: got 19; allowed: at least 20"):
        fit_whole_networks(TABLE, [["a"]] * 19, [1.0] * 19)
