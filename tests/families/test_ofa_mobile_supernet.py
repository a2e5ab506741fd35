from __future__ import annotations

import numpy as np
import pytest
import torch
from ofa_samples import GOLDEN
from torch.nn import functional

from archsmith.families.ofa_mobile import OfaMobileFamily, open_family
from archsmith.supernet import Supernet
from archsmith.testing.families import images, worn_
from archsmith.train.children import train_mode_


@pytest.fixture
def family():
    return open_family("ofa-mobile", image=(3, 9, 12), num_classes=5, width=0.25)


def children(family, count=3):
    drawn = [family.space.sample(np.random.default_rng(seed)) for seed in range(count)]
    return [family.largest(), family.smallest(), *drawn]


def test_the_supernet_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        for width, name in ((1.0, "mbv3_w1.0"), (1.2, "mbv3_w1.2")):
            supernet = OfaMobileFamily(image=(3, 224, 224), num_classes=1000, width=width).supernet()
            published = GOLDEN["network_sizes"][name]["supernet_params_with_kernel_transforms"]
            assert sum(parameter.numel() for parameter in supernet.parameters()) == published


@pytest.mark.parametrize("training", [False, True])
def test_a_child_alone_computes_what_it_computes_inside(family, training: bool) -> None:
    supernet, batch = worn_(family.supernet(seed=0)).double(), images(family).double()
    assert isinstance(supernet, Supernet)
    train_mode_(supernet, regularised=False) if training else supernet.eval()
    supernet.activate(family.smallest())
    for child in children(family):
        alone = supernet.extract(child)
        assert supernet.active == family.smallest()
        train_mode_(alone, regularised=False) if training else alone.eval()
        assert family.architecture_of(alone) == child
        supernet.activate(child)
        torch.testing.assert_close(alone(batch), supernet(batch), rtol=0, atol=1e-12)
        supernet.activate(family.smallest())


def test_the_largest_child_is_the_whole_network(family) -> None:
    supernet, batch = worn_(family.supernet(seed=0)).eval(), images(family)
    with torch.no_grad():
        assert torch.equal(supernet(batch), supernet.network(batch))
    assert torch.equal(
        family.build(family.largest(), seed=0).stem.conv.weight, family.supernet(seed=0).network.stem.conv.weight
    )


def test_kernels_start_as_their_centre_and_pass_through_the_matrices(family) -> None:
    """The smallest kernel is what two matrices make of the centre: first 5 x 5, then 3 x 3 of the result."""
    supernet = family.supernet(seed=0)
    whole = supernet.network.units[0][0].depthwise.conv.weight.detach()
    small = supernet.extract(family.smallest()).units[0][0].depthwise.conv.weight
    assert torch.equal(small, whole[: len(small), :, 2:5, 2:5])
    by_three, by_five = supernet.transforms["0-0"].matrices
    with torch.no_grad():
        by_five += torch.randn(25, 25, generator=torch.Generator().manual_seed(0))
        by_three += torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
    middle = functional.linear(whole[:, :, 1:6, 1:6].flatten(2), by_five).view(-1, 1, 5, 5)
    expected = functional.linear(middle[:, :, 1:4, 1:4].flatten(2), by_three).view(-1, 1, 3, 3)
    small = supernet.extract(family.smallest()).units[0][0].depthwise.conv.weight
    torch.testing.assert_close(small, expected[: len(small)])
    assert not len(family.supernet(seed=0, kernel_transform=False).transforms["0-0"].matrices)


def test_what_is_not_active_gets_no_gradient(family) -> None:
    supernet = worn_(family.supernet(seed=0)).train()
    supernet.activate(family.smallest())
    supernet(images(family)).square().sum().backward()
    unit = supernet.network.units[0]
    hidden = family.skeleton.block(0, 0)[0] * 3
    gradient = unit[0].depthwise.conv.weight.grad
    assert gradient[:hidden, :, 2:5, 2:5].any() and not gradient[hidden:].any()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in unit[2].parameters())
    assert all(matrix.grad.any() for matrix in supernet.transforms["0-0"].matrices)
