"""Mixed operations: all candidates of a choice at once, each times its weight; and how logits become weights.

A ``Relaxation`` is two functions: ``weights`` turns architecture logits into mixing weights, ``mix`` turns the weights
and the candidates into an output. Weights of one call can be given from outside. They are used as they are: nothing
normalises them again, so a weight set to zero removes its candidate and changes no other.

Sources: softmax: DARTS, arXiv 1806.09055; sigmoid: Fair DARTS, arXiv 1911.12126; Gumbel softmax: 1611.01144, as in SNAS
(1812.09926) and, with one candidate forward, GDAS (1910.04465).
"""

# E edges, O candidates

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError

Weights: TypeAlias = "Tensor | Sequence[float]"
"""Mixing weights of one edge: a tensor (O,), or plain numbers where nothing is to be learned about them."""


class Relaxation(ABC):
    """How logits become mixing weights, and how these mix candidates."""

    @abstractmethod
    def weights(self, logits_EO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return mixing weights of the shape of ``logits_EO``; an entry of minus infinity is no candidate: weight 0.

        Args:
            logits_EO: One row for each edge.
            generator: Source of randomness, for relaxations that sample; torch's global one if None.
        """

    def probabilities(self, logits_EO: Tensor) -> Tensor:
        """Return how likely or strong every candidate is, without a sample; the weights where nothing is sampled."""
        return self.weights(logits_EO)

    def mix(self, x: Tensor, candidates: nn.ModuleDict, weights_O: Weights) -> Tensor:
        """Return ``sum_o weights[o] * candidate_o(x)``; of plain numbers, those that are zero are not run."""
        total: Tensor | None = None
        modules = list(candidates.values())
        for weight, candidate in zip(weights_O, modules, strict=True):
            if isinstance(weight, Tensor) or weight != 0.0:
                term = weight * candidate(x)
                total = term if total is None else total + term
        return modules[0](x) * 0.0 if total is None else total


class Softmax(Relaxation):
    """Probabilities: the relaxation of DARTS."""

    def weights(self, logits_EO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the softmax of every row."""
        return logits_EO.softmax(dim=-1)


class Sigmoid(Relaxation):
    """Independent gates in (0, 1): candidates do not compete."""

    def weights(self, logits_EO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the logistic sigmoid of every entry."""
        return logits_EO.sigmoid()


class GumbelSoftmax(Relaxation):
    """A relaxed sample of one candidate for each edge: ``softmax((logits + g) / temperature)``, g standard Gumbel.

    Args:
        temperature: Above 0; smaller is closer to one candidate. May be changed during a search.
        hard: Forward the one-hot sample, backward the relaxed one (straight through).
    """

    def __init__(self, temperature: float = 1.0, *, hard: bool = False) -> None:
        if not temperature > 0:
            raise UserError("temperature", temperature, allowed="a number above 0")
        self.temperature, self.hard = temperature, hard

    def weights(self, logits_EO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return one relaxed sample for each row."""
        uniform = torch.rand(logits_EO.shape, dtype=logits_EO.dtype, generator=generator).to(logits_EO.device)
        tiny = torch.finfo(logits_EO.dtype).tiny
        gumbel = -torch.log(-torch.log(uniform.clamp(tiny, 1 - torch.finfo(logits_EO.dtype).eps)))
        soft = ((logits_EO + gumbel) / self.temperature).softmax(dim=-1)
        return straight_through(soft.argmax(dim=-1), soft) if self.hard else soft

    def probabilities(self, logits_EO: Tensor) -> Tensor:
        """Return the softmax of every row: how often each candidate is the largest of a sample."""
        return logits_EO.softmax(dim=-1)


class StraightThrough(Relaxation):
    """A sample of one candidate for each edge, drawn from the softmax; its gradient is that of the softmax."""

    def weights(self, logits_EO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a one-hot sample for each row."""
        soft = logits_EO.softmax(dim=-1)
        # Sampled on the CPU, where a generator seeded by step lives.
        drawn = torch.multinomial(soft.detach().cpu().float(), 1, generator=generator).flatten()
        return straight_through(drawn.to(soft.device), soft)


def straight_through(index_E: Tensor, soft_EO: Tensor) -> Tensor:
    """Return one-hot rows, exactly, whose gradient is that of ``soft_EO``."""
    hard = torch.zeros_like(soft_EO).scatter_(-1, index_E.unsqueeze(-1), 1.0)
    return hard + (soft_EO - soft_EO.detach())


class MixedOp(nn.Module):
    """All candidates of one edge; the output is their weighted sum.

    Args:
        candidates: Module by option, at least one; all give the same shape.
        relaxation: How weights mix them; softmax's plain sum if None.

    Raises:
        UserError: No candidate.
    """

    def __init__(self, candidates: Mapping[str, nn.Module], relaxation: Relaxation | None = None) -> None:
        super().__init__()
        if not candidates:
            raise UserError("candidates", dict(candidates), allowed="at least one operation on every edge")
        self.candidates = nn.ModuleDict(candidates)
        self.relaxation = relaxation or Softmax()

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """Return the mixture for ``x``.

        Args:
            x: Input of every candidate.
            weights: One weight for each candidate, used as they are; longer rows (of edges with more candidates) are
                cut. A tensor runs every candidate; of plain numbers, those that are zero are not run.

        Raises:
            UserError: Fewer weights than candidates, or candidates of different shapes.
        """
        row = self.row(weights)
        try:
            return self.relaxation.mix(x, self.candidates, row)
        except RuntimeError as error:
            self.explain_shapes(x, error)
            raise

    def row(self, weights: Weights) -> Weights:
        """Return one weight for each candidate.

        Raises:
            UserError: There are fewer.
        """
        if len(weights) < len(self.candidates):
            given = Shown(f"{len(weights)} numbers")
            raise UserError("mixing weights", given, allowed=f"one for each of {', '.join(self.candidates)}")
        return weights[: len(self.candidates)]

    def explain_shapes(self, x: Tensor, error: RuntimeError) -> None:
        """Raise a clear error if the cause is that candidates disagree about the shape of their output."""
        with torch.no_grad():
            shapes = {}
            for name, candidate in self.candidates.items():
                try:
                    shapes[name] = tuple(candidate(x).shape)
                except RuntimeError:
                    return
        if len(set(shapes.values())) > 1:
            raise UserError("candidates", shapes, allowed="operations that all give the same shape") from error
