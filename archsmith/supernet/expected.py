"""The cost of a relaxed supernet: for every edge the expectation over its candidates, differentiable in the weights.

When the mixing weights are one-hot, it is the cost of the extracted network.

Source: FBNet, arXiv 1812.03443; ProxylessNAS, arXiv 1812.00332.
"""

# E edges, O candidates

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from archsmith.cost import count
from archsmith.supernet.mixed import MixedOp
from archsmith.supernet.relaxed import SearchSupernet


@runtime_checkable
class KnowsMacs(Protocol):
    """A supernet that says what its candidates cost: those whose edges are more than mixed operations."""

    def candidate_macs(self) -> tuple[dict[str, Tensor], float]:
        """Return the multiply-accumulates (E, O) of all candidates by group, and of everything else."""


@dataclass(frozen=True)
class ExpectedCost:
    """A cost that is a sum over edges, and what does not depend on any choice.

    Attributes:
        of_candidates: For every group the cost (E, O) of each candidate, summed over all modules that share the edge's
            logits; zero where an edge has no such candidate.
        fixed: The cost of everything else.
    """

    of_candidates: Mapping[str, Tensor]
    fixed: float

    def __call__(self, mixing: Mapping[str, Tensor]) -> Tensor:
        """Return ``fixed + sum of weight * cost``, a scalar.

        Args:
            mixing: Mixing weights (E, O) by group; entries of other names (edge weights) are left alone.
        """
        total = torch.tensor(float(self.fixed), dtype=torch.float64)
        for group, costs_EO in self.of_candidates.items():
            total = total + (mixing[group].double() * costs_EO.to(mixing[group].device)).sum()
        return total


class CandidateMacs(ExpectedCost):
    """Multiply-accumulates of one input, in the standard convention of ``archsmith.cost.count``."""

    @classmethod
    def of(cls, supernet: SearchSupernet, input_shape: tuple[int, ...]) -> CandidateMacs:
        """Count every candidate where it stands.

        Args:
            supernet: Left as it is. Its edges are ``MixedOp`` or hold one, or it says itself what its candidates cost.
            input_shape: Shape of one input, without the batch.
        """
        if isinstance(supernet, KnowsMacs):
            return cls(*supernet.candidate_macs())
        modules = dict(supernet.network.named_modules())
        edges = {name: _mixed_op(modules[name]) for name in supernet.places()}
        shapes: dict[str, tuple[int, ...]] = {}
        handles = []
        for name, edge in edges.items():

            def keep(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                shapes[name] = tuple(inputs[0].shape)

            handles.append(edge.register_forward_pre_hook(keep))
        parameter = next(supernet.network.parameters())
        try:
            x = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
            first = _FirstCandidates(supernet)
            total = count(first, x).macs
        finally:
            for handle in handles:
                handle.remove()
        costs = {group: torch.zeros_like(supernet.logits[group].detach()).double().cpu() for group in supernet.options}
        for name, (group, row) in supernet.places().items():
            x = torch.zeros(shapes[name], dtype=parameter.dtype, device=parameter.device)
            for column, candidate in enumerate(edges[name].candidates.values()):
                costs[group][row, column] += count(candidate, x).macs
        return cls(costs, float(total) - sum(float(cost[:, 0].sum()) for cost in costs.values()))


class _FirstCandidates(nn.Module):
    """A supernet's network with the first candidate on every edge."""

    def __init__(self, supernet: SearchSupernet) -> None:
        super().__init__()
        self.network = supernet.network
        self.mixing: dict[str, Any] = {}
        for group, logits in supernet.logits.items():
            edges = supernet.options.get(group)
            row = [1.0] + [0.0] * (logits.shape[-1] - 1)
            self.mixing[group] = [1.0] * len(logits) if edges is None else [row] * len(edges)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        output: Tensor = self.network(x, self.mixing)
        return output


def _mixed_op(edge: nn.Module) -> MixedOp:
    return next(module for module in edge.modules() if isinstance(module, MixedOp))
