import copy

import numpy as np
import pytest
import torch
from hand_units import IMAGE, along, attention, awaken, branches
from torch import nn

from archsmith.atoms.declared import copy_without
from archsmith.atoms.gate_sites import SiteHooks, fold_, gate_sites
from archsmith.atoms.units import Place, UnitGroup


def closed(groups, removed):
    """Gates of ones, zero for the removed units."""
    gates = {group.name: torch.ones(group.size) for group in groups}
    for name, units in removed.items():
        gates[name][list(units)] = 0.0
    return gates


@pytest.mark.parametrize(
    ("make", "shape", "removed"),
    [
        (branches, IMAGE, {"c1": [0, 5], "c2": [3, 4, 11], "c3": [2]}),
        (attention, (2, 5, 6), {"heads": [1], "qk": [0], "v": [2], "ffn": [0, 7, 9]}),
    ],
)
def test_closed_gates_compute_what_the_cut_network_computes(make, shape, removed):
    atoms = make()
    model = awaken(atoms.model).double().eval()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    small = copy_without(atoms, {name: np.array(units) for name, units in removed.items()})
    sites, refused = gate_sites(model, atoms.groups)
    assert not refused
    gates = closed(atoms.groups, removed)
    before = model(x)
    hooks = SiteHooks(model, sites, gates.get)
    torch.testing.assert_close(model(x), small(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(x), before, atol=1e-3)
    hooks.remove()
    assert torch.equal(model(x), before)


def test_units_are_gated_where_they_are_read_and_else_where_they_are_made():
    sites, _ = gate_sites(attention().model, attention().groups)
    assert [(s.module, s.side) for s in sites["heads"]] == [("out", "input")]
    assert [(s.module, s.side) for s in sites["qk"]] == [("q", "output"), ("k", "output")]
    sites, _ = gate_sites(branches().model, branches().groups)
    assert [(s.module, s.side) for s in sites["c1"]] == [("c2", "input"), ("c3", "input")]  # not the depthwise one


@pytest.mark.parametrize(("make", "shape"), [(branches, IMAGE), (attention, (2, 5, 6))])
def test_folding_leaves_the_function(make, shape):
    atoms = make()
    model = awaken(atoms.model).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    sites, _ = gate_sites(model, atoms.groups)
    generator = torch.Generator().manual_seed(0)
    gates = {g.name: torch.rand(g.size, generator=generator, dtype=torch.float64) + 0.2 for g in atoms.groups}
    hooks = SiteHooks(model, sites, gates.get)
    gated = model(x)
    hooks.remove()
    fold_(model, sites, gates)
    torch.testing.assert_close(model(x), gated, rtol=1e-9, atol=1e-9)


def test_grouped_and_transposed_convolutions():
    index = np.array([[(3 * (i // 4) + o) * 4 + i % 4 for o in range(3)] for i in range(8)])
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 2)).double()
    groups = [
        UnitGroup("in", 8, (along("0.weight", 0, 8), along("0.bias", 0, 8), Place("1.weight", (0, 1), index))),
        UnitGroup("out", 6, (along("1.weight", 0, 6), along("1.bias", 0, 6), along("2.weight", 0, 6))),
        UnitGroup("columns", 4, (Place("0.weight", (0,), np.arange(8).reshape(2, 4).T), along("1.weight", 1, 4))),
    ]
    sites, refused = gate_sites(model, groups)
    assert not refused
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    hidden = model[0](x)
    gates = {
        "in": torch.tensor([1, 1, 0, 1, 1, 0.5, 1, 1]).double(),
        "out": torch.tensor([1, 0, 1, 1, 1, 2.0]).double(),
    }
    hidden = model[1](hidden * gates["in"][:, None, None]) * gates["out"][:, None, None]
    expected = model[2](hidden)
    hooks = SiteHooks(model, sites, gates.get)
    torch.testing.assert_close(model(x), expected)
    hooks.remove()
    columns = {"columns": torch.tensor([1, 0.5, 1, 0]).double()}
    expected = model[1:](model[0](x) * columns["columns"].repeat(2)[:, None, None])
    SiteHooks(model, {"columns": sites["columns"]}, columns.get)
    torch.testing.assert_close(model(x), expected)


def test_units_read_where_no_hook_reaches_have_no_gate():
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.weight = nn.Linear(3, 4), nn.Parameter(torch.ones(4, 2))

        def forward(self, x):
            return self.up(x) @ self.weight

    group = UnitGroup("up", 4, (along("up.weight", 0, 4), along("up.bias", 0, 4), along("weight", 0, 4)))
    found, refused = gate_sites(Free(), [group])
    assert not found
    assert "'' (Free) reads it where no hook reaches" in refused["up"]
    lstm = nn.LSTM(3, 4)
    hidden = UnitGroup("h", 4, (along("weight_hh_l0", 1, 4),))
    assert "(LSTM) reads it where no hook reaches" in gate_sites(lstm, [hidden])[1]["h"]
    frozen = UnitGroup("f", 4, (along("up.weight", 0, 4),), frozen="by hand")
    assert gate_sites(Free(), [frozen])[1] == {"f": "it is frozen: by hand"}


def test_a_tied_weight_is_folded_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    group = UnitGroup("w", 4, (along("0.weight", 1, 4),))
    sites, _ = gate_sites(model, [group])
    assert [site.module for site in sites["w"]] == ["0", "1"]
    before = copy.deepcopy(model[0].weight)
    fold_(model, sites, {"w": torch.full((4,), 0.5)})
    torch.testing.assert_close(model[0].weight, before * 0.5)
