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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.graph import evaluating
from archsmith.supernet.relaxed import RelaxedSupernet, SearchSupernet, batch_statistics
from archsmith.supernet.updaters import RADIUS, Tensors
from archsmith.tasks.base import Task
from archsmith.train.bilevel import BilevelStep, loss_of, random_batch

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
    loss: OneLoss, at: Tensors, *, how: Products = "exact", tolerance: float = 1e-3, seed: int = 0
) -> float:
    """Return the largest eigenvalue (the most positive one) of the loss's Hessian at a point.

    By the Lanczos iteration (ARPACK's, of scipy), which needs products with the Hessian alone, as power iteration does,
    and unlike it also converges where the largest and the most negative eigenvalue are of about the same size.

    Args:
        loss: For example the validation loss as a function of the logits.
        at: The point: the logits.
        how: See ``Products``. Products by differences across kinks are not symmetric, and the result is then rough.
        tolerance: Relative accuracy.
        seed: Of the first vector.

    Returns:
        The eigenvalue, or NaN where 20 restarts (about 400 products) were not enough.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    shapes = {name: tensor.shape for name, tensor in at.items()}
    sizes = [tensor.numel() for tensor in at.values()]
    like = next(iter(at.values()))

    def product(flat: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        parts = torch.from_numpy(np.ascontiguousarray(flat).reshape(-1)).to(like).split(sizes)
        vector = {name: part.reshape(shapes[name]) for name, part in zip(at, parts, strict=True)}
        found = hessian_product(loss, at, vector, how)
        return torch.cat([each.detach().flatten() for each in found.values()]).double().cpu().numpy()

    n = sum(sizes)
    if n <= 8:  # too few for a subspace
        hessian = np.stack([product(row) for row in np.eye(n)])
        return float(np.linalg.eigvalsh((hessian + hessian.T) / 2)[-1])
    start = np.random.default_rng(seed).standard_normal(n)
    scale = np.linalg.norm(product(start)) / np.linalg.norm(start)
    if scale == 0.0:
        return 0.0
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    try:
        (value,) = eigsh(
            operator, k=1, which="LA", v0=start, tol=tolerance, ncv=min(n, 24), maxiter=20, return_eigenvectors=False
        )
    except ArpackNoConvergence:
        return math.nan
    return float(value)


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


def supernet_landscape(
    supernet: RelaxedSupernet, step: BilevelStep, *, rho: float = 0.05, how: Products = "exact"
) -> dict[str, float]:
    """Return the sharpness of a supernet on two batches that the seed names; nothing of the supernet changes.

    Args:
        supernet: Any relaxed supernet.
        step: Its search: the batch for the logits gives ``logit_curvature``, the largest eigenvalue of the Hessian over
            the logits, the one for the weights ``weight_sharpness``, see ``sharpness``. Batch statistics throughout.
        rho: Length of the step uphill.
        how: How the Hessian is multiplied.
    """
    batch = next(iter(step.weight_task.batches("train", batch_size=step.batch_size)))
    other = random_batch(step, "landscape")
    train, _ = loss_of(supernet, step.weight_task, batch, step, "landscape", "weights")
    valid, _ = loss_of(supernet, step.logit_task, other, step, "landscape", "logits")
    weights = {name: weight.detach() for name, weight in supernet.weights().items()}
    logits = {name: tensor.detach() for name, tensor in supernet.logits.items()}
    with evaluating(supernet), batch_statistics(supernet):
        return {
            "logit_curvature": top_eigenvalue(lambda moved: valid(weights, moved), logits, how=how),
            "weight_sharpness": sharpness(lambda moved: train(moved, logits), weights, rho=rho),
        }


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


def discretisation_gap(
    supernet: SearchSupernet, architecture: Mapping[str, Any], task: Task, split: str = "valid"
) -> Gap:
    """Return the accuracy before and after the mixture becomes one architecture; no weight is trained in between.

    Both are computed with the statistics of each batch, and nothing of the supernet changes (it ends relaxed).

    Args:
        supernet: The relaxed supernet.
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
