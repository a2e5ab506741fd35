"""Probabilities over architectures: what controllers, tables of logits and relaxed supernets have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from archsmith.space import Architecture, Mask, Options, Space, Value, sample_by_decisions
from archsmith.strategies.parts import Part, choose_value, parts_of


@runtime_checkable
class Distribution(Protocol):
    """A distribution over the architectures of a space, as a product over the decisions of a walk.

    Where walks can end dead (predicates), ``log_prob`` is that of the walk: the distribution is the one given that the
    walk succeeds. Real numbers and very long lists of options are chosen by stretches, uniform inside; ``log_prob`` is
    that of the stretches (``archsmith.strategies.parts``).
    """

    def sample(self, rng: np.random.Generator) -> tuple[Architecture, float]:
        """Return an architecture and its log-probability in nats."""
        ...

    def log_prob(self, architecture: Architecture) -> float:
        """Return the log-probability of an architecture in nats, the sum over its decisions.

        Raises:
            UserError: The architecture is not valid.
        """
        ...

    def entropy(self, architecture: Architecture) -> float:
        """Return the sum of the entropies, in nats, of the decisions met on the way to ``architecture``.

        Its mean over samples is the entropy of the distribution; where no decision depends on another it is exactly
        that for each architecture.

        Raises:
            UserError: The architecture is not valid.
        """
        ...

    def mode(self) -> Architecture:
        """Return the architecture of the likeliest option at every decision in turn.

        Raises:
            DeadEnd: These decisions cannot be completed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        ...


class UniformDecisions:
    """Every allowed option of a decision is equally likely: random search, as a controller that never learns.

    Args:
        space: What is walked.

    Source: arXiv 1707.07012, section 4.4: each softmax is replaced by the uniform distribution.
    """

    def __init__(self, space: Space) -> None:
        self.space = space

    def sample(self, rng: np.random.Generator) -> tuple[Architecture, float]:
        """Return an architecture, drawn decision by decision, and its log-probability."""
        architecture = sample_by_decisions(self.space, rng)
        return architecture, self.log_prob(architecture)

    def log_prob(self, architecture: Architecture) -> float:
        """Return minus the sum of the logarithms of the numbers of allowed options."""
        return -self.entropy(architecture)

    def entropy(self, architecture: Architecture) -> float:
        """Return the sum of the logarithms of the numbers of allowed options."""
        parts = [part for decision in self.space.trace(architecture) for part, _ in parts_of(decision)]
        return math.fsum(math.log(part.count if part.mask is None else int(part.mask.sum())) for part in parts)

    def mode(self) -> Architecture:
        """Return the architecture of the first allowed option everywhere: all are equally likely."""

        def first(part: Part) -> int:
            return 0 if part.mask is None else int(np.argmax(part.mask))

        def decide(path: str, options: Options, mask: Mask, group: str) -> Value:
            return choose_value(path, options, mask, group, first, lambda: 0.5)

        return self.space.walk(decide)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty object: nothing is learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""
