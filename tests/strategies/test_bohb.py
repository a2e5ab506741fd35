from __future__ import annotations

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Categorical, Count, Given, Ordinal, ProductSpace, Real, Result, When
from archsmith.strategies import Bohb
from archsmith.strategies.density import DecisionDensity, coordinates
from archsmith.testing.strategies import EXAMPLE_SPACES, deep_space, flat_space


@pytest.mark.parametrize("make", [deep_space, EXAMPLE_SPACES["small"]], ids=lambda make: make.__name__)
def test_the_density_is_normalised(make: object) -> None:
    """Summed over a finite space, with conditions and repeats, it is one (constraints cut some of the mass)."""
    space = make()  # type: ignore[operator]
    everything = list(space.enumerate())
    observed = [coordinates(space, everything[i]) for i in range(0, len(everything), max(1, len(everything) // 7))]
    density = DecisionDensity(space, observed)
    total = np.exp(density.log_densities([coordinates(space, a) for a in everything])).sum()
    if space.name == "small":
        assert total == pytest.approx(1.0)
    else:
        assert 0.5 < total <= 1.0 + 1e-9


def test_a_conditional_space_without_constraints_sums_to_one() -> None:
    space = ProductSpace(
        "tree",
        {
            "op": Categorical(["conv", "pool"]),
            "kernel": Given(When("op", "conv"), Ordinal([3, 5, 7])),
            "width": Count(1, 9),
        },
    )
    everything = list(space.enumerate())
    density = DecisionDensity(space, [coordinates(space, a) for a in everything[::4]])
    assert np.exp(density.log_densities([coordinates(space, a) for a in everything])).sum() == pytest.approx(1.0)


def test_the_density_of_a_real_number_integrates_to_one() -> None:
    space = ProductSpace("real", {"lr": Real(1e-4, 1.0, log=True)})
    observed = [coordinates(space, space.validate({"lr": lr})) for lr in (1e-4, 3e-3, 4e-3, 0.9)]
    density = DecisionDensity(space, observed)
    interval = space.dimension("lr").domain
    grid = [interval.at((i + 0.5) / 2_000) for i in range(2_000)]  # type: ignore[union-attr]
    values = np.exp(density.log_densities([coordinates(space, space.validate({"lr": lr})) for lr in grid]))
    assert values.mean() == pytest.approx(1.0, abs=1e-3)


def test_unordered_kernels_have_the_bandwidth_of_the_formula() -> None:
    space = ProductSpace("toy", {"op": Categorical(["a", "b", "c", "d"])})
    observed = [coordinates(space, space.validate({"op": op})) for op in "aaab"]
    width = (1.06 * np.sqrt(1 - 0.75**2 - 0.25**2) * 4 ** (-1 / 5)) ** 2
    density = DecisionDensity(space, observed)
    assert density.bandwidths["op"] == pytest.approx(width)
    a, c = (coordinates(space, space.validate({"op": op})) for op in "ac")
    assert np.exp(density.log_densities([a, c])) == pytest.approx([0.75 * (1 - width) + width / 4, width / 4])


def test_unordered_decisions_go_on_being_redrawn_when_all_good_ones_agree() -> None:
    space = ProductSpace("toy", {"op": Categorical(["a", "b", "c", "d"])})
    observed = [coordinates(space, space.validate({"op": "a"}))] * 9
    density = DecisionDensity(space, observed, least_unordered=0.3)
    rng = np.random.default_rng(0)
    n = 4_000
    others = sum(density.sample(rng)[0]["op"] != "a" for _ in range(n))
    assert abs(others - n * 0.3 * 3 / 4) < 4 * np.sqrt(n * 0.225 * 0.775)


def test_samples_follow_the_density() -> None:
    space = ProductSpace("toy", {"op": Categorical(["a", "b", "c"]), "width": Count(1, 5)})
    observed = [coordinates(space, space.validate(a)) for a in ({"op": "a", "width": 1}, {"op": "b", "width": 4})]
    density = DecisionDensity(space, observed, factor=1.0)
    rng = np.random.default_rng(0)
    n = 3_000
    drawn = [density.sample(rng)[0] for _ in range(n)]
    for architecture in space.enumerate():
        share = float(np.exp(density.log_densities([coordinates(space, architecture)])[0]))
        assert abs(drawn.count(architecture) - n * share) < 4 * np.sqrt(n * share * (1 - share)) + 1e-9


def test_the_model_waits_for_enough_results_and_takes_the_highest_fidelity() -> None:
    search = Bohb(flat_space(), fidelities=(1, 9), eta=9, random_fraction=0.0, samples=4)
    assert search._densities() is None
    for i in range(11):  # nine starts are a rung: d + 1 = 9 and two more are needed
        (trial,) = search.ask()
        search.tell(trial.id, Result(metrics={"valid_accuracy": float(i)}))
    assert [len(rung) for rung in search.results] == [9, 2]
    assert search._densities() is None
    while len(search.results[0]) < 11:
        (trial,) = search.ask()
        search.tell(trial.id, Result(metrics={"valid_accuracy": 0.0}))
    assert search._densities() is not None


def test_bad_settings_are_named() -> None:
    for settings, text in (
        ({"samples": 0}, "samples: got 0"),
        ({"random_fraction": 1.5}, "random_fraction: got 1.5"),
        ({"min_redraw": 1.5}, "min_redraw: got 1.5"),
        ({"good_fraction": 0.0}, "good_fraction: got 0.0"),
        ({"bandwidth_factor": 0.0}, "bandwidth_factor: got 0.0"),
    ):
        with pytest.raises(UserError, match=text):
            Bohb(flat_space(), fidelities=(1, 2), **settings)
