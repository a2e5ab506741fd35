"""Switches and single-path supernets: what runs, what is shared, what comes out."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.families.cells import EDGE_PATHS, NasBench201Family, random_path
from archsmith.layers.cells import NasBench201Network
from archsmith.space import Categorical, ProductSpace
from archsmith.supernet import SinglePathSupernet, Supernet, Switch
from archsmith.testing.families import worn_

FAMILY = NasBench201Family(image=(3, 8, 8), num_classes=4, channels=4, cells=2)
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cells(count=4):
    return [FAMILY.space.sample(np.random.default_rng(seed)) for seed in range(count)]


@pytest.fixture(params=[False, True], ids=["plain", "affine"])
def supernet(request):
    return worn_(FAMILY.supernet(seed=0, affine=request.param))


@pytest.mark.parametrize("training", [False, True])
def test_an_extracted_network_is_the_active_path(supernet, training):
    supernet.train(training)
    for cell in [*cells(2), FAMILY.smallest(), FAMILY.largest()]:
        network = supernet.extract(cell)
        assert isinstance(network, NasBench201Network) and network.training == training
        assert FAMILY.architecture_of(network) == cell
        supernet.activate(cell)
        with torch.no_grad():
            torch.testing.assert_close(network(IMAGES), copy.deepcopy(supernet)(IMAGES), rtol=1e-5, atol=1e-5)


def test_an_extracted_network_has_the_standalone_costs_and_weights_of_its_own(supernet):
    cell = cells()[0]
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    network = supernet.extract(cell)
    assert sum(p.numel() for p in network.parameters()) == FAMILY.exact_costs(cell)["params"]
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())


def test_extracting_leaves_the_active_path(supernet):
    first, second, *_ = cells()
    supernet.eval().activate(first)
    before = supernet(IMAGES)
    supernet.extract(second)
    assert torch.equal(supernet(IMAGES), before)
    supernet.activate(second)
    assert not torch.equal(supernet(IMAGES), before)


def test_only_the_active_path_gets_gradients():
    supernet = FAMILY.supernet(seed=0)
    cell = FAMILY.smallest()  # nothing but a skip, on edge 0-3
    supernet.activate(cell)
    supernet(IMAGES).sum().backward()
    touched = {name for name, parameter in supernet.named_parameters() if parameter.grad is not None}
    assert touched and not any("candidates" in name for name in touched)
    supernet.activate({**cell, "edge/0-3": "nor_conv_1x1"})
    supernet(IMAGES).sum().backward()
    inside = {
        name.split(".edges.")[1] for name, p in supernet.named_parameters() if p.grad is not None and "edges" in name
    }
    assert inside == {"3.candidates.nor_conv_1x1.conv.weight"}


def test_every_cell_of_every_stage_is_switched():
    supernet = FAMILY.supernet(seed=0)
    switches = [module for module in supernet.modules() if isinstance(module, Switch)]
    assert len(switches) == 3 * FAMILY.cells * len(EDGE_PATHS)
    supernet.activate(FAMILY.largest())
    assert {switch.active for switch in switches} == {"nor_conv_3x3"}


def test_a_supernet_keeps_the_protocol_and_pickles():
    supernet = FAMILY.supernet(seed=0)
    assert isinstance(supernet, Supernet)
    again = pickle.loads(pickle.dumps(supernet))  # noqa: S301
    for each in (supernet, again):
        each.eval().activate(cells()[1])
    assert torch.equal(again(IMAGES), supernet(IMAGES))


def test_the_seed_decides_the_weights():
    before = torch.random.get_rng_state()
    first, again, other = (FAMILY.supernet(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_random_paths_feed_every_node_and_are_uniform_over_those():
    rng = np.random.default_rng(0)
    drawn = [random_path(rng) for _ in range(2_000)]
    for cell in drawn:
        for target in "123":
            assert any(cell[path] != "none" for path in EDGE_PATHS if path.endswith(target))
    # Node 1 has one edge, never none: four operations, 500 each; node 3 may have none on two of its three edges.
    counts = [sum(cell["edge/0-1"] == name for cell in drawn) for name in ("skip_connect", "avg_pool_3x3")]
    assert all(abs(count - 500) < 4 * (2_000 * 0.25 * 0.75) ** 0.5 for count in counts)
    share = 1 - 100 / 124  # of the 124 ways to feed node 3, 24 have none on a given edge
    none = sum(cell["edge/1-3"] == "none" for cell in drawn)
    assert abs(none - 2_000 * share) < 4 * (2_000 * share * (1 - share)) ** 0.5


def test_wrong_use_is_refused():
    supernet = FAMILY.supernet(seed=0)
    with pytest.raises(UserError, match="edge/0-1"):
        supernet.activate({})
    with pytest.raises(UserError, match="edge/0-1"):
        supernet.extract({**FAMILY.smallest(), "edge/0-1": "conv"})
    with pytest.raises(UserError, match="option: got 'c'; allowed: a, b"):
        Switch({"a": nn.Identity(), "b": nn.Identity()}).activate("c")
    space = ProductSpace("two", {"x": Categorical(["a", "b"]), "y": Categorical(["a", "b"])})
    network = nn.Sequential(Switch({"a": nn.Identity(), "b": nn.ReLU()}))
    with pytest.raises(UserError, match=r"switches: got .*; allowed: every one of \['0'\] under one path"):
        SinglePathSupernet(network, space, {"x": ["0"], "y": []}, lambda architecture: network)
