import json

import numpy as np
import pytest
import torch
from mobile_samples import FACTS, built, fact, images, random_family, random_keep, small_family, without, worn_
from torch import nn

from archsmith.atoms.groups import tensors_of
from archsmith.atoms.score import cost_of
from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families import family_table
from archsmith.families.mobile import (
    BlockPlan,
    MobileFamily,
    collapse_,
    family_from_json,
    fit_strides,
    initialise_,
    mobile_family,
    open_family,
    published_family,
    published_network,
)
from archsmith.families.mobile_published import NETWORKS, SUPERNETS
from archsmith.layers.mobile import MixedInvertedResidual

# --------------------------------------------------------------------- published figures

NETWORK_CASES = ["network_a_224", "network_c_224", "network_aplus_224", "network_cplus_224", "network_a_192"]
SUPERNET_CASES = {
    "supernet_supernet_single_path_nas_relu": ("atomnas-c", "atomnas-b"),
    "supernet_mobilenet_v2_1.0_relu": ("mobilenetv2",),
    "supernet_proxyless_mobile": ("proxylessnas-mobile",),
}


def counted(family):
    """Return the counts of the family's largest network by the names of the facts; nothing is computed."""
    with torch.device("meta"):
        network, x = family.build(family.largest()), torch.zeros(1, *family.image)
    standard, paper = count(network, x), count(network, x, convention="paper")
    return {
        "params_conv_linear": standard.params_conv_linear,
        "params_total": standard.params,
        "macs_conv_linear": standard.macs,
        "macs_reference": paper.macs,
        "atoms": sum(atoms for block in network.inverted_residuals() for _, atoms in block.atoms()),
    }


@pytest.mark.parametrize("case", NETWORK_CASES)
def test_published_networks_have_exactly_the_published_costs(case):
    given, expected = fact(case)
    side = given["resolution"]
    family = published_family(given["network"], image=(given["input_channels"], side, side), num_classes=1000)
    assert counted(family) == expected


@pytest.mark.parametrize("case", ["network_a_224", "published_rows_b", "network_c_224"])
def test_the_tables_are_the_published_rows(case):
    given = FACTS[case]["input"]
    table = NETWORKS[given["network"]]
    assert (table["stem_channels"], table["last_channels"]) == (given["stem_channels"], given["last_channels"])
    rows = [[out, 1, stride, list(k), list(atoms), expand] for out, stride, k, atoms, expand in table["blocks"]]
    assert rows == given["blocks"]


def test_network_b_rounds_to_the_published_figures():
    _, expected = fact("published_rows_b")
    for name, prefix in (("AtomNAS-B", ""), ("AtomNAS-B+", "plus_")):
        figures = counted(published_family(name, image=(3, 224, 224), num_classes=1000))
        assert round(figures["macs_reference"] / 1e6) == expected[f"{prefix}published_macs_millions"]
        assert round(figures["params_conv_linear"] / 1e6, 1) == expected[f"{prefix}published_params_millions"]


@pytest.mark.parametrize(("case", "presets"), SUPERNET_CASES.items(), ids=lambda value: str(value))
def test_supernets_have_exactly_the_published_costs(case, presets):
    given, expected = fact(case)
    image = (3, given["resolution"], given["resolution"])
    families = [mobile_family(preset, image=image, num_classes=1000) for preset in presets]
    assert counted(families[0]) == expected
    for preset, family in zip(presets, families, strict=True):
        assert family == families[0]
        rows = [[expansion, out, n, s, list(k)] for expansion, out, n, s, k in SUPERNETS[preset]["rows"]]
        assert rows == given["setting"]


def test_atoms_of_the_published_supernet_cost_what_was_published():
    given, expected = fact("atom_cost_and_penalty")
    assert "B/C supernet" in given["network"]
    family = mobile_family("atomnas-c", image=(3, 224, 224), num_classes=1000)
    with torch.device("meta"):
        atoms = family.atoms(family.build(family.largest()))
    assert len(atoms) == expected["searchable_atoms"]
    assert atoms.cost("macs") / (len(atoms) + 1e-5) == pytest.approx(expected["mean_macs_per_atom"], abs=1e-9)
    for feature, kernel, size, macs, _ in expected["rows"]:
        group = atoms.group(f"blocks.{feature - 1}.branches.k{kernel}")
        assert (group.size, group.cost["macs"]) == (size, macs)


