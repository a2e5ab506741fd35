"""Normalisation with what follows it: the same values and derivatives as one after the other."""

import pytest
import torch
from torch.nn import functional

from archsmith.supernet.norm_sum import normalised_relu, normalised_sum


def maps(count, *, shape=(3, 4, 5, 6), seed=0):
    torch.manual_seed(seed)
    made = [(torch.randn(shape, dtype=torch.float64) * 2 + 1).contiguous(memory_format=torch.channels_last)]
    made += [torch.randn_like(made[0]) for _ in range(count - 1)]
    return [x.requires_grad_() for x in made]


def norm(y, eps):
    return functional.batch_norm(y, None, None, None, None, True, 0.0, eps)


def plain_sum(weights, ys, eps, others):
    terms = [w * norm(y, e) for w, y, e in zip(weights, ys, eps, strict=False)]
    return sum(terms + [w * z for w, z in zip(weights[len(ys) :], others, strict=True)])


def assert_same(found, expected, inputs):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    probe = torch.cos(torch.arange(found.numel(), dtype=found.dtype)).view_as(found)
    gradients = []
    for output in (found, expected):
        first = torch.autograd.grad(output, inputs, probe, retain_graph=True)
        tracked = torch.autograd.grad(output, inputs, probe, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in tracked), inputs, allow_unused=True)
        gradients.append((*first, *tracked, *second))
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_relu_of_a_normalised_map():
    (y,) = maps(1)
    z, mean, var = normalised_relu(y, 1e-3)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert_same(z, norm(y, 1e-3).relu(), [y])
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(var, y.var((0, 2, 3), unbiased=False))
    assert not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize(("count", "others"), [(1, 0), (3, 2), (0, 2)])
def test_weighted_sum(count, others):
    tensors = maps(count + others)
    ys, zs = tensors[:count], tensors[count:]
    weights = torch.linspace(-0.5, 1.0, count + others, dtype=torch.float64).requires_grad_()
    eps = [10.0**-k for k in range(1, count + 1)]
    total, mean, var = normalised_sum(weights, ys, eps, zs)
    assert total.is_contiguous(memory_format=torch.channels_last) and mean.shape == var.shape == (count, 4)
    assert_same(total, plain_sum(weights, ys, eps, zs), [*tensors, weights])


def test_a_sum_keeps_other_maps_for_the_gradient_of_weights_alone():
    ys, zs = maps(2), maps(2, seed=1)
    kept = []
    for learned in (False, True):
        weights = torch.rand(4, dtype=torch.float64).requires_grad_(learned)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            total, _, _ = normalised_sum(weights, ys, [1e-5] * 2, zs)
        assert sum(x.numel() == total.numel() for x in kept) == 2 + 2 * learned
        if not learned:
            assert_same(total, plain_sum(weights, ys, [1e-5] * 2, zs), [*ys, *zs])


def test_float32_agrees_although_means_are_far_from_zero():
    y = (torch.randn(16, 8, 16, 16) + 30.0).contiguous(memory_format=torch.channels_last)
    found, _, _ = normalised_sum(torch.tensor([0.3]), [y], [1e-5], [])
    torch.testing.assert_close(found.double(), 0.3 * norm(y.double(), 1e-5), rtol=0, atol=1e-4)
