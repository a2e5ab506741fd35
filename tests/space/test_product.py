from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
from generators import product_spaces
from hypothesis import assume, given
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.space import (
    Architecture,
    AtLeast,
    AtMost,
    Categorical,
    Count,
    Given,
    Group,
    Has,
    Linear,
    Not,
    Ordinal,
    Predicate,
    ProductSpace,
    Real,
    Repeat,
    Subset,
    When,
)


def brute_force(space: ProductSpace) -> set[Architecture]:
    """Literal meaning of a declarative space: all assignments, the inactive dropped, constraints summed."""
    assume(math.prod(int(slot.dimension.size) for slot in space.slots) <= 4_000)
    found = set()
    for values in itertools.product(*(list(slot.dimension.domain) for slot in space.slots)):
        decided: dict[str, object] = {}
        for slot, value in zip(space.slots, values, strict=True):
            if slot.condition is None or slot.condition.holds_for(decided):
                decided[slot.path] = value
        if all(satisfied(constraint, decided) for constraint in space.linear):
            found.add(Architecture(decided, space=space.name))
    return found


def satisfied(constraint: Linear, decided: Mapping[str, object]) -> bool:
    terms = [weight * decided[path] for path, weight in constraint.weights.items() if path in decided]
    return not terms or constraint.admits(sum(terms))


@given(product_spaces())
def test_size_and_enumeration_equal_brute_force(space: ProductSpace) -> None:
    expected = brute_force(space)
    everything = list(space.enumerate())
    assert space.size_is_exact
    assert space.size == len(expected) == len(everything)
    assert set(everything) == expected


@given(product_spaces(), st.integers(0, 99))
def test_masks_are_exact(space: ProductSpace, seed: int) -> None:
    """An option is allowed if and only if some valid architecture continues the decisions so far with it."""
    expected = brute_force(space)
    assume(expected)
    sample = space.sample(np.random.default_rng(seed))
    before: dict[str, object] = {}
    for decision in space.trace(sample):
        following = [a for a in expected if all(path in a and a[path] == value for path, value in before.items())]
        alive = {a[decision.path] for a in following if decision.path in a}
        mask = [True] * len(decision.options) if decision.mask is None else list(decision.mask)
        assert {value for value, allowed in zip(decision.options, mask, strict=True) if allowed} == alive
        before[decision.path] = decision.choice