def test_published_networks_run_and_follow_their_names():
    network = published_network("AtomNAS-A+", image=(3, 64, 64), num_classes=7, seed=0).eval()
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert network.constructor()["activation"] == "swish"
    assert network.dropout.p == 0.28
    assert network.blocks[1].squeeze.reduce.out_channels == round(0.5 * 16)
    with pytest.raises(UserError, match=r"network.*'AtomNAS-D'.*AtomNAS-A, AtomNAS-A\+, AtomNAS-B"):
        published_network("AtomNAS-D")


# --------------------------------------------------------------------- points of the space

FAMILIES = [small_family(), small_family(squeeze_ratio=0.5, activation="swish")]
FAMILIES += [random_family(np.random.default_rng(seed)) for seed in range(12)]


@pytest.mark.parametrize("family", FAMILIES, ids=range(len(FAMILIES)))
def test_every_point_builds_trains_and_is_read_back(family):
    rng = np.random.default_rng(5)
    space = family.space
    for _ in range(3):
        point = space.sample(rng)
        network = family.build(point, seed=1)
        assert family.architecture_of(network) == point
        assert family.architecture_of(type(network)(**network.constructor())) == point
        logits = network(images(family))
        assert logits.shape == (2, family.num_classes)
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        assert space.contains(point)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.space.paths], ids=lambda f: f"{len(f.plan)} blocks")
def test_costs_predicted_from_the_atoms_equal_the_counted_ones(family):
    rng = np.random.default_rng(6)
    full = family.build(family.largest())
    everything = family.atoms(full)
    total = count(full, images(family))
    for _ in range(3):
        keep = random_keep(everything, rng)
        point = family.kept(everything, keep)
        network = family.build(point)
        left = count(network, images(family))
        dead = [b for b in everything.blocks if not any(bool(keep[name].any()) for name in b.groups)]
        for cost in ("macs", "params"):
            atoms_gone = everything.cost(cost) - cost_of(everything, keep, cost)
            gone = atoms_gone + sum(block.cost[cost] for block in dead)
            assert getattr(total, cost) - getattr(left, cost) == gone
        assert family.atoms(network).cost("macs") == cost_of(everything, keep, "macs")


@pytest.mark.parametrize("squeeze_ratio", [0.0, 0.5])
def test_one_atom_less_is_exactly_its_cost_less(squeeze_ratio):
    family = small_family(squeeze_ratio=squeeze_ratio)
    largest = family.largest()
    before = count(family.build(largest), images(family))
    for group in family.atoms(family.build(largest)):
        path = group.name.replace(".branches.", "/").replace(".", "/")
        point = family.space.validate({**largest, path: largest[path] - 1})
        after = count(family.build(point), images(family))
        assert before.macs - after.macs == group.cost["macs"]
        assert before.params - after.params == group.cost["params"]


def test_the_slots_of_an_atom_hold_all_its_parameters():
    for family in (small_family(), small_family(squeeze_ratio=1.0)):
        network = family.build(family.largest())
        named = tensors_of(network)
        trained = dict(network.named_parameters())
        for group in family.atoms(network):
            owned = sum(
                s.rows * named[s.tensor].numel() // named[s.tensor].shape[s.axis]
                for s in group.slots
                if s.tensor in trained
            )
            assert owned == group.cost["params"]
            assert any(slot.tensor == group.scale for slot in group.slots)


def test_blocks_without_residual_keep_an_atom():
    family = small_family()
    atoms = family.atoms(family.build(family.largest()))
    assert [block.minimum for block in atoms.blocks] == [1, 0, 1, 0]
    assert not family.space.contains(
        {**family.largest(), **dict.fromkeys(["blocks/1/k3", "blocks/1/k5", "blocks/1/k7"], 0)}
    )
    smallest = family.smallest()
    assert family.space.contains(smallest)
    assert sum(smallest.values()) == 2


