"""Average pooling as a convolution: torch's values and derivatives of first and second order."""

import pytest
import torch
from torch.nn import functional

from archsmith.supernet import average_pool as module
from archsmith.supernet.average_pool import average_pool


def torchs(x):
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (1, 2, 3, 5), (4, 16, 8, 7)])
def test_values_and_derivatives_are_torchs(shape):
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    probe = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(shape)
    assert module._fast_for(x)
    figures = []
    for pool in (average_pool, torchs):
        y = pool(x)
        (first,) = torch.autograd.grad((y.square() * probe).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        figures.append((y, first, second))
    for mine, theirs in zip(*figures, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", [torch.randn(2, 3, 1, 5), torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4)])
def test_elsewhere_it_is_torchs_own(x):
    assert not module._fast_for(x)
    assert torch.equal(average_pool(x), torchs(x))
