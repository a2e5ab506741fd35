"""The neural tangent kernel at initialisation."""

# B batch, P parameters

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from archsmith.evaluate.zero_cost.base import Batch, fixed, zero_cost_score


@zero_cost_score(needs="images", arxiv="2102.11535", higher_is_better=False)
def ntk_condition(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return the condition number of the batch's neural tangent kernel, largest by smallest eigenvalue; at least 1.

    Networks with a small one are easier to train. Infinite when the smallest eigenvalue is not positive in float64.

    Source: Chen et al. 2021 (TE-NAS), arXiv 2102.11535.
    """
    eigenvalues = torch.linalg.eigvalsh(tangent_kernel(network, batch.images))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    return largest / smallest if smallest > 0 else math.inf


def tangent_kernel(network: nn.Module, images: Tensor) -> Tensor:
    """Return ``J J^T``, row i of J the gradient of image i's summed logits by all parameters; (B, B) float64.

    Batch normalisations use the statistics of the batch, so a row also holds what image i does to the others' share.

    Args:
        network: Any network.
        images: (B, C, H, W); one backward pass of the batch for each, and B times the parameters are held in memory.
    """
    with fixed(network, norm="batch") as view:
        parameters = list(view.parameters.values())
        logits = view(images).flatten(1).sum(1)
        rows = []
        for logit in logits:
            found = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([g.flatten() for g in found if g is not None]))
    jacobian_BP = torch.stack(rows).double()
    return jacobian_BP @ jacobian_BP.T
