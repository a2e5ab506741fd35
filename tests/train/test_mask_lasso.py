"""The group lasso on what a mask removes: gradients in closed form, by autograd, and that kept weights feel nothing."""

from __future__ import annotations

import pytest
import torch

from archsmith.atoms.weight_masks import FIXED_POOL, Kernels, NOfM, Patterns, Unstructured
from archsmith.train.mask_lasso import ComplementLasso, complement_lasso, complement_lasso_gradient


def case() -> tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 8, 3, 3, generator=generator, dtype=torch.float64))
    scores = torch.rand(4, 8, 3, 3, generator=generator, dtype=torch.float64)
    return weight, Patterns(FIXED_POOL[:4]).choose(scores), Kernels(55).choose(scores)


def test_the_gradient_is_the_published_formula() -> None:
    weight, by_pattern, by_kernel = case()
    strength = 4e-3
    ComplementLasso([(weight, [by_pattern, by_kernel])]).add_gradient_(strength)
    assert weight.grad is not None
    expected = torch.zeros_like(weight)
    for mask in (by_pattern, by_kernel):
        for o in range(4):
            for i in range(8):
                removed = weight.detach()[o, i] * ~mask[o, i]
                expected[o, i] += strength * removed / (removed.square().sum() + 1e-8).sqrt()
    assert torch.allclose(weight.grad, expected, atol=1e-12, rtol=0)
    kept = by_pattern & by_kernel
    assert kept.any() and (weight.grad[kept] == 0).all()
    assert (weight.grad[~kept] != 0).all()


@pytest.mark.parametrize(("leading", "groups"), [(1, 4), (2, 32), (4, 288)])
def test_value_and_gradient_belong_together(leading: int, groups: int) -> None:
    weight, by_pattern, by_kernel = case()
    lasso = ComplementLasso([(weight, [by_pattern, by_kernel])], leading=leading)
    value = lasso.value()
    (automatic,) = torch.autograd.grad(value, weight)
    lasso.add_gradient_(2.0)
    assert weight.grad is not None and torch.allclose(weight.grad, 2 * automatic, atol=1e-12)
    empty = complement_lasso(weight, torch.ones_like(by_kernel), leading=leading)
    assert float(empty.detach()) == pytest.approx(groups * 1e-4)


@pytest.mark.parametrize("family", [Unstructured(50), NOfM(2, 4), Kernels(50), Patterns(FIXED_POOL)])
def test_it_shrinks_what_any_family_removes_by_equal_steps_and_leaves_the_rest(family) -> None:
    weight, _, _ = case()
    mask = family.choose(torch.rand(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    start = weight.detach().clone()

    def norms(of: torch.Tensor) -> torch.Tensor:
        return (of * ~mask).flatten(2).norm(dim=-1)

    for _ in range(20):
        with torch.no_grad():
            weight -= 0.02 * complement_lasso_gradient(weight, mask)
    assert torch.equal(weight.detach()[mask], start[mask])
    # The norm falls by the step, however large it is; a squared norm would fall in proportion.
    long = norms(start) > 0.5
    assert long.any()
    assert torch.allclose(norms(start)[long] - norms(weight.detach())[long], torch.tensor(0.4).double(), atol=1e-6)
    for _ in range(380):
        with torch.no_grad():
            weight -= 0.02 * complement_lasso_gradient(weight, mask)
    assert norms(weight.detach()).max() < 0.021


def test_it_adds_to_a_gradient_and_strength_zero_adds_nothing() -> None:
    weight, by_pattern, _ = case()
    lasso = ComplementLasso([(weight, [by_pattern])])
    lasso.add_gradient_(0.0)
    assert weight.grad is None
    weight.grad = torch.ones_like(weight)
    lasso.add_gradient_(0.5)
    assert torch.allclose(weight.grad, 1 + 0.5 * complement_lasso_gradient(weight, by_pattern))
    assert float(ComplementLasso([]).value()) == 0.0


def test_the_proximal_step_shortens_norms_and_stops_at_zero() -> None:
    weight, by_pattern, _ = case()
    lasso = ComplementLasso([(weight, [by_pattern])])
    start = weight.detach().clone()

    def norms(of: torch.Tensor) -> torch.Tensor:
        return (of * ~by_pattern).flatten(2).norm(dim=-1)

    lasso.shrink_([0.3])
    assert torch.allclose(norms(weight.detach()), (norms(start) - 0.3).clamp_min(0))
    assert torch.equal(weight.detach()[by_pattern], start[by_pattern])
    for _ in range(30):
        lasso.shrink_([0.3])
    assert torch.equal(weight.detach(), start * by_pattern)
    for step in (0.3, 0.0):  # of zeros
        lasso.shrink_([step])
    assert torch.equal(weight.detach(), start * by_pattern)
