"""Stage-wise elastic networks: published sizes, spaces, rounding and drop-connect rates; the start of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.bignas import bignas_family, family_from_json, open_family
from archsmith.families.bignas_space import (
    PRESETS,
    PUBLISHED_MODELS,
    Rounding,
    drop_connect_rates,
    elastic_space,
    elastic_table,
    genotype,
    published_architecture,
)
from archsmith.layers.bignas import ResidualEverywhere

GOLDEN = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent.parent / "golden" / "bignas.json").read_text())["cases"]
}
SIZED = [name for name in GOLDEN if name.startswith(("attentivenas-", "bignas-"))]


def published(preset):
    return bignas_family(preset, image=(3, 224, 224), num_classes=1000)


def small(**settings):
    return bignas_family("tiny", image=(3, 8, 12), num_classes=5, **settings)


@pytest.mark.parametrize("name", SIZED)
def test_published_sizes_are_exact(name):
    """Counted without building; that the built network agrees is the family contract, and checked here for the ends."""
    given, expected = GOLDEN[name]["input"], GOLDEN[name]["expected"]
    family, config = published(given["space"]), given["config"]
    lists = (config[key] for key in ("width", "depth", "kernel_size", "expand_ratio"))
    architecture = genotype(family.table, config["resolution"], *lists)
    costs = family.exact_costs(architecture)
    assert costs == {"macs": expected["macs"], "params": expected["params_used"]}
    idle = family.exact_costs(architecture, idle=True)
    assert idle["params"] == expected["params_with_idle_shortcut_convs"]
    if name.endswith(("-max", "-min", "-a0")):
        with torch.device("meta"):
            network = family.build(architecture)
            counted = count(network, torch.zeros(1, 3, 224, 224))
            assert sum(p.numel() for p in family.build(architecture, idle=True).parameters()) == idle["params"]
        assert {"macs": counted.macs, "params": counted.params} == costs
        assert family.architecture_of(network) == architecture


def test_published_spaces_have_their_sizes():
    expected = GOLDEN["space-sizes"]["expected"]
    for preset in ("bignas", "attentivenas"):
        family = published(preset)
        assert family.space.size == expected[preset]
        assert family.exact_costs(family.largest(), idle=True)["params"] == expected[f"{preset}_supernet_params"]


def test_published_networks_are_points_of_their_space():
    table = elastic_table("attentivenas", (3, 224, 224))
    costs = [table.costs(published_architecture(n, table), image=(3, 224, 224), num_classes=1000) for n in ("A0", "A5")]
    assert [cost["macs"] for cost in costs] == [203389568, 490520064]
    with pytest.raises(UserError, match=r"network: got 'A9'; allowed: A0, A1, A3, A5"):
        published_architecture("A9", table)


def test_the_published_region_lies_in_the_space():
    family = published("bignas")
    low, high = (family.exact_costs(end)["macs"] for end in (family.smallest(), family.largest()))
    assert all(low <= model["macs"] <= high for model in PUBLISHED_MODELS.values())


def test_widths_are_rounded_as_published_and_the_rule_is_a_parameter():
    case = GOLDEN["round-to-multiple-of-8"]
    assert [Rounding(least=1)(width) for width in case["input"]] == case["expected"]
    assert Rounding(divisor=1, least=1)(27) == 27
    assert (Rounding()(76), Rounding(share=0.97)(76)) == (80, 80)
    assert (Rounding()(67), Rounding(share=0.96)(67)) == (64, 72)
    wide = small(rounding={"divisor": 4, "least": 4})
    assert wide.exact_costs(wide.smallest())["params"] < small().exact_costs(small().smallest())["params"]


def test_drop_connect_grows_with_depth_in_the_last_two_stages():
    case = GOLDEN["drop-connect-rates-max-net"]
    rates = drop_connect_rates([2, 3, 3, 4, 6, 6, 2], case["input"]["rate"])
    assert rates == pytest.approx(case["expected"], abs=1e-9)
    family = published("bignas")
    used = family.arguments(family.largest())["drop_connect"]
    changes_the_shape = {18, 24}  # first blocks of the last two stages
    assert [n for n, rate in enumerate(used) if rate] == sorted(set(range(18, 26)) - changes_the_shape)
    assert used[25] == rates[25]


def test_every_block_starts_as_its_shortcut():
    """So depths that only add identities give identical logits."""
    family = small()
    shallow = dict(family.largest()) | {"mb1/depth": 1, "mb2/depth": 1}
    deep, flat = (family.build(a, seed=3).eval() for a in (family.largest(), family.space.validate(shallow)))
    x = torch.randn(4, 3, 8, 12)
    seen = []
    for module in deep.modules():
        if isinstance(module, ResidualEverywhere):
            module.register_forward_hook(lambda m, inputs, y: seen.append(torch.equal(y, m.shortcut(inputs[0]))))
    logits = deep(x)
    assert seen == [True] * 4
    flat.load_state_dict({name: deep.state_dict()[name] for name in flat.state_dict()})
    assert torch.equal(flat(x), logits)


def test_convolutions_start_by_their_fan_out():
    network = bignas_family("small", image=(3, 32, 32), num_classes=10).build(
        bignas_family("small", image=(3, 32, 32), num_classes=10).largest(), seed=0
    )
    weight = network.last.conv.weight
    assert float(weight.detach().std()) == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.05)


def test_equal_networks_share_their_digest():
    """The last two stages of AttentiveNAS may agree in everything: then only the sum of their depths counts."""
    table = elastic_table("attentivenas", (3, 224, 224))
    space, base = elastic_space(table), dict(published_architecture("A0", table))
    alike = base | {"mb6/width": 216, "mb7/width": 216, "mb6/kernel": 3, "mb7/kernel": 3}
    one = space.validate(alike | {"mb6/depth": 5, "mb7/depth": 1})
    other = space.validate(alike | {"mb6/depth": 4, "mb7/depth": 2})
    assert one.digest != other.digest
    assert one.network_digest == other.network_digest
    assert one.network_digest != space.validate(alike | {"mb6/depth": 4, "mb7/depth": 1}).network_digest


def test_resolutions_of_small_presets_follow_the_image():
    assert bignas_family("small", image=(3, 32, 32), num_classes=10).table.resolutions == (24, 28, 32)
    assert bignas_family("auto", image=(1, 28, 28), num_classes=10).table.resolutions == (20, 24, 28)
    assert bignas_family("auto", image=(1, 8, 8), num_classes=10).table.resolutions == (6, 8)
    assert small(resolutions=(8, 16)).table.resolutions == (8, 16)


def test_tables_come_from_lists_as_files_write_them():
    given = {"stages": [[[8, 16], [1, 2], [3], [1], 1, True]], "stem_widths": [8], "head_widths": [16, 32]}
    family = open_family("bignas", image=(3, 8, 8), num_classes=5, preset="tiny", resolutions=[0.75, 1.0], **given)
    assert family == family_from_json(json.loads(json.dumps(family.to_json())))
    assert family.space.paths == ("resolution", "mb1/width", "mb1/depth", "head/width")
    assert family.space.size == 2**4


def test_strides_are_dropped_for_small_images():
    table = elastic_table("bignas", (3, 32, 32), resolutions=(24, 32))
    assert [table.stem_stride, *(row[4] for row in table.stages)] == [1, 1, 1, 2, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "b0"}, r"family\.preset: got 'b0'; allowed: auto, bignas, attentivenas, small, tiny"),
        ({"stem_widths": (16, 8)}, r"family\.stem_widths: got \(16, 8\); allowed: rising integers from 1"),
        ({"resolutions": (2,)}, r"family\.resolutions: got \(2,\); allowed: images of at least 3x3 pixels"),
        ({"activation": "tanh"}, r"family\.activation: got 'tanh'; allowed: relu, relu6, swish"),
        ({"dropout": 1.0}, r"family\.dropout: got 1\.0; allowed: a number from 0, below 1"),
        (
            {"stages": (((8,), (1,), (4,), (2,), 1, True),)},
            r"family\.stages\[0\]\.kernels: got \(4,\); allowed: odd numbers",
        ),
        ({"stages": (((8,), (1,), (3,), (1, 2), 1, True),)}, r"family\.stages\[0\]\.expansions: got \(1, 2\)"),
        ({"stages": (((8,), (1,), (3,), (2,), 3, True),)}, r"family\.stages\[0\]\.stride: got 3; allowed: 1 or 2"),
        ({"stages": (((8,), (1,), (3,)),)}, r"family\.stages\[0\]: got .*; allowed: widths, depths, kernels"),
    ],
)
def test_bad_tables_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        bignas_family(**{"preset": "tiny", "image": (3, 8, 8), "num_classes": 5, **settings})


def test_points_outside_the_space_are_refused():
    with pytest.raises(UserError, match=r"architecture\['mb1/width'\]: got 32; allowed: one of \[8, 16\]"):
        genotype(small().table, 8, (8, 32, 16, 48), (1, 1), (3, 3), (1, 2))
    with pytest.raises(UserError, match=r"family: got 'big'; allowed: bignas"):
        open_family("big", image=(3, 8, 8), num_classes=5)
    assert set(PRESETS) == {"bignas", "attentivenas", "small", "tiny"}
