"""Weights that are zero and stay zero, whatever the optimiser does.

Masking gradients is not enough: momentum and weight decay move weights without any gradient. So the masks are applied
to the weights after *every* step, and to what the optimiser remembers of them, so that nothing pushes against the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError


class HardMasks:
    """Masks of named weights.

    Args:
        weights: Live parameters by name.
        masks: Boolean masks by the same names, True where a weight stays.

    Raises:
        UserError: A name without its weight, or a mask of another shape.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self.weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}
        self._removed: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if name not in weights or weights[name].shape != mask.shape:
                given = f"a mask of shape {tuple(mask.shape)} for {name}"
                allowed = f"shape {tuple(weights[name].shape)}" if name in weights else f"one of {', '.join(weights)}"
                raise UserError("masks", Shown(given), allowed=allowed)
            self.weights[name] = weights[name]
            self.masks[name] = mask.to(weights[name].device, torch.bool)
            self._removed[name] = ~self.masks[name]

    @torch.no_grad()
    def apply_(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set the removed weights to zero, and what the optimiser keeps of them (momentum, moments).

        Args:
            optimizer: Its state tensors that have the shape of a weight are masked too; others (step counts, factored
                moments) are left alone.
        """
        for name, weight in self.weights.items():
            removed = self._removed[name] = self._removed[name].to(weight.device)
            weight.masked_fill_(removed, 0.0)
            state = {} if optimizer is None else optimizer.state.get(weight, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(removed.to(value.device), 0.0)

    def nonzeros(self) -> dict[str, int]:
        """Return the present number of nonzero weights by name."""
        return {name: int(weight.detach().count_nonzero()) for name, weight in self.weights.items()}

    def violations(self) -> dict[str, int]:
        """Return how many removed weights are not zero, by name; empty when all hold."""
        found = {
            name: int(weight.detach()[self._removed[name].to(weight.device)].count_nonzero())
            for name, weight in self.weights.items()
        }
        return {name: count for name, count in found.items() if count}
