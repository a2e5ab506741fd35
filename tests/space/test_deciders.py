from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import (
    AtLeast,
    Categorical,
    Count,
    DeadEnd,
    Given,
    Linear,
    Ordinal,
    Predicate,
    ProductSpace,
    Recording,
    Repeat,
    Replay,
    Subset,
    Uniform,
    When,
    first_allowed,
    sample_by_decisions,
)
from archsmith.space.deciders import is_allowed, option_index
from archsmith.space.options import Subsets


def layers() -> ProductSpace:
    layer = {"op": Categorical(["conv", "pool"]), "kernel": Given(When("op", "conv"), Ordinal([3, 5, 7]))}
    return ProductSpace("layers", {"net": Repeat(Count(1, 3), layer)})


def test_deciders_compose() -> None:
    space = layers()
    recording = Recording(Replay({"net/count": 2, "net/1/op": "pool"}, first_allowed))
    found = space.walk(recording)
    assert dict(found) == {"net/count": 2, "net/0/op": "conv", "net/0/kernel": 3, "net/1/op": "pool"}
    assert [(d.path, d.choice) for d in recording.decisions] == list(found.items())
    assert [d.group for d in recording.decisions] == ["net/count", "net/*/op", "net/*/kernel", "net/*/op"]


def test_replay_keeps_only_what_is_still_allowed() -> None:
    space = layers()
    found = space.walk(Replay({"net/count": 1, "net/0/op": "conv", "net/0/kernel": 9}, first_allowed))
    assert found["net/0/kernel"] == 3


def test_masks_reach_the_decider() -> None:
    space = ProductSpace("pair", {"a": Count(0, 2), "b": Count(0, 2)}, constraints=[AtLeast(["a", "b"], 3)])
    recording = Recording(first_allowed)
    assert dict(space.walk(recording)) == {"a": 1, "b": 2}
    assert [d.mask.tolist() for d in recording.decisions] == [[False, True, True], [False, False, True]]
    with pytest.raises(ValueError, match=r"the decider chose 0 at 'a'; allowed: one of \[1, 2\]"):
        space.walk(lambda path, options, mask, group: options[0])


def test_contradictions_are_dead_ends() -> None:
    space = ProductSpace("none", {"a": Count(0, 1)}, constraints=[AtLeast(["a"], 2)])
    with pytest.raises(DeadEnd, match=r"cannot go on at 'a': the constraints leave no option"):
        space.walk(first_allowed)
    with pytest.raises(UserError, match=r"space: got 'none'.*no option"):
        sample_by_decisions(space, np.random.default_rng(0))


def test_uniform_is_uniform_per_decision_only() -> None:
    space = layers()
    rng = np.random.default_rng(0)
    depths = Counter(space.walk(Uniform(rng))["net/count"] for _ in range(3000))
    for depth in (1, 2, 3):
        assert abs(depths[depth] / 3000 - 1 / 3) < 4 * math.sqrt(2 / 9 / 3000)


def test_mutation_reaches_every_single_change() -> None:
    space = layers()
    start = space.validate({"net/count": 1, "net/0/op": "conv", "net/0/kernel": 3})
    rng = np.random.default_rng(0)
    changes = Counter()
    for _ in range(3000):
        mutant = space.mutate(start, rng)
        [path] = [path for path in start if path in mutant and mutant[path] != start[path]]
        changes[path, mutant[path]] += 1
    # Three decisions, equally likely; then the other options of the decision, equally likely.
    expected = {("net/count", 2): 1 / 6, ("net/count", 3): 1 / 6, ("net/0/op", "pool"): 1 / 3}
    expected |= {("net/0/kernel", 5): 1 / 6, ("net/0/kernel", 7): 1 / 6}
    assert set(changes) == set(expected)
    for change, share in expected.items():
        assert abs(changes[change] / 3000 - share) < 4 * math.sqrt(share * (1 - share) / 3000)


