"""Node subsets: exact sizes, uniform draws, and mutations that swap one node."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import EncodingKind, Result, Space
from archsmith.space.node_subsets import NodeSubsetSpace, kept_nodes
from archsmith.strategies import (
    PPO,
    GridSearch,
    LocalSearch,
    Nsga2,
    RandomSearch,
    RegularizedEvolution,
    Reinforce,
    Strategy,
    TpeSearch,
)
from archsmith.testing.space import SpaceContract

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "random-sparse.json").read_text())


class TestLayers(SpaceContract):
    uniform = True

    @pytest.fixture
    def space(self) -> Space:
        return NodeSubsetSpace({"a": 5, "b": 4}, {"a": 2, "b": 3})


class TestNetwork(SpaceContract):
    """A number for the whole network: layers depend on each other."""

    uniform = True
    single_changes = False

    @pytest.fixture
    def space(self) -> Space:
        return NodeSubsetSpace({"a": 4, "b": 2, "c": 3}, 5)


class TestWider(SpaceContract):
    lossless: ClassVar[tuple[EncodingKind, ...]] = ("one-hot",)

    @pytest.fixture
    def space(self) -> Space:
        return NodeSubsetSpace({"a": 12, "b": 10}, {"a": 2, "b": 9})


@pytest.mark.parametrize("case", [case for case in GOLDEN["cases"] if case["name"].startswith("mlp_")])
def test_published_sizes(case: dict) -> None:
    widths, keep = case["input"]["widths"], case["input"]["node_keep_fraction"]
    nodes = {f"h{i}": n for i, n in enumerate(widths[1:-1])}
    kept = kept_nodes(nodes, 1 - keep[0])
    assert list(kept.values()) == case["expected"]["kept_nodes"]
    assert NodeSubsetSpace(nodes, kept).log10_size == pytest.approx(
        case["expected"]["log10_configurations"], abs=case["tolerance"]
    )


def test_a_number_for_the_whole_network_counts_what_enumeration_finds() -> None:
    nodes = {"a": 4, "b": 2, "c": 3}
    for kept in range(3, 10):
        space = NodeSubsetSpace(nodes, kept)
        layers = [range(4), range(4, 6), range(6, 9)]
        literal = sum(
            all(set(layer) & set(chosen) for layer in layers) for chosen in itertools.combinations(range(9), kept)
        )
        assert space.size == len(list(space.enumerate())) == literal


def test_every_node_is_kept_equally_often() -> None:
    space = NodeSubsetSpace({"h": 8}, {"h": 3})
    rng = np.random.default_rng(0)
    draws = [space.sample(rng)["h"] for _ in range(20_000)]
    assert {len(set(each)) for each in draws} == {3}
    share = np.bincount(np.concatenate(draws), minlength=8) / len(draws)
    assert np.abs(share - 0.375).max() < 0.012


def test_mutations_swap_one_node_and_reach_every_swap() -> None:
    space = NodeSubsetSpace({"a": 4, "b": 3}, {"a": 2, "b": 1})
    start = space.sample(np.random.default_rng(0))
    rng = np.random.default_rng(1)
    found = Counter(space.mutate(start, rng) for _ in range(2_400))
    assert set(found) == set(space.neighbours(start))  # 2 * 2 + 1 * 2 swaps
    assert len(found) == 6
    assert max(abs(count - 400) for count in found.values()) < 4 * math.sqrt(400)


def test_a_network_wide_mutation_moves_a_node_between_layers_and_empties_none() -> None:
    space = NodeSubsetSpace({"a": 3, "b": 3}, 3)
    rng = np.random.default_rng(0)
    sizes = set()
    point = space.sample(rng)
    for _ in range(200):
        after = space.mutate(point, rng)
        before, now = np.array(space.encode(point, "one-hot")), np.array(space.encode(after, "one-hot"))
        assert np.abs(before - now).sum() == 2
        sizes.add((len(after["a"]), len(after["b"])))
        point = after
    assert sizes == {(1, 2), (2, 1)}


def test_large_subsets_are_drawn_and_validated() -> None:
    space = NodeSubsetSpace({"a": 512, "b": 512}, kept_nodes({"a": 512, "b": 512}, 0.5))
    point = space.sample(np.random.default_rng(0))
    assert space.contains(space.mutate(point, np.random.default_rng(0)))
    assert space.log10_size == pytest.approx(2 * math.log10(math.comb(512, 256)))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match=r"sparsity.*a number from 0, below 1"):
        kept_nodes({"a": 4}, sparsity)


@pytest.mark.parametrize("kept", [{"a": 0, "b": 1}, {"a": 5, "b": 1}, {"a": 1}, 1, 8])
def test_what_cannot_be_kept_is_refused(kept: dict[str, int] | int) -> None:
    with pytest.raises(UserError, match="kept"):
        NodeSubsetSpace({"a": 4, "b": 3}, kept)


def test_nothing_removed_has_no_mutant() -> None:
    space = NodeSubsetSpace({"a": 2}, {"a": 2})
    with pytest.raises(UserError, match="one that keeps every node"):
        space.mutate(space.sample(np.random.default_rng(0)), np.random.default_rng(0))


@pytest.mark.parametrize(
    "kind", [GridSearch, LocalSearch, Nsga2, PPO, RandomSearch, RegularizedEvolution, Reinforce, TpeSearch]
)
def test_strategies_search_it_and_resume(kind: type[Strategy]) -> None:
    space = NodeSubsetSpace({"a": 24, "b": 16}, {"a": 12, "b": 4})
    strategy = kind(space, seed=1)
    for _ in range(4):
        for trial in strategy.ask(3):
            assert space.contains(trial.architecture)
            strategy.tell(trial.id, Result(metrics={"valid_accuracy": float(sum(trial.architecture["b"]))}))
    again = kind(space, seed=1)
    again.load_state_dict(json.loads(json.dumps(strategy.state_dict())))
    assert [trial.architecture for trial in again.ask(3)] == [trial.architecture for trial in strategy.ask(3)]


def test_a_controller_says_that_sizes_must_not_vary() -> None:
    strategy = PPO(NodeSubsetSpace({"a": 6, "b": 6}, 6), seed=0)
    with pytest.raises(UserError, match="must always offer the same list"):
        strategy.ask(20)
