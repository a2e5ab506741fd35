"""Views of parameters while a network computes, from parts written down by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from archsmith.atoms.units import TensorCut
from archsmith.core.errors import UserError
from archsmith.supernet.elastic_slices import (
    MappedTensor,
    SlicedAttribute,
    SlicedAxis,
    SlicedChildren,
    SlicedTensor,
    Slices,
)


def first(width: int) -> int:
    return width


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )


def conv_parts() -> list[SlicedAxis]:
    rows = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "2.weight", "2.bias"]
    return [SlicedAxis(name, 0, ("width",), first) for name in rows] + [SlicedAxis("4.weight", 1, ("width",), first)]


def small(net: nn.Sequential, width: int) -> nn.Sequential:
    made = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 5, padding=2, groups=width),
        nn.ReLU(),
        nn.Conv2d(width, 4, 1),
    )
    state = {}
    for name, tensor in net.state_dict().items():
        if name == "4.weight":
            tensor = tensor[:, :width]
        elif tensor.dim() and name != "4.bias":
            tensor = tensor[:width]
        state[name] = tensor
    made.load_state_dict(state)
    return made


def test_the_active_part_is_the_small_network_and_the_rest_gets_no_gradient() -> None:
    net, x = conv_net(), torch.randn(2, 3, 6, 6)
    whole = net.eval()(x)
    slices = Slices(net, conv_parts())
    slices.choose({"width": 5})
    alone = small(net, 5).eval()
    with slices.active():
        out = net(x)
        assert net[2].groups == 5 and net[1].num_features == 5
    assert torch.allclose(out, alone(x), atol=1e-6)
    out.square().sum().backward()
    alone(x).square().sum().backward()
    weight = net[0].weight
    assert isinstance(weight, nn.Parameter) and weight.shape[0] == 8
    assert torch.equal(weight.grad[5:], torch.zeros_like(weight.grad[5:]))
    assert torch.allclose(weight.grad[:5], alone[0].weight.grad, atol=1e-5)
    assert torch.equal(net[4].weight.grad[:, 5:], torch.zeros(4, 3, 1, 1))
    assert net[2].groups == 8 and torch.equal(net(x), whole)


def test_running_statistics_are_written_into_the_active_channels_only() -> None:
    net, x = conv_net().train(), torch.randn(4, 3, 6, 6)
    slices = Slices(net, conv_parts())
    slices.choose({"width": 3})
    with slices.active():
        net(x)
    assert torch.equal(net[1].running_mean[3:], torch.zeros(5)) and bool((net[1].running_mean[:3] != 0).all())


def test_scattered_positions_are_copies_that_write_back() -> None:
    net, x = conv_net().train(), torch.randn(4, 3, 6, 6)
    odd = np.array([1, 4, 6])
    parts = [SlicedAxis(part.tensor, part.axis, ("width",), lambda _: odd) for part in conv_parts()]
    slices = Slices(net, parts)
    slices.choose({"width": 3})
    with slices.active():
        net(x).sum().backward()
    changed = torch.nonzero(net[1].running_var != 1).flatten().tolist()
    assert changed == [1, 4, 6]
    assert torch.nonzero(net[2].bias.grad).flatten().tolist() == [1, 4, 6]


def test_several_parts_on_one_axis_keep_what_all_of_them_keep() -> None:
    net = nn.Linear(6, 2)
    slices = Slices(
        net,
        [
            SlicedAxis("weight", 1, ("a",), lambda a: [*range(a), 3, 4, 5]),
            SlicedAxis("weight", 1, ("b",), lambda b: [0, 1, 2, *range(3, 3 + b)]),
        ],
    )
    slices.choose({"a": 2, "b": 1})
    assert slices.cuts({"a": 2, "b": 1})["weight"].axes[1].tolist() == [0, 1, 3]
    with slices.active():
        assert net.in_features == 3


def test_jointly_cut_axes_and_children_and_attributes_and_maps() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Tanh(), nn.Tanh(), nn.Tanh())
    net.number = 3  # type: ignore[assignment]
    cut = TensorCut(joint=((0, 1), np.array([[0], [2], [5], [7]])))
    slices = Slices(
        net,
        [
            SlicedTensor("0.weight", ("inputs",), lambda inputs: cut if inputs == 2 else None),
            SlicedChildren("", ("depth",), lambda depth: range(1 + depth)),
            SlicedAttribute("number", ("depth",), lambda depth: depth),
            MappedTensor("0.weight", ("inputs",), lambda w, inputs: 2 * w, lambda inputs: inputs == 2),
        ],
    )
    weight = net[0].weight.detach().reshape(-1)
    slices.choose({"inputs": 2, "depth": 1})
    with slices.active():
        assert torch.equal(net[0].weight.detach().flatten(), 2 * weight[[0, 2, 5, 7]])
        assert len(net) == 2 and net.number == 1 and net[0].in_channels == 2
    assert len(net) == 4 and net.number == 3 and net[0].in_channels == 4


def test_everything_is_back_after_an_error_inside() -> None:
    net = conv_net()
    before = {name: id(p) for name, p in net.named_parameters()}
    slices = Slices(net, conv_parts())
    slices.choose({"width": 2})
    with pytest.raises(RuntimeError), slices.active():
        net(torch.randn(1, 7, 4, 4))
    assert {name: id(p) for name, p in net.named_parameters()} == before and net[2].groups == 8


def test_tied_weights_are_sliced_in_every_place() -> None:
    net = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7, bias=False))
    net[1].weight = net[0].weight
    slices = Slices(net, [SlicedAxis("0.weight", 1, ("w",), first)])
    slices.choose({"w": 4})
    with slices.active():
        assert net[1].weight is net[0].weight and net[1].in_features == net[0].embedding_dim == 4
        assert net(torch.tensor([[1, 2]])).shape == (1, 2, 7)


def test_recurrent_layers_use_the_views() -> None:
    net = nn.LSTM(5, 6)
    slices = Slices(net, [SlicedAxis("weight_ih_l0", 1, ("w",), first)])
    slices.choose({"w": 3})
    with slices.active():
        assert net(torch.randn(2, 1, 3))[0].shape == (2, 1, 6)
    assert net(torch.randn(2, 1, 5))[0].shape == (2, 1, 6)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (SlicedAxis("9.weight", 0, ("w",), first), "9.weight"),
        (SlicedAxis("0.weight", 4, ("w",), first), "axis 4"),
        (SlicedAttribute("0.nothing", ("w",), first), "nothing"),
        (SlicedChildren("0", ("w",), range), "Conv2d"),
        (SlicedChildren("nine", ("w",), range), "nine"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        Slices(conv_net(), [part])  # type: ignore[list-item]


def test_choices_that_do_not_fit_are_refused() -> None:
    slices = Slices(conv_net(), conv_parts())
    with pytest.raises(UserError, match="missing: width"):
        slices.choose({})
    with pytest.raises(UserError, match="a number up to 8"):
        slices.choose({"width": 9})
    with pytest.raises(UserError, match="some of axis 0"):
        slices.choose({"width": 0})
    with pytest.raises(UserError, match="ascending"):
        Slices(conv_net(), [SlicedAxis("0.weight", 0, ("w",), lambda w: [2, 1])]).choose({"w": 1})


def test_a_copy_is_as_elastic_as_the_original() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.inner, self.outer = 4, nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(x).view(len(x), self.heads, 2).flatten(1))

    net = Heads()
    parts = [
        SlicedAxis("inner.weight", 0, ("heads",), lambda heads: 2 * heads),
        SlicedAxis("inner.bias", 0, ("heads",), lambda heads: 2 * heads),
        SlicedAxis("outer.weight", 1, ("heads",), lambda heads: 2 * heads),
        SlicedAttribute("heads", ("heads",), first),
    ]
    slices, x = Slices(net, parts), torch.randn(5, 3)
    slices.choose({"heads": 2})
    twin = copy.deepcopy(slices)
    with slices.active(), twin.active():
        assert twin.model is not net and torch.equal(twin.model(x), net(x))
    slices.choose({"heads": 4})
    twin.choose({"heads": 1})
    with twin.active():
        assert twin.model(x).shape == (5, 2) and twin.model.outer.in_features == 2
        assert net.heads == 4 and net.inner.out_features == 8
