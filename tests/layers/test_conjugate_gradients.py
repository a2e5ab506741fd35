"""Batched conjugate gradients: exact after as many steps as unknowns, every system by itself."""

from __future__ import annotations

import pytest
import torch

from archsmith.layers.conjugate_gradients import conjugate_gradients


def systems(count: int = 5, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(count, size, size, generator=generator, dtype=dtype)
    matrices = root @ root.mT + 0.5 * torch.eye(size, dtype=dtype)
    return matrices, torch.randn(count, size, generator=generator, dtype=dtype)


def product(matrices: torch.Tensor):
    return lambda p: (matrices @ p.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("jacobi", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
def test_it_equals_a_direct_solution(jacobi, early_stop):
    matrices, right = systems()
    diagonal = matrices.diagonal(dim1=1, dim2=2) if jacobi else None
    x, steps = conjugate_gradients(product(matrices), right, diagonal=diagonal, rtol=1e-28, early_stop=early_stop)
    assert torch.allclose(x, torch.linalg.solve(matrices, right), atol=1e-10)
    assert steps == 32 if not early_stop else 6 <= steps < 15


def test_a_diagonal_matrix_needs_one_step_where_it_is_the_preconditioner():
    diagonal = torch.tensor([[1.0, 10.0, 1000.0]], dtype=torch.float64)
    right = torch.ones(1, 3, dtype=torch.float64)
    plain, steps = conjugate_gradients(lambda p: diagonal * p, right)
    x, fewer = conjugate_gradients(lambda p: diagonal * p, right, diagonal=diagonal)
    assert (fewer, steps) == (1, 3) and torch.allclose(x, plain, rtol=1e-4) and torch.allclose(x, 1 / diagonal)


def test_every_system_stops_by_itself():
    matrices, right = systems(3)
    matrices[1] = torch.eye(6)  # ends after one step, and stays there
    right[2] = 0
    seen = []
    solve = product(matrices)
    x, _ = conjugate_gradients(lambda p: solve(seen.append(p.clone()) or p), right, rtol=1e-28)
    assert torch.equal(x[1], right[1]) and not x[2].any()
    alone, _ = conjugate_gradients(product(matrices[:1]), right[:1], rtol=1e-28)
    assert torch.allclose(x[:1], alone, rtol=1e-12)
    assert all(torch.equal(p[1], seen[1][1]) for p in seen[2:])  # its direction is frozen


def test_the_limit_is_on_squares():
    matrices, right = systems(1, 40)
    x, _ = conjugate_gradients(product(matrices), right, rtol=1e-4, iterations=400)
    residual = (right - product(matrices)(x)).norm() / right.norm()
    assert 1e-4 < float(residual) <= 1e-2  # 1e-2 in norm, not 1e-4


def test_a_singular_system_keeps_its_last_finite_solution():
    matrix = torch.zeros(2, 3, 3, dtype=torch.float64)
    matrix[1] = torch.eye(3)
    right = torch.ones(2, 3, dtype=torch.float64)
    x, steps = conjugate_gradients(product(matrix), right)
    assert not x[0].any() and torch.equal(x[1], right[1]) and steps == 1
    nan, _ = conjugate_gradients(product(matrix), right * torch.nan)
    assert not nan.any()


def test_nothing_to_do_takes_no_step():
    assert conjugate_gradients(lambda p: p, torch.zeros(2, 3))[1] == 0
