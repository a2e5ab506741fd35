import ast
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families import family_table
from archsmith.families.nasnet import (
    PUBLISHED,
    SKELETONS,
    family_from_json,
    nasnet_family,
    open_family,
    published_family,
    published_network,
)
from archsmith.families.nasnet_space import NASNET_A_OUTPUTS, nasnet_a
from archsmith.layers.nasnet import HalvedInput, NasnetCell
from archsmith.run.constructor import call_of
from archsmith.run.source import standalone_source

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden/nasnet.json").read_text())["cases"]
NETWORKS = [case for case in GOLDEN if case["name"].startswith("network/")]
SKELETON_OF = {"NASNet-A 4@1056 mobile": "NASNet-A 4@1056", "NASNet-A 6@4032 large": "NASNet-A 6@4032"}


def small_family(**settings):
    own = {"image": (3, 16, 16), "num_classes": 4, "filters": 4, "repeats": 1}
    return nasnet_family("cifar", **{**own, **settings})


def sampled(family, seed):
    return family.space.sample(np.random.default_rng(seed))


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case["name"])
def test_published_networks_have_their_exact_counts(case):
    given, expected = case["input"], case["expected"]
    name = SKELETON_OF.get(case["name"].removeprefix("network/"), "NASNet-A 6@768")
    changed = {"filters": given["filters"], "repeats": given["num_normal_cells"] // 3}
    family = published_family(name, **changed)
    assert family.stem == given["stem"] and family.stem_multiplier == given["stem_multiplier"]
    assert family.skip_reduction_input == bool(given["skip_reduction_layer_input"])
    assert (family.image[1], family.num_classes) == (given["resolution"], given["classes"])
    with torch.device("meta"):
        network = family.build(nasnet_a())
    counts = count(network, torch.zeros(1, *family.image))
    assert counts.params == expected["params"]
    assert counts.macs == expected["macs"]
    assert not counts.uncounted
    assert network.classifier.in_features == expected["penultimate_filters"] == 24 * given["filters"]


def test_reductions_stand_before_the_published_cells():
    case = next(case for case in GOLDEN if case["name"] == "layout/reduction_positions")
    for cells, expected in zip(case["input"]["num_normal_cells"], case["expected"], strict=True):
        with torch.device("meta"):
            network = published_network("NASNet-A 6@768", repeats=cells // 3, filters=4)
        positions = [index for index, reduces in enumerate(network.reduces) if reduces]
        assert [position - earlier for earlier, position in enumerate(positions)] == expected
        assert len(network.cells) == cells + 2


def inputs_seen(network, image):
    """Return the inputs of each cell, and the outputs of all layers (None in front of the stem)."""
    seen, layers = [], [None]
    network.stem_norm.register_forward_hook(lambda _, args, y: layers.append(y))
    for cell in network.cells:
        cell.register_forward_pre_hook(lambda _, args: seen.append(args))
        cell.register_forward_hook(lambda _, args, y: layers.append(y))
    network.eval()(torch.zeros(1, *image))
    return seen, layers


@pytest.mark.parametrize("skip", [False, True])
def test_both_wirings_behind_a_reduction(skip):
    family = small_family(repeats=2, skip_reduction_input=skip, outputs=NASNET_A_OUTPUTS)
    network = family.build(nasnet_a())
    seen, layers = inputs_seen(network, family.image)
    # Layers: 0 nothing, 1 stem, then cells: normal, normal, reduction, normal, normal, reduction, normal, normal.
    found = [tuple(next(i for i, layer in enumerate(layers) if layer is x) for x in inputs) for inputs in seen]
    behind = (4, 2) if skip else (4, 3), (7, 5) if skip else (7, 6)
    assert found == [(1, 0), (2, 1), (3, 2), behind[0], (5, 4), (6, 5), behind[1], (8, 7)]
    assert [isinstance(cell.before, HalvedInput) for cell in network.cells] == [i in (3, 6) for i in range(8)]


def test_the_imagenet_stem_reduces_three_times():
    family = nasnet_family("large", image=(3, 64, 64), num_classes=5, filters=8, repeats=1, outputs=NASNET_A_OUTPUTS)
    seen, _ = inputs_seen(family.build(nasnet_a()), family.image)
    shapes = [[None if x is None else tuple(x.shape[1:]) for x in inputs] for inputs in seen[:3]]
    assert shapes == [[(96, 31, 31), None], [(8, 16, 16), (96, 31, 31)], [(16, 8, 8), (8, 16, 16)]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [{}, {"skip_reduction_input": True, "filters": 5}, {"stem": "imagenet", "image": (3, 33, 40), "filters": 6}],
)
def test_every_genotype_builds_trains_and_comes_back(seed, settings):
    family = small_family(**settings)
    architecture = sampled(family, seed)
    network = family.build(architecture, seed=seed)
    network.set_progress(0.5)
    loss = network(torch.randn(2, *family.image)).logsumexp(1).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert family.architecture_of(network) == architecture


def test_no_weight_is_without_gradient_in_nasnet_a():
    network = small_family(outputs=NASNET_A_OUTPUTS, auxiliary=True, image=(3, 32, 32)).build(nasnet_a(), seed=0)
    logits, auxiliary = network.forward_with_auxiliary(torch.randn(4, 3, 32, 32))
    (logits.square().sum() + auxiliary.square().sum()).backward()
    # Only the h1 of a cell whose second input nobody needs could be idle, and NASNet-A has none.
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_progress_sets_every_cells_keep_probability():
    network = small_family(repeats=2, final_keep=0.6).build(nasnet_a())
    assert {cell.keep for cell in network.cells} == {1.0}
    network.set_progress(1.0)
    assert [cell.keep for cell in network.cells] == pytest.approx([1 - 0.4 * (i + 1) / 8 for i in range(8)])
    x = torch.randn(2, 3, 16, 16)
    network.train()
    network(x)
    network.eval()
    assert torch.equal(network(x), network(x))


def test_the_auxiliary_head_stands_at_two_thirds_and_only_helps_training():
    family = published_family("NASNet-A 6@768", filters=4, repeats=2, auxiliary=True)
    network = family.build(nasnet_a(), seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    logits, auxiliary = network.forward_with_auxiliary(x)
    assert torch.equal(network(x), logits) and auxiliary.shape == (2, 10)
    assert network.auxiliary_cell == 4  # the last normal cell before the second reduction
    assert network.auxiliary.reduce.in_channels == network.cells[4].out_channels == 6 * 8
    assert family.auxiliary_size == (16, 16)
    assert tuple(network.auxiliary.whole.weight.shape) == (768, 128, 4, 4)
    assert family.build(nasnet_a()).forward_with_auxiliary(x)[1] is not None
    assert published_network("NASNet-A 6@768", filters=4, repeats=1).forward_with_auxiliary(x)[1] is None


@pytest.mark.parametrize(("name", "size"), [("NASNet-A 4@1056", (14, 14)), ("NASNet-A 6@4032", (21, 21))])
def test_the_auxiliary_head_knows_the_size_of_its_map(name, size):
    family = published_family(name)
    assert family.auxiliary_size == size
    with torch.device("meta"):
        network = published_family(name, filters=8, repeats=1, auxiliary=True).build(nasnet_a()).eval()
        assert network.forward_with_auxiliary(torch.zeros(1, *family.image))[1].shape == (1, 1000)


@pytest.mark.parametrize("outputs", [None, NASNET_A_OUTPUTS])
def test_the_family_round_trips_through_json(outputs):
    family = small_family(outputs=outputs, auxiliary=True)
    again = family_from_json(json.loads(json.dumps(family.to_json())))
    assert again == family


@pytest.mark.parametrize("outputs", [None, NASNET_A_OUTPUTS])
def test_the_standalone_source_is_the_same_function(outputs):
    family = small_family(outputs=outputs)
    network = family.build(nasnet_a() if outputs else sampled(family, 3), seed=1).eval()
    call = call_of(network)
    normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}
    text = standalone_source(
        call.path, call.arguments, input_shape=(3, 16, 16), normalisation=normalisation, class_names=list("abcd")
    )
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert not any(str(module).startswith("archsmith") for module in imported)
    namespace = {"__name__": "standalone"}
    exec(compile(text, "model.py", "exec"), namespace)
    rebuilt = namespace["build"]()
    rebuilt.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(rebuilt.eval()(x), network(x))


@pytest.mark.parametrize("seed", [None, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6))])
def test_the_onnx_file_computes_the_same(seed):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from archsmith.run.onnx_file import onnx_bytes

    family = small_family(outputs=NASNET_A_OUTPUTS if seed is None else None, image=(3, 14, 15))
    network = family.build(nasnet_a() if seed is None else sampled(family, seed), seed=1).eval()
    x = torch.randn(3, 3, 14, 15)
    data = onnx_bytes(network, x, {})
    session = runtime.InferenceSession(io.BytesIO(data).getvalue(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": x.numpy()})[0]
    np.testing.assert_allclose(found, network(x).detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_largest_and_smallest_bracket_samples():
    family = small_family()
    low, high = family.exact_costs(family.smallest()), family.exact_costs(family.largest())
    for seed in range(40):
        costs = family.exact_costs(sampled(family, seed))
        assert all(low[name] < costs[name] < high[name] for name in costs)


def test_the_family_is_listed_and_opened_by_name():
    assert "nasnet" in [row["name"] for row in family_table()]
    assert open_family("nasnet", image=(3, 32, 32), num_classes=10).repeats == SKELETONS["search"]["repeats"]
    assert open_family("nasnet", image=(3, 224, 224), num_classes=10).stem == "imagenet"
    assert set(PUBLISHED) == {"NASNet-A 6@768", "NASNet-A 4@1056", "NASNet-A 6@4032"}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: open_family("nasnetwork", image=(3, 8, 8), num_classes=2),
            "family: got 'nasnetwork'; allowed: nasnet",
        ),
        (lambda: small_family(skeleton="x") and None, "skeleton"),
        (lambda: nasnet_family("huge", image=(3, 8, 8), num_classes=2), r"family\.skeleton: got 'huge'"),
        (lambda: small_family(repeats=0), "repeats from 1"),
        (lambda: small_family(stem="imagenet", filters=3), "filters from 4"),
        (lambda: small_family(stem="mnist"), r"family\.stem: got 'mnist'"),
        (lambda: small_family(final_keep=0.0), r"family\.final_keep"),
        (lambda: small_family(outputs={"normal": (2,)}), r"family\.outputs"),
        (lambda: small_family(width=3), r"family: got \['width'\]"),
        (lambda: published_network("NASNet-B"), "network: got 'NASNet-B'; allowed: NASNet-A 6@768"),
    ],
)
def test_wrong_settings_say_what_is_allowed(call, match):
    with pytest.raises((UserError, TypeError), match=match):
        call()


def test_a_map_too_small_for_the_auxiliary_head_is_refused():
    with pytest.raises(ValueError, match="auxiliary head: the map has 4x4 pixels"):
        small_family(image=(3, 8, 8), auxiliary=True).build(nasnet_a())


def test_cells_are_modules_of_the_network():
    network = small_family().build(nasnet_a())
    assert all(isinstance(cell, NasnetCell) for cell in network.cells)
    assert isinstance(network.cells, nn.ModuleList)
