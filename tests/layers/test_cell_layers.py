"""The NAS-Bench-201 network against the values of its reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cell_samples import NB201_FACTS, fill_closed_form_, operations_of
from torch import nn

from archsmith.layers.cells import DenseCell, NasBench201Network, ReluConvNorm, ResidualReduction, make_edge_operation

FORWARD = sorted(name for name in NB201_FACTS["cases"] if name.startswith("forward/"))


@pytest.mark.parametrize("case", FORWARD)
def test_a_cell_has_the_reference_values(case):
    fact = NB201_FACTS["cases"][case]
    cell = fill_closed_form_(DenseCell(operations_of(fact["arch"]), 4)).eval()
    x = torch.cos(0.1 * torch.arange(2 * 4 * 5 * 5, dtype=torch.float64)).reshape(2, 4, 5, 5)
    with torch.no_grad():
        y = cell(x)
    found = [float(y.sum()), float(y.abs().sum()), float(y[0, 1, 2, 3]), float(y[1, 3, 4, 4])]
    expected = [fact[key] for key in ("cell_sum", "cell_abs_sum", "cell_y_0_1_2_3", "cell_y_1_3_4_4")]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", FORWARD)
def test_a_network_has_the_reference_logits(case):
    fact = NB201_FACTS["cases"][case]
    network = fill_closed_form_(NasBench201Network(3, 10, 4, 1, operations_of(fact["arch"]))).eval()
    x = torch.cos(0.05 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64)).reshape(2, 3, 16, 16)
    with torch.no_grad():
        assert network(x)[0].tolist() == pytest.approx(fact["net_logits_0"], abs=1e-6)


def test_the_facts_name_their_origin():
    path = Path(__file__).parents[1] / "golden" / "nas-bench-201-networks.json"
    assert "AutoDL-Projects" in json.loads(path.read_text())["origin"]


def test_the_border_is_not_counted_in_averages():
    pool = make_edge_operation("avg_pool_3x3", 1)
    assert torch.equal(pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_none_gives_zeros_with_a_gradient():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = make_edge_operation("none", 3)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_operations_leave_their_input_alone():
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    for name in ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"):
        assert make_edge_operation(name, 3)(x).shape == x.shape
    ResidualReduction(3, 6)(x)
    assert torch.equal(x, before)


def test_a_skip_cell_passes_its_input_three_times_over():
    # x1 = x0, x2 = x0 + x1, x3 = x0 + x1 + x2: one, two, four paths.
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(DenseCell(("skip_connect",) * 6, 3)(x), 4 * x)


def test_cells_of_any_number_of_nodes():
    assert DenseCell(("skip_connect",), 2).nodes == 2
    assert DenseCell(("skip_connect",) * 10, 2).nodes == 5
    with pytest.raises(ValueError, match=r"n \(n - 1\) / 2 edges, got 4"):
        DenseCell(("none",) * 4, 2)
    with pytest.raises(ValueError, match="edges, got 0"):
        DenseCell((), 2)
    with pytest.raises(ValueError, match="got 'conv'; allowed: 'none', 'skip_connect'"):
        DenseCell(("conv",), 2)


def test_without_affine_only_the_outer_normalisations_have_parameters():
    network = NasBench201Network(3, 10, 4, 1, ("nor_conv_3x3",) * 6, affine=False)
    inner = [m.norm for m in network.modules() if isinstance(m, ReluConvNorm)]
    assert all(not norm.affine for norm in inner)
    assert sum(isinstance(m, nn.BatchNorm2d) and m.affine for m in network.modules()) == 2
    assert network.constructor()["affine"] is False


def test_the_constructor_rebuilds_the_structure():
    network = NasBench201Network(1, 7, 4, 2, ("none", "skip_connect", "nor_conv_1x1", "none", "none", "avg_pool_3x3"))
    again = NasBench201Network(**network.constructor())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert len(network.cells()) == 6
