"""Conjugate gradients for many small systems at once, each with its own end, matrices known by their products only."""

# ... any leading axes (one system each), D unknowns

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    diagonal: Tensor | None = None,
    iterations: int = 32,
    rtol: float = 1e-12,
    atol: float = 1e-12,
    early_stop: bool = True,
) -> tuple[Tensor, int]:
    """Solve ``A x = b`` for a batch of symmetric positive definite matrices.

    Every system starts at zero and stops by itself: when ``r.r <= rtol * max(atol, b.b)``, or when a step would not be
    finite (a singular matrix, rounding); then its solution stays what it was. Note that *squares* are compared: an
    ``rtol`` of 1e-12 asks for a residual of 1e-6 of the right-hand side. In exact arithmetic it ends after D steps.

    Args:
        product: Maps directions (..., D) to ``A`` times them, system by system.
        right: Right-hand sides (..., D), floating point.
        diagonal: Diagonals of the matrices (..., D), positive, for Jacobi's preconditioner; None for none.
        iterations: Most steps that are taken.
        rtol: Relative limit of the squared residual.
        atol: Squared right-hand sides below it count as this large.
        early_stop: Look after every step whether all systems have stopped. False takes all steps, stopped systems
            standing still: the same solution, without control flow that depends on data.

    Returns:
        Solutions (..., D), and the number of steps taken.

    Example:
        >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> x, steps = conjugate_gradients(lambda p: p @ matrix, torch.tensor([[1.0, 2.0]]))
        >>> bool((x @ matrix).allclose(torch.tensor([1.0, 2.0]))), steps
        (True, 2)
    """
    x = torch.zeros_like(right)
    residual = right
    conditioned = residual if diagonal is None else residual / diagonal
    direction = conditioned
    length = _dot(residual, conditioned)
    squared = _dot(residual, residual)
    limit = rtol * squared.clamp_min(atol)
    active = squared > limit  # False for NaN
    steps = 0
    for _ in range(iterations):
        if early_stop and not bool(active.any()):
            break
        image = product(direction)
        step = length / _dot(direction, image)
        moved, reached = residual - step * image, x + step * direction
        squared = _dot(moved, moved)
        # A step that leaves the finite numbers is not taken, and is the last one that is tried.
        active = active & squared.isfinite()
        x, residual = torch.where(active, reached, x), torch.where(active, moved, residual)
        conditioned = residual if diagonal is None else residual / diagonal
        longer = _dot(residual, conditioned)
        direction = torch.where(active, conditioned + longer / length * direction, direction)
        length = torch.where(active, longer, length)
        active = active & (squared > limit)
        steps += 1
    return x, steps


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
