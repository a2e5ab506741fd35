import numpy as np
import pytest
import torch
from darts_recipe import alpha, image, weighted_
from sharp_recipe import case, cases

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.darts import DartsFamily, darts_family, family_from_json, open_family, published_counts
from archsmith.families.darts_space import (
    CELLS,
    OPERATION_SETS,
    SHARP_OPERATIONS,
    SHARPER_OPERATIONS,
    Genotype,
    architecture_of,
    edges_of,
)
from archsmith.layers.darts import DenseLayers
from archsmith.layers.sharp import SHARP_CONVOLUTIONS, make_sharp_primitive, sharp_size
from archsmith.supernet import MaxW
from archsmith.supernet.selection import magnitude

NETWORKS = [
    pytest.param(fact, network, id=f"{fact['name']}:{network}", marks=() if quick else pytest.mark.slow)
    for fact in cases("count:")
    if "genotype" in fact["input"]
    for network in ("cifar", "imagenet")
    for quick in [fact["name"] == "count:SHARP_DARTS:Cmid32"]
]


def sharp(**changes):
    small = {"image": (3, 8, 8), "num_classes": 5, "channels": 4, "cells": 3, "nodes": 2}
    return open_family("sharpdarts", **{**small, **changes})


def with_outputs(cells):
    return {**cells, "normal_concat": [2, 3, 4, 5], "reduce_concat": [2, 3, 4, 5]}


def of_fact(fact, network):
    given = fact["input"][network]
    return darts_family(
        network,
        image=(3, given["input"], given["input"]),
        num_classes=given["classes"],
        channels=given["C"],
        cells=given["layers"],
        operations="sharp",
        primitives="sharp",
        choke=fact["input"]["C_mid"],
    )


@pytest.mark.parametrize(("fact", "network"), NETWORKS)
def test_published_networks_have_their_exact_counts(fact, network):
    family, expected = of_fact(fact, network), fact["expected"][network]
    genotype = Genotype.from_json(fact["input"]["genotype"])
    assert published_counts(family, genotype) == {"macs": expected["macs"], "params": expected["params"]}
    with torch.device("meta"):
        whole = family.final_form(auxiliary=True).network(genotype)
    assert sum(p.numel() for p in whole.parameters()) == expected["params_with_aux"]


def test_a_wider_choke_is_that_of_the_final_network_alone():
    """Published: 3.71 M parameters with a middle of 96 channels, 3.17 M with 32, for large images."""
    fact = case("count:SHARP_DARTS:Cmid32")
    genotype, family = Genotype.from_json(fact["input"]["genotype"]), of_fact(fact, "imagenet")
    assert published_counts(family, genotype)["params"] == 3173440
    wide = DartsFamily(**{**{name: getattr(family, name) for name in family.__dataclass_fields__}, "choke": 96})
    assert round(published_counts(wide, genotype)["params"] / 1e6, 2) == 3.71
    assert (wide.search_form(16, 8).choke, wide.final_form(auxiliary=False).choke) == (32, 96)


def search_network(fact):
    given = fact["input"]
    with torch.device("meta"):
        return DartsFamily(
            image=(3, 32, 32),
            num_classes=given["classes"],
            channels=given["C"],
            cells=given["layers"],
            operations=tuple(given["primitives"]),
            primitives="sharp",
            choke=given["C_mid_for_choke"],
        ).supernet()


@pytest.mark.parametrize("fact", cases("count:supernet"), ids=lambda fact: fact["name"])
def test_search_networks_have_their_exact_sizes(fact):
    supernet, expected = search_network(fact), fact["expected"]
    assert sum(weight.numel() for weight in supernet.weights().values()) == expected["params"]
    assert [list(logits.shape) for logits in supernet.logits.values()] == expected["alpha_shapes"]


@pytest.mark.slow
@pytest.mark.parametrize("fact", cases("count:supernet"), ids=lambda fact: fact["name"])
def test_search_networks_have_their_exact_macs(fact):
    with torch.device("meta"):
        counts = count(search_network(fact), torch.zeros(1, 3, 32, 32))
    assert (counts.macs, counts.uncounted) == (fact["expected"]["macs"], ())


def test_search_network_outputs():
    fact = case("supernet_forward:DARTS_PRIMITIVES:scalar")
    given, expected = fact["input"], fact["expected"]
    family = DartsFamily(
        image=(3, 32, 32), num_classes=10, channels=given["C"], cells=given["layers"], primitives="sharp"
    )
    supernet = weighted_(family.supernet(seed=0))
    with torch.no_grad():
        supernet.logits["normal"].copy_(alpha(scale=0.5))
        supernet.logits["reduce"].copy_(alpha(scale=-0.7))
        logits = supernet(image(3, 3, 32, 32))
    close = {"rel": 0, "abs": 1e-6}
    assert logits.flatten().tolist() == pytest.approx([v for row in expected["logits"] for v in row], **close)
    assert sum(weight.numel() for weight in supernet.weights().values()) == expected["params"]


