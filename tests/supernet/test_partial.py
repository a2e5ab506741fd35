import json
from pathlib import Path

import pytest
import torch
from darts_recipe import alpha, image, matches, weighted_
from torch import nn
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.cell_spaces import NB201_OPERATIONS
from archsmith.families.darts_space import DARTS_OPERATIONS
from archsmith.layers.cells import make_edge_operation
from archsmith.layers.darts import DenseLayers, make_primitive
from archsmith.supernet import MixedOp
from archsmith.supernet.partial import PartialChannels, channel_shuffle, partial_edge

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pc-darts.json").read_text())


def cases(prefix):
    found = [case for case in GOLDEN["cases"] if case["name"].startswith(prefix)]
    assert found
    return [pytest.param(case, id=case["name"]) for case in found]


def candidates(stride, names=DARTS_OPERATIONS):
    return lambda channels: {name: make_primitive(name, channels, stride, False, DenseLayers(), True) for name in names}


def edge(channels, divisor, stride=1, mixing="shuffle"):
    return partial_edge(candidates(stride), channels, stride, divisor=divisor, mixing=mixing)


class Called(nn.Module):
    """Adds 100 to what it is given, halved where told, and remembers it."""

    def __init__(self, stride=1):
        super().__init__()
        self.stride, self.seen = stride, []

    def forward(self, x, *arguments):
        self.seen.append((x, arguments))
        return x[:, :, :: self.stride, :: self.stride] + 100.0


def numbered(channels, side=2):
    """Return an image whose pixels say in which channel they are."""
    return torch.arange(float(channels)).reshape(1, channels, 1, 1).expand(2, -1, side, side).contiguous()


def saved(module, *arguments):
    """Return elements of feature maps that a forward pass keeps for the backward pass: each storage once."""
    kept = {}

    def pack(tensor):
        if tensor.dim() == 4 and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*arguments)
    assert output.requires_grad
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("case", cases("channel_shuffle:"))
def test_the_shuffle(case):
    channels, groups = (int(word.strip("chgroups")) for word in case["name"].split(":")[1:])
    x = numbered(channels)
    assert channel_shuffle(x, groups)[1, :, 1, 0].tolist() == case["expected"]
    last = channel_shuffle(x.contiguous(memory_format=torch.channels_last), groups)
    assert torch.equal(last, channel_shuffle(x, groups))
    with pytest.raises(ValueError, match=f"groups: got 5; allowed: a divisor of the {channels} channels"):
        channel_shuffle(x, 5)


@pytest.mark.parametrize("case", cases("pc_mixedop:"))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_published_mixture(case, layout):
    words = case["name"].split(":")
    divisor, channels, stride = int(words[1][1:]), int(words[2][1:]), int(words[3][-1])
    mixed, expected = weighted_(edge(channels, divisor, stride)), case["expected"]
    assert sum(parameter.numel() for parameter in mixed.parameters()) == expected["params"]
    found = mixed(image(2, channels, 8, 8).contiguous(memory_format=layout), alpha(1, 8)[0].softmax(-1))
    matches(found, expected["out"])
    assert found.sum((0, 2, 3)).tolist() == pytest.approx(expected["per_channel_sum"], abs=1e-6)
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("case", cases("count:supernet:"))
def test_published_sizes_of_an_edge(case):
    mixed = edge(16, case["input"].get("K", 1))
    size = sum(parameter.numel() for parameter in mixed.parameters())
    assert size == case["expected"]["mixed_op_params_C16_stride1"]


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_channels_that_go_past_stay_as_they_are(divisor):
    x, part = torch.rand(2, 16, 4, 4), 16 // divisor
    inner = Called()
    y = PartialChannels(inner, 16, divisor)(x, "weights", 7)
    assert torch.equal(inner.seen[0][0], x[:, :part]) and inner.seen[0][1] == ("weights", 7)
    for channel in range(16):
        place = channel % part * divisor + channel // part
        assert torch.equal(y[:, place], x[:, channel] + (100.0 if channel < part else 0.0))


def test_every_channel_gets_its_turn():
    for mixing in ("shuffle", "shift"):
        x, touched = torch.zeros(1, 16, 2, 2), []
        step = PartialChannels(Called(), 16, 4, mixing=mixing)
        for _ in range(4):
            x = step(x)
            touched.append(int((x[0, :, 0, 0] > 0).sum()))
        assert touched[0] == 4 and touched[1] > 4, mixing  # without either it would be the same four
        assert touched[-1] == (16 if mixing == "shift" else touched[1])


@pytest.mark.parametrize("mixing", ["shuffle", "shift", "random"])
def test_the_bypass_is_pooled_where_the_edge_halves(mixing):
    x = torch.rand(2, 8, 6, 6)
    step = PartialChannels(Called(stride=2), 8, 4, 2, mixing)
    step.redraw_(torch.Generator().manual_seed(3))
    y, inside = step(x), set(step.order[:2].tolist())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in step.modules())
    pooled = functional.max_pool2d(x, 2)
    values = {
        channel: x[:, channel, ::2, ::2] + 100.0 if channel in inside else pooled[:, channel] for channel in range(8)
    }
    order = {"shuffle": [0, 2, 4, 6, 1, 3, 5, 7], "shift": [2, 3, 4, 5, 6, 7, 0, 1], "random": list(range(8))}[mixing]
    assert torch.equal(y, torch.stack([values[channel] for channel in order], dim=1))


