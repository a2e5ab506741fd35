"""Generators of random values for property tests, one place for all of tests/."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from archsmith.space import (
    AllOf,
    AnyOf,
    AtLeast,
    AtMost,
    Categorical,
    Count,
    Given,
    Has,
    Linear,
    Not,
    Ordinal,
    ProductSpace,
    Real,
    Repeat,
    Subset,
    When,
)

# The same examples everywhere and every time, and no clock: a busy machine must not fail a test.
settings.register_profile(
    "archsmith", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("archsmith")

finite_floats = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | finite_floats | st.text(max_size=5)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
paths = st.lists(st.sampled_from(["a", "b", "0", "1", "k5"]), min_size=1, max_size=4).map("/".join)
decisions = st.dictionaries(paths, values, max_size=6)
json_objects = st.dictionaries(
    st.text(max_size=4), st.recursive(scalars, lambda s: st.lists(s, max_size=3), max_leaves=5)
)


def option_lists(maximum: int = 4) -> st.SearchStrategy[list[object]]:
    """Lists of options that differ under ==."""
    return st.lists(
        st.integers(0, 9) | st.text("abc", min_size=1, max_size=2), min_size=1, max_size=maximum, unique=True
    )


@st.composite
def counts(draw: st.DrawFn, low: int = 0) -> Count:
    first, step = draw(st.integers(low, low + 2)), draw(st.integers(1, 2))
    return Count(first, first + step * draw(st.integers(0, 3)), step)


def finite_dimensions() -> st.SearchStrategy[object]:
    return (
        option_lists().map(Categorical)
        | option_lists().map(Ordinal)
        | counts()
        | st.builds(
            lambda options, least: Subset(options, min(least, len(options))), option_lists(3), st.integers(0, 1)
        )
    )


def reals() -> st.SearchStrategy[Real]:
    return st.builds(
        lambda low, width: Real(low, low + width, log=True), st.floats(0.1, 9), st.floats(0, 9)
    ) | st.builds(lambda low, width: Real(low, low + width), st.floats(-9, 9), st.floats(0, 9))


@st.composite
def conditions(draw: st.DrawFn, earlier: dict[str, object]) -> object:
    """A condition on earlier dimensions."""
    path = draw(st.sampled_from(sorted(earlier)))
    dimension = earlier[path]
    if isinstance(dimension, Subset):
        atom = Has(path, draw(st.sampled_from(dimension.options)))
    else:
        atom = When(
            path, tuple(draw(st.lists(st.sampled_from(list(dimension.domain)), min_size=1, max_size=2, unique=True)))
        )
    shape = draw(st.sampled_from(["atom", "not", "all", "any"]))
    if shape == "atom":
        return atom
    if shape == "not":
        return Not(atom)
    other = draw(conditions(earlier)) if draw(st.booleans()) else atom
    return (AllOf if shape == "all" else AnyOf)((atom, other))


@st.composite
def product_spaces(draw: st.DrawFn, *, real: bool = False) -> ProductSpace:
    """Small spaces with conditions, a repeat and linear constraints; some have no valid architecture at all."""
    flat: dict[str, object] = {}
    elements: dict[str, object] = {}
    for i in range(draw(st.integers(1, 4))):
        dimension = draw(finite_dimensions())
        name = f"d{i}" if draw(st.booleans()) else f"part/{i}/d"
        conditional = flat and draw(st.booleans())
        elements[name] = Given(draw(conditions(flat)), dimension) if conditional else dimension
        flat[name] = dimension
    if draw(st.booleans()):
        body = {"w": draw(counts())}
        if draw(st.booleans()):
            body["v"] = Given(When("w", body["w"].high), draw(finite_dimensions()))
        elements["net"] = Repeat(Count(draw(st.integers(0, 1)), draw(st.integers(1, 3))), body)
    if real:
        elements["rate"] = draw(reals())
        elements["noise"] = Given(draw(conditions(flat)), draw(reals()))
    numeric = [name for name, dimension in flat.items() if isinstance(dimension, Count)]
    constraints = []
    if numeric and draw(st.booleans()):
        chosen = draw(st.lists(st.sampled_from(numeric), min_size=1, unique=True))
        constraints.append(draw(st.sampled_from([AtLeast, AtMost]))(chosen, draw(st.integers(0, 5))))
    if numeric and draw(st.booleans()):
        weights = {name: draw(st.sampled_from([-1, 1, 2, 0.5])) for name in numeric}
        if "net" in elements:
            weights["net/*/w"] = 1
        constraints.append(Linear(weights, low=draw(st.integers(-3, 2)), high=draw(st.integers(2, 6))))
    return ProductSpace("random", elements, constraints=constraints)


BUDGET_UNITS = {
    "macs": ["", "k", "K", "M", "G", "x"],
    "params": ["", "k", "K", "M", "G", "x"],
    "memory": ["B", "kB", "MB", "GB", "KiB", "MiB", "GiB", "x"],
    "latency": ["us", "ms", "s", "x"],
    "throughput": ["/s", "x"],
    "energy": ["uJ", "mJ", "J", "x"],
}


def limit_texts(cost: str) -> st.SearchStrategy[str]:
    numbers = (
        st.integers(1, 10**13).map(lambda n: f"{n // 10**4}.{n % 10**4:04d}")
        | st.integers(1, 10**12).map(str)
        | st.floats(1e-200, 1e200).map(repr)
    )
    relation = ">=" if cost == "throughput" else "<="
    return st.builds(
        lambda number, unit: f"{cost}{relation}{number}{unit}", numbers, st.sampled_from(BUDGET_UNITS[cost])
    )


budgets = st.lists(st.sampled_from(sorted(BUDGET_UNITS)), min_size=1, unique=True).flatmap(
    lambda costs: st.tuples(*map(limit_texts, costs)).map(", ".join)
)

few_losses = st.sampled_from([-math.inf, -1.0, 0.0, 1.0, 2.0, math.inf, math.nan])
