"""Constraints: what must hold of the decisions together.

``Linear`` (made by ``AtLeast`` and ``AtMost``) is declarative: spaces count, sample and mask with it exactly.
``Predicate`` is any function of the decisions; a space can only try and reject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space.values import FrozenDict, Value


@dataclass(frozen=True)
class Linear:
    """``low <= sum of weight * value <= high`` over the paths that are active; none active satisfies it.

    Args:
        weights: Finite weight per path. A ``*`` stands for one whole segment of a path: ``"layers/*/width"``.
        low: Lower bound, ``None`` for none.
        high: Upper bound, ``None`` for none.

    With integer weights, values and bounds everything is exact. With floats, sums are taken in the order of the space.
    """

    weights: Mapping[str, float]
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", FrozenDict(self.weights))
        numbers = [*self.weights.values(), *(bound for bound in (self.low, self.high) if bound is not None)]
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            raise UserError("Linear.weights, low, high", numbers, allowed="finite numbers")
        if not self.weights or (self.low is None and self.high is None):
            raise UserError("Linear", self, allowed="at least one path, and a low or a high bound")

    @cached_property
    def exact(self) -> bool:
        """True when weights and bounds are integers."""
        numbers = (*self.weights.values(), self.low or 0, self.high or 0)
        return all(isinstance(number, int) for number in numbers)

    def admits(self, total: float) -> bool:
        """Return whether the bounds allow this sum."""
        return (self.low is None or total >= self.low) and (self.high is None or total <= self.high)

    def __str__(self) -> str:
        terms = [path if weight == 1 else f"{weight}*{path}" for path, weight in self.weights.items()]
        shown = " + ".join(terms if len(terms) <= 6 else [*terms[:4], "...", terms[-1]])
        low = "" if self.low is None else f"{self.low} <= "
        return f"{low}{shown}" + ("" if self.high is None else f" <= {self.high}")

    def to_json(self) -> dict[str, Any]:
        """Return the constraint as a JSON object; ``linear_from_json`` restores it."""
        return {
            "type": "linear",
            "weights": [list(item) for item in self.weights.items()],
            "low": self.low,
            "high": self.high,
        }


def AtLeast(paths: Sequence[str], bound: float) -> Linear:
    """Return the constraint that the values at ``paths`` add up to at least ``bound``.

    Example:
        >>> str(AtLeast(["block/k3", "block/k5"], 1))
        '1 <= block/k3 + block/k5'
    """
    return Linear(dict.fromkeys(paths, 1), low=bound)


def AtMost(paths: Sequence[str], bound: float) -> Linear:
    """Return the constraint that the values at ``paths`` add up to at most ``bound``."""
    return Linear(dict.fromkeys(paths, 1), high=bound)


@dataclass(frozen=True)
class Predicate:
    """Any condition on an architecture, by name.

    Args:
        name: Says what must hold; errors show it.
        holds: Function of the mapping path → value (only active paths; relative ones inside a group or repeat). Pure.
    """

    name: str
    holds: Callable[[Mapping[str, Value]], bool]

    def __str__(self) -> str:
        return self.name


Constraint = Linear | Predicate


def linear_from_json(data: Mapping[str, Any]) -> Linear:
    """Return the constraint that ``Linear.to_json`` wrote.

    Raises:
        UserError: Another type of constraint.
    """
    if data.get("type") != "linear":
        raise UserError("constraint.type", data.get("type"), allowed="'linear'")
    return Linear(dict(data["weights"]), low=data["low"], high=data["high"])
