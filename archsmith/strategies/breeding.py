"""Populations that are bred by the thousand: as rows of integers where a space allows it, as architectures elsewhere.

A search on predictors asks for thousands of children between two measurements. ``breeding_of`` returns the fast form
for product spaces of listed dimensions (``archsmith.space.genotypes``), and for every other space one that uses the
space's own ``sample``, ``crossover`` and ``mutate``. Both give populations as arrays with one entry for each member
along the first axis, so that selecting and joining them is indexing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Architecture, ProductSpace, Space
from archsmith.space.genotypes import Genotypes
from archsmith.strategies.candidates import Features, default_features, feature_rows

# N members, D features

Key = bytes | str


class Breeding(ABC):
    """How a space's populations are drawn, crossed, mutated and shown to predictors.

    Args:
        space: The space.
        features: Vector of an architecture for predictors; None for the space's own, in which inactive decisions are
            masked.
    """

    def __init__(self, space: Space, features: Features | None = None) -> None:
        self.space, self._features = space, features

    @abstractmethod
    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return ``n`` random members."""

    @abstractmethod
    def children(
        self,
        first: np.ndarray,
        second: np.ndarray,
        rng: np.random.Generator,
        *,
        crossover: float,
        mutation: float | None,
    ) -> np.ndarray:
        """Return one child of each pair.

        Args:
            first: Parents, N of them.
            second: Their partners.
            rng: Stream of all choices.
            crossover: Probability that both parents have a part in a child; a child of one is its copy.
            mutation: Probability that a decision changes; None for one over the number of decisions.
        """

    @abstractmethod
    def keys(self, population: np.ndarray) -> list[Key]:
        """Return one key for each member; equal keys are equal architectures."""

    @abstractmethod
    def architectures(self, population: np.ndarray) -> list[Architecture]:
        """Return the members as architectures."""

    @abstractmethod
    def population(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return architectures as a population."""

    def features(self, population: np.ndarray) -> np.ndarray:
        """Return what predictors see, float64 of shape (N, D)."""
        if self._features is None:
            self._features = default_features(self.space)
        return feature_rows(self._features, self.architectures(population))


class GeneBreeding(Breeding):
    """Populations of genotypes, int64 of shape (N, G), canonical: inactive genes are 0.

    Crossover takes each gene from either parent by a fair coin, mutation puts another option in its place.
    """

    def __init__(self, space: ProductSpace, features: Features | None = None) -> None:
        super().__init__(space, features)
        self.genotypes = Genotypes(space)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return ``n`` genotypes of independent genes."""
        return self.genotypes.canonical(self.genotypes.sample(rng, n))

    def children(
        self,
        first: np.ndarray,
        second: np.ndarray,
        rng: np.random.Generator,
        *,
        crossover: float,
        mutation: float | None,
    ) -> np.ndarray:
        """Return one child of each pair; genes that it wakes up come from the parent that has them, or at random."""
        counts, shape = self.genotypes.counts_G, first.shape
        # What is inactive in both parents has no value to inherit: a random one, not option 0.
        asleep = ~self.genotypes.active(first), ~self.genotypes.active(second)
        drawn = self.genotypes.sample(rng, len(first))
        second = np.where(asleep[1], np.where(asleep[0], drawn, first), second)
        first = np.where(asleep[0], second, first)
        crossed = rng.random((len(first), 1)) < crossover
        child = np.where(crossed & (rng.random(shape) < 0.5), second, first)
        rate = 1.0 / len(self.genotypes) if mutation is None else mutation
        hit = (rng.random(shape) < rate) & (counts > 1)
        step = rng.integers(1, np.maximum(counts, 2), size=shape)
        return self.genotypes.canonical(np.where(hit, (child + step) % counts, child))

    def keys(self, population: np.ndarray) -> list[Key]:
        """Return the bytes of each row."""
        rows = np.ascontiguousarray(population, dtype=np.uint8)
        return [row.tobytes() for row in rows]

    def architectures(self, population: np.ndarray) -> list[Architecture]:
        """Return the members as architectures."""
        return self.genotypes.architectures(population)

    def population(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return architectures as canonical genotypes."""
        return self.genotypes.genes(architectures)

    def features(self, population: np.ndarray) -> np.ndarray:
        """Return the masked one-hot encoding, or the features that were given."""
        return self.genotypes.one_hot(population) if self._features is None else super().features(population)


class WalkBreeding(Breeding):
    """Populations of architectures, object arrays of shape (N,), for any space."""

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return ``n`` samples of the space."""
        return self.population([self.space.sample(rng) for _ in range(n)])

    def children(
        self,
        first: np.ndarray,
        second: np.ndarray,
        rng: np.random.Generator,
        *,
        crossover: float,
        mutation: float | None,
    ) -> np.ndarray:
        """Return one child of each pair by the space's own crossover and mutation, one decision at a time."""
        found: list[Architecture] = []
        for one, two in zip(first, second, strict=True):
            child = self.space.crossover(one, two, rng) if rng.random() < crossover else one
            decisions = max(len(child), 1)
            rate = 1.0 / decisions if mutation is None else mutation
            for _ in range(int(rng.binomial(decisions, rate))):
                with suppress(UserError):  # an architecture without a valid neighbour
                    child = self.space.mutate(child, rng)
            found.append(child)
        return self.population(found)

    def keys(self, population: np.ndarray) -> list[Key]:
        """Return the digest of each member."""
        return [architecture.digest for architecture in population]

    def architectures(self, population: np.ndarray) -> list[Architecture]:
        """Return the members."""
        return list(population)

    def population(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return architectures as an object array."""
        out = np.empty(len(architectures), dtype=object)
        for at, architecture in enumerate(architectures):
            out[at] = architecture
        return out


def breeding_of(space: Space, features: Features | None = None) -> Breeding:
    """Return the fastest breeding that a space allows."""
    if Genotypes.supports(space):
        return GeneBreeding(cast(ProductSpace, space), features)
    return WalkBreeding(space, features)
