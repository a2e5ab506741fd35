"""The fast depthwise gradient equals torch's own, wherever it applies, and is not used elsewhere."""

import copy
import itertools

import pytest
import torch
from torch import nn

from archsmith.supernet.depthwise import (
    FastDepthwise,
    depthwise,
    depthwise_weight_gradient,
    from_phases,
    to_phases,
    use_fast_depthwise_,
    use_plain_depthwise_,
)


def _layer(channels, kernel, stride):
    torch.manual_seed(channels + kernel)
    layer = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    return layer.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), list(itertools.product([4, 7, 8, 13], [5, 7, 9], [1, 2])), ids=str
)
def test_gradients_equal_those_of_torch(side, kernel, stride):
    plain = _layer(24, kernel, stride)
    fast = copy.deepcopy(plain)
    assert use_fast_depthwise_(fast) == 1
    x = torch.randn(5, 24, side, side + 1).contiguous(memory_format=torch.channels_last)
    results = []
    for layer in (plain, fast):
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        output = layer(inputs)
        output.backward(torch.cos(output.detach()))
        results.append((output.detach(), inputs.grad, layer.weight.grad))
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert fast.weight.grad.stride() == fast.weight.stride()


def test_the_weight_gradient_equals_the_sum_over_positions():
    x, g = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    expected = torch.stack(
        [
            torch.stack([(padded[:, :, i : i + 8, j : j + 8] * g).sum((0, 2, 3)) for j in range(5)], -1)
            for i in range(5)
        ],
        -2,
    ).unsqueeze(1)
    got = depthwise_weight_gradient(
        g.contiguous(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
        torch.empty(3, 1, 5, 5),
        1,
        2,
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_only_wide_depthwise_layers_change_and_the_change_can_be_undone():
    network = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
        nn.Conv2d(8, 8, 5, padding=2, bias=False),
        nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8, bias=False),
        nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=True),
    )
    names = list(network.state_dict())
    assert use_fast_depthwise_(network) == 1
    assert [type(layer) is FastDepthwise for layer in network] == [False, True, False, False, False]
    assert list(network.state_dict()) == names
    use_plain_depthwise_(network)
    assert {type(layer) for layer in network} == {nn.Conv2d}


@pytest.mark.parametrize("change", ["contiguous", "float64", "no_grad"])
def test_other_formats_and_types_use_torchs_own_path(change, monkeypatch):
    layer = _layer(16, 5, 1)
    use_fast_depthwise_(layer)
    monkeypatch.setattr("archsmith.supernet.depthwise._Depthwise.apply", lambda *a: pytest.fail("fast path taken"))
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    if change == "no_grad":
        with torch.no_grad():
            layer(x)
    elif change == "float64":
        layer.double()(x.double())
    else:
        layer(x.contiguous())


@pytest.mark.parametrize(("kernel", "sides"), [(3, (8, 8)), (5, (16, 24)), (5, (4, 8))])
def test_a_dilated_convolution_is_an_ordinary_one_of_every_phase(kernel, sides):
    x = torch.randn(3, 6, *sides).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 1, kernel, kernel)
    assert torch.equal(from_phases(to_phases(x)), x)
    assert torch.equal(to_phases(x)[3:6], x[:, :, ::2, 1::2])
    expected = nn.functional.conv2d(x, weight, None, 1, kernel - 1, 2, 6)
    torch.testing.assert_close(from_phases(depthwise(to_phases(x), weight)), expected)
    strided = nn.functional.conv2d(x, weight, None, 2, kernel - 1, 2, 6)
    few = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(depthwise(few, weight), strided)


def test_second_derivatives():
    """The gradient's gradient, which an unrolled step needs, equals torch's own."""
    x = torch.randn(4, 8, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 1, 5, 5, requires_grad=True)
    results = []
    for y in (depthwise(x, weight), nn.functional.conv2d(x, weight, None, 1, 2, 1, 8)):
        first = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, weight]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
