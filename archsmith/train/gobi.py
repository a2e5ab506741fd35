"""GOBI: the best input of a differentiable function, by second-order descent on the input itself.

Source: Tuli et al. 2022, "FlexiBERT", arXiv 2205.11656, Algorithm 2; GOBI is of arXiv 2112.06480.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from archsmith.core.errors import Shown, UserError
from archsmith.train.adahessian import AdaHessian

# K starts, D dimensions


def cosine_rate(step: int, *, rate: float = 0.5, period: int = 2) -> float:
    """Return the learning rate of step 0, 1, ...: half a cosine from ``rate`` to 0 in ``period`` steps, and back.

    With the published period of 2 it is 0.5, 0.25, 0, 0.25, 0.5, ...: every fourth step does not move.
    """
    return rate * (1 + math.cos(math.pi * step / period)) / 2


@dataclass(frozen=True)
class Optimum:
    """What a descent from several starts ends with.

    Attributes:
        points: (K, D), where each start ended.
        values: (K,), the function there.
        steps: (K,), steps that each start took.
    """

    points: Tensor
    values: Tensor
    steps: Tensor


def optimise_inputs(
    objective: Callable[[Tensor], Tensor],
    starts_KD: Tensor,
    *,
    low: Tensor,
    high: Tensor,
    steps: int = 200,
    rate: float = 0.5,
    period: int = 2,
    tolerance: float = 1e-5,
    patience: int = 6,
    trust: float | None = None,
    generator: torch.Generator | None = None,
) -> Optimum:
    """Descend with AdaHessian from several starts at once, inside a box.

    All starts go in one batch: where ``objective`` treats rows alone, the Hessian falls apart into theirs, and each row
    moves as if it were by itself. A start stops after ``patience`` steps in a row whose change is below ``tolerance``.

    Args:
        objective: Maps (K, D) to (K,), twice differentiable, row by row; smaller is better.
        starts_KD: Where to begin.
        low: Lower bounds, broadcast to (K, D).
        high: Upper bounds.
        steps: At most.
        rate: See ``cosine_rate``.
        period: See ``cosine_rate``.
        tolerance: Of the change of the objective.
        patience: Such steps in a row.
        trust: Share of the box's sides that a start may move away, to either side (0.25 is published); None for all.
        generator: Source of the random signs.

    Raises:
        UserError: Bounds that cross, or values of another shape.
    """
    low, high = low.expand_as(starts_KD), high.expand_as(starts_KD)
    if bool((low > high).any()):
        raise UserError("bounds", Shown("a lower bound above its upper bound"), allowed="low <= high")
    if trust is not None:
        reach = trust * (high - low)
        low, high = torch.maximum(low, starts_KD - reach), torch.minimum(high, starts_KD + reach)
    points = starts_KD.detach().clamp(low, high).clone().requires_grad_()
    optimiser = AdaHessian([points], lr=rate, generator=generator)
    before = torch.full((len(points),), math.inf, dtype=points.dtype)
    calm = torch.zeros(len(points), dtype=torch.long)
    taken = torch.zeros(len(points), dtype=torch.long)
    for step in range(steps):
        values = objective(points)
        if values.shape != (len(points),):
            raise UserError("objective", Shown(f"values of shape {tuple(values.shape)}"), allowed=f"({len(points)},)")
        calm = torch.where((values.detach() - before).abs() < tolerance, calm + 1, torch.zeros_like(calm))
        active = calm < patience
        if not bool(active.any()):
            break
        before = values.detach()
        (points.grad,) = torch.autograd.grad(values.sum(), points, create_graph=True, materialize_grads=True)
        optimiser.param_groups[0]["lr"] = cosine_rate(step, rate=rate, period=period)
        held = points.detach().clone()
        optimiser.step() if points.grad.requires_grad else None
        with torch.no_grad():
            points.copy_(torch.where(active[:, None], points.clamp(low, high), held))
        taken += active
        points.grad = None
    with torch.no_grad():
        return Optimum(points.detach(), objective(points).detach(), taken)