def test_subtree_mutation() -> None:
    space = layers()
    start = space.validate(
        {"net/count": 2, "net/0/op": "conv", "net/0/kernel": 3, "net/1/op": "conv", "net/1/kernel": 5}
    )
    for seed in range(30):
        mutant = space.mutate(start, np.random.default_rng(seed), subtree="net/1")
        assert (mutant["net/count"], mutant["net/0/op"], mutant["net/0/kernel"]) == (2, "conv", 3)
        assert mutant != start
    with pytest.raises(UserError, match=r"subtree: got 'net/7'; allowed: a path of the architecture"):
        space.mutate(start, np.random.default_rng(0), subtree="net/7")


def test_mutation_lets_constraints_force_changes_when_it_must() -> None:
    fixed = ProductSpace(
        "sum", {"a": Count(0, 3), "b": Count(0, 3)}, constraints=[Linear({"a": 1, "b": 1}, low=3, high=3)]
    )
    assert dict(fixed.mutate(fixed.validate({"a": 0, "b": 3}), np.random.default_rng(0)))["a"] != 0


def test_mutation_says_when_there_is_none() -> None:
    space = ProductSpace(
        "swap",
        {"a": Count(0, 1), "b": Count(0, 1)},
        constraints=[Predicate("exactly one", lambda d: d["a"] + d["b"] == 1)],
    )
    one = space.validate({"a": 0, "b": 1})
    assert list(space.neighbours(one)) == []
    with pytest.raises(UserError, match=r"no other nearby"):
        space.mutate(one, np.random.default_rng(0))


def test_crossover_mixes_both_parents() -> None:
    space = ProductSpace("flat", {f"w{i}": Count(0, 99) for i in range(40)})
    first, second = space.sample_many(np.random.default_rng(0), 2)
    child = space.crossover(first, second, np.random.default_rng(1))
    from_first = sum(child[path] == first[path] for path in child)
    assert all(child[path] in (first[path], second[path]) for path in child)
    assert abs(from_first - 20) < 4 * math.sqrt(10)


def test_crossover_of_strict_parents_is_a_parent() -> None:
    space = ProductSpace(
        "twins",
        {f"w{i}": Count(0, 9) for i in range(60)},
        constraints=[Predicate("all equal", lambda d: len(set(d.values())) == 1)],
    )
    parents = [space.validate({f"w{i}": value for i in range(60)}) for value in (3, 4)]
    assert space.crossover(*parents, np.random.default_rng(0)) in parents


def test_neighbours_fill_new_decisions_with_the_first_option() -> None:
    space = layers()
    start = space.validate({"net/count": 1, "net/0/op": "pool"})
    assert [dict(n) for n in space.neighbours(start)] == [
        {"net/count": 2, "net/0/op": "pool", "net/1/op": "conv", "net/1/kernel": 3},
        {"net/count": 1, "net/0/op": "conv", "net/0/kernel": 3},
    ]


def test_enumeration_order_is_lexicographic_and_lazy() -> None:
    space = ProductSpace(
        "order", {"a": Categorical(["x", "y"]), "b": Given(When("a", "y"), Count(0, 1)), "c": Subset([1])}
    )
    assert [tuple(a.values()) for a in space.enumerate()] == [
        ("x", ()),
        ("x", (1,)),
        ("y", 0, ()),
        ("y", 0, (1,)),
        ("y", 1, ()),
        ("y", 1, (1,)),
    ]
    astronomical = ProductSpace("big", {f"w{i}": Count(0, 1152) for i in range(63)})
    assert sum(next(iter(astronomical.enumerate())).values()) == 0


def test_is_allowed_tells_types_apart() -> None:
    mask = np.array([True, False, True])
    assert is_allowed(2, range(3), mask)
    assert not is_allowed(1, range(3), mask)
    assert not is_allowed(True, range(3), None)
    assert not is_allowed(1.0, (1, 2), None)
    subsets = Subsets((3, 5, 7), 1, 2)
    assert [option_index(value, subsets) for value in subsets] == list(range(len(subsets)))
    for wrong in [(), (3, 5, 7), (5, 3), (3, 3), (4,), 3, [3]]:
        assert option_index(wrong, subsets) is None
