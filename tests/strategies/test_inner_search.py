from __future__ import annotations

import numpy as np
import pytest
from ofa_samples import GOLDEN, SPACE

from archsmith.core.errors import UserError
from archsmith.space import non_dominated
from archsmith.space.hypervolume import hypervolume
from archsmith.strategies.breeding import GeneBreeding, WalkBreeding, breeding_of
from archsmith.strategies.inner_search import Drawn, Evolution, order, reference_directions
from archsmith.strategies.nsga2 import ranks_and_crowding
from archsmith.testing.strategies import EXAMPLE_SPACES, flat_space, small_space


def ones_and_twos(population: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two losses that pull in two directions: few genes of option 1, few genes of option 2."""
    return np.stack([-(population == 1).sum(1), -(population == 2).sum(1)], axis=1).astype(float), np.zeros(
        len(population)
    )


def test_ranks_and_crowding_are_the_published_ones() -> None:
    case = GOLDEN["ranks"]
    points = np.array(case["input"]["F_minimise"], dtype=float)
    ranks, crowding = ranks_and_crowding(points, np.zeros(len(points)))
    assert ranks.tolist() == case["expected"]["rank"]
    expected = np.array([float(value) for value in case["expected"]["crowding"]])
    assert crowding * 2 == pytest.approx(expected, abs=1e-9)  # ours is divided by the number of objectives


def test_the_small_hypervolume_is_the_published_one() -> None:
    case = GOLDEN["hypervolume_small"]
    found = hypervolume(np.array(case["input"]["points_minimise"]), case["input"]["reference"]).value
    assert found == pytest.approx(case["expected"], abs=1e-9)


@pytest.mark.parametrize("name", list(EXAMPLE_SPACES))
def test_children_are_valid_and_come_of_their_parents(name: str) -> None:
    space = EXAMPLE_SPACES[name]()
    breeding = breeding_of(space)
    assert isinstance(breeding, GeneBreeding if name in ("flat", "small") else WalkBreeding)
    rng = np.random.default_rng(0)
    first, second = breeding.sample(rng, 30), breeding.sample(rng, 30)
    copies = breeding.children(first, second, rng, crossover=0.0, mutation=0.0)
    assert breeding.keys(copies) == breeding.keys(first)
    mixed = breeding.architectures(breeding.children(first, second, rng, crossover=1.0, mutation=0.0))
    for child, one, two in zip(mixed, breeding.architectures(first), breeding.architectures(second), strict=True):
        assert space.contains(child)
        if name in ("flat", "small", "recipe"):
            assert all(child[path] in (one.get(path), two.get(path)) for path in child)
    changed = breeding.children(first, second, rng, crossover=0.0, mutation=1.0)
    assert breeding.keys(changed) != breeding.keys(first)
    assert all(space.contains(child) for child in breeding.architectures(changed))
    assert len(breeding.features(mixed_population := breeding.population(mixed))) == len(mixed_population) == 30


def test_genes_that_wake_up_are_inherited_or_random() -> None:
    """A block that only one parent has keeps that parent's kernel; one that neither has is not always option 0."""
    breeding = GeneBreeding(SPACE)
    rng = np.random.default_rng(0)
    shallow = breeding.population([SPACE.validate({**a}) for a in breeding.architectures(breeding.sample(rng, 400))])
    place = {path: gene for gene, path in enumerate(breeding.genotypes.paths)}
    depth, kernel = place["stage/0/depth"], place["stage/0/3/kernel"]
    asleep = shallow[shallow[:, depth] < 2][:100]
    awake = shallow[shallow[:, depth] == 2][:100]
    pairs = min(len(asleep), len(awake))
    children = breeding.children(asleep[:pairs], awake[:pairs], rng, crossover=1.0, mutation=0.0)
    deep = children[:, depth] == 2
    assert deep.any() and (children[deep, kernel] == awake[:pairs][deep, kernel]).all()
    # Only the depth's own mutation can wake a block that neither parent has.
    woken = [breeding.children(asleep, asleep, rng, crossover=1.0, mutation=0.2) for _ in range(10)]
    kernels = np.concatenate([rows[rows[:, depth] == 2, kernel] for rows in woken])
    assert set(kernels.tolist()) == {0, 1, 2}


def test_predictors_see_the_masked_encoding() -> None:
    breeding = GeneBreeding(SPACE)
    population = breeding.sample(np.random.default_rng(0), 20)
    seen = SPACE.encode_many(breeding.architectures(population), "one-hot")
    np.testing.assert_array_equal(breeding.features(population), seen)
    own = GeneBreeding(SPACE, lambda architecture: np.array([float(len(architecture))]))
    assert own.features(population)[:, 0].tolist() == [len(a) for a in breeding.architectures(population)]


def test_exactly_so_many_are_scored_and_each_once() -> None:
    asked: list[np.ndarray] = []

    def score(population: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.append(population)
        return ones_and_twos(population)

    for inner in (Evolution(population=20, evaluations=333), Drawn(evaluations=333)):
        asked.clear()
        found = inner(GeneBreeding(flat_space()), score, np.empty((0, 8), dtype=int), np.random.default_rng(0))
        rows = np.concatenate(asked)
        assert len(rows) == len(found.population) == 333
        assert len(np.unique(rows, axis=0)) == 333
        np.testing.assert_array_equal(found.population, rows)


def test_a_small_space_is_searched_through_and_ends() -> None:
    found = Evolution(population=10, evaluations=5_000)(
        GeneBreeding(small_space()), ones_and_twos, np.empty((0, 3), dtype=int), np.random.default_rng(0)
    )
    assert len(found.population) == 27


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_evolution_finds_more_than_drawing(objectives: int) -> None:
    def score(population: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        losses = np.stack([-(population == option).sum(1) for option in range(objectives)], axis=1)
        return losses.astype(float), np.zeros(len(population))

    breeding, nobody = GeneBreeding(flat_space()), np.empty((0, 8), dtype=int)
    for seed in range(3):
        bred = Evolution(population=24, evaluations=1_200)(breeding, score, nobody, np.random.default_rng(seed))
        drawn = Drawn(evaluations=1_200)(breeding, score, nobody, np.random.default_rng(seed))
        reference = np.ones(objectives)
        assert hypervolume(bred.losses, reference).value > hypervolume(drawn.losses, reference).value
        # The front of eight genes that are shared out: all splits of 8 for two objectives.
        if objectives == 2:
            assert len(np.unique(bred.losses[non_dominated(bred.losses)], axis=0)) == 9
        if objectives == 1:
            assert bred.losses.min() == -8


def test_what_breaks_a_constraint_ranks_behind_by_how_much() -> None:
    losses = np.array([[5.0], [1.0], [2.0], [0.0]])
    assert order(losses, np.array([0.0, 0.5, 0.0, 0.1])).tolist() == [2, 0, 3, 1]

    def score(population: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        losses, _ = ones_and_twos(population)
        return losses, np.maximum(0, 6 - (population == 4).sum(1)).astype(float)

    for objectives in (2, 3):

        def wide(population: np.ndarray, objectives: int = objectives) -> tuple[np.ndarray, np.ndarray]:
            losses, violations = score(population)
            return losses[:, [0, 1, 0][:objectives]], violations

        found = Evolution(population=20, evaluations=1_000)(
            GeneBreeding(flat_space()), wide, np.empty((0, 8), dtype=int), np.random.default_rng(0)
        )
        kept = found.losses[found.violations == 0]
        assert kept.sum(axis=1).min() <= -2  # two genes are free: both directions are used up


def test_reference_directions_are_on_the_simplex_and_spread() -> None:
    for objectives, count, kept in ((3, 10, 10), (3, 14, 10), (4, 24, 20), (3, 2, 3)):
        directions = reference_directions(objectives, count)
        assert directions.shape == (kept, objectives)  # C(p + M - 1, M - 1), at least the corners
        assert directions.sum(axis=1) == pytest.approx(np.ones(kept))
    gaps = np.linalg.norm(directions[:, None] - directions[None], axis=2) + np.eye(len(directions)) * 9
    assert gaps.min() > 0.2


@pytest.mark.slow
def test_directions_of_even_energy_are_as_many_as_asked() -> None:
    directions = reference_directions(3, 11, "energy")
    assert directions.shape == (11, 3)
    assert directions.sum(axis=1) == pytest.approx(np.ones(11))


def test_wrong_settings_are_named() -> None:
    for settings in (
        {"population": 1},
        {"evaluations": 10},
        {"crossover": 1.5},
        {"mutation": -0.1},
        {"elite": 2},
        {"directions": "x"},
    ):
        with pytest.raises(UserError, match=f"inner.{next(iter(settings))}"):
            Evolution(**settings)
