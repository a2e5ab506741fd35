"""Deciders: everything discrete is a function that answers ``decide(path, options, mask, group)``.

Uniform choice, replay of stored decisions by path, one pinned path, crossover and recording are each one small class;
they compose, and they work on any space, because a space only ever asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from archsmith.core.errors import ArchsmithError, UserError
from archsmith.space.options import Interval, Options, Subsets, described, draw, option_count
from archsmith.space.values import Value, strict_key

Mask = np.ndarray | None


class Decide(Protocol):
    """Answers one question of a walk."""

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        """Return the choice.

        Args:
            path: Stable hierarchical name of the decision.
            options: A lazy sequence of values, or an ``Interval``.
            mask: One bool per option, True where allowed; ``None`` when all are. At least one is.
            group: Class of the decision.
        """


class DeadEnd(ArchsmithError):
    """A walk cannot be finished: no option is left at ``path``, or the decisions break a constraint ("" as path)."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"the walk cannot go on at {path!r}: {reason}" if path else reason)


class Decision(NamedTuple):
    """One step of a walk: what was asked and what was chosen."""

    path: str
    options: Options
    mask: Mask
    group: str
    choice: Value


def is_allowed(value: Value, options: Options, mask: Mask) -> bool:
    """Return whether ``value`` is among the options and not masked (1, 1.0 and True are different values)."""
    if isinstance(options, Interval):
        return value in options
    if isinstance(options, range):
        return type(value) is int and value in options and (mask is None or bool(mask[options.index(value)]))
    if mask is None and isinstance(options, tuple) and any(option is value for option in options):
        return True  # the usual case, at the speed of a look
    index = option_index(value, options)
    return index is not None and (mask is None or bool(mask[index]))


def option_index(value: Value, options: Sequence[Value]) -> int | None:
    """Return the position of ``value`` among the options, ``None`` when it is not one."""
    if isinstance(options, range):
        return options.index(value) if type(value) is int and value in options else None
    if isinstance(options, Subsets):
        members = value if isinstance(value, tuple) else None
        flags = None if members is None else [item in members for item in options.items]
        if flags is None or not options.minimum <= sum(flags) <= options.maximum:
            return None
        rank = options.rank(flags)
        return rank if strict_key(options[rank]) == strict_key(value) else None
    key = strict_key(value)
    return next((i for i, option in enumerate(options) if option == value and strict_key(option) == key), None)


def allowed_count(options: Options, mask: Mask) -> int | float:
    """Return how many options are allowed: an exact int, or ``math.inf``."""
    return option_count(options) if mask is None else int(mask.sum())


@dataclass(frozen=True)
class Uniform:
    """Chooses uniformly among the allowed options of each decision by itself (not uniformly over architectures)."""

    rng: np.random.Generator

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        """Return a drawn option."""
        return draw(options, mask, self.rng)


def first_allowed(path: str, options: Options, mask: Mask, group: str) -> Value:
    """Choose the first allowed option; of an interval its lower end."""
    if isinstance(options, Interval):
        return options.low
    return options[0 if mask is None else int(np.argmax(mask))]


@dataclass(frozen=True)
class Replay:
    """Repeats stored decisions by path; where none exists, or it is no longer allowed, asks ``otherwise``.

    Args:
        decisions: Value per path.
        otherwise: Decider for the rest.
    """

    decisions: Mapping[str, Value]
    otherwise: Decide

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        """Return the stored decision if there is an allowed one."""
        if path in self.decisions and is_allowed(self.decisions[path], options, mask):
            return self.decisions[path]
        return self.otherwise(path, options, mask, group)


@dataclass(frozen=True)
class Exactly:
    """Repeats stored decisions and accepts nothing else: the decider of validation and of traces."""

    decisions: Mapping[str, Value]

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        """Return the stored decision.

        Raises:
            UserError: There is none, it is not an option, or earlier decisions and constraints leave it no way.
        """
        field = f"architecture[{path!r}]"
        if path not in self.decisions:
            raise UserError(field, None, allowed=described(options, mask), hint="The path is active and needs a value.")
        value = self.decisions[path]
        if is_allowed(value, options, mask):
            return value
        masked = is_allowed(value, options, None)
        hint = "The constraints rule it out after the decisions before it." if masked else ""
        raise UserError(field, value, allowed=described(options, mask), hint=hint)


@dataclass(frozen=True)
class Crossover:
    """Takes each decision from a parent chosen by a coin, from the other one if need be, else asks ``otherwise``.

    Args:
        parents: Two mappings path → value.
        rng: Stream of the coin.
        otherwise: Decider where no parent has an allowed answer.
    """

    parents: tuple[Mapping[str, Value], Mapping[str, Value]]
    rng: np.random.Generator
    otherwise: Decide

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        """Return a parent's decision if one is allowed."""
        coin = int(self.rng.integers(2))
        for parent in (self.parents[coin], self.parents[1 - coin]):
            if path in parent and is_allowed(parent[path], options, mask):
                return parent[path]
        return self.otherwise(path, options, mask, group)


class Recording:
    """Passes questions on to ``decide`` and keeps the answers in ``decisions``."""

    def __init__(self, decide: Decide) -> None:
        self.decide = decide
        self.decisions: list[Decision] = []

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        """Return what ``decide`` returns."""
        choice = self.decide(path, options, mask, group)
        self.decisions.append(Decision(path, options, mask, group, choice))
        return choice


def checked(decide: Decide, path: str, options: Options, mask: Mask, group: str) -> Value:
    """Ask ``decide`` and insist on an allowed option: the one way in which spaces ask.

    Raises:
        DeadEnd: No option is allowed.
        ValueError: The decider answered with something else.
    """
    if mask is not None and not mask.any():
        raise DeadEnd(path, "the constraints leave no option")
    choice = decide(path, options, mask, group)
    if not is_allowed(choice, options, mask):
        raise ValueError(f"the decider chose {choice!r} at {path!r}; allowed: {described(options, mask)}")
    return choice
