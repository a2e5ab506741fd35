from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from generators import finite_dimensions, reals
from hypothesis import given
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.space import Categorical, Count, Ordinal, Real, Subset
from archsmith.space.dimensions import Dimension, dimension_from_json
from archsmith.space.options import draw_below


@given(finite_dimensions())
def test_options_are_numbered_and_distinct(dimension: Dimension) -> None:
    options = list(dimension.domain)
    assert len(options) == len(set(options)) == dimension.size
    assert [dimension.index(value) for value in options] == list(range(len(options)))


@given(finite_dimensions() | reals())
def test_json_round_trip(dimension: Dimension) -> None:
    again = dimension_from_json(dimension.to_json())
    assert again == dimension
    assert type(again) is type(dimension)


@given(finite_dimensions(), st.integers(0, 99))
def test_neighbours_are_other_options_and_symmetric(dimension: Dimension, seed: int) -> None:
    value = dimension.sample(np.random.default_rng(seed))
    for other in dimension.adjacent(value):
        assert other != value
        assert dimension.contains(other)
        assert value in dimension.adjacent(other)


@given(reals(), st.integers(0, 99))
def test_real_samples_and_neighbours_stay_inside(dimension: Real, seed: int) -> None:
    value = dimension.sample(np.random.default_rng(seed))
    for other in [value, *dimension.adjacent(value)]:
        assert isinstance(other, float)
        assert dimension.low <= other <= dimension.high


def test_what_is_adjacent() -> None:
    assert Categorical(["a", "b", "c"]).adjacent("b") == ["a", "c"]
    assert Ordinal([3, 5, 7]).adjacent(3) == [5]
    assert Count(0, 1152, 8).adjacent(16) == [8, 24]
    assert Subset([3, 5, 7], minimum=1).adjacent((3,)) == [(3, 5), (3, 7)]
    assert Real(0.0, 1.0).adjacent(0.5) == pytest.approx([0.45, 0.55])
    assert Real(0.01, 1.0, log=True).adjacent(0.1) == pytest.approx([0.1 * 100**-0.05, 0.1 * 100**0.05])
    assert Real(0.0, 1.0).adjacent(1.0) == pytest.approx([0.95])


def test_subsets_equal_itertools_in_order() -> None:
    subset = Subset(list("abcde"), minimum=1, maximum=3)
    expected = [each for size in (1, 2, 3) for each in itertools.combinations("abcde", size)]
    assert list(subset.domain) == expected
    assert [subset.index(value) for value in expected] == list(range(len(expected)))


def test_large_domains_cost_nothing() -> None:
    assert Count(0, 10**15).index(10**15) == 10**15
    big = Subset(list(range(200)))
    assert big.size == 2**200
    chosen = big.sample(np.random.default_rng(0))
    assert big.contains(chosen)
    assert 60 < len(chosen) < 140  # binomial(200, 1/2), 5.6 standard deviations each side


def test_types_are_told_apart() -> None:
    assert not Count(0, 3).contains(1.0)
    assert not Count(0, 3).contains(True)
    assert not Categorical([1, 2]).contains(True)
    assert not Ordinal([1, 2]).contains(2.0)
    assert not Real(0.0, 1.0).contains(1)
    assert not Subset([1, 2]).contains((2, 1))
    assert not Subset([1, 2]).contains((1.0,))
    assert not Subset([1, 2]).contains([1])
    assert not Categorical(["a"]).contains({"un": "hashable"})


def test_real_sampling_is_uniform_on_its_scale() -> None:
    rng = np.random.default_rng(0)
    for log in (False, True):
        dimension = Real(0.1, 10.0, log=log)
        fractions = [dimension.domain.fraction(dimension.sample(rng)) for _ in range(4000)]
        assert abs(np.mean(fractions) - 0.5) < 4 * math.sqrt(1 / 12 / 4000)


def test_big_integers_are_drawn_uniformly() -> None:
    rng = np.random.default_rng(0)
    bound = 3 << 80
    draws = [draw_below(bound, rng) for _ in range(4000)]
    assert 0 <= min(draws) <= max(draws) < bound
    assert abs(sum(draw >= 2 << 80 for draw in draws) / 4000 - 1 / 3) < 4 * math.sqrt(2 / 9 / 4000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical([]), r"Categorical\.options: got \[\].*at least one"),
        (lambda: Categorical("abc"), r"Categorical\.options: got 'abc'.*a list"),
        (lambda: Ordinal([1, True]), r"Ordinal\.options.*all differ"),
        (lambda: Ordinal([1, math.nan]), r"Ordinal\.options: got nan; allowed: finite"),
        (lambda: Count(0, 1.5), r"Count\.high: got 1\.5; allowed: an integer"),
        (lambda: Count(0, 7, 2), r"Count\.high: got 7; allowed: low \+ a multiple"),
        (lambda: Count(0, 7, 0), r"Count\.step: got 0"),
        (lambda: Count(3, 1), r"Count\.high: got 1"),
        (lambda: Real(0.0, math.inf), r"Real\.high: got inf; allowed: a finite"),
        (lambda: Real(1.0, 0.0), r"Real\.high: got 0\.0; allowed: at least low = 1\.0"),
        (lambda: Real(0.0, 1.0, log=True), r"Real\.low: got 0\.0; allowed: a number above zero"),
        (lambda: Subset([1, 2], minimum=3), r"Subset\.minimum, maximum: got \(3, None\); allowed: 0 <= minimum"),
        (lambda: dimension_from_json({"type": "fuzzy"}), r"dimension\.type: got 'fuzzy'.*'categorical'"),
        (lambda: dimension_from_json({"type": "count", "bottom": 1}), r"count dimension: got \{'bottom': 1\}"),
    ],
)
def test_bad_dimensions_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("dimension", "value", "message"),
    [
        (Count(0, 8, 2), 3, "width: got 3; allowed: an integer from 0 to 8 in steps of 2"),
        (Categorical(["a", "b"]), "c", r"width: got 'c'; allowed: one of \['a', 'b'\]"),
        (Ordinal(list(range(30))), 31, r"30 values: 0, 1, 2, 3, 4, 5, \.\.\., 29"),
        (Real(0.5, 1.0), 2.0, "a float from 0.5 to 1.0"),
        (Subset([3, 5], minimum=1), (), r"a tuple of 1 to 2 of \[3, 5\], in this order"),
    ],
)
def test_errors_name_the_options(dimension: Dimension, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dimension.validate(value, "width")
