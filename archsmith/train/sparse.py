"""Training sparse layers: what is frozen when, and weights that their mask has dropped.

A dropped weight gets no gradient, but weight decay and momentum would still move it, without any effect on the network.
Here they do not: what is dropped keeps its value bit for bit, so the same mask always hides the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.layers.sparse import masks, sparse_layers


def learn_weights_(network: nn.Module) -> None:
    """Freeze the scores of every sparse layer, and let everything else learn."""
    network.requires_grad_(True)
    for layer in sparse_layers(network).values():
        layer.score.requires_grad_(False)


def learn_scores_(network: nn.Module, *, norms: bool = True) -> None:
    """Let the scores of every sparse layer learn, and freeze weights and biases.

    Args:
        network: Changed in place.
        norms: Whether scales and shifts of normalisations learn too.
    """
    network.requires_grad_(False)
    for module in network.modules():
        if norms and isinstance(module, _BatchNorm):
            module.requires_grad_(True)
    for layer in sparse_layers(network).values():
        layer.score.requires_grad_(True)


def hold_dropped_(optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """Let no step of ``optimizer`` move a weight that its layer's present mask has dropped.

    Args:
        optimizer: Over weights of ``network``; gets a hook behind every step.
        network: Its masks must not change while the optimiser is used.
    """
    held: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    for name, mask in masks(network).items():
        weight = network.get_submodule(name).get_parameter("weight")
        held.append((weight, mask == 0, weight.detach().clone()))

    def restore(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for weight, dropped, value in held:
                torch.where(dropped, value, weight, out=weight)

    optimizer.register_step_post_hook(restore)
