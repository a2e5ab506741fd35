"""Max-W: the strongest candidate always has weight 1, the others as much less as they are weaker.

Under a softmax a candidate gains when the others lose, so the winner grows by shrinking them. Max-W adds to every
weight what the largest lacks to 1. The winner's own weight is then constant, it can gain nothing by growing; what moves
the logits is only how far behind each other candidate stays.

Source: Hundt, Jain, Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", arXiv 1903.09900.
"""

# E edges, O candidates

from __future__ import annotations

import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.supernet.mixed import Relaxation, Softmax


class MaxW(Relaxation):
    """The weights ``1 - max_j w_j + w_k`` of another relaxation's ``w``, row by row.

    Only what candidates are multiplied with changes: ``probabilities``, by which an architecture is derived, are the
    other relaxation's (under Max-W every edge has the same largest weight, so edges could not be ranked by it). A row
    with one weight of 1 and zeros stays as it is; equal weights become the plain sum of all candidates.

    Args:
        relaxation: Gives ``w``; softmax if None.
        detached: Whether the maximum is a constant to the gradient. As published it is not: the winner's share then
            meets minus the sum of the other candidates' outputs, and never its own.

    Raises:
        UserError: A relaxation that mixes candidates in a way of its own, which shifted weights do not fit.
    """

    def __init__(self, relaxation: Relaxation | None = None, *, detached: bool = False) -> None:
        if relaxation is not None and type(relaxation).mix is not Relaxation.mix:
            raise UserError("relaxation", type(relaxation).__name__, allowed="one that takes the weighted sum")
        self.relaxation = relaxation or Softmax()
        self.detached = detached

    def weights(self, logits_EO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the shifted weights, the largest of each row 1; an entry of minus infinity keeps weight 0."""
        weights = self.relaxation.weights(logits_EO, generator)
        largest = weights.max(dim=-1, keepdim=True).values
        shifted = 1.0 - (largest.detach() if self.detached else largest) + weights
        return shifted.masked_fill(logits_EO == -torch.inf, 0.0)

    def probabilities(self, logits_EO: Tensor) -> Tensor:
        """Return the other relaxation's probabilities."""
        return self.relaxation.probabilities(logits_EO)
