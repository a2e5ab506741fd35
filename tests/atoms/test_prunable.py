"""Which convolutions are pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from archsmith.atoms.prunable import chosen_convolutions, convolutions, unwrapped, weight_of
from archsmith.core.errors import UserError
from archsmith.layers.plain_nets import PlainResNet


def network() -> nn.Sequential:
    shared = nn.Conv2d(8, 8, 3)
    frozen = nn.Conv2d(8, 8, 3)
    frozen.weight.requires_grad_(False)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        shared,
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        frozen,
        nn.Sequential(shared),
        nn.Linear(8, 2),
    )


def test_each_has_its_reason() -> None:
    reasons = {one.name: one.kept for one in convolutions(network())}
    assert list(reasons) == ["0", "1", "2", "3", "4", "5"]
    assert reasons["1"] == reasons["3"] == ""
    assert reasons["0"] == "the first convolution"
    assert reasons["2"].startswith("depthwise: removing a kernel removes a channel")
    assert reasons["4"] == "its weight is computed from other parameters"
    assert reasons["5"] == "its weight is frozen"
    assert [one.name for one in chosen_convolutions(network())] == ["1", "3"]
    assert [one.name for one in chosen_convolutions(network(), names=["3", "0"], exclude=["3"])] == ["0"]


def test_shortcuts_stay_whole_unless_asked_for() -> None:
    net = PlainResNet((1, 1), (4, 8), False, False, 1, 3)
    shortcut = "layer2.0.shortcut.0"
    assert shortcut not in [one.name for one in chosen_convolutions(net)]
    assert [one.name for one in chosen_convolutions(net, names=[shortcut])] == [shortcut]


def test_wrappers_are_looked_through() -> None:
    net = network()
    compiled = torch.compile(net, backend="eager")
    assert unwrapped(nn.DataParallel(compiled)) is net
    assert [one.name for one in chosen_convolutions(compiled)] == ["1", "3"]
    assert weight_of(compiled, "1") is net[1].weight


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["9"], r"layer: got '9'; allowed: 0, 1, 2"),
        (["2"], r"layer: got 2 \(depthwise: .*\); allowed: other convolutions"),
        (["5"], r"layer: got 5 \(its weight is frozen\)"),
    ],
)
def test_wrong_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen_convolutions(network(), names=names)


def test_nothing_to_prune_is_said_with_reasons() -> None:
    with pytest.raises(
        UserError, match=r"no convolution to prune \(0: the first convolution; 1: depthwise.*allowed: one"
    ):
        chosen_convolutions(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)))
    with pytest.raises(UserError, match="it has no Conv2d"):
        chosen_convolutions(nn.Linear(2, 2))
