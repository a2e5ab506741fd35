import dataclasses

import numpy as np
import pytest
import torch
from hand_units import IMAGE, Attention, Branches, along, attention, branches, branches_groups
from torch import nn

from archsmith.atoms.declared import DeclaredAtoms, copy_without
from archsmith.atoms.unit_costs import UnitCosts, smallest_chunk, times, weight_axes
from archsmith.atoms.units import Place, UnitGroup
from archsmith.core.errors import ArchsmithError, UserError
from archsmith.cost import count


def costs_of(atoms):
    return UnitCosts(
        atoms.model,
        atoms.example_inputs,
        atoms.groups,
        shrunk=lambda removed: copy_without(atoms, removed, numbers=False),
    )


@pytest.mark.parametrize("widths", [(8, 12, 6), (5, 7, 3), (1, 1, 1)])
def test_a_network_of_convolutions_costs_what_the_built_one_costs(widths):
    costs = UnitCosts(Branches(), torch.zeros(IMAGE), branches_groups())
    built = count(Branches(*widths), torch.zeros(IMAGE))
    assert costs.of(dict(zip(costs.names, widths, strict=True))) == {"macs": built.macs, "params": built.params}


@pytest.mark.parametrize("widths", [(4, 3, 10), (2, 3, 10), (4, 1, 10), (3, 2, 4), (1, 1, 1)])
def test_attention_costs_what_the_built_one_costs(widths):
    costs = costs_of(attention())
    heads, width, hidden = widths
    built = count(Attention(*widths), torch.zeros(2, 5, 6))
    kept = {"heads": heads, "qk": width, "v": width, "ffn": hidden}
    assert costs.of(kept) == {"macs": built.macs, "params": built.params}


def test_query_and_value_widths_are_charged_apart():
    atoms = attention()
    costs = costs_of(atoms)
    twin = copy_without(atoms, {"v": np.array([0]), "heads": np.array([1])})
    assert costs.of({"v": 2, "heads": 3}) == costs.recount(twin)


def test_without_probing_products_of_activations_stay_constant():
    """The reason for probing: the weights alone do not say that scores need all heads."""
    atoms = attention()
    blind = UnitCosts(atoms.model, atoms.example_inputs, atoms.groups)
    assert blind.of({"heads": 1}) != costs_of(atoms).of({"heads": 1})


def test_a_shared_layer_used_on_parts_is_found_by_the_combined_cut():
    """Positions depend on units: one layer runs once for each head."""

    class PerHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 4
            self.into, self.each, self.out = nn.Linear(6, 12), nn.Linear(3, 3), nn.Linear(12, 6)

        def forward(self, x):
            return self.out(self.each(self.into(x).unflatten(-1, (self.heads, 3))).flatten(2))

    groups = [
        UnitGroup(
            "heads", 4, (along("into.weight", 0, 4, 3), along("into.bias", 0, 4, 3), along("out.weight", 1, 4, 3))
        )
    ]
    atoms = DeclaredAtoms(PerHead(), torch.zeros(2, 5, 6), groups, attributes=lambda kept: {"heads": kept["heads"]})
    costs = costs_of(atoms)
    for gone in (1, 3):
        assert costs.of({"heads": 4 - gone}) == costs.recount(copy_without(atoms, {"heads": np.arange(gone)}))


def test_grouped_convolutions_share_their_columns():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2))
    index = np.array([[(3 * (i // 4) + o) * 4 + i % 4 for o in range(3)] for i in range(8)])
    group = UnitGroup(
        "in",
        8,
        (along("0.weight", 0, 8), along("0.bias", 0, 8), Place("1.weight", (0, 1), index)),
        balance=((0, 1, 2, 3), (4, 5, 6, 7)),
    )
    atoms = DeclaredAtoms(model, torch.zeros(1, 3, 5, 5), [group])
    assert smallest_chunk(group).tolist() == [3, 7]
    assert costs_of(atoms).of({"in": 4}) == costs_of(atoms).recount(copy_without(atoms, {"in": np.array([1, 2, 4, 7])}))


def test_what_a_unit_costs_follows_its_neighbours():
    costs = UnitCosts(Branches(), torch.zeros(IMAGE), branches_groups())
    full, narrow = np.array([8.0, 12.0, 6.0]), np.array([8.0, 4.0, 6.0])
    for kept in (full, narrow):
        for number, falls in enumerate(costs.marginal("macs", kept)):
            less = kept.copy()
            less[number] -= 1
            numbers = [dict(zip(costs.names, map(int, each), strict=True)) for each in (kept, less)]
            assert falls == pytest.approx(costs.of(numbers[0])["macs"] - costs.of(numbers[1])["macs"])
    assert costs.marginal("macs", narrow)[0] < costs.marginal("macs", full)[0]
    assert costs.marginal("macs", narrow)[2] == costs.marginal("macs", full)[2]


def test_gradients_exist_at_zero_units():
    costs = UnitCosts(Branches(), torch.zeros(IMAGE), branches_groups())
    compiled = costs.compiled("macs")
    kept = np.array([8.0, 0.0, 6.0])
    slope = compiled.value(kept + np.array([0.0, 1.0, 0.0])) - compiled.value(kept)
    assert compiled.gradient(kept)[1] == pytest.approx(slope)


def test_square_weights_count_twice():
    model = nn.Linear(6, 6, bias=False)
    group = UnitGroup("width", 6, (along("weight", 0, 6), along("weight", 1, 6)))
    costs = UnitCosts(model, torch.zeros(1, 6), [group])
    assert costs.polynomials["macs"] == {(0, 0): 36}
    assert costs.of({"width": 4}) == {"macs": 16, "params": 16}
    assert costs.marginal("macs", np.array([6.0]), 2.0)[0] == pytest.approx(36 - 16)


def test_positions_with_two_owners_multiply():
    rows = UnitGroup("rows", 2, (along("w", 0, 2, 3),))
    columns = UnitGroup("columns", 3, (Place("w", (0,), np.array([[j, 3 + j] for j in range(3)])),))
    assert weight_axes([rows, columns], {"w": (7, 2)})["w", 0] == {(0, 1): 6, (): 1}


def test_polynomials_multiply_out():
    assert times({(): 2, (0,): 3}, {(0,): 1, (1,): 5}) == {(0,): 2, (1,): 10, (0, 0): 3, (0, 1): 15}


def test_groups_of_another_network_are_refused():
    wide = branches_groups(9)
    with pytest.raises(UserError, match=r"describe another network, or the same one before a cut"):
        UnitCosts(Branches(), torch.zeros(IMAGE), wide)
    lost = [dataclasses.replace(wide[0], places=(along("nowhere", 0, 9),))]
    with pytest.raises(UserError, match=r"a place in 'nowhere'"):
        UnitCosts(Branches(), torch.zeros(IMAGE), lost)
    with pytest.raises(UserError, match=r"kept: got 'c9'"):
        UnitCosts(Branches(), torch.zeros(IMAGE), branches_groups()).of({"c9": 1})


def test_a_cut_that_changes_which_products_run_is_no_silent_count():
    class Branching(Attention):
        def forward(self, x):
            x = super().forward(x)
            return x if self.heads == 4 else x + self.down(torch.relu(self.up(x)))

    atoms = attention()
    atoms = dataclasses.replace(atoms, model=Branching())
    with pytest.raises(ArchsmithError, match="changed which products run"):
        costs_of(atoms)


def test_nothing_of_the_network_changes():
    atoms = branches()
    before = {name: tensor.clone() for name, tensor in atoms.model.state_dict().items()}
    costs_of(atoms)
    after = atoms.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
