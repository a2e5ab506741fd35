"""Puzzle as a whole: what its settings mean, the sweep over batches, further children, aiming lower when measured."""

from itertools import pairwise

import pytest
from plain_blocks import plain_batches, plain_family

from archsmith import api
from archsmith.core.errors import UserError
from archsmith.methods import load_method
from archsmith.methods.puzzle import Settings, search
from archsmith.run.block_search import BlockSearch
from archsmith.run.directory import Run
from archsmith.space import Budget
from archsmith.strategies.milp import Infeasible
from archsmith.train.blockwise import BlockTraining


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    with Run.create_or_open(tmp_path_factory.mktemp("puzzle") / "run", {"seed": 0}) as run:
        training = BlockTraining(steps=5, lr=3e-3)
        yield BlockSearch(run, plain_family, plain_batches(6), plain_batches(2, seed=9), training=training)


def call(load):
    return plain_batches(1, size=load.batch, length=load.prefill)[0]


def searched(blocks, budget, **settings):
    return search(blocks, Budget.parse(budget), Settings(**settings), call, length=8)


def test_it_is_found_by_its_name_and_refuses_to_search_without_a_model(tmp_path):
    row, _ = load_method("puzzle")
    assert row["arxiv"] == "2411.19146"
    with pytest.raises(UserError, match="search --method puzzle --model"):
        api.search(method="puzzle", out=tmp_path / "run")


def test_larger_batches_leave_less_memory_for_weights_and_the_best_scoring_batch_wins(blocks):
    small, _, costs = searched(blocks, "memory<=40kB", batches=(1,))
    swept, _, chosen = searched(blocks, "memory<=40kB", batches=(8, 1, 2))
    assert chosen.load.batch == costs.load.batch == 1
    assert swept[0].selection.choice == small[0].selection.choice
    large, _, _ = searched(blocks, "memory<=40kB", batches=(8,))
    assert large[0].selection.score >= small[0].selection.score
    with pytest.raises(UserError, match="outside of the layers"):
        searched(blocks, "memory<=1kB", batches=(1, 2))


def test_further_children_share_at_most_a_part_of_their_layers(blocks):
    children, _, _ = searched(blocks, "params<=0.7x", different_from_first=0.4, children=3)
    assert len(children) >= 2
    for number, child in enumerate(children):
        for earlier in children[:number]:
            same = zip(child.selection.choice, earlier.selection.choice, strict=True)
            assert sum(a == b for a, b in same) <= 1  # 0.4 of 3 layers
    assert [c.selection.score for c in children] == sorted(c.selection.score for c in children)


def test_a_child_that_is_measured_slower_than_allowed_makes_the_search_aim_lower(blocks, monkeypatch):
    from dataclasses import replace

    aimed = []

    def measured(children, costs, call):
        aimed.append(children[0].predicted["runtime"])
        slower = 0.95 if len(aimed) == 1 else 0.5
        return [
            replace(c, measured={"runtime_ms": slower * costs.parent["runtime"], "of_parent": slower}) for c in children
        ]

    monkeypatch.setattr(blocks, "measured", measured)
    searched(blocks, "latency<=0.9x")
    assert aimed[1] < aimed[0]


def test_errors_name_the_limit(blocks):
    with pytest.raises((Infeasible, UserError), match="limits on memory, params, macs, latency, throughput"):
        searched(blocks, "energy<=1mJ")
    with pytest.raises(ValueError, match="different_from_first"):
        Settings(different_from_first=2)


def slower_than_the_tables(blocks, monkeypatch, factor):
    """Measured runtimes are ``factor`` of the tables' sum; returns what was measured, by choice."""
    from dataclasses import replace

    aimed = []

    def measured(children, costs, call):
        aimed.append(children[0].predicted["runtime"])
        ms = [factor(child, costs) for child in children]
        parent = costs.parent["runtime"]
        return [
            replace(c, measured={"runtime_ms": m, "of_parent": m / parent}) for c, m in zip(children, ms, strict=True)
        ]

    monkeypatch.setattr(blocks, "measured", measured)
    return aimed


def test_only_the_fastest_child_is_fast_enough_and_it_is_found(blocks, monkeypatch):
    def factor(child, costs):
        fastest = costs.rest["runtime"] + sum(min(row) for row in costs.tables["runtime"])
        return (0.5 if child.predicted["runtime"] <= fastest * 1.0001 else 0.95) * costs.parent["runtime"]

    aimed = slower_than_the_tables(blocks, monkeypatch, factor)
    monkeypatch.setattr(blocks, "baselines", lambda *given, **named: [])
    [child], _, costs = searched(blocks, "latency<=0.9x")
    assert child.measured["runtime_ms"] == 0.5 * costs.parent["runtime"]
    assert aimed[:-1] == sorted(aimed[:-1], reverse=True)


def test_when_even_the_fastest_child_is_too_slow_the_error_names_the_nearest(blocks, monkeypatch):
    aimed = slower_than_the_tables(blocks, monkeypatch, lambda child, costs: 0.95 * costs.parent["runtime"])
    with pytest.raises(UserError, match=r"the nearest measured child.*The nearest: layer") as caught:
        searched(blocks, "latency<=0.9x")
    assert str(blocks.run.path) in str(caught.value)
    assert all(later < earlier for earlier, later in pairwise(aimed))
