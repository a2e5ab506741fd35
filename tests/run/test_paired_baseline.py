"""The paired baseline: differences within pairs, their intervals, convergence, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest

from archsmith.core.errors import UserError
from archsmith.run.paired_baseline import compare_with_random, epochs_to_share

BASE = (0.30, 0.50, 0.70, 0.40)
GAIN = (0.02, 0.01, 0.03, 0.02)


def measure(extra: tuple[float, ...], steps: int = 4, speed: int = 3):  # type: ignore[no-untyped-def]
    return lambda pair: [(BASE[pair] + extra[pair]) * min(1.0, (epoch + 1) / speed) for epoch in range(steps)]


def report(**options: object):  # type: ignore[no-untyped-def]
    none = (0.0,) * 4
    return compare_with_random(
        {"search": measure(GAIN, speed=2)}, measure(none), range(4), dense=measure((0.2,) * 4), **options
    )


def test_the_difference_is_taken_within_pairs() -> None:
    row = report()["search"]
    assert row.mean == pytest.approx(0.495)
    assert row.difference == pytest.approx(0.02)
    assert row.difference_stderr == pytest.approx(math.sqrt(2e-4 / 3) / 2)
    half = 3.182446305284263 * row.difference_stderr  # t quantile of 3 degrees of freedom
    assert (row.low, row.high) == pytest.approx((0.02 - half, 0.02 + half))
    assert row.low > 0, "the spread of the parents is ten times as large and must not hide the effect"
    assert (row.paired.wins, row.paired.ties, row.paired.losses) == (4, 0, 0)


def test_random_is_level_with_itself_and_shares_are_of_the_dense_network() -> None:
    found = report()
    assert (found["random"].difference, found["random"].paired.ties) == (0.0, 4)
    assert found["dense"].kept == pytest.approx(1.0)
    assert found["random"].kept == pytest.approx(0.475 / 0.675)
    assert [row.name for row in found.rows] == ["search", "random", "dense"]


def test_convergence_is_counted_in_epochs() -> None:
    assert epochs_to_share([0.1, 0.4, 0.39, 0.4], 0.95) == 2
    assert epochs_to_share([0.5, 0.4], 0.95) == 1
    row = report(share=1.0)["search"]
    assert row.epochs == 2
    assert row.epochs_difference == (-1.0, -1.0, -1.0)


def test_the_report_is_json_and_a_table() -> None:
    found = report()
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["name"] == "search"
    table = found.to_markdown().splitlines()
    assert len(table) == 5
    assert "+0.0200 [+0.0070, +0.0330] | 4/0/0" in table[2]
    with pytest.raises(KeyError, match="no contender 'nobody'"):
        found["nobody"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pairs": [0]}, "at least 2"),
        ({"pairs": [0, 0]}, "all different"),
        ({"share": 0.0}, "above 0"),
        ({"contenders": {"dense": measure(GAIN)}}, "these are the controls"),
        ({"random": measure(GAIN, steps=3)}, "the common budget in epochs"),
    ],
)
def test_bad_input_is_refused(changes: dict, text: str) -> None:
    arguments = {"contenders": {"search": measure(GAIN)}, "random": measure(GAIN), "pairs": range(4), **changes}
    with pytest.raises(UserError, match=text):
        compare_with_random(**arguments)