@pytest.mark.parametrize("fact", cases("genotype_from_published_weights:"), ids=lambda fact: fact["name"])
@pytest.mark.parametrize("skipped", ["skip_none", "skip_nothing"])
def test_published_weights_give_the_published_cells(fact, skipped):
    given = fact["input"]
    assert tuple(given["primitives"]) == SHARPER_OPERATIONS
    never = ("none",) if skipped == "skip_none" else ()
    for cell in CELLS:
        weights = torch.tensor(given[f"softmax_{cell}"])
        found = magnitude(weights, (SHARPER_OPERATIONS,) * 14, edges_of(), never=never)
        assert [list(edge) for edge in found] == fact["expected"][skipped][cell]


def test_published_weights_derive_through_the_supernet_and_max_w_changes_nothing():
    (fact,) = cases("genotype_from_published_weights:")
    family = sharp(nodes=4, operations="sharper")
    expected = fact["expected"]["skip_none"]
    for relaxation in (None, MaxW()):
        supernet = family.relaxed(seed=0, relaxation=relaxation)
        with torch.no_grad():
            for cell in CELLS:
                supernet.logits[cell].copy_(torch.tensor(fact["input"][f"softmax_{cell}"]).log())
        assert {cell: [list(e) for e in getattr(supernet.genotype(), cell)] for cell in CELLS} == expected
        assert supernet.derive() == architecture_of(Genotype.from_json(with_outputs(expected)), family.space)
        mixing, probabilities = supernet.mixing(), supernet.probabilities()
        torch.testing.assert_close(probabilities["normal"].sum(-1), torch.ones(14))
        largest = mixing["normal"].amax(-1)
        assert torch.allclose(largest, torch.ones(14)) == (relaxation is not None)


@pytest.mark.parametrize("operations", ["sharp", "sharper", "darts"])
def test_extracted_networks_are_the_active_path(operations):
    family = sharp(operations=operations, image=(3, 7, 10))
    supernet = family.relaxed(seed=1, relaxation=MaxW()).eval()
    x = torch.rand(4, 3, 7, 10)
    for seed in range(4):
        point = family.space.sample(np.random.default_rng(seed))
        supernet.activate(point)
        network = supernet.extract(point)
        torch.testing.assert_close(network(x), supernet(x), rtol=0, atol=1e-5)
        assert family.architecture_of(network) == point


def test_spaces_and_sets():
    assert open_family("sharpdarts", image=(3, 32, 32), num_classes=10).operations == SHARP_OPERATIONS
    assert sharp(operations="sharper").operations == OPERATION_SETS["sharper"]
    family = sharp()
    assert (family.space.name, sharp(nodes=4).space.name) == ("sharpdarts-2", "sharpdarts")
    assert family.to_json()["name"] == "sharpdarts"
    assert family_from_json(family.to_json()) == family
    old = {k: v for k, v in darts_family(image=(3, 8, 8), num_classes=5).to_json().items() if k != "choke"}
    old.pop("primitives")
    assert family_from_json(old) == darts_family(image=(3, 8, 8), num_classes=5)  # written before there were others


@pytest.mark.parametrize("channels", [4, 64])
def test_the_ends_are_the_ends_at_every_width(channels):
    """Among cells of one operation, which a choke of fixed width orders differently at every width."""
    family = sharp(channels=channels)
    costs = {}
    for name in family.operations:
        if name != "none":
            cells = family._uniform(name, from_inputs=name == "skip_connect")
            costs[name] = family.exact_costs(cells)["macs"]
    assert family.exact_costs(family.largest())["macs"] == max(costs.values())
    assert family.exact_costs(family.smallest())["macs"] <= min(costs.values())


@pytest.mark.parametrize("name", ["max_pool_3x3", *SHARP_CONVOLUTIONS])
@pytest.mark.parametrize("widths", [(4, 4), (4, 6), (32, 16)])
def test_sizes_in_closed_form(name, widths):
    with torch.device("meta"):
        operation = make_sharp_primitive(name, *widths, 2, True, DenseLayers(), 24)
        counted = count(operation, torch.zeros(1, widths[0], 6, 10))
    macs, params = sharp_size(name, *widths, 24)
    assert (counted.macs, counted.params) == (macs * 3 * 5, params)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"operations": ("conv_9x9",)}, "family.operations: got ('conv_9x9',); allowed: none, max_pool_3x3"),
        ({"operations": "widest"}, "family.operations: got 'widest'; allowed: darts, sharp, sharper, or a list"),
        ({"choke": 0}, "family.choke: got 0; allowed: an integer from 1"),
    ],
)
def test_wrong_settings_are_refused(changes, text):
    with pytest.raises(UserError) as error:
        sharp(**changes)
    assert text in str(error.value)
    with pytest.raises(UserError, match=r"family\.primitives: got 'blunt'; allowed: darts, sharp"):
        darts_family(image=(3, 8, 8), num_classes=5, primitives="blunt")


def test_darts_itself_has_no_sharp_operations():
    with pytest.raises(UserError, match=r"family\.operations"):
        darts_family(image=(3, 8, 8), num_classes=5, operations=("choke_conv_3x3",))
    edges = (("choke_conv_3x3", 0), ("choke_conv_3x3", 1))
    with pytest.raises(UserError, match="got 'choke_conv_3x3'"):
        architecture_of(Genotype(edges, edges, (2,), (2,)))
