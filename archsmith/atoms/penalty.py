"""Cost-weighted L1 on the scales of atoms, as a gradient or as a proximal step.

``penalty = rho * sum_i c_i * |g_i|``: a sum over atoms, not a mean; ``c_i`` is the atom's MACs over the mean MACs of
all searchable atoms *before* training (AtomNAS, arXiv 1912.09640). The weights never change during a run: cutting atoms
does not re-normalise the survivors, which would silently rescale ``rho``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from archsmith.atoms.groups import Atoms

Weighting = Literal["macs", "equal"]


def penalty_weights(atoms: Atoms, weighting: Weighting = "macs") -> dict[str, float]:
    """Return ``c`` for the units of every group.

    Args:
        atoms: The units before anything was cut.
        weighting: "macs": MACs over the mean MACs of all units (the denominator is the number of units + 1e-5, as
            published). "equal": 1 for all, which is network slimming (Liu et al. 2017).
    """
    if weighting == "equal":
        return {group.name: 1.0 for group in atoms}
    mean = atoms.cost("macs") / (len(atoms) + 1e-5)
    return {group.name: group.cost["macs"] / mean for group in atoms}


class ScalePenalty:
    """The penalty over the present scales of a model.

    Args:
        weights: ``c`` by group name, from ``penalty_weights``; groups that die later are simply no longer asked for.
        scales: The live scale parameters (size,) by group name; ``follow`` replaces them after a cut.

    Attributes:
        scales: Those in use.
    """

    def __init__(self, weights: Mapping[str, float], scales: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.follow(scales)

    def follow(self, scales: Mapping[str, Tensor]) -> None:
        """Use these scale parameters from now on (after a cut)."""
        self.scales = dict(scales)
        self._scales = list(self.scales.values())
        self._c = [self.weights[name] for name in self.scales]

    @torch.no_grad()
    def value(self) -> float:
        """Return ``sum_i c_i * |g_i|`` (without rho)."""
        norms = torch._foreach_norm(self._scales, 1)
        return float(sum(c * float(norm) for c, norm in zip(self._c, norms, strict=True)))

    @torch.no_grad()
    def add_gradient_(self, rho: float) -> None:
        """Add ``rho * c_i * sign(g_i)`` to the gradients of the scales; the subgradient at zero is zero."""
        if rho == 0.0 or not self._scales:
            return
        signs = torch._foreach_sign(self._scales)
        torch._foreach_mul_(signs, [rho * c for c in self._c])
        for scale, sign in zip(self._scales, signs, strict=True):
            scale.grad = sign if scale.grad is None else scale.grad.add_(sign)

    @torch.no_grad()
    def proximal_step_(self, step: float) -> None:
        """Shrink every scale by ``step * c_i`` towards zero, stopping at zero (soft threshold).

        Args:
            step: ``lr * rho``. The decoupled form for optimisers that normalise gradients (Adam, AdamW, RMSprop with a
                tiny epsilon): as a gradient the penalty would lose its cost weighting there.
        """
        if step == 0.0:
            return
        for scale, c in zip(self._scales, self._c, strict=True):
            scale.copy_(torch.sign(scale) * (scale.abs() - step * c).clamp_min_(0.0))
