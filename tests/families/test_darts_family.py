import numpy as np
import pytest
import torch
from darts_recipe import alpha, cases, image, matches, weighted_
from torch import nn
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.darts import SKELETONS, DartsFamily, darts_family, open_family, published_counts
from archsmith.families.darts_space import DARTS_OPERATIONS, DARTS_V2, Genotype, darts_space
from archsmith.families.darts_supernet import SearchCell
from archsmith.layers.darts import DartsNetwork, DenseLayers
from archsmith.layers.sparse import SparseLayers
from archsmith.run.constructor import call_of
from archsmith.run.source import standalone_source
from archsmith.supernet import Supernet, batch_statistics
from archsmith.supernet.expected import CandidateMacs

QUICK = ("count:cifar:DARTS_V2:C36:L20", "count:imagenet:DARTS_V2:C48:L14")
NETWORKS = [
    pytest.param(case, id=case["name"], marks=() if case["name"] in QUICK else pytest.mark.slow)
    for case in cases("count:")
    if "genotype" in case["input"]
]


def small(**changes):
    return darts_family(**{"image": (3, 8, 8), "num_classes": 5, "channels": 4, "cells": 3, "nodes": 2, **changes})


def sampled(family, seed=0):
    return family.space.sample(np.random.default_rng(seed))


@pytest.mark.parametrize("case", NETWORKS)
def test_published_networks_have_their_exact_counts(case):
    given, expected = case["input"], case["expected"]
    family = DartsFamily(
        image=tuple(given["input"][1:]),
        num_classes=given["classes"],
        channels=given["C"],
        cells=given["layers"],
        stem=given["network"],
        auxiliary=given["auxiliary"],
    )
    genotype = Genotype.from_json(given["genotype"])
    assert published_counts(family, genotype) == {"macs": expected["macs"], "params": expected["params"]}
    with torch.device("meta"):
        assert sum(p.numel() for p in family.network(genotype).parameters()) == expected["params_with_aux"]


def search_network(case):
    given = case["input"]
    family = DartsFamily(image=(3, 32, 32), num_classes=10, channels=given["C"], cells=given["layers"])
    with torch.device("meta"):
        return family.supernet()


@pytest.mark.parametrize("case", cases("count:supernet:C16"), ids=lambda case: case["name"])
def test_search_networks_have_their_exact_sizes(case):
    supernet, expected = search_network(case), case["expected"]
    assert sum(weight.numel() for weight in supernet.weights().values()) == expected["params"]
    assert [list(logits.shape) for logits in supernet.logits.values()] == expected["alphas"]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("count:supernet"), ids=lambda case: case["name"])
def test_search_networks_have_their_exact_macs(case):
    with torch.device("meta"):
        counts = count(search_network(case), torch.zeros(1, 3, 32, 32))
    assert (counts.macs, counts.uncounted) == (case["expected"]["macs"], ())
    assert counts.params - 2 * 14 * 8 == case["expected"]["params"]  # the logits are no weights


@pytest.mark.parametrize("case", cases("search_cell:"), ids=lambda case: case["name"])
def test_search_cells(case):
    reduction = "reduction=True" in case["name"]
    cell = SearchCell((DARTS_OPERATIONS,) * 14, 4, 6, 8, 4, reduction, False, DenseLayers())
    weights = alpha().softmax(-1)
    matches(weighted_(cell)(image(2, 6, 8, 8), image(2, 8, 8, 8), weights), case["expected"])


@pytest.mark.parametrize("case", cases("supernet_forward:"), ids=lambda case: case["name"])
def test_search_network_outputs_and_gradients(case):
    given, expected = case["input"], case["expected"]
    side = int(case["name"].rpartition("in")[2])
    family = DartsFamily(
        image=(3, side, side), num_classes=given["classes"], channels=given["C"], cells=given["layers"]
    )
    supernet = family.supernet(seed=0).double()
    weighted_(supernet)
    with torch.no_grad():
        supernet.logits["normal"].copy_(alpha(scale=0.5))
        supernet.logits["reduce"].copy_(alpha(scale=-0.7))
    logits = supernet(image(3, 3, side, side))
    loss = functional.cross_entropy(logits, torch.tensor(given["targets"]))
    loss.backward()
    close = {"rel": 0, "abs": 1e-6}
    assert logits.flatten().tolist() == pytest.approx([v for row in expected["logits"] for v in row], **close)
    assert loss.item() == pytest.approx(expected["loss"], **close)
    for cell, row, index in (("normal", "row0", 0), ("reduce", "row13", 13)):
        gradient = supernet.logits[cell].grad
        assert gradient.abs().sum().item() == pytest.approx(expected[f"grad_alpha_{cell}_sum_abs"], **close)
        assert gradient[index].tolist() == pytest.approx(expected[f"grad_alpha_{cell}_{row}"], **close)
    assert sum(weight.numel() for weight in supernet.weights().values()) == expected["params"]


