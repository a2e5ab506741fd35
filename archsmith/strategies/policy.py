"""A distribution over architectures: one table of logits for each part of each decision.

The walk goes on until it is through, each part drawn from the softmax of its table over what is allowed there. Paths
that other decisions switch on have their own tables, so conditions and repeats need nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from archsmith.core.rng import numpy_stream
from archsmith.space import Architecture, DeadEnd, Mask, Options, Space, Value
from archsmith.strategies.parts import Part, choose_value, parts_of

WALKS = 100
"""Walks that may end dead before a sample is left to the space's own sampler."""


class TablePolicy:
    """Independent softmax distributions, one for each part of a decision (see ``archsmith.strategies.parts``).

    Args:
        space: What is walked.
        seed: Seed of the initial logits. Each table has its own stream, so the order of discovery does not matter.
        init_scale: Standard deviation of the initial logits.

    Tables come into being when a walk first asks for them. ``log_prob`` is that of one walk: where walks can end dead
    (predicates), the distribution is this one given that the walk succeeds.
    """

    def __init__(self, space: Space, *, seed: int, init_scale: float = 1e-3) -> None:
        self.space = space
        self.seed = seed
        self.init_scale = init_scale
        self.logits: dict[str, np.ndarray] = {}

    def table(self, part: Part) -> np.ndarray:
        """Return the logits of a part, float64 of shape (count,)."""
        if (known := self.logits.get(part.name)) is None:
            stream = numpy_stream(self.seed, "policy", part.name)
            self.logits[part.name] = known = self.init_scale * stream.standard_normal(part.count)
        return known

    def probabilities(self, part: Part) -> np.ndarray:
        """Return the probabilities of a part's alternatives, zero where masked; float64 of shape (count,)."""
        logits = self.table(part)
        if part.mask is not None:
            logits = np.where(part.mask, logits, -np.inf)
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def sample(self, rng: np.random.Generator) -> tuple[Architecture, float]:
        """Return an architecture and its log-probability, drawn by walking.

        Where ``WALKS`` walks end dead the space's own sampler steps in.
        """
        log_prob = 0.0

        def choose(part: Part) -> int:
            nonlocal log_prob
            probabilities = self.probabilities(part)
            index = min(int(np.searchsorted(np.cumsum(probabilities), rng.random(), side="right")), part.count - 1)
            if probabilities[index] == 0.0:  # the sum of the probabilities fell short of the drawn number
                index = int(np.flatnonzero(probabilities)[-1])
            log_prob += math.log(probabilities[index])
            return index

        def decide(path: str, options: Options, mask: Mask, group: str) -> Value:
            return choose_value(path, options, mask, group, choose, rng.random)

        for _ in range(WALKS):
            log_prob = 0.0
            try:
                return self.space.walk(decide), log_prob
            except DeadEnd:
                continue
        architecture = self.space.sample(rng)
        return architecture, self.log_prob(architecture)

    def chosen(self, architecture: Architecture) -> list[tuple[Part, int]]:
        """Return the parts that make up an architecture, each with its index.

        Raises:
            UserError: The architecture is not valid.
        """
        return [pair for decision in self.space.trace(architecture) for pair in parts_of(decision)]

    def log_prob(self, architecture: Architecture) -> float:
        """Return the log-probability of the parts that make up an architecture.

        Raises:
            UserError: The architecture is not valid.
        """
        with np.errstate(divide="ignore"):
            return float(sum(np.log(self.probabilities(part)[index]) for part, index in self.chosen(architecture)))

    def entropy(self, architecture: Architecture) -> float:
        """Return the sum of the entropies, in nats, of the parts met on the way to an architecture."""
        return float(sum(entropy(self.probabilities(part)) for part, _ in self.chosen(architecture)))

    def mode(self) -> Architecture:
        """Return the architecture of the likeliest alternative everywhere; of a stretch, the middle.

        Raises:
            DeadEnd: These decisions break a predicate.
        """

        def choose(part: Part) -> int:
            return int(np.argmax(self.probabilities(part)))

        def decide(path: str, options: Options, mask: Mask, group: str) -> Value:
            return choose_value(path, options, mask, group, choose, lambda: 0.5)

        return self.space.walk(decide)

    def state_dict(self) -> dict[str, Any]:
        """Return the tables as plain JSON."""
        return {name: table.tolist() for name, table in self.logits.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.logits = {name: np.array(table, dtype=np.float64) for name, table in state.items()}


def entropy(probabilities: np.ndarray) -> float:
    """Return the entropy in nats; an impossible alternative counts nothing."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())
