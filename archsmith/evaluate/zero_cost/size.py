"""Plain sizes as scores: the baselines that every other score has to beat."""

from __future__ import annotations

import torch
from torch import nn

from archsmith.cost import count
from archsmith.evaluate.zero_cost.base import Batch, zero_cost_score


@zero_cost_score(needs="shape")
def params(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return the number of parameters, shared ones once."""
    return float(sum(parameter.numel() for parameter in network.parameters()))


@zero_cost_score(needs="shape")
def macs(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return the multiply-accumulates of one image in the standard convention of ``archsmith.cost``."""
    return float(count(network, batch.images[:1]).macs)
