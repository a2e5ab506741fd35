"""Chains against the published facts (``tests/golden/proxylessnas.json``), and what their supernet holds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.cost import LookupTable, Row, read_lookup_table
from archsmith.families.mobile_chain import ChainFamily, chain_family, published_network
from archsmith.families.mobile_chain_space import NETWORKS, SKELETONS, ZERO, divisible, published_architecture
from archsmith.space import ProductSpace
from archsmith.supernet.expected import CandidateMacs
from archsmith.supernet.gates import BinaryGates
from archsmith.testing.families import images, measured_costs

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent.parent / "golden" / "proxylessnas.json").read_text())["cases"]
}


def imagenet():
    return chain_family("imagenet", image=(3, 224, 224), num_classes=1000)


def small(**changes):
    options = {"widths": (12, 16), "cells": (2, 2), "strides": (1, 2), "last_channels": 24, **changes}
    return chain_family("tiny", image=(3, 8, 8), num_classes=4, **options)


def logits_of(name, family):
    """Return the logits (E, O) of an oracle case, -inf where a place has no such candidate."""
    rows = torch.full((len(family.searched), 7), -torch.inf, dtype=torch.float64)
    for k, number in enumerate(family.searched):
        names = family.places[number][2]
        chosen = {
            "all_3x3_MBConv3": 0,
            "all_5x5_MBConv6": 3,
            "all_7x7_MBConv6": 5,
            "cyclek+1": (k + 1) % 6,
            "first MB6 rest zero": names.index(ZERO) if ZERO in names else 1,
        }.get(name)
        for j in range(len(names)):
            value = {"uniform": 0.0, "sin": math.sin(1 + 3 * k + j)}.get(name, 0.0 if j == chosen else -1e4)
            rows[k, j] = value
    return rows


def derived(name, family):
    chosen = logits_of(name, family).argmax(dim=-1).tolist()
    return family.space.validate(
        {f"blocks/{n}": family.places[n][2][j] for n, j in zip(family.searched, chosen, strict=True)}
    )


@pytest.mark.parametrize("name", ["mobile", "cpu"])
def test_published_networks_count_as_published(name):
    family, architecture = published_network(name)
    assert family.exact_costs(architecture) == CASES[f"architecture/{name}"]["expected"]
    assert measured_costs(family, architecture) == CASES[f"architecture/{name}"]["expected"]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_published_networks_are_those_of_the_released_files(name):
    nets = json.loads((shared_data("nas-benchmarks") / "proxylessnas-architectures.json").read_text())["nets"]
    theirs = nets[name.replace("-", "_")]
    family, architecture = published_network(name)
    assert family.stem_channels == theirs["first_conv"]["out_channels"]
    assert family.last_channels == theirs["feature_mix_layer"]["out_channels"]
    assert (family.norm_eps, family.norm_momentum) == (theirs["bn"]["eps"], theirs["bn"]["momentum"])
    for place, chosen, block in zip(family.chain, family.chosen(architecture), theirs["blocks"], strict=True):
        if block == "zero":
            assert chosen == ZERO and place.residual
        else:
            assert chosen == f"k{block['k']}e{block['e']}"
            shape = (place.in_channels, place.out_channels, place.stride, int(place.residual))
            assert shape == (block["in"], block["out"], block["s"], block["skip"])


def test_the_search_network_has_the_published_size():
    expected = CASES["supernet"]["expected"]
    family = imagenet()
    with torch.device("meta"):
        supernet = family.supernet()
    assert sum(weight.numel() for weight in supernet.weights().values()) == expected["weight_params"]
    assert [len(names) for names in supernet.options["blocks"]] == expected["choices"]
    assert sum(map(len, supernet.options["blocks"])) == expected["arch_params"]
    assert len(family.searched) == expected["choice_blocks"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("derived/")])
def test_derived_networks_count_as_published(name):
    family = imagenet()
    assert family.exact_costs(derived(name.partition("/")[2], family)) == CASES[name]["expected"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("expected_latency_ms/")])
def test_expected_latency_by_the_published_table(name):
    family, kind = imagenet(), name.partition("/")[2]
    table = read_lookup_table(
        shared_data("nas-benchmarks") / "latency-table-mobile-proxylessnas.json", device="mobile phone"
    )
    cost = family.expected_latency(table)
    logits = logits_of(kind, family)
    assert float(cost({"blocks": logits.softmax(-1)})) == pytest.approx(CASES[name]["expected"], abs=1e-3)
    architecture = derived(kind, family)
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), 7)
    assert float(cost({"blocks": one_hot})) == pytest.approx(table.cost(family.keys(architecture)), rel=1e-12)


def test_rows_that_were_not_measured_are_an_error():
    family = small()
    table = LookupTable({key: Row(1.0) for key in family.measurable()}, device="none")
    assert set(table.rows) == {
        *family.fixed_keys(),
        *(key for row in family.candidate_keys() for key in row if key is not None),
    }
    family.expected_latency(table)
    missing = dict(list(table.rows.items())[:-1])
    with pytest.raises(UserError, match="operator: got 'expanded_conv-input:4x4x16-output:4x4x16-expand:6-kernel:7"):
        family.expected_latency(LookupTable(missing, device="none"))
    scaled = LookupTable(table.rows, device="none", scale=2.0, overhead=0.5)
    architecture = family.smallest()
    mixing = family.supernet(seed=0).path(architecture)
    assert float(family.expected_latency(scaled)(mixing)) == pytest.approx(scaled.cost(family.keys(architecture)))


def test_expected_macs_are_those_of_the_network_and_of_the_counted_candidates():
    family = small()
    supernet, cost = family.supernet(seed=0), family.expected_macs()
    for seed in range(3):
        architecture = family.space.sample(np.random.default_rng(seed))
        assert float(cost(supernet.path(architecture))) == family.exact_costs(architecture)["macs"]
    counted = CandidateMacs.of(supernet, family.image)
    mixing = supernet.probabilities()
    assert float(cost(mixing).detach()) == pytest.approx(float(counted(mixing).detach()), rel=1e-12)
    uniform = {"blocks": torch.zeros_like(supernet.logits["blocks"]).requires_grad_()}
    (gradient,) = torch.autograd.grad(cost(supernet.probabilities(uniform)), uniform["blocks"])
    assert gradient.sum(-1).abs().max() < 1e-3 * gradient.abs().max()
    assert gradient[1, -1] < 0  # no block is the cheapest of all


def test_measurable_parts_have_the_shapes_of_the_network():
    family = small()
    for key, (module, shape) in family.measurable().items():
        size = module.eval()(torch.zeros(shape)).shape[1:]
        wanted = key.partition("-output:")[2].split("-")[0]
        given = f"{size[1]}x{size[2]}x{size[0]}" if len(size) == 3 else str(size[0])
        assert given == wanted, key


@pytest.mark.parametrize("seed", range(3))
def test_what_is_extracted_is_the_active_path(seed):
    family = small()
    supernet = family.supernet(seed=seed).train()
    for _ in range(2):
        supernet(images(family))  # running statistics that no initialisation has
    architecture = family.space.sample(np.random.default_rng(seed))
    network = supernet.eval().extract(architecture)
    supernet.activate(architecture)
    with torch.no_grad():
        torch.testing.assert_close(supernet(images(family)), network(images(family)), rtol=1e-5, atol=1e-5)
    supernet.activate(None)
    assert family.architecture_of(network) == architecture
    assert not any(f"blocks.{n}." in name for name in network.state_dict() for n in empty(family, architecture))
    network.classifier.weight.data.zero_()
    assert bool(supernet.network.classifier.weight.any())


def empty(family, architecture):
    return [number for number, name in enumerate(family.chosen(architecture)) if name == ZERO]


def test_a_place_without_a_block_vanishes():
    family = small()
    smallest = family.smallest()
    assert len(empty(family, smallest)) == 2
    network = family.build(smallest, seed=0)
    assert len(network.blocks) == 3 and set(network.blocks) == {"0", "1", "3"}
    without = [None if number in empty(family, smallest) else block for number, block in enumerate(network.plan)]
    assert list(network.plan) == without


def test_empty_places_of_a_stretch_are_interchangeable():
    family = small(cells=(3, 2))
    one, other, third = (
        family.space.validate({**family.largest(), "blocks/2": a, "blocks/3": b})
        for a, b in (("k3e3", ZERO), (ZERO, "k3e3"), (ZERO, ZERO))
    )
    assert one.network_digest == other.network_digest != third.network_digest
    assert one.digest != other.digest
    restored = ProductSpace.from_json(json.loads(json.dumps(family.space.to_json())))
    assert restored.validate(dict(one)).digest == one.digest
    first, second = family.build(one, seed=1), family.build(other, seed=1)
    with torch.no_grad():
        assert torch.equal(first.eval()(images(family)), second.eval()(images(family)))


def test_the_strongest_candidate_of_every_place_is_derived():
    family = small()
    supernet = family.supernet(seed=0, relaxation=BinaryGates("two"))
    logits = torch.linspace(-1, 1, supernet.logits["blocks"].numel()).reshape(supernet.logits["blocks"].shape)
    with torch.no_grad():
        supernet.logits["blocks"].copy_(logits)
    architecture = supernet.derive()
    assert architecture["blocks/2"] == ZERO and architecture["blocks/1"] == "k7e6"
    assert supernet.weightless(architecture) == {"blocks": 2}
    assert supernet.derive() == architecture  # no sample
    assert set(supernet.places().values()) == {("blocks", row) for row in range(len(family.searched))}
    assert len(supernet.labels["blocks"]) == len(family.searched)


def test_widths_are_scaled_as_published():
    assert [divisible(1.4 * width) for width in (32, 16, 40, 80, 96)] == [48, 24, 56, 112, 136]
    assert [divisible(0.25 * width) for width in (32, 24, 40, 80, 192, 320)] == [8, 8, 16, 24, 48, 80]
    quarter = chain_family("imagenet", image=(3, 32, 32), num_classes=10, width=0.25)
    shipped = SKELETONS["small"]
    assert sorted({width for width, *_ in quarter.places}) == sorted(set(shipped["widths"]))
    assert quarter.last_channels == 1280  # never made smaller
    assert chain_family("imagenet", image=(3, 32, 32), num_classes=10, width=1.4).last_channels == 1792


def test_presets_fit_the_image_and_zero_stands_only_where_the_shape_stays():
    for image in ((1, 8, 8), (3, 32, 32), (3, 224, 224)):
        family = chain_family(image=image, num_classes=10)
        assert min(family.chain[-1].after) >= 4
        for place in family.chain[1:]:
            assert (ZERO in place.candidates) == place.residual
    assert all(ZERO not in place.candidates for place in small(skippable=False).chain)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cells": (2,)}, r"family.cells: got \(2,\); allowed: a number from 1 for each of the 2 stages"),
        ({"width": 0.0}, "family.width: got 0.0"),
        ({"kernels": (4,)}, "candidate: got 'k4e3'; allowed: 'zero', or kernel"),
        ({"activation": "gelu"}, "family.activation: got 'gelu'; allowed: relu, relu6, swish"),
    ],
)
def test_bad_families(changes, text):
    with pytest.raises(UserError, match=text):
        small(**changes)


def test_bad_names_and_places():
    with pytest.raises(UserError, match=r"family\.skeleton: got 'resnet'; allowed: auto, imagenet"):
        chain_family("resnet", image=(3, 32, 32), num_classes=10)
    with pytest.raises(UserError, match="network: got 'tpu'; allowed: mobile, cpu, gpu, mobile-14"):
        published_network("tpu")
    with pytest.raises(UserError, match="places: got 4; allowed: 21, as the network 'gpu' has"):
        published_architecture("gpu", small().chain)
    common = {"image": (3, 8, 8), "num_classes": 2, "stem_channels": 4, "stem_stride": 1, "last_channels": 8}
    for candidates in (("k3e3", "zero"), (), ("k3e3", "k3e3")):
        with pytest.raises(UserError, match=r"family.places\[0\]"):
            ChainFamily(places=((8, 1, candidates),), **common)
    with pytest.raises(UserError, match="one whose edges keep their width"):
        small().relaxed(make_edge=lambda *given: None)
