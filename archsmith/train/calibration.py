"""Batch statistics of one subnet: what its running statistics would be, taken anew before it is evaluated.

Running statistics belong to one network. A supernet's mix all subnets that were trained, so nothing is accumulated
during training (``hold_statistics_``), and ``calibrate_`` takes those of the active subnet from training batches.

Source: Yu and Huang, arXiv 1903.05134; BigNAS, arXiv 2003.11142.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.core.errors import Shown, UserError


def hold_statistics_(model: nn.Module) -> nn.Module:
    """Let batch normalisations use the statistics of their batch in training mode and accumulate nothing: momentum 0.

    Args:
        model: Changed in place; evaluation mode then reads what ``calibrate_`` took.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.0
    return model


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Replace all running statistics by plain averages over batches, of the active path where there is one.

    The mean is the mean of the batch means, the variance that of the *unbiased* batch variances; every batch counts the
    same, however large it is. Everything else is in evaluation mode: dropout is off. ``archsmith.train.average``'s
    ``recalibrate`` does the same for batches of one tensor over several processes.

    Args:
        model: Network or supernet, changed in place; ends in evaluation mode with its momenta as before.
        batches: Inputs as they go into the model: a tensor, a tuple of arguments or a mapping by name each, of training
            examples, in the resolution and augmentation that the network is evaluated with.

    Raises:
        UserError: No batch, or one that is none of these.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's cumulative average
            norm.train()
        for batch in batches:
            called(model, batch)
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    if not count:
        raise UserError("batches", Shown("none"), allowed="at least one batch of training inputs")
    return model


def called(model: nn.Module, inputs: Any) -> Any:
    """Return what a model gives for a tensor, a tuple or list of arguments, or a mapping by name."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    raise UserError(
        "inputs", Shown(f"a {type(inputs).__name__}"), allowed="a tensor, a tuple of arguments or a mapping by name"
    )