@given(product_spaces(real=True), st.integers(0, 99))
def test_laws_on_random_spaces(space: ProductSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assume(space.size > 0)
    first, second = space.sample_many(rng, 2)
    for sample in (first, second):
        assert space.validate(sample) == sample
        assert space.replay(sample, rng) == sample
        assert Architecture.from_json(json.loads(json.dumps(sample.to_json()))) == sample
        for kind in ("one-hot", "ordinal"):
            assert space.decode(kind, space.encode(sample, kind)) == sample
    child = space.crossover(first, second, rng)
    assert space.contains(child)
    for neighbour in itertools.islice(space.neighbours(first), 10):
        assert space.contains(neighbour)
        assert sum(neighbour[path] != first[path] for path in first if path in neighbour) == 1
    again = ProductSpace.from_json(json.loads(json.dumps(space.to_json(), sort_keys=True)))
    assert again.to_json() == space.to_json()
    assert again.paths == space.paths
    assert again.sample(np.random.default_rng(seed)) == space.sample(np.random.default_rng(seed))


def mobile() -> ProductSpace:
    elements = {f"blocks/{b}/k{k}": Count(0, 1152 - 50 * b) for b in range(21) for k in (3, 5, 7)}
    constraints = [AtLeast([f"blocks/{b}/k{k}" for k in (3, 5, 7)], 1) for b in range(0, 21, 3)]
    return ProductSpace("mobile", elements, constraints=constraints)


def test_size_of_the_mobile_space_is_a_closed_form() -> None:
    expected = math.prod((1153 - 50 * b) ** 3 - (b % 3 == 0) for b in range(21))
    assert mobile().size == expected
    assert expected > 10**150


def test_repeats_count_in_closed_form() -> None:
    layer = {"op": Categorical(["conv", "pool"]), "kernel": Given(When("op", "conv"), Ordinal([3, 5, 7]))}
    space = ProductSpace("deep", {"net": Repeat(Count(1, 30), layer)})
    assert space.size == sum(4**depth for depth in range(1, 31))  # 3 kernels or a pool per layer
    assert space.paths[:4] == ("net/count", "net/0/op", "net/0/kernel", "net/1/op")
    depths = [space.sample(np.random.default_rng(seed))["net/count"] for seed in range(400)]
    # Uniform over architectures, so three in four are as deep as possible.
    assert abs(np.mean(np.array(depths) == 30) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 400)


def test_a_sum_is_counted_by_its_own_formula() -> None:
    n, top = 40, 60
    space = ProductSpace(
        "sum",
        {f"w{i}": Count(0, top) for i in range(n)},
        constraints=[Linear({f"w{i}": 1 for i in range(n)}, low=top, high=top)],
    )
    assert space.size == math.comb(top + n - 1, n - 1)  # stars and bars
    assert sum(space.sample(np.random.default_rng(0)).values()) == top


def test_sizes_with_reals() -> None:
    assert ProductSpace("r", {"a": Real(0.0, 1.0)}).size == math.inf
    assert ProductSpace("r", {"a": Real(1.0, 1.0), "b": Count(0, 2)}).size == 3
    never = Given(When("a", 3), Real(0.0, 1.0))
    bounded = ProductSpace("r", {"a": Count(0, 3), "b": never}, constraints=[AtMost(["a"], 2)])
    assert bounded.size == 3
    assert ProductSpace("r", {"a": Count(0, 3), "b": never}).size == math.inf
    with pytest.raises(UserError, match=r"a finite space.*sample it instead"):
        ProductSpace("r", {"a": Real(0.0, 1.0)}).enumerate()


def test_predicates_are_counted_one_by_one_or_bounded() -> None:
    even = Predicate("the sum is even", lambda a: sum(a.values()) % 2 == 0)
    small = ProductSpace("p", {"a": Count(0, 2), "b": Count(0, 2)}, constraints=[even])
    assert (small.size, small.size_is_exact) == (5, True)
    large = ProductSpace("p", {f"w{i}": Count(0, 9) for i in range(9)}, constraints=[even])
    assert (large.size, large.size_is_exact, large.samples_uniformly) == (10**9, False, True)
    assert sum(large.sample(np.random.default_rng(0)).values()) % 2 == 0


def test_rare_architectures_of_small_spaces_are_found() -> None:
    rare = Predicate("all nine", lambda a: set(a.values()) == {9})
    space = ProductSpace("rare", {f"w{i}": Count(0, 9) for i in range(4)}, constraints=[rare])
    assert dict(space.sample(np.random.default_rng(0))) == {f"w{i}": 9 for i in range(4)}


def test_nothing_valid_is_an_error() -> None:
    rng = np.random.default_rng(0)
    impossible = ProductSpace("none", {"a": Count(0, 2), "b": Count(0, 2)}, constraints=[AtLeast(["a", "b"], 5)])
    assert impossible.size == 0
    assert list(impossible.enumerate()) == []
    with pytest.raises(UserError, match=r"space: got 'none'.*declared constraints contradict each other.*Relax"):
        impossible.sample(rng)
    never = Predicate("never", lambda a: False)
    with pytest.raises(UserError, match=r"candidates broke: never"):
        ProductSpace("none", {"a": Count(0, 10**6)}, constraints=[never]).sample(rng)
    with pytest.raises(UserError, match=r"decisions: got .*broken: never"):
        ProductSpace("none", {"a": Count(0, 2)}, constraints=[never]).replay({"a": 1}, rng)
    alone = ProductSpace("one", {"a": Categorical(["x"])})
    with pytest.raises(UserError, match=r"architecture: got .*'one' offers no other"):
        alone.mutate(alone.sample(rng), rng)


def test_uncountable_parts_fall_back_to_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsmith.space.components.WORK_LIMIT", 10)
    space = ProductSpace(
        "big", {f"w{i}": Count(0, 5) for i in range(4)}, constraints=[AtLeast([f"w{i}" for i in range(4)], 17)]
    )
    assert (space.samples_uniformly, space.size_is_exact, space.size) == (False, False, 6**4)
    for seed in range(50):
        sample = space.sample(np.random.default_rng(seed))
        assert sum(sample.values()) >= 17  # the bounds on the rest mask what cannot be completed: no dead ends here
        assert space.contains(sample)
    assert len(list(space.enumerate())) == sum(sum(v) >= 17 for v in itertools.product(range(6), repeat=4))


def test_paths_survive_edits_elsewhere() -> None:
    layer = {"op": Categorical(["conv", "pool"]), "width": Count(1, 8)}
    before = ProductSpace("net", {"net": Repeat(Count(1, 3), layer), "head": Ordinal([64, 128])})
    more = {
        "stem": Categorical(["a", "b"]),
        "net": Repeat(Count(1, 4), {"act": Count(0, 1), **layer}),
        "head": Ordinal([32, 128]),
    }
    after = ProductSpace("net", more)
    for seed in range(20):
        old = before.sample(np.random.default_rng(seed))
        new = after.replay(old, np.random.default_rng(seed))
        kept = {path: value for path, value in old.items() if path != "head"}
        assert {path: new[path] for path in kept} == kept
        assert new["head"] == 128 if old["head"] == 128 else new["head"] in (32, 128)
        assert set(new) - set(old) == {"stem", *(f"net/{i}/act" for i in range(old["net/count"]))}


def test_side_spaces() -> None:
    main = ProductSpace("net", {"depth": Count(1, 3)}, canonical=lambda a: int(a["depth"] > 1))
    speed = {"opt": Categorical(["sgd", "adam"]), "momentum": Given(When("opt", "sgd"), Ordinal([0.0, 0.9]))}
    recipe = ProductSpace(
        "recipe", speed, constraints=[Predicate("adam or momentum", lambda d: d.get("momentum") != 0.0)]
    )
    joined = main.with_side("train", recipe)
    assert joined.paths == ("depth", "train/opt", "train/momentum")
    assert joined.size == 3 * 2
    point = joined.validate({"depth": 2, "train/opt": "adam"})
    assert joined.activity(point).tolist() == [True, True, False]
    assert joined.main_part(point) == main.validate({"depth": 2})
    assert joined.side_part(point, "train") == recipe.validate({"opt": "adam"})
    assert point.network_digest == joined.validate({"depth": 3, "train/opt": "adam"}).network_digest
    assert point.network_digest != joined.validate({"depth": 1, "train/opt": "adam"}).network_digest
    with pytest.raises(UserError, match=r"side: got 'train'; allowed: one path segment"):
        joined.with_side("train", recipe)
    with pytest.raises(UserError, match=r"side: got 'quant'; allowed: one of \['train'\]"):
        joined.side_part(point, "quant")
    with pytest.raises(UserError, match=r"architecture: .*broken: adam or momentum"):
        joined.validate({"depth": 2, "train/opt": "sgd", "train/momentum": 0.0})


def test_sides_survive_json() -> None:
    plain = ProductSpace("net", {"depth": Count(1, 3)}).with_side(
        "train", ProductSpace("recipe", {"lr": Real(0.1, 1.0)})
    )
    again = ProductSpace.from_json(json.loads(json.dumps(plain.to_json())))
    assert (again.name, again.paths, list(again.sides)) == ("net+train", plain.paths, ["train"])
    assert again.to_json() == plain.to_json()


def test_groups_scope_their_paths() -> None:
    cell = Group({"a": Count(0, 2), "b": Given(Not(When("a", 0)), Count(0, 2))}, [AtMost(["a", "b"], 2)])
    space = ProductSpace("scopes", {"a": Count(5, 6), "left": cell, "right": Given(When("a", 6), cell)})
    one_cell = 1 + 2 + 1  # a=0; a=1 with b in 0, 1; a=2 with b=0
    assert space.size == one_cell + one_cell**2
    chosen = Group({"ops": Subset([3, 5]), "width": Given(Has("ops", 5), Count(1, 4))})
    assert ProductSpace("subset", {"cell": chosen}).size == 2 + 2 * 4


def test_constraints_hold_in_every_active_repetition() -> None:
    pair = {"a": Count(0, 1), "b": Count(0, 1)}
    some = ProductSpace("deep", {"net": Repeat(Count(0, 2), Group(pair, [AtLeast(["a", "b"], 1)]))})
    assert some.size == 1 + 3 + 9
    seen: list[set[str]] = []
    differ = Predicate("a differs from b", lambda d: seen.append(set(d)) or d["a"] != d["b"])
    unequal = ProductSpace("deep", {"net": Repeat(Count(0, 2), Group(pair, [differ]))})
    assert unequal.size == 1 + 2 + 4
    assert all(paths == {"a", "b"} for paths in seen)  # never asked about a repetition that is not there


def test_groups_name_decisions_of_a_kind() -> None:
    space = ProductSpace("net", {"blocks/3/k5": Count(0, 1), "head": Count(0, 1, group="width")})
    assert [d.group for d in space.trace(space.validate({"blocks/3/k5": 1, "head": 0}))] == ["blocks/*/k5", "width"]


def test_validate_names_the_path_and_what_is_allowed() -> None:
    space = mobile()
    good = dict(space.sample(np.random.default_rng(0)))
    with pytest.raises(UserError, match=r"architecture\['blocks/1/k3'\]: got 5000; allowed: an integer from 0 to 1102"):
        space.validate({**good, "blocks/1/k3": 5000})
    with pytest.raises(UserError, match=r"architecture\['blocks/0/k7'\]: got 0; .*constraints rule it out"):
        space.validate({**good, "blocks/0/k3": 0, "blocks/0/k5": 0, "blocks/0/k7": 0})
    with pytest.raises(UserError, match=r"architecture\['blocks/2/k3'\]: got None; .*needs a value"):
        space.validate({path: value for path, value in good.items() if path != "blocks/2/k3"})
    with pytest.raises(UserError, match=r"\['blocks/99/k3'\].*unknown or inactive"):
        space.validate({**good, "blocks/99/k3": 0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProductSpace("", {}), "space.name: got ''"),
        (lambda: ProductSpace("s", {"a b": Count(0, 1)}), "path: got 'a b'; allowed: segments joined by '/'"),
        (
            lambda: ProductSpace("s", {"a/b": Count(0, 1), "a": {"b": Count(0, 1)}}),
            "path: got 'a/b'; allowed: each path once",
        ),
        (lambda: ProductSpace("s", {"a": 3}), "element 'a': got 3; allowed: a dimension, Group, Repeat, Given"),
        (
            lambda: ProductSpace("s", {"a": Given(When("b", 1), Count(0, 1)), "b": Count(0, 1)}),
            "of 'a': got 'b'; allowed: an earlier",
        ),
        (
            lambda: ProductSpace("s", {"b": Count(0, 1), "a": Given(When("b", 7), Count(0, 1))}),
            "of 'a' on 'b': got 7; .*may be decided",
        ),
        (
            lambda: ProductSpace("s", {"b": Real(0.0, 1.0), "a": Given(When("b", 0.5), Count(0, 1))}),
            "of 'a': got 'b'.*finitely many",
        ),
        (
            lambda: ProductSpace("s", {"a": Count(0, 1)}, constraints=[AtLeast(["b"], 1)]),
            "got 'b'; allowed: an earlier path: a",
        ),
        (lambda: ProductSpace("s", {"a": Count(0, 1)}, constraints=[AtLeast(["*/b"], 1)]), "a pattern that matches"),
        (
            lambda: ProductSpace("s", {"a": Categorical([0, 1])}, constraints=[AtLeast(["a"], 1)]),
            "got 'a'.*numbers only",
        ),
        (lambda: ProductSpace("s", {"a": Repeat(Count(-1, 1), Count(0, 1))}), r"Repeat 'a'\.count.*integers from 0"),
        (lambda: Linear({"a": math.nan}, low=0), "Linear.weights, low, high: .*finite numbers"),
        (lambda: Linear({"a": 1}), "Linear: .*a low or a high bound"),
        (lambda: When("a", []), r"When\('a'\)\.values.*at least one"),
        (
            lambda: ProductSpace.from_json({"type": "group", "format_version": 9}),
            r"space\.format_version: got 9.*upgrade",
        ),
        (lambda: ProductSpace.from_json([]), r"space: got \[\]; allowed: an object"),
        (lambda: mobile().encode(mobile().sample(np.random.default_rng(0)), "binary"), "kind: got 'binary'.*'one-hot'"),
        (lambda: mobile().dimension("x"), "path: got 'x'; allowed: one of"),
        (
            lambda: ProductSpace("s", {}, constraints=[Predicate("p", bool)]).to_json(),
            r"space\.to_json: got 'p'.*in code",
        ),
        (lambda: ProductSpace("s", {}, canonical=len).to_json(), r"space\.to_json: got 's'.*canonical function"),
    ],
)
def test_bad_spaces_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_many_samples_are_as_single_ones() -> None:
    space = mobile()
    many = space.sample_many(np.random.default_rng(7), 300)
    assert len(set(many)) == 300
    assert space.sample_many(np.random.default_rng(7), 1)[0] == space.sample(np.random.default_rng(7))
    assert all(space.contains(sample) for sample in many[:10])
    means = [np.mean([sample[path] for sample in many]) / space.dimension(path).high for path in space.paths]
    assert max(abs(mean - 0.5) for mean in means) < 5 * math.sqrt(1 / 12 / 300)  # 63 means: 5 standard errors
    matrix = space.encode_many(many, "ordinal")
    assert (matrix == [[sample[path] for path in space.paths] for sample in many]).all()


def test_a_space_has_a_json_form_without_its_canonical_one() -> None:
    space = ProductSpace("parity", {"n": Categorical((1, 2, 3))}, canonical=lambda a: a["n"] % 2)
    space = space.with_side("recipe", ProductSpace("odd", {"n": Categorical((1, 3))}, canonical=lambda a: 0))
    again = ProductSpace.from_json(space.without_canonical_form().to_json())
    for number in range(4):
        point = space.sample(np.random.default_rng(number))
        same = again.validate(dict(point))
        assert same.digest == point.digest
        assert same.network_digest == same.digest != point.network_digest
    assert space.canonical is not None
