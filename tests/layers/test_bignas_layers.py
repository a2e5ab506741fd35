"""Blocks with a shortcut everywhere: the published numbers of the body, and what the shortcut is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from archsmith.families.bignas_space import Rounding
from archsmith.layers.bignas import BigNasNet, DropConnect, InvertedResidual, ResidualEverywhere, Resize, Shortcut

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "bignas.json").read_text())
ROUNDED = Rounding()
CASES = [case for case in GOLDEN["cases"] if case["name"].startswith("elastic-mbconv-")]


def closed_form_(body):
    """Give a body the weights of the published cases: they are those of the LARGEST layer, to be sliced."""
    with torch.no_grad():
        for module in body.modules():
            if isinstance(module, nn.Conv2d):
                indices = torch.arange(module.weight.numel(), dtype=torch.float64)
                module.weight.copy_((0.2 * torch.sin(0.37 * indices + 0.5)).reshape(module.weight.shape))
                if module.bias is not None:
                    module.bias.copy_(0.1 * torch.cos(torch.arange(len(module.bias), dtype=torch.float64)))
    return body.eval()


def sliced_body(case):
    """Return the active body of a published case: slices of the closed-form weights of the largest one."""
    given, active = case["input"], case["input"]["active"]
    largest = (ROUNDED(given["max_in"] * max(given["expands"])), ROUNDED(active["cin"] * active["expand"]))
    shapes = []
    for cin, cout, kernel, hidden in (
        (given["max_in"], given["max_out"], max(given["kernels"]), largest[0]),
        (active["cin"], active["cout"], active["kernel"], largest[1]),
    ):
        shapes.append(InvertedResidual(cin, cout, given["stride"], kernel, hidden, True, ROUNDED(hidden // 4)).double())
    full, own = closed_form_(shapes[0]), shapes[1].eval()
    state = full.state_dict()
    for name, tensor in own.state_dict().items():
        source = state[name]
        if tensor.dim() == 4:
            margin = (source.shape[-1] - tensor.shape[-1]) // 2
            side = tensor.shape[-1]
            source = source[..., margin : margin + side, margin : margin + side]
        tensor.copy_(source[tuple(slice(0, n) for n in tensor.shape[:2])])
    return own


def case_input(case):
    given = case["input"]
    shape = (2, given["max_in"], 9, 9)
    x = torch.cos(0.11 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)
    return x[:, : given["active"]["cin"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_body_of_a_slice_is_as_published(case):
    body, expected = sliced_body(case), case["expected"]
    with torch.no_grad():
        y = body(case_input(case))
    assert list(y.shape) == expected["shape"]
    assert sum(p.numel() for p in body.parameters()) == expected["params"]
    for name, value in (("sum", y.sum()), ("abs_sum", y.abs().sum()), ("first", y.flatten()[0])):
        assert float(value) == pytest.approx(expected[name], abs=1e-6)
    assert float(y.flatten()[-1]) == pytest.approx(expected["last"], abs=1e-6)


def test_a_shortcut_is_the_input_pooled_and_projected_only_where_it_must_be():
    x = torch.randn(2, 4, 5, 6)
    assert Shortcut(4, 4, 1)(x) is x
    pooled = Shortcut(4, 4, 2)(x)
    assert pooled.shape == (2, 4, 3, 3)
    torch.testing.assert_close(pooled[:, :, 0, 0], x[:, :, :2, :2].mean((2, 3)))
    torch.testing.assert_close(pooled[:, :, 2, 0], x[:, :, 4, :2].mean(2))  # at the edge: what is there
    projected = Shortcut(4, 6, 2)
    torch.testing.assert_close(projected(x), projected.project(pooled))
    assert not list(Shortcut(4, 4, 1).parameters())
    idle = Shortcut(4, 4, 1, idle=True)
    assert len(list(idle.parameters())) == 1
    assert idle(x) is x


def test_drop_connect_leaves_out_whole_examples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropConnect(0.25), torch.ones(4000, 2, 2, 2)
    y = drop(x)
    dropped = (y == 0).flatten(1)
    assert bool((dropped.all(1) == dropped.any(1)).all())
    torch.testing.assert_close(y[~dropped.any(1)], torch.full_like(y[~dropped.any(1)], 1 / 0.75))
    assert abs(float(dropped.any(1).float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert drop.eval()(x) is x


def test_images_of_the_right_size_are_not_touched():
    x = torch.rand(2, 3, 8, 10)
    assert Resize((8, 10))(x) is x
    expected = nn.functional.interpolate(x, size=(6, 7), mode="bicubic", align_corners=False)
    assert torch.equal(Resize((6, 7))(x), expected)


def test_without_expansion_the_hidden_width_is_that_of_the_input():
    with pytest.raises(ValueError, match=r"hidden: got 16; allowed: 8, the input's width, without an expansion"):
        InvertedResidual(8, 8, 1, 3, 16, expand=False)


def test_a_block_with_a_closed_body_is_its_shortcut():
    block = ResidualEverywhere(4, 6, 2, 5, 24, squeeze=8)
    nn.init.zeros_(block.body.project_norm.weight)
    x = torch.randn(3, 4, 7, 7)
    for training in (True, False):
        assert torch.equal(block.train(training)(x), block.shortcut(x))


def test_the_head_may_mix_behind_the_pooling():
    arguments = {"resolution": (6, 6), "stem_channels": 4, "stem_stride": 1, "stages": (((8, 1, 3, 4, False, 0),),)}
    network = BigNasNet(3, 5, **arguments, last_channels=16, mix_channels=12)
    assert network(torch.rand(2, 3, 9, 9)).shape == (2, 5)
    assert isinstance(network.mix, nn.Sequential)
    assert network.mix[0].weight.shape == (12, 16, 1, 1)
    assert network.constructor() == BigNasNet(**network.constructor()).constructor()
