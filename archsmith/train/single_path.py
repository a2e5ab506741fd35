"""Training a supernet by single paths: one sampled architecture for each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsmith.space import Architecture
from archsmith.supernet import Supernet


def train_single_path(
    supernet: Supernet,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    sample: Callable[[np.random.Generator], Architecture],
    *,
    rng: np.random.Generator,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> list[float]:
    """Take one optimiser step of the cross-entropy for each batch, on a path of its own.

    Weights of paths that do not run have no gradient in this step, so neither momentum nor weight decay moves them.

    Args:
        supernet: An ``nn.Module``; put into training mode.
        batches: Images (B, C, H, W) and labels (B,), as many as there shall be steps.
        optimizer: Over the supernet's parameters.
        sample: Draws the path of a batch, for example ``space.sample`` or ``archsmith.families.cells.random_path``.
        rng: Stream of the paths.
        scheduler: Stepped behind every batch.

    Returns:
        The loss of every step.

    Source: Li and Talwalkar 2019, arXiv 1902.07638; as RSPS in NAS-Bench-201, arXiv 2001.00326.
    """
    assert isinstance(supernet, nn.Module)
    supernet.train()
    losses = []
    for images, labels in batches:
        supernet.activate(sample(rng))
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(supernet(images), labels)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses
