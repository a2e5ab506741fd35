"""The grouped knapsack: equal to brute force and to known optima; limits are kept or the one that binds is named."""

import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.strategies.milp import Infeasible, solve, sweep, within

CASES = json.loads((Path(__file__).parents[1] / "golden" / "puzzle.json").read_text())["cases"]
A = CASES["mip_A_memory"]["input"]


def instance(batch):
    memory = [
        [p + batch * k for p, k in zip(*rows, strict=True)] for rows in zip(A["mem_params"], A["mem_kv"], strict=True)
    ]
    runtime = [[value * math.sqrt(batch) for value in row] for row in A["runtime"]]
    return {"memory": memory, "runtime": runtime}


@pytest.mark.parametrize("batch", A["batches"])
def test_the_published_instance_has_its_known_optimum_for_every_batch(batch):
    wanted = CASES["mip_A_memory"]["expected"][str(batch)]
    found = solve(A["score"], instance(batch), {"memory": A["memory_max"]})
    assert list(found.choice) == wanted["choice"]
    assert found.optimal
    assert found.score == pytest.approx(wanted["score"], abs=1e-12)
    assert found.totals["memory"] == pytest.approx(wanted["memory"], abs=1e-9)
    assert found.totals["runtime"] == pytest.approx(wanted["runtime"], abs=1e-3)  # stored with three decimals


def test_two_limits_and_then_a_selection_that_differs_in_half_of_the_groups():
    case = CASES["mip_A_memory_latency_diverse"]
    limits = {"memory": case["input"]["memory_max"], "runtime": case["input"]["latency_max"]}
    first = solve(A["score"], instance(4), limits)
    assert list(first.choice) == case["expected"]["first"]["choice"]
    second = solve(A["score"], instance(4), limits, different_from=[first.choice], alpha=0.5)
    wanted = case["expected"]["second_at_most_alpha_L_shared"]
    assert list(second.choice) == wanted["choice"]
    assert second.score == pytest.approx(wanted["score"], abs=1e-12)
    assert sum(a == b for a, b in zip(first.choice, second.choice, strict=True)) <= 3


def test_a_throughput_is_a_limit_on_the_runtime():
    case = CASES["mip_A_throughput"]
    given = case["input"]
    found = solve(A["score"], instance(4), {"runtime": given["batch"] * given["seq_len"] / given["throughput_min"]})
    assert list(found.choice) == case["expected"]["choice"]
    assert found.score == pytest.approx(case["expected"]["score"], abs=1e-12)


def brute_force(scores, costs, limits, maximize, earlier, shared):
    best = None
    for choice in itertools.product(*(range(len(row)) for row in scores)):
        totals = {name: math.fsum(table[i][j] for i, j in enumerate(choice)) for name, table in costs.items()}
        if not all(within(totals[name], limits[name]) for name in limits):
            continue
        if any(sum(a == b for a, b in zip(choice, y, strict=True)) > shared for y in earlier):
            continue
        score = math.fsum(scores[i][j] for i, j in enumerate(choice))
        if best is None or (score > best if maximize else score < best):
            best = score
    return best


@pytest.mark.parametrize("seed", range(40))
def test_it_equals_brute_force_with_ranges_both_directions_and_cuts(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, size=rng.integers(2, 8))
    scores = [list(rng.random(n)) for n in sizes]
    whole = seed % 3 == 0  # integer costs make ties and sums that meet a limit exactly
    draw = (lambda n: [float(v) for v in rng.integers(1, 6, n)]) if whole else (lambda n: list(rng.random(n)))
    costs = {name: [draw(n) for n in sizes] for name in ("a", "b")}
    middle = {name: sum(float(np.mean(row)) for row in table) for name, table in costs.items()}
    limits = {"a": (None, round(middle["a"], 1)), "b": (0.7 * middle["b"], 1.1 * middle["b"])}
    maximize = bool(seed % 2)
    earlier = [[0] * len(sizes)] if seed % 4 == 0 else []
    wanted = brute_force(scores, costs, limits, maximize, earlier, math.floor(0.5 * len(sizes)))
    arguments = {"maximize": maximize, "different_from": earlier, "alpha": 0.5}
    if wanted is None:
        with pytest.raises(Infeasible):
            solve(scores, costs, limits, **arguments)
        return
    found = solve(scores, costs, limits, **arguments)
    assert found.score == pytest.approx(wanted, abs=1e-8)
    for name, (low, high) in limits.items():
        assert found.totals[name] <= high * (1 + 1e-9)
        assert low is None or found.totals[name] >= low * (1 - 1e-9)


