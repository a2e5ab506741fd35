"""The protocol of a space: something that can be walked as a stream of decisions.

A concrete space (``ProductSpace``, a grammar, a growing graph) says how it is walked, how it is sampled and how large
it is. Validation, traces, replay, mutation, crossover, neighbours and enumeration are then the same for all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.architecture import Architecture
from archsmith.space.deciders import (
    Crossover,
    DeadEnd,
    Decide,
    Decision,
    Exactly,
    Mask,
    Recording,
    Replay,
    Uniform,
    allowed_count,
    first_allowed,
    is_allowed,
    option_index,
)
from archsmith.space.options import Interval, Options, draw
from archsmith.space.values import Value

ATTEMPTS = 1_000
"""Walks that are tried before a sampler says that it finds nothing valid."""

DRAWS = 16
"""Other options of one decision that a mutation tries before it turns to another decision."""

FEW_ATTEMPTS = 100
"""Walks that crossover and subtree mutation try: they have an answer, or an error, that is cheap to come to."""

EncodingKind = Literal["one-hot", "ordinal", "path"]


@dataclass(frozen=True)
class Invalid:
    """What ``decode`` returns for an array that no architecture has."""

    reason: str

    def __bool__(self) -> bool:
        return False


class Space(ABC):
    """What may be chosen. Subclasses are immutable and hold no random state."""

    name: str

    @abstractmethod
    def walk(self, decide: Decide) -> Architecture:
        """Ask ``decide(path, options, mask, group)`` for every decision and return the architecture.

        What is asked next may depend on the answers so far; the same answers always give the same questions.

        Raises:
            DeadEnd: The answers so far cannot be completed.
            ValueError: An answer is not among the allowed options.
        """

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Architecture:
        """Return a random valid architecture; the class says how it is distributed.

        Raises:
            UserError: No valid architecture was found.
        """

    @property
    @abstractmethod
    def size(self) -> int | float:
        """Number of valid architectures: an int, or ``math.inf``."""

    @abstractmethod
    def adjacent(self, path: str, value: Value, options: Options) -> list[Value]:
        """Return the values one small step away from ``value`` at ``path``."""

    @abstractmethod
    def encode(self, architecture: Architecture, kind: EncodingKind) -> np.ndarray:
        """Return a float64 vector of fixed length for a valid architecture."""

    @abstractmethod
    def decode(self, kind: EncodingKind, array: np.ndarray) -> Architecture | Invalid:
        """Return the architecture that ``encode`` gives ``array`` for, or why there is none or more than one."""

    def validate(self, architecture: Mapping[str, Value]) -> Architecture:
        """Check a mapping path → value against the space and return it as an architecture of the space.

        Args:
            architecture: An architecture, or a plain mapping of decisions.

        Raises:
            UserError: It belongs to another space, lacks a decision, has a path that is unknown or inactive, a value
                that is not an option, or breaks a constraint. The error names the path and what is allowed.
        """
        if isinstance(architecture, Architecture):
            if architecture.space != self.name:
                raise UserError(
                    "architecture.space", architecture.space, allowed=f"{self.name!r}, the space it is used in"
                )
            decisions: Mapping[str, Value] = architecture
        else:
            decisions = Architecture(architecture, space=self.name)
        try:
            found = self.walk(Exactly(decisions))
        except DeadEnd as end:
            raise UserError("architecture", dict(decisions), allowed=f"what the constraints admit: {end}") from end
        if len(found) != len(decisions):
            extra = sorted(set(decisions) - set(found))
            raise UserError(
                "architecture",
                extra,
                allowed="active paths only",
                hint="These paths are unknown or inactive: remove them.",
            )
        return found

    def contains(self, architecture: Mapping[str, Value]) -> bool:
        """Return whether ``validate`` accepts it."""
        try:
            self.validate(architecture)
        except UserError:
            return False
        return True

    def trace(self, architecture: Architecture) -> list[Decision]:
        """Return the decisions that make up a valid architecture, in the order of the walk.

        Raises:
            UserError: The architecture is not valid.
        """
        recording = Recording(Exactly(self.validate(architecture)))
        self.walk(recording)
        return recording.decisions

    def replay(self, decisions: Mapping[str, Value], rng: np.random.Generator) -> Architecture:
        """Return an architecture that keeps every stored decision that exists and is still allowed; samples the rest.

        Args:
            decisions: Value per path, from this space or an earlier edition of it.
            rng: Stream for the decisions that are not kept.

        Raises:
            UserError: No valid completion was found.
        """
        for _ in range(ATTEMPTS):
            try:
                return self.walk(Replay(decisions, Uniform(rng)))
            except DeadEnd as end:
                reason = str(end)
        raise UserError(
            "decisions", dict(decisions), allowed=f"decisions of which some completion is valid; last failure: {reason}"
        )

    def mutate(
        self, architecture: Architecture, rng: np.random.Generator, *, subtree: str | None = None
    ) -> Architecture:
        """Return a valid architecture that differs in one decision, or in one subtree.

        Without ``subtree``, a decision is drawn uniformly from those with another allowed option, then another option;
        all else is replayed, and only decisions that a condition switches on or off may differ as well. Where
        constraints admit no such single change (a fixed sum, say), decisions that they force may differ too.

        Args:
            architecture: A valid architecture, left as it is.
            rng: Stream of all choices.
            subtree: A path or a prefix of paths ("blocks/3"): everything at and below it is sampled anew.

        Raises:
            UserError: Nothing different and valid was found, or ``subtree`` names no decision.
        """
        decisions = self.trace(architecture)
        if subtree is not None:
            return self._resampled(architecture, rng, subtree)
        open_decisions = [d for d in decisions if allowed_count(d.options, d.mask) > 1]
        order = [open_decisions[i] for i in rng.permutation(len(open_decisions))]
        for strict in (True, False):
            for decision in order:
                for value in islice(_others(decision, rng), DRAWS):
                    found = self._pinned(architecture, decision.path, value, Uniform(rng))
                    if found is not None and (not strict or differs_only_at(architecture, found, decision.path)):
                        return found
        raise UserError(
            "architecture",
            dict(architecture),
            allowed=f"one with a valid neighbour; {self.name!r} offers no other nearby",
        )

    def _pinned(self, architecture: Architecture, path: str, value: Value, otherwise: Decide) -> Architecture | None:
        """Return ``architecture`` with one decision replaced and the rest replayed, ``None`` when that is not valid."""
        try:
            found = self.walk(Replay({**architecture, path: value}, otherwise))
        except DeadEnd:
            return None
        return found if path in found and found != architecture else None

    def _resampled(self, architecture: Architecture, rng: np.random.Generator, subtree: str) -> Architecture:
        kept = {p: v for p, v in architecture.items() if p != subtree and not p.startswith(f"{subtree}/")}
        if len(kept) == len(architecture):
            raise UserError(
                "subtree", subtree, allowed=f"a path of the architecture or a prefix: {sorted(architecture)[:8]}"
            )
        for _ in range(FEW_ATTEMPTS):
            try:
                found = self.walk(Replay(kept, Uniform(rng)))
            except DeadEnd:
                continue
            if found != architecture and all(found.get(path, value) == value for path, value in kept.items()):
                return found
        raise UserError(
            "subtree", subtree, allowed=f"a part that can differ; no other was found in {FEW_ATTEMPTS} walks"
        )

    def crossover(self, first: Architecture, second: Architecture, rng: np.random.Generator) -> Architecture:
        """Return a valid child whose every decision stems from a parent, unless neither has an allowed one.

        Each decision is taken from a parent chosen by a fair coin. When no valid child comes of ``FEW_ATTEMPTS`` walks
        (predicates may be that strict), the child equals one of the parents.

        Raises:
            UserError: A parent is not valid in this space.
        """
        parents = (self.validate(first), self.validate(second))
        for _ in range(FEW_ATTEMPTS):
            try:
                return self.walk(Crossover(parents, rng, Uniform(rng)))
            except DeadEnd:
                continue
        return parents[int(rng.integers(2))]

    def neighbours(self, architecture: Architecture) -> Iterator[Architecture]:
        """Yield the valid architectures one small step away, in the order of the walk.

        Each differs in exactly one decision, apart from those that a condition switches on (they take their first
        allowed option) or off. What a small step is, the dimension says.

        Raises:
            UserError: The architecture is not valid.
        """
        for decision in self.trace(architecture):
            for value in self.adjacent(decision.path, decision.choice, decision.options):
                if is_allowed(value, decision.options, decision.mask):
                    found = self._pinned(architecture, decision.path, value, first_allowed)
                    if found is not None and differs_only_at(architecture, found, decision.path):
                        yield found

    def enumerate(self, *, after: Architecture | None = None) -> Iterator[Architecture]:
        """Yield every valid architecture once, lazily, in the order of decisions and options (the last varies fastest).

        Args:
            after: Go on behind this valid architecture, without passing through those before it.

        Raises:
            UserError: The space is infinite, or ``after`` is not valid in it.
        """
        if self.size == math.inf:
            raise UserError(
                "space", self.name, allowed="a finite space", hint="It has real dimensions: sample it instead."
            )
        if after is None:
            return completed_walks(self.walk)
        odometer = _Odometer([_position(decision) for decision in self.trace(after)])
        self.walk(odometer)
        following = odometer.following()
        return completed_walks(self.walk, following) if following else iter(())


def completed_walks(walk: Callable[[Decide], Architecture], start: Sequence[int] = ()) -> Iterator[Architecture]:
    """Yield the result of every walk that does not end dead, the last decision varying fastest.

    Args:
        walk: Of a finite space.
        start: Option numbers of the first decisions of the first walk.
    """
    prefix = list(start)
    while True:
        odometer = _Odometer(prefix)
        with suppress(DeadEnd):
            yield walk(odometer)
        prefix = odometer.following()
        if not prefix:
            return


class _Odometer:
    """Chooses by option number: the given prefix, then the first allowed option of each further decision."""

    def __init__(self, prefix: list[int]) -> None:
        self.prefix = prefix
        self.taken: list[tuple[int, int | None]] = []

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        at = len(self.taken)
        if isinstance(options, Interval):  # of a finite space: a single value
            self.taken.append((0, None))
            return options.low
        index = self.prefix[at] if at < len(self.prefix) else _next_allowed(0, int(allowed_count(options, None)), mask)
        assert index is not None
        self.taken.append((index, _next_allowed(index + 1, int(allowed_count(options, None)), mask)))
        return options[index]

    def following(self) -> list[int]:
        """Return the prefix that comes next, empty when this walk was the last."""
        for at in range(len(self.taken) - 1, -1, -1):
            if (index := self.taken[at][1]) is not None:
                return [taken for taken, _ in self.taken[:at]] + [index]
        return []


def _position(decision: Decision) -> int:
    if isinstance(decision.options, Interval):  # of a finite space: a single value
        return 0
    index = option_index(decision.choice, decision.options)
    assert index is not None
    return index


def _next_allowed(start: int, count: int, mask: Mask) -> int | None:
    if mask is None:
        return start if start < count else None
    later = np.flatnonzero(mask[start:])
    return start + int(later[0]) if len(later) else None


def _others(decision: Decision, rng: np.random.Generator) -> Iterator[Value]:
    """Yield allowed options other than the choice, in random order; without end for an interval."""
    options, mask = decision.options, decision.mask
    if isinstance(options, Interval) or allowed_count(options, mask) > 1 << 16:
        while True:
            if (value := draw(options, mask, rng)) != decision.choice:
                yield value
    else:
        indices = np.arange(len(options)) if mask is None else np.flatnonzero(mask)
        for index in rng.permutation(indices):
            if (value := options[int(index)]) != decision.choice:
                yield value


def differs_only_at(before: Mapping[str, Value], after: Mapping[str, Value], path: str) -> bool:
    """Return whether two architectures agree on every path that both have, ``path`` itself excepted."""
    return all(after[other] == value for other, value in before.items() if other != path and other in after)


def sample_by_decisions(space: Space, rng: np.random.Generator) -> Architecture:
    """Return a valid architecture, each decision drawn uniformly among its allowed options; dead ends are tried anew.

    Simple and always possible, but not uniform over architectures: a branch with few completions is as likely as one
    with many.

    Raises:
        UserError: Nothing valid was found in ``ATTEMPTS`` walks.
    """
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            return space.walk(Uniform(rng))
        except DeadEnd as end:
            reason = str(end)
    raise nothing_valid(space.name, reason)


def nothing_valid(name: str, reason: str) -> UserError:
    """Return the error of a space in which no valid architecture was found."""
    return UserError(
        "space",
        name,
        allowed=f"a space with valid architectures; none was found, last failure: {reason}",
        hint="Relax its constraints.",
    )