def test_no_point_is_cheaper_than_the_smallest_nor_dearer_than_the_largest():
    family = small_family()
    low, high = (count(family.build(a), images(family)).macs for a in (family.smallest(), family.largest()))
    for point in family.space.sample_many(np.random.default_rng(0), 8):
        assert low <= count(family.build(point), images(family)).macs <= high


def test_scaling_keeps_the_shares_and_at_least_one_atom():
    family = small_family()
    largest = family.largest()
    assert family.scaled(1.0) == largest
    half, none = family.scaled(0.5), family.scaled(0.0)
    assert all(half[path] == max(1, round(0.5 * largest[path])) for path in largest)
    assert set(none.values()) == {1}
    assert family.space.contains(half) and family.space.contains(none)


def test_kept_is_what_remains_of_a_mask():
    family = small_family()
    atoms = family.atoms(family.build(family.largest()))
    point = family.kept(atoms, without(atoms, b1k5=[0, 3], b2k3=..., b2k5=..., b2k7=...))
    assert {path: family.largest()[path] - n for path, n in point.items() if family.largest()[path] != n} == {
        "blocks/1/k5": 2, "blocks/2/k3": 12, "blocks/2/k5": 12, "blocks/2/k7": 12,
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=range(len(FAMILIES)))
def test_families_survive_json(family):
    back = family_from_json(json.loads(json.dumps(family.to_json())))
    assert back == family
    assert back.space.size == family.space.size


# --------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("strides", "side", "fitted"),
    [
        ([2, 2, 2, 2], 224, [2, 2, 2, 2]),
        ([2, 2, 2, 2], 64, [2, 2, 2, 2]),
        ([2, 2, 2, 2], 32, [1, 2, 2, 2]),
        ([2, 1, 2, 2], 8, [1, 1, 1, 2]),
        ([2, 1, 2, 2], 16, [1, 1, 2, 2]),
        ([2, 1, 2, 2], 4, [1, 1, 1, 1]),
        ([2, 1, 2, 2], 28, [2, 1, 2, 2]),  # 28, 14, 7, 4: maps round up
        ([2, 1, 2, 2], 24, [1, 1, 2, 2]),
    ],
)
def test_first_strides_go_until_the_last_map_is_4x4(strides, side, fitted):
    assert fit_strides(strides, (3, side, side)) == (fitted[0], fitted[1:])


def test_the_shorter_side_decides():
    assert fit_strides([2, 2, 2], (1, 32, 8)) == (1, [1, 2])


