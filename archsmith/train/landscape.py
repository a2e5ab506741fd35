"""How sharp the loss is around a supernet, and what deciding costs it.

Three numbers that say whether a search ended in a flat place: the largest curvature over the logits, how much one step
uphill raises the loss over the weights, and how much accuracy is lost when the mixture becomes one architecture.

Sources: curvature over the logits as the cause of bad selections: Zela et al., "Understanding and Robustifying
Differentiable Architecture Search", arXiv 1909.09656; the step uphill: Foret et al., "Sharpness-Aware Minimization",
arXiv 2010.01412.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.graph import evaluating
from archsmith.supernet.relaxed import batch_statistics
from archsmith.supernet.updaters import RADIUS, Tensors
from archsmith.tasks.base import Task

OneLoss = Callable[[Tensors], Tensor]
"""From named tensors to a scalar; called again with the same tensors it gives the same value."""

Products = Literal["exact", "difference"]
"""How the Hessian is multiplied with a vector: by a second backward pass, or by a central difference of gradients."""


def hessian_product(loss: OneLoss, at: Tensors, vector: Tensors, how: Products = "exact") -> dict[str, Tensor]:
    """Return the loss's Hessian at a point times a vector.

    Args:
        loss: The function; only called.
        at: The point, unchanged.
        vector: Direction, by the names of ``at``.
        how: See ``Products``. The step of the difference is ``0.01 / |vector|`` to each side. Where the loss has kinks
            (ReLU, max pooling) the difference sees them and the second backward pass does not.

    Raises:
        UserError: Unknown ``how``.
    """
    names = list(at)
    if how == "exact":
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in at.items()}
        first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, allow_unused=True)
        slope = sum(
            ((each * vector[name].detach()).sum() for name, each in zip(names, first, strict=True) if each is not None),
            start=torch.zeros(()),
        )
        if not slope.requires_grad:  # a linear loss
            return {name: torch.zeros_like(tensor) for name, tensor in at.items()}
        second = torch.autograd.grad(slope, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(at[name]) if each is None else each for name, each in zip(names, second, strict=True)
        }
    if how != "difference":
        raise UserError("how", how, allowed=", ".join(get_args(Products)))
    length = _norm(vector)
    if length == 0.0:
        return {name: torch.zeros_like(tensor) for name, tensor in at.items()}
    epsilon = RADIUS / length
    sides = [
        _gradient(loss, {name: tensor.detach() + sign * epsilon * vector[name] for name, tensor in at.items()})
        for sign in (1.0, -1.0)
    ]
    return {name: (sides[0][name] - sides[1][name]) / (2 * epsilon) for name in names}


def top_eigenvalue(
    loss: OneLoss,
    at: Tensors,
    *,
    how: Products = "exact",
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """Return the largest eigenvalue (the most positive one) of the loss's Hessian at a point, by power iteration.

    Power iteration finds the eigenvalue ``m`` of largest magnitude. If that is negative, a second one on ``H - m``,
    whose eigenvalues are all at least zero, finds the largest.

    Args:
        loss: For example the validation loss as a function of the logits.
        at: The point: the logits.
        how: See ``Products``.
        iterations: Most products of each of the two.
        tolerance: Relative change of the Rayleigh quotient at which the iteration ends.
        seed: Of the first vector.
    """
    generator = torch.Generator().manual_seed(seed)
    start = {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in at.items()}

    def power(shift: float) -> float:
        vector, value = _scaled(start, 1 / _norm(start)), math.nan
        for _ in range(iterations):
            product = hessian_product(loss, at, vector, how)
            moved = {name: product[name] - shift * vector[name] for name in vector}
            before, value = value, sum(float((moved[name] * vector[name]).double().sum()) for name in vector)
            length = _norm(moved)
            if length == 0.0 or abs(value - before) <= tolerance * abs(value):
                break
            vector = _scaled(moved, 1 / length)
        return value + shift

    largest = power(0.0)
    return largest if largest >= 0 else power(largest)


def sharpness(loss: OneLoss, at: Tensors, *, rho: float = 0.05) -> float:
    """Return ``L(w + rho g / |g|) - L(w)``, ``g`` the gradient at ``w`` and ``|g|`` its norm over all tensors.

    Args:
        loss: For example the training loss as a function of the weights.
        at: The point: the weights, unchanged.
        rho: Length of the step uphill.
    """
    gradient = _gradient(loss, at)
    length = _norm(gradient)
    if length == 0.0:
        return 0.0
    with torch.no_grad():
        here = {name: tensor.detach() for name, tensor in at.items()}
        above = {name: tensor + rho / length * gradient[name] for name, tensor in here.items()}
        return float(loss(above)) - float(loss(here))


@dataclass(frozen=True)
class Gap:
    """What deciding costs a supernet.

    Attributes:
        mixed: Accuracy of the mixture.
        decided: Accuracy of the one architecture, with the same weights.
    """

    mixed: float
    decided: float

    @property
    def value(self) -> float:
        """The discretisation gap, ``mixed - decided``."""
        return self.mixed - self.decided


def discretisation_gap(supernet: Any, architecture: Mapping[str, Any], task: Task, split: str = "valid") -> Gap:
    """Return the accuracy before and after the mixture becomes one architecture; no weight is trained in between.

    Both are computed with the statistics of each batch, and nothing of the supernet changes (it ends relaxed).

    Args:
        supernet: A relaxed supernet with ``activate``, which takes one architecture's path, or the mixture for None.
        architecture: What was selected.
        task: Has the images.
        split: Of which part.
    """
    accuracies = []
    try:
        for active in (None, architecture):
            supernet.activate(active)
            with evaluating(supernet), batch_statistics(supernet):
                accuracies.append(float(task.evaluate(supernet, split)["accuracy"]))
    finally:
        supernet.activate(None)
    return Gap(*accuracies)


def _gradient(loss: OneLoss, at: Tensors) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in at.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaves[name]) if each is None else each for name, each in zip(leaves, found, strict=True)
    }


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def _scaled(tensors: Tensors, factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in tensors.items()}