def test_random_channels_are_drawn_and_keep_their_places():
    x, step = torch.rand(2, 12, 3, 3), PartialChannels(Called(), 12, 3, mixing="random")
    chosen = set()
    for seed in range(12):
        step.redraw_(torch.Generator().manual_seed(seed))
        y, again = step(x), step(x)
        assert torch.equal(y, again)  # a function, until the channels are drawn again
        changed = {channel for channel in range(12) if not torch.equal(y[:, channel], x[:, channel])}
        assert changed == set(step.order[:4].tolist()) and len(changed) == 4
        assert all(torch.equal(y[:, channel], x[:, channel] + 100.0) for channel in changed)
        chosen |= changed
    assert chosen == set(range(12))
    twin = PartialChannels(Called(), 12, 3, mixing="random")
    twin.load_state_dict(step.state_dict())
    assert torch.equal(twin(x), step(x))
    fixed = PartialChannels(Called(), 12, 3)
    fixed.redraw_()
    assert fixed.order.tolist() == list(range(12)) and not fixed.state_dict()


@pytest.mark.parametrize("mixing", ["shuffle", "shift", "random"])
@pytest.mark.parametrize("channels", [4, 8])
def test_the_memory_layout_stays(channels, mixing):
    step = PartialChannels(Called(), channels, 4, mixing=mixing)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(2, channels, 4, 4).contiguous(memory_format=layout)
        assert step(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mixing", ["shuffle", "shift", "random"])
def test_one_part_is_the_mixed_operation(stride, mixing):
    x, weights = image(2, 8, 8, 8), alpha(1, 8)[0].softmax(-1)
    whole, plain = edge(8, 1, stride, mixing), MixedOp(candidates(stride)(8))
    assert isinstance(whole, MixedOp)
    assert torch.equal(PartialChannels(weighted_(whole), 8, 1, stride, mixing)(x, weights), whole(x, weights))
    assert torch.equal(whole(x, weights), weighted_(plain)(x, weights))


@pytest.mark.parametrize("divisor", [2, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_candidates_keep_one_part_of_the_memory(divisor, stride):
    weights = torch.full((8,), 0.125, requires_grad=True)
    x = torch.rand(3, 32, 8, 8, requires_grad=True)
    whole, partial = MixedOp(candidates(stride)(32)), edge(32, divisor, stride)
    part = x[:, : 32 // divisor].contiguous()
    kept = saved(partial.inner, part, weights)
    assert kept * divisor == saved(whole, x, weights)
    bypass = 0
    if stride == 2:  # what a pooling keeps: its input, and for every output a place (8 bytes for a float's 4)
        bypass = 4 * 3 * 32 * 64 + 8 * 3 * (32 - 32 // divisor) * 16
        assert saved(partial, x, weights) <= kept + bypass
    else:
        assert saved(partial, x, weights) == kept


@pytest.mark.parametrize("divisor", [2, 4])
def test_candidates_do_their_part_of_the_arithmetic(divisor):
    """Depthwise convolutions at one K-th, pointwise ones at one K^2-th: four and two of 1 x 1, kernels 9, 25."""
    channels, area = 16, 64
    part = channels // divisor
    with torch.device("meta"):
        macs = count(edge(channels, divisor), (torch.zeros(1, channels, 8, 8), torch.full((8,), 0.1))).macs
    assert macs == area * (part * (2 * 9 + 2 * 25 + 9 + 25) + part**2 * 6)


def test_it_works_around_other_candidates():
    mixed = partial_edge(
        lambda channels: {name: make_edge_operation(name, channels, False) for name in NB201_OPERATIONS},
        16,
        1,
        divisor=4,
    )
    weights = torch.full((5,), 0.2, requires_grad=True)
    y = mixed(torch.rand(2, 16, 8, 8), weights)
    y.square().sum().backward()
    assert y.shape == (2, 16, 8, 8) and bool((weights.grad != 0)[1:].all())
    assert sum(parameter.numel() for parameter in mixed.parameters()) == 4 * 4 * (1 + 9)
    assert mixed(torch.rand(2, 16, 8, 8), [0.0, 1.0, 0.0, 0.0, 0.0]).shape == (2, 16, 8, 8)


def test_gradients_reach_all_channels():
    mixed, x = edge(8, 4).double(), torch.rand(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = alpha(1, 8)[0].softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: mixed(*inputs).tanh(), (x, weights))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((10, 4), "channel_divisor: got 4; allowed: 1, 2, 5, 10 for an edge of 10 channels.*Widen"),
        ((8, 0), "channel_divisor: got 0; allowed: 1, 2, 4, 8 for"),
        (
            (4, 4, 2),
            "channel_divisor: got 4; allowed: 1, 2 for an edge of 4 channels that halves the resolution",
        ),
        ((8, 2, 1, "rotate"), "mixing: got 'rotate'; allowed: shuffle, shift, random"),
    ],
)
def test_what_does_not_divide_is_refused(arguments, text):
    with pytest.raises(UserError, match=text):
        edge(*arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((10, 4), "divisor: got 4; allowed: a divisor of the 10 channels"),
        ((8, 4, 3), "stride: got 3; allowed: 1 or 2"),
        ((8, 4, 1, "rotate"), "mixing: got 'rotate'; allowed: shuffle, shift, random"),
    ],
)
def test_impossible_layers_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        PartialChannels(nn.Identity(), *arguments)