def test_finished_network_outputs():
    (case,) = cases("evalnet_forward:")
    given, expected = case["input"], case["expected"]
    family = DartsFamily(image=(3, 32, 32), num_classes=10, channels=4, cells=5, auxiliary=True)
    network = weighted_(family.network(Genotype.from_json(given["genotype"])))
    logits, second = network.forward_with_auxiliary(image(3, 3, 32, 32))
    for found, name in ((logits, "logits"), (second, "aux_logits")):
        assert found.flatten().tolist() == pytest.approx([v for row in expected[name] for v in row], rel=0, abs=1e-5)
    assert sum(p.numel() for p in network.parameters()) == expected["params_with_aux"]
    assert published_counts(family, DARTS_V2)["params"] == expected["params_no_aux"]


def test_normalisations_are_as_published():
    supernet, network = small().supernet(seed=0), small().build(sampled(small()), seed=0)
    inside = [m for name, m in supernet.network.named_modules() if isinstance(m, nn.BatchNorm2d) and "stem" not in name]
    assert inside and not any(norm.affine for norm in inside)
    assert supernet.network.stem[1].affine
    assert all(m.affine for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def worn(supernet):
    """Give running statistics values as after training."""
    with torch.no_grad():
        for index, buffer in enumerate(supernet.network.buffers()):
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand(buffer.shape, generator=torch.Generator().manual_seed(index)))
    return supernet


@pytest.mark.parametrize("nodes", [2, 4])
def test_extracted_networks_are_the_active_path(nodes):
    family = small(nodes=nodes, cells=5)
    supernet = worn(family.supernet(seed=1)).eval()
    assert isinstance(supernet, Supernet)
    x = torch.rand(4, 3, 8, 8)
    relaxed = supernet(x)
    for seed in range(6):
        point = sampled(family, seed)
        supernet.activate(point)
        network = supernet.extract(point)
        torch.testing.assert_close(network(x), supernet(x), rtol=0, atol=1e-5)
        assert family.architecture_of(network) == point
        network(x).sum().backward()  # its own copy
        assert all(parameter.grad is None for parameter in supernet.parameters())
    supernet.activate(None)
    assert torch.equal(supernet(x), relaxed)
    with pytest.raises(UserError, match="normal/0/inputs"):
        supernet.activate({"edge/0-1": "none"})


def test_one_hot_logits_decide_the_genotype_and_the_path():
    family = small(nodes=4)
    supernet = family.supernet(seed=1)
    for seed in range(4):
        point = sampled(family, seed)
        with torch.no_grad():
            for cell, weights in supernet.path(point).items():
                supernet.logits[cell].copy_(20.0 * weights)
        assert supernet.derive() == point


def test_costs_of_one_hot_paths_are_those_of_their_networks():
    family = small(nodes=4)
    supernet = family.supernet(seed=1)
    point = sampled(family)
    supernet.activate(point)
    counted = count(supernet, torch.zeros(1, 3, 8, 8))
    assert counted.macs == family.exact_costs(point)["macs"]


def test_edges_may_have_options_of_their_own():
    ragged = (("skip_connect", "sep_conv_3x3"), ("none", "max_pool_3x3", "dil_conv_3x3"), *(("skip_connect",),) * 3)
    family = small()
    supernet = family.supernet(seed=0, options={"normal": ragged, "reduce": ragged})
    assert supernet.logits["normal"].shape == (5, 3)
    mixing = supernet.mixing()["normal"]
    assert mixing[0, 2] == 0 and mixing[2, 1] == 0
    torch.testing.assert_close(mixing.sum(-1), torch.ones(5))
    supernet(torch.rand(2, 3, 8, 8)).sum().backward()
    gradient = supernet.logits["normal"].grad
    assert bool(gradient.isfinite().all()) and gradient[0, 2] == 0
    assert supernet.genotype().normal[2:] == (("skip_connect", 0), ("skip_connect", 1))
    with pytest.raises(UserError, match="candidates of 5 edges"):
        family.supernet(options={"normal": ragged[:4], "reduce": ragged})


def test_the_ends_of_the_family_bound_it():
    for changes in ({"nodes": 4}, {"operations": ("none", "skip_connect")}):
        family = small(**changes)
        low, high = (family.exact_costs(end) for end in (family.smallest(), family.largest()))
        for seed in range(3):
            costs = family.exact_costs(sampled(family, seed))
            assert all(low[name] <= costs[name] <= high[name] for name in costs)