def test_a_sum_above_the_limit_by_less_than_the_solvers_tolerance_is_not_taken():
    limit = 1e9
    costs = {"bytes": [[limit / 2 + 30, limit / 2 - 200], [limit / 2, limit / 2 - 100]]}  # 30 of 1e9: 3e-8
    found = solve([[0.0, 1.0], [0.0, 0.4]], costs, {"bytes": limit})
    assert found.choice == (0, 1)
    assert found.totals["bytes"] <= limit


def test_the_limit_to_blame_is_named_with_what_can_be_reached():
    costs = {"memory": [[4.0, 2.0], [4.0, 3.0]], "latency": [[1.0, 5.0], [1.0, 6.0]]}
    with pytest.raises(Infeasible, match=r"memory<=4\.5; allowed: memory at least 5\. .*memory binds") as caught:
        solve([[0, 1], [0, 1]], costs, {"memory": 4.5, "latency": 100})
    assert caught.value.reachable == {"memory": 5.0}
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert str(again) == str(caught.value)
    assert again.reachable == caught.value.reachable


def test_limits_that_exclude_each_other_are_both_named():
    costs = {"memory": [[4.0, 2.0], [4.0, 3.0]], "latency": [[1.0, 5.0], [1.0, 6.0]], "params": [[1, 1], [1, 1]]}
    with pytest.raises(Infeasible, match="Together nothing keeps them") as caught:
        solve([[0, 1], [0, 1]], costs, {"params": 5, "memory": 5.5, "latency": 4})
    assert caught.value.reachable == {"memory": 8.0, "latency": 11.0}  # params takes no part in it
    with pytest.raises(Infeasible, match="memory at most 8"):
        solve([[0, 1], [0, 1]], costs, {"memory": (9.0, None)})


def test_a_difference_that_is_impossible_is_named_as_such():
    with pytest.raises(Infeasible, match=r"difference from earlier selections \(at most 0 equal choices\)"):
        solve([[0.0], [0.0, 1.0]], different_from=[[0, 0]], alpha=0.4)


def test_no_limit_takes_the_best_of_each_group_and_the_score_never_falls_as_limits_shrink():
    rng = np.random.default_rng(5)
    scores = rng.random((9, 6)).tolist()
    costs = {"a": rng.random((9, 6)).tolist()}
    free = solve(scores, costs)
    assert free.choice == tuple(int(np.argmin(row)) for row in scores)
    smallest = sum(min(row) for row in costs["a"])
    found = [
        solve(scores, costs, {"a": share * free.totals["a"] + (1 - share) * smallest}).score
        for share in (1, 0.8, 0.6, 0.4, 0.2, 0.05)
    ]
    assert found == sorted(found)
    assert found[0] == pytest.approx(free.score)


def test_the_sweep_keeps_the_best_and_tells_which_settings_nothing_fits():
    def problem(batch):
        return lambda: solve(A["score"], instance(batch), {"memory": A["memory_max"]})

    best, found, failed = sweep({batch: problem(batch) for batch in (16, 1, 64)})
    assert best == 1
    assert set(found) == {1, 16}
    assert set(failed) == {64}
    with pytest.raises(Infeasible):
        sweep({64: problem(64)})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([], {}, {}), "at least one group"),
        (([[1.0], []], {}, {}), "at least one alternative in each"),
        (([[1.0, math.nan]], {}, {}), r"finite numbers \(group 0\)"),
        (([[1.0, 2.0]], {"a": [[1.0]]}, {}), r"costs\['a'\]: got \[1\]"),
        (([[1.0]], {"a": [[1.0]]}, {"b": 1}), "costs that are given"),
        (([[1.0]], {"a": [[1.0]]}, {"a": (None, None)}), r"limits\['a'\]"),
        (([[1.0]], {"a": [[1.0]]}, {"a": (3, 2)}), "not above the largest"),
    ],
)
def test_wrong_tables_and_limits_are_refused(arguments, text):
    with pytest.raises(UserError, match=text):
        solve(*arguments)


def test_wrong_earlier_selections_and_shares_are_refused():
    with pytest.raises(UserError, match="an index of an alternative for each group"):
        solve([[0.0, 1.0]], different_from=[[2]])
    with pytest.raises(UserError, match="alpha"):
        solve([[0.0, 1.0]], alpha=1.5)