@pytest.mark.parametrize("preset", [*SUPERNETS, "auto"])
@pytest.mark.parametrize("side", [4, 5, 8, 28, 32, 64])
def test_no_preset_ends_on_less_than_4x4_pixels(preset, side):
    family = mobile_family(preset, image=(1, side, side), num_classes=10)
    with torch.device("meta"):
        network = family.build(family.smallest())
        h = network.stem(torch.zeros(1, 1, side, side))
        sides = [h.shape[2]]
        for block in network.blocks:
            h = block(h)
            sides.append(h.shape[2])
    assert sides[-1] >= 4
    strides = [family.stem_stride, *(block.stride for block in family.plan)]
    dropped = [i for i, stride in enumerate(strides) if stride == 2]
    published = [2, *(row[3] if r == 0 else 1 for row in _rows(preset, side) for r in range(row[2]))]
    kept = [i for i, stride in enumerate(published) if stride == 2]
    assert dropped == kept[len(kept) - len(dropped) :]  # what is left are the last ones
    if len(dropped) < len(kept):  # and one more stride would have been too many
        assert -(-sides[-1] // 2) < 4


def _rows(preset, side):
    return SUPERNETS["tiny" if side < 24 else "small"]["rows"] if preset == "auto" else SUPERNETS[preset]["rows"]


def test_the_automatic_preset_goes_by_the_image_size():
    for side, last in ((8, 128), (23, 128), (24, 256), (95, 256), (96, 1280)):
        assert mobile_family(image=(3, side, side), num_classes=2).last_channels == last


def test_bad_families_are_refused():
    with pytest.raises(UserError, match=r"family.preset.*'huge'.*auto, atomnas-a"):
        mobile_family("huge", image=(3, 32, 32), num_classes=2)
    with pytest.raises(UserError, match=r"image size.*3x32.*at least 4x4 pixels"):
        mobile_family(image=(3, 3, 32), num_classes=2)
    with pytest.raises(UserError, match=r"family.*'resnet'.*mobile"):
        open_family("resnet", image=(3, 32, 32), num_classes=2)
    assert isinstance(open_family("mobile", image=(3, 32, 32), num_classes=2), MobileFamily)
    assert [row["name"] for row in family_table()] == sorted(row["name"] for row in family_table())
    assert "mobile" in [row["name"] for row in family_table()]


# --------------------------------------------------------------------- weights


def test_weights_start_as_published():
    plan = (BlockPlan(64, 1, ((3, 400), (5, 400)), True, True),)
    family = MobileFamily(
        image=(3, 8, 8), num_classes=400, stem_channels=64, stem_stride=1, plan=plan, last_channels=100,
        squeeze_ratio=0.5,
    )  # fmt: skip
    network = family.build(family.largest(), seed=3)
    branch = network.blocks[0].branches["k5"]
    spread = {"stem.conv": (network.stem.conv, 9 * 64), "expand": (branch.expand.conv, 400)}
    spread |= {"depthwise": (branch.depthwise, 25), "project": (branch.project, 64)}
    for conv, fan_out in spread.values():
        n, std = conv.weight.numel(), (2 / fan_out) ** 0.5
        assert abs(conv.weight.mean().item()) < 4 * std / n**0.5
        assert abs(conv.weight.std().item() / std - 1) < 4 / (2 * n) ** 0.5
    bound = 400**-0.5
    weight = network.classifier.weight
    assert weight.abs().max() <= bound
    assert abs(weight.std().item() / (bound / 3**0.5) - 1) < 4 / (2 * weight.numel()) ** 0.5
    assert network.classifier.bias.eq(0).all()
    assert network.blocks[0].squeeze.reduce.bias.abs().max() == 0
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_seed_decides_the_weights_and_nothing_else():
    family = small_family()
    state = torch.get_rng_state()
    first, same, other = (family.build(family.largest(), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["stem.conv.weight"], other["stem.conv.weight"])
    worn = worn_(family.build(family.largest()))
    initialise_(worn, torch.Generator().manual_seed(1))
    assert all(torch.equal(tensor, first[name]) for name, tensor in worn.state_dict().items())
    assert state.shape == torch.get_rng_state().shape


def test_a_collapsed_block_keeps_the_bias_parameter():
    block = MixedInvertedResidual(4, 4, 1, ((3, 2),), squeeze=2).eval()
    bias = block.norm.bias
    collapse_(block)
    assert block.norm.bias is bias
    assert block.squeeze is None
    assert not block.norm.training


# --------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("settings", [{}, {"squeeze_ratio": 0.5, "activation": "swish"}], ids=["relu", "squeeze"])
def test_onnx_runtime_computes_the_same(settings):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from archsmith.run.onnx_file import onnx_bytes

    family = small_family(**settings)
    point = {**family.largest(), "blocks/2/k3": 0, "blocks/2/k5": 0, "blocks/2/k7": 0, "blocks/1/k5": 0}
    network = worn_(family.build(family.space.validate(point))).eval()
    x = images(family, 3)
    session = onnxruntime.InferenceSession(onnx_bytes(network, x, {}), providers=["CPUExecutionProvider"])
    for batch in (x, x[:1]):
        (y,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        expected = network(batch).detach()
        tolerance = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=0, atol=tolerance)


def test_built_networks_differ_only_where_the_point_says():
    family = small_family()
    a, b = built(family), family.build(family.scaled(0.5))
    different = {name for name, t in a.state_dict().items() if t.shape != b.state_dict()[name].shape}
    assert all(name.startswith("blocks.") and not name.startswith("blocks.0") for name in different)
