"""Group lasso on the weights that a mask will remove: the pressure that makes pruning a small step.

``R = sum over groups of sqrt(sum over the group's masked-out weights of w^2 + eps)``: the norm of each group, not its
square. Squared it would be weight decay, which shrinks in proportion and drives nothing to zero. Kept weights are
outside, hence without any gradient from here. A group with nothing to remove adds the constant ``sqrt(eps)``.

``R`` is a sum over all groups of all layers, so its strength is not free of scale: a short training needs a larger one.
Source: ClickTrain (arXiv 2011.10170); it works with the masks of any family.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

EPS = 1e-8


def complement_lasso(weight: Tensor, mask: Tensor, *, leading: int = 2, eps: float = EPS) -> Tensor:
    """Return ``R`` of one layer, a scalar that is differentiable in ``weight``.

    Args:
        weight: The layer's weight.
        mask: Boolean of the same shape (or broadcasting to it), True where a weight stays.
        leading: How many leading axes number the groups: 2 for one group per kernel of a convolution, 1 per filter, all
            axes of the weight for one group per weight.
        eps: Under the root.
    """
    return _norms(weight.masked_fill(mask, 0.0), leading, eps).sum()


@torch.no_grad()
def complement_lasso_gradient(weight: Tensor, mask: Tensor, *, leading: int = 2, eps: float = EPS) -> Tensor:
    """Return ``dR/dw``: ``w / sqrt(sum of the group's squares + eps)`` on removed weights, exactly 0 on kept ones."""
    removed = weight.masked_fill(mask, 0.0)
    norms = _norms(removed, leading, eps)
    return removed / norms.reshape(*norms.shape, *[1] * (weight.dim() - leading))


def _norms(removed: Tensor, leading: int, eps: float) -> Tensor:
    groups = removed.reshape(*removed.shape[:leading], -1)
    return (groups.square().sum(-1) + eps).sqrt()


@torch.no_grad()
def complement_shrink_(weight: Tensor, mask: Tensor, step: float, *, leading: int = 2) -> None:
    """Shorten the norm of every group of removed weights by ``step``, to zero at the shortest; kept ones do not move.

    The proximal form of the same penalty (group soft threshold).
    """
    if step == 0.0:
        return
    norms = _norms(weight.masked_fill(mask, 0.0), leading, 0.0)
    factors = (1.0 - step / norms).clamp_min_(0.0)  # a norm of zero gives -inf, hence the factor 0
    factors = factors.reshape(*factors.shape, *[1] * (weight.dim() - leading))
    weight.copy_(torch.where(mask, weight, weight * factors))


class ComplementLasso:
    """The penalty over many layers, each with one or more masks that count separately.

    Args:
        layers: Pairs of a weight and its masks: ``R`` has one sum for each pair of weight and mask.
        leading: See ``complement_lasso``.
        eps: Under the root.
    """

    def __init__(
        self, layers: Iterable[tuple[Tensor, Sequence[Tensor]]], *, leading: int = 2, eps: float = EPS
    ) -> None:
        self.leading, self.eps = leading, eps
        self.layers = [(weight, list(masks)) for weight, masks in layers]

    def value(self) -> Tensor:
        """Return the penalty as a scalar with a gradient.

        Add ``strength`` times it to a loss, or use ``add_gradient_``, not both.
        """
        sums = [
            complement_lasso(weight, mask.to(weight.device), leading=self.leading, eps=self.eps)
            for weight, masks in self.layers
            for mask in masks
        ]
        return torch.stack(sums).sum() if sums else torch.zeros(())

    @torch.no_grad()
    def add_gradient_(self, strength: float) -> None:
        """Add ``strength * dR/dw`` to the gradients of the weights, between the backward pass and the step.

        Under loss scaling call it after unscaling. It costs no second backward pass, and is the same on every process
        whose weights are.
        """
        if strength == 0.0:
            return
        for weight, masks in self.layers:
            masks[:] = [mask.to(weight.device) for mask in masks]  # the model may have moved
            for mask in masks:
                part = complement_lasso_gradient(weight, mask, leading=self.leading, eps=self.eps).mul_(strength)
                weight.grad = part if weight.grad is None else weight.grad.add_(part)

    @torch.no_grad()
    def shrink_(self, steps: Sequence[float]) -> None:
        """Do the proximal step after the optimiser's: for optimisers that normalise gradients (Adam, RMSprop).

        As a gradient the penalty would be divided by the size of the loss's gradient there, and stop being a norm's.

        Args:
            steps: Learning rate times strength, for each pair of ``layers``.
        """
        for (weight, masks), step in zip(self.layers, steps, strict=True):
            for mask in masks:
                complement_shrink_(weight, mask.to(weight.device), step, leading=self.leading)
