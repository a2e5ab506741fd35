"""Which subnets of a supernet one training step trains, and from what each learns.

A rule draws children for a step. Each child says how much it learns from the labels, from the child that teaches in
this step (in-place distillation) and from a teacher outside, and whether it is regularised.

Sources: sandwich rule and in-place distillation, arXiv 1903.05134 and BigNAS 2003.11142; progressive shrinking,
1908.09791; sampling balanced over costs, AttentiveNAS 2011.09011.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Interval, Mask, Options, Space, Value
from archsmith.space.options import Subsets


class Extremes(Protocol):
    """Something with a space whose ends are known: an elastic network, or a family of slices."""

    @property
    def space(self) -> Space:
        """The space."""

    def largest(self) -> Architecture:
        """Return the architecture that holds all others."""

    def smallest(self) -> Architecture:
        """Return the architecture that all others hold."""


@dataclass(frozen=True, kw_only=True)
class Child:
    """One subnet of a step; its loss is the weighted sum of up to three terms.

    Attributes:
        architecture: Which.
        labels: Weight of the loss on the labels.
        inplace: Weight of the distance from the child that teaches, which comes earlier in the step.
        teacher: Weight of the distance from the teacher outside.
        teaches: Whether its logits, detached, are what later children of the step learn from.
        regularised: Whether dropout, weight decay and the like are on in its pass.
    """

    architecture: Architecture
    labels: float = 0.0
    inplace: float = 0.0
    teacher: float = 0.0
    teaches: bool = False
    regularised: bool = False


class Sampling(ABC):
    """A rule; deterministic given its generator and the progress of the training."""

    @abstractmethod
    def children(self, rng: np.random.Generator, progress: float = 0.0) -> list[Child]:
        """Return the children of one step, in the order in which they are trained.

        Args:
            rng: Stream of the step.
            progress: Share of the training that is done, 0 to 1.
        """


class Uniform(Sampling):
    """Random children that learn from the labels.

    Args:
        supernet: Its space is sampled.
        children: How many, at least 1.

    Raises:
        UserError: Fewer than one child.
    """

    def __init__(self, supernet: Extremes, children: int = 1) -> None:
        self.space, self.number = supernet.space, _at_least(children, 1)

    def children(self, rng: np.random.Generator, progress: float = 0.0) -> list[Child]:
        """See ``Sampling``."""
        return [Child(architecture=self.space.sample(rng), labels=1.0, regularised=True) for _ in range(self.number)]


class Sandwich(Sampling):
    """The largest child by the labels, then random children and the smallest by the largest one's predictions.

    Args:
        supernet: Its space is sampled.
        children: How many in all, at least 2.

    Raises:
        UserError: Fewer than two children.
    """

    def __init__(self, supernet: Extremes, children: int = 4) -> None:
        self.supernet, self.number = supernet, _at_least(children, 2)

    def random(self, rng: np.random.Generator, progress: float) -> Architecture:
        """Return one of the children in the middle; here a uniform one."""
        return self.supernet.space.sample(rng)

    def children(self, rng: np.random.Generator, progress: float = 0.0) -> list[Child]:
        """See ``Sampling``."""
        middle = [self.random(rng, progress) for _ in range(self.number - 2)]
        return [
            Child(architecture=self.supernet.largest(), labels=1.0, teaches=True, regularised=True),
            *(Child(architecture=each, inplace=1.0) for each in (*middle, self.supernet.smallest())),
        ]


class StrongestFirst(Sandwich):
    """A sandwich without its lower half at first: children come from the strongest options, and ever weaker ones join.

    After a share ``p`` of ``warmup`` each decision offers its largest options only, ``ceil(p * n)`` of ``n``, at least
    one (progressive shrinking in one schedule for all dimensions). The smallest child of a step is the smallest that
    is offered.

    Args:
        supernet: Its options are ordered by strength, the weakest first.
        children: How many in all, at least 2.
        warmup: Share of the training after which everything is offered.

    Raises:
        UserError: Fewer than two children, or a share that is not above 0 and at most 1.
    """

    def __init__(self, supernet: Extremes, children: int = 4, *, warmup: float = 0.5) -> None:
        super().__init__(supernet, children)
        if not 0 < warmup <= 1:
            raise UserError("warmup", warmup, allowed="a share of the training, above 0 and at most 1")
        self.warmup = warmup

    def random(self, rng: np.random.Generator, progress: float) -> Architecture:
        """Return a child of the options that are offered by now, each decision uniform."""
        share = self._share(progress)
        return _walked(self.supernet.space, lambda count: count - 1 - int(rng.integers(_offered(count, share))))

    def children(self, rng: np.random.Generator, progress: float = 0.0) -> list[Child]:
        """See ``Sampling``."""
        share = self._share(progress)
        weakest = _walked(self.supernet.space, lambda count: count - _offered(count, share))
        first, *middle, _ = super().children(rng, progress)
        return [first, *middle, Child(architecture=weakest, inplace=1.0)]

    def _share(self, progress: float) -> float:
        return min(1.0, progress / self.warmup)


class BalancedByCost(Sandwich):
    """A sandwich whose random children are spread evenly over costs.

    Uniform choices pile up in the middle: the cost is a sum of many. Here a pool is drawn whose choices lean to the
    weak or the strong side by a random amount, sorted into bins of equal width between its cheapest and its costliest;
    a child is uniform in a bin that is uniform among those that are not empty.

    Args:
        supernet: Its options are ordered by strength, the weakest first.
        cost: Cost of an architecture, asked for once for each of the pool.
        children: How many in all, at least 2.
        bins: Number of bins.
        pool: Architectures in the pool.
        seed: Of the pool.

    Raises:
        UserError: Fewer than two children, one bin or one architecture.
    """

    def __init__(
        self,
        supernet: Extremes,
        cost: Callable[[Architecture], float],
        children: int = 4,
        *,
        bins: int = 10,
        pool: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(supernet, children)
        if bins < 1 or pool < 1:
            raise UserError("bins, pool", (bins, pool), allowed="numbers from 1")
        rng = np.random.default_rng(seed)
        drawn = {supernet.smallest(): None, supernet.largest(): None}
        for _ in range(pool):
            lean = rng.random()
            drawn.setdefault(_walked(supernet.space, lambda count, p=lean: int(rng.binomial(count - 1, p))))  # type: ignore[misc]
        costs = np.array([cost(architecture) for architecture in drawn], dtype=np.float64)
        edges = np.linspace(costs.min(), costs.max(), bins + 1)
        numbers = np.clip(np.searchsorted(edges, costs, side="right") - 1, 0, bins - 1)
        members = list(drawn)
        self.bins = [
            [members[i] for i in np.flatnonzero(numbers == number)]
            for number in range(bins)
            if (numbers == number).any()
        ]

    def random(self, rng: np.random.Generator, progress: float) -> Architecture:
        """Return a child of a random bin."""
        own = self.bins[int(rng.integers(len(self.bins)))]
        return own[int(rng.integers(len(own)))]


def _offered(count: int, share: float) -> int:
    return min(count, max(1, int(np.ceil(share * count))))


def _walked(space: Space, choose: Callable[[int], int]) -> Architecture:
    """Return the architecture whose decisions take option ``choose(count)`` of those that are allowed."""

    def decide(path: str, options: Options, mask: Mask, group: str) -> Value:
        if isinstance(options, Interval | Subsets):
            raise UserError("space", path, allowed="decisions with options in a list, ordered by strength")
        allowed = list(range(len(options))) if mask is None else np.flatnonzero(mask).tolist()
        return options[allowed[choose(len(allowed))]]

    return space.walk(decide)


def _at_least(number: int, lowest: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < lowest:
        raise UserError("children", number, allowed=f"an integer from {lowest}")
    return number