def test_batch_statistics_leave_running_ones_alone():
    supernet = worn(small().supernet(seed=0)).eval()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    x = torch.rand(4, 3, 8, 8)
    running = supernet(x)
    with batch_statistics(supernet):
        own = supernet(x)
        assert not torch.allclose(own, running)
    assert all(torch.equal(buffer, before[name]) for name, buffer in supernet.named_buffers())
    assert torch.equal(supernet(x), running)
    assert torch.equal(supernet.train()(x), own)


def test_drop_path_is_set_on_every_cell():
    network = small().build(sampled(small()), seed=0)
    network.set_drop_path(0.3)
    assert {cell.drop_path for cell in network.cells} == {0.3}


def test_skeletons_and_settings():
    for side, name in ((16, "tiny"), (32, "cifar"), (224, "imagenet")):
        family = darts_family(image=(3, side, side), num_classes=10)
        assert {key: getattr(family, key) for key in SKELETONS[name]} == SKELETONS[name]
    family = open_family("darts", image=(3, 8, 8), num_classes=5, operations=["none", "skip_connect"])
    assert family.space.size == darts_space(4, ("skip_connect",)).size == 180**2
    assert isinstance(small().build(sampled(small())), DartsNetwork)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image": (3, 10, 8)}, "image size: got 10x8; allowed: sides that are multiples of 4"),
        ({"channels": 5}, "family.channels: got 5; allowed: an even number"),
        ({"cells": 2}, "family.cells: got 2; allowed: an integer from 3"),
        ({"stem": "mnist"}, "family.stem: got 'mnist'"),
        ({"auxiliary": True}, "family.auxiliary: got True; allowed: images of 32 to 40 pixels"),
        ({"operations": ("none",)}, "family.operations: got .'none',."),
        ({"skeleton": "huge"}, "family.skeleton: got 'huge'"),
        ({"wide": 3}, "family: got .'wide'.; allowed: skeleton, restricted, channels"),
    ],
)
def test_wrong_settings_are_refused(changes, text):
    with pytest.raises(UserError, match=text):
        small(**changes)
    with pytest.raises(UserError, match="family: got 'dart'; allowed: darts"):
        open_family("dart", image=(3, 8, 8), num_classes=5)


def test_sparse_networks_have_a_source_of_their_own():
    network = small().build(sampled(small()), seed=0, layers=SparseLayers(0.3)).eval()
    call = call_of(network)
    scale = {"mean": [0.0] * 3, "std": [1.0] * 3}
    text = standalone_source(
        call.path, call.arguments, input_shape=(3, 8, 8), normalisation=scale, class_names=["a", "b", "c", "d", "e"]
    )
    module: dict[str, object] = {"__name__": "model"}
    exec(compile(text, "model.py", "exec"), module)
    again = module["build"]().eval()
    again.load_state_dict(network.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x), network(x))
    dense = call_of(small().build(sampled(small())))
    assert "Sparse" not in standalone_source(
        dense.path, dense.arguments, input_shape=(3, 8, 8), normalisation=scale, class_names=["a", "b", "c", "d", "e"]
    )


def test_expected_macs_of_one_hot_weights_are_those_of_the_network():
    family = small()
    supernet = family.supernet(seed=0)
    expected = CandidateMacs.of(supernet, (3, 8, 8))
    for seed in range(3):
        point = family.space.sample(np.random.default_rng(seed))
        assert float(expected(supernet.path(point))) == family.exact_costs(point)["macs"]
    assert set(supernet.places()) <= {name for name, _ in supernet.network.named_modules()}


def test_edges_can_be_weighted_against_each_other():
    family = small()
    supernet, plain = family.supernet(seed=0, edge_weights=True).double(), family.supernet(seed=0).double()
    assert supernet.logits["normal_edges"].shape == (5,)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    mixing = plain.mixing()
    ones = {f"{cell}_edges": torch.ones(5, dtype=torch.float64) for cell in ("normal", "reduce")}
    torch.testing.assert_close(supernet(x, {**mixing, **ones}), plain(x, mixing))
    # with two equal operations on all edges the edge weights decide which edges stay
    with torch.no_grad():
        supernet.logits["normal"].zero_()
        supernet.logits["normal_edges"].copy_(torch.tensor([0.0, 0.0, 0.0, 2.0, 1.0]))
    chosen = supernet.genotype().normal
    assert [source for _, source in chosen] == [0, 1, 1, 2]
