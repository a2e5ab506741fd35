"""Plain networks: shapes, names, known numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from archsmith.layers.plain_nets import VGG, PlainResNet, PlainVgg


@pytest.mark.parametrize(("name", "convolutions"), [("vgg11", 8), ("vgg13", 10), ("vgg16", 13)])
def test_vgg(name: str, convolutions: int) -> None:
    thin = PlainVgg(tuple(width // 16 for width in VGG[name]), 3, 10)
    assert thin(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    found = sum(isinstance(module, torch.nn.Conv2d) for module in thin.modules())
    assert found == convolutions == int(name[3:]) - 3  # the name counts three linear layers that CIFAR networks lack


def test_resnet_of_basic_blocks_and_of_bottlenecks() -> None:
    basic = PlainResNet((1, 2), (4, 8), False, False, 1, 3)
    assert basic(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert basic.get_submodule("layer2.0.shortcut.0").weight.shape == (8, 4, 1, 1)
    assert len(list(basic.get_submodule("layer1.0.shortcut").parameters())) == 0
    with torch.device("meta"):
        fifty = PlainResNet((3, 4, 6, 3), (64, 128, 256, 512), True, True, 3, 1000)
    assert sum(p.numel() for p in fifty.parameters()) == 25_557_032  # the number everyone has for ResNet-50
    assert fifty(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)
