import re

import pytest
import torch
from darts_recipe import image, matches, weighted_
from sharp_recipe import case, cases
from torch import nn

from archsmith.layers.darts import AuxiliaryClassifier, DartsNetwork, DenseLayers, FactorizedReduce
from archsmith.layers.sharp import (
    SHARP_CONVOLUTIONS,
    PaddedReduce,
    ResizablePool,
    SharpPrimitives,
    SharpSepConv,
    make_sharp_primitive,
)
from archsmith.run.constructor import build, call_of

EDGES = (("dil_conv_3x3", 0), ("skip_connect", 1), ("max_pool_3x3", 2), ("choke_conv_3x3", 0))


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


def primitive(name, *, channels=4, out=None, stride=1, affine=False, **options):
    return make_sharp_primitive(name, channels, out or channels, stride, affine, DenseLayers(), **options)


@pytest.mark.parametrize("case", cases("sharpsepconv_params:"), ids=lambda case: case["name"])
def test_separable_blocks_have_their_exact_sizes(case):
    pattern = r"sharpsepconv_params:Cin(\d+):Cout(\d+):k(\d):mult(\d):Cmid(\w+):affine"
    into, out, kernel, multiple, middle = re.fullmatch(pattern, case["name"]).groups()
    width = int(out) * int(multiple) if middle == "None" else int(middle)
    assert size(SharpSepConv(int(into), int(out), int(kernel), middle=width)) == case["expected"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("k3", {}), ("dil3", {"dilation": 2}), ("flood3", {"middle": 24})],
)
def test_separable_blocks(name, arguments):
    expected = case(f"sharpsepconv_forward:{name}")["expected"]
    block = SharpSepConv(4, 6, 3, **arguments)
    assert size(block) == expected["params"]
    matches(weighted_(block)(image(2, 4, 8, 8)), expected["out"])


@pytest.mark.parametrize("case", cases("prim:"), ids=lambda case: case["name"])
def test_sharp_primitives(case):
    given, (_, name, _) = case["input"], case["name"].split(":")
    operation = primitive(name, stride=given["stride"], affine=given["affine"], choke=given["C_mid"])
    assert size(operation) == case["expected"]["params"]
    matches(weighted_(operation)(image(2, 4, 8, 8)), case["expected"]["out"])


def test_a_pooling_that_widens():
    expected = case("resizable_pool:4->6:stride2")["expected"]
    pool = ResizablePool("max", 4, 6, 2)
    assert size(pool) == expected["params"]
    matches(weighted_(pool)(image(2, 4, 8, 8)), expected["out"])


def test_a_reduction_of_odd_sides():
    expected = case("factorized_reduce:odd9")["expected"]
    matches(weighted_(PaddedReduce(4, 6, False, DenseLayers()))(image(2, 4, 9, 9)), expected)


def test_a_padded_reduction_of_even_sides_is_that_of_darts():
    padded, plain = (weighted_(kind(4, 6, True, DenseLayers())) for kind in (PaddedReduce, FactorizedReduce))
    x = image(2, 4, 8, 10)
    assert torch.equal(padded(x), plain(x))


def test_only_the_first_round_strides_and_dilates():
    for name, (kernel, dilation, multiple) in SHARP_CONVOLUTIONS.items():
        block = primitive(name, channels=8, stride=2)
        first, second = (block.first.convs[0], block.second.convs[0])
        assert (first.dilation, second.dilation) == ((dilation,) * 2, (1, 1))
        assert (first.stride, second.stride) == ((2, 2), (1, 1))
        assert first.kernel_size == second.kernel_size == (kernel, kernel)
        # The bottleneck stands behind the first depthwise convolution, not in front of it.
        assert first.in_channels == first.groups == 8
        assert second.in_channels == second.groups == (8 * multiple or 32)


@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3", "skip_connect", "none", *SHARP_CONVOLUTIONS])
@pytest.mark.parametrize("side", [7, 8])
def test_all_primitives_agree_about_shapes(name, side):
    x = torch.rand(2, 4, side, side + 3)
    assert primitive(name)(x).shape == x.shape
    assert primitive(name, stride=2)(x).shape == (2, 4, -(-side // 2), -(-(side + 3) // 2))


def test_what_changes_the_width():
    x = torch.rand(2, 4, 8, 8)
    for name in ("max_pool_3x3", "avg_pool_3x3", *SHARP_CONVOLUTIONS):
        assert primitive(name, out=6)(x).shape == (2, 6, 8, 8)
    assert isinstance(primitive("max_pool_3x3").resize, nn.Identity)
    assert primitive("max_pool_3x3", out=6, affine=True).resize[1].eps == 1e-3


def test_choke_convolutions_have_a_fixed_middle_width():
    assert [size(primitive("choke_conv_3x3", choke=width)) for width in (32, 96)] == [580, 1668]
    widths = [primitive("choke_conv_3x3", channels=channels).second.convs[0].groups for channels in (4, 128)]
    assert widths == [32, 32]  # floods the narrow one


def test_averages_count_the_border_as_zero():
    ones = torch.ones(1, 1, 3, 3)
    assert primitive("avg_pool_3x3", channels=1)(ones)[0, 0, 0, 0] == pytest.approx(4 / 9)


def test_networks_with_these_primitives_come_back():
    arguments = {"in_channels": 3, "num_classes": 5, "channels": 4, "cells": 3, "normal": EDGES, "reduce": EDGES}
    outputs = {"normal_concat": (2, 3), "reduce_concat": (2, 3)}
    network = DartsNetwork(**arguments, **outputs, primitives=SharpPrimitives(16)).eval()
    again = build(call_of(network)).eval()
    again.load_state_dict(network.state_dict())
    x = torch.rand(2, 3, 13, 10)  # odd sides
    assert torch.equal(again(x), network(x))
    assert again.cells[0].operations[3].second.convs[0].groups == 16
    plain = dict.fromkeys(("normal", "reduce"), (*EDGES[:3], ("sep_conv_3x3", 0)))
    assert "primitives" not in DartsNetwork(**{**arguments, **plain}, **outputs).constructor()


def test_the_auxiliary_classifier_for_large_images_has_its_second_norm():
    arguments = {"in_channels": 3, "num_classes": 5, "channels": 4, "cells": 3, "normal": EDGES, "reduce": EDGES}
    network = DartsNetwork(
        **arguments,
        normal_concat=(2, 3),
        reduce_concat=(2, 3),
        stem="imagenet",
        auxiliary=True,
        primitives=SharpPrimitives(),
    )
    assert isinstance(network.auxiliary, AuxiliaryClassifier)
    assert isinstance(network.auxiliary.features[6], nn.BatchNorm2d)


def test_unknown_primitives_and_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="operation: got 'dil_flood_conv_5x5' from 4 to 4 channels; allowed: none"):
        primitive("dil_flood_conv_5x5")
    with pytest.raises(ValueError, match="operation: got 'skip_connect' from 4 to 6 channels"):
        primitive("skip_connect", out=6)
    with pytest.raises(ValueError, match="got 5; allowed: an even number"):
        PaddedReduce(4, 5, True, DenseLayers())
