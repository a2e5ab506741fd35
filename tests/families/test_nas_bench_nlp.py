"""Recurrent cells: the benchmark's counts, hand-made steps, the space's rules, and the contract of families."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from shared_data import shared_data
from torch import nn

from archsmith.core.errors import UserError
from archsmith.families.nas_bench_nlp import RecurrentFamily
from archsmith.families.nas_bench_nlp_space import (
    architecture_of,
    cell_space,
    parse_recipe,
    recipe_of,
    recipe_params,
)
from archsmith.layers.recurrent_cells import RecurrentCell, RecurrentLayer
from archsmith.run.constructor import build, call_of
from archsmith.testing.families import FamilyContract, images, measured_costs

ELMAN = '{"f": {"op": "linear", "input": ["x", "h_prev_0"]}, "h_new_0": {"op": "activation_tanh", "input": ["f"]}}'
GRU = (
    '{"r": {"op": "linear", "input": ["x", "h_prev_0"]}, "r_act": {"op": "activation_sigm", "input": ["r"]}, '
    '"z": {"op": "linear", "input": ["x", "h_prev_0"]}, "z_act": {"op": "activation_sigm", "input": ["z"]}, '
    '"rh": {"op": "elementwise_prod", "input": ["r_act", "h_prev_0"]}, "t": {"op": "linear", "input": ["x", "rh"]}, '
    '"t_act": {"op": "activation_tanh", "input": ["t"]}, '
    '"h_new_0": {"op": "blend", "input": ["z_act", "h_prev_0", "t_act"]}}'
)
# Recorded in the WikiText-2 table for the recipes 1000000 and 1000002.
PUBLISHED = {ELMAN: 15_066_078, GRU: 18_509_278}


class TestRecurrentFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        return RecurrentFamily(
            image=(1, 1, 3), num_classes=7, embedding=4, hidden=6, layers=2, nodes=5, states=3, dropout=0.1
        )

    def test_architectures_come_back(self, family, samples):
        """The graph comes back; places that it does not use are free."""
        for sample in samples:
            network = family.build(sample, seed=0)
            again = family.architecture_of(network)
            assert recipe_of(again) == recipe_of(sample)
            assert again.network_digest == sample.network_digest
            assert call_of(family.build(again, seed=0)) == call_of(network)
            self._same_function(build(call_of(network)), network, images(family))


def rows_of_wikitext2():
    parquet = pytest.importorskip("pyarrow.parquet")
    file = shared_data("nas-benchmarks") / "nas-bench-nlp-wikitext2.parquet"
    return parquet.read_table(file, columns=["recepie", "num_params"]).to_pylist()


def test_published_counts():
    assert {text: recipe_params(parse_recipe(text)) for text in PUBLISHED} == PUBLISHED
    family = RecurrentFamily(image=(1, 1, 2), num_classes=33_278)
    with torch.device("meta"):
        network = family.build_recipe(parse_recipe(GRU))
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[GRU]


def test_all_345_recipes_have_their_recorded_counts_and_run():
    family = RecurrentFamily(image=(1, 1, 2), num_classes=5, embedding=2, hidden=3)
    rows = rows_of_wikitext2()
    assert len(rows) == 345
    sizes = {"vocabulary": 5, "embedding": 2, "hidden": 3, "layers": 3}
    for row in rows:
        recipe = parse_recipe(row["recepie"])
        assert recipe_params(recipe) == row["num_params"]
        network = family.build_recipe(recipe, seed=0)
        assert sum(p.numel() for p in network.parameters()) == recipe_params(recipe, **sizes)
        with torch.no_grad():
            assert network(torch.tensor([[1, 2]])).shape == (1, 2, 5)


def test_the_elman_recipe_is_torchs():
    torch.manual_seed(0)
    layer, reference = RecurrentLayer(3, 4, parse_recipe(ELMAN)), nn.RNN(3, 4)
    linear = layer.cell.nodes[0]
    with torch.no_grad():
        linear.weight.copy_(torch.cat([reference.weight_ih_l0, reference.weight_hh_l0], 1))
        linear.bias.copy_(reference.bias_ih_l0 + reference.bias_hh_l0)
    x = torch.randn(6, 2, 3)
    torch.testing.assert_close(layer(x)[0], reference(x)[0])


def test_the_gru_recipe_by_hand():
    torch.manual_seed(0)
    cell = RecurrentCell(3, 4, parse_recipe(GRU))
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    linear = {name: module for (name, _, _), module in zip(cell.plan, cell.nodes, strict=True)}
    r = torch.sigmoid(linear["r"](torch.cat([x, h], 1)))
    z = torch.sigmoid(linear["z"](torch.cat([x, h], 1)))
    t = torch.tanh(linear["t"](torch.cat([x, r * h], 1)))
    torch.testing.assert_close(cell(x, (h,))[0], z * h + (1 - z) * t)


def test_texts_go_on_from_states():
    family = RecurrentFamily(image=(1, 1, 8), num_classes=9, embedding=4, hidden=5)
    network, tokens = family.build_recipe(parse_recipe(GRU), seed=0), family.examples(2).flatten(1)
    first, states = network.step(tokens[:, :3], None)
    second, _ = network.step(tokens[:, 3:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), network(tokens))


def test_samples_have_no_idle_part_and_read_token_and_state():
    space = cell_space(6, 3)
    seen = set()
    for seed in range(60):
        recipe = recipe_of(space.sample(np.random.default_rng(seed)))
        assert parse_recipe({n: {"op": o, "input": list(i)} for n, o, i in recipe}) == recipe
        read = {name for _, _, inputs in recipe for name in inputs}
        assert {"x", "h_prev_0"} <= read
        assert all(name in read or name.startswith("h_new_") for name, _, _ in recipe)
        assert {n.replace("new", "prev") for n, _, _ in recipe if n.startswith("h_new_")} <= read
        assert recipe_of(architecture_of(recipe, space)) == recipe
        seen.add(recipe)
    assert len(seen) > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "sine", "input": ["f"]}, "sine of 1"),
        ({"op": "elementwise_sum", "input": ["f", "x"]}, "x in linear nodes only"),
        ({"op": "activation_tanh", "input": ["nowhere"]}, "nowhere"),
        ({"op": "activation_tanh", "input": ["h_prev_1"]}, "without gaps"),
        ({"op": "linear", "input": ["f", "h_new_0"]}, "circle"),
    ],
)
def test_broken_recipes_are_refused(change, message):
    graph = {**json.loads(ELMAN), "h_new_0": change}
    with pytest.raises(UserError, match=message):
        parse_recipe(graph)


def test_other_errors():
    with pytest.raises(UserError, match="object of nodes"):
        parse_recipe("[1]")
    with pytest.raises(UserError, match="at most 3 nodes"):
        architecture_of(parse_recipe(GRU), cell_space(3, 1))
    with pytest.raises(UserError, match="more nodes than states"):
        cell_space(2, 2)


def test_ends_are_ends():
    family = RecurrentFamily(image=(1, 1, 2), num_classes=9, embedding=3, hidden=8, layers=3, nodes=6)
    low, high = (measured_costs(family, end)["params"] for end in (family.smallest(), family.largest()))
    drawn = [family.exact_costs(family.space.sample(np.random.default_rng(s)))["params"] for s in range(40)]
    assert low <= min(drawn)
    assert max(drawn) <= high
