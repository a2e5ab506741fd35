"""Dimensions: what one decision may be.

A dimension offers its ``options``: a lazy sequence of values (a ``range`` for counts, so that a thousand widths cost
nothing), or an ``Interval`` for a real number. Dimensions are frozen values; they know nothing of paths or spaces.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.options import Interval, Options, Subsets, described, draw
from archsmith.space.values import Value, frozen_value, strict_key

REAL_STEPS = 20  # a neighbour of a real value is one twentieth of its range away


class Dimension(ABC):
    """One decision's domain. Subclasses are frozen dataclasses with a keyword ``group``.

    ``group`` names the decision's class: decisions of one group mean the same thing at different places (controllers
    share parameters by it). ``None`` lets the space derive it from the path, integers replaced by ``*``.
    """

    kind: ClassVar[str]
    group: str | None

    @property
    @abstractmethod
    def size(self) -> int | float:
        """Number of options: an exact int, or ``math.inf``."""

    @property
    @abstractmethod
    def domain(self) -> Options:
        """The options, lazily, in a fixed order."""

    @abstractmethod
    def index(self, value: Value) -> int:
        """Return the position of ``value`` among the options.

        Raises:
            ValueError: ``value`` is not an option (1.0 and True are not the option 1).
        """

    @abstractmethod
    def adjacent(self, value: Value) -> list[Value]:
        """Return the values one small step away from ``value``, in option order, without ``value``."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments other than ``group``, as JSON values."""

    def contains(self, value: Value) -> bool:
        """Tell whether ``value`` is one of the options."""
        try:
            self.index(value)
        except ValueError:
            return False
        return True

    def validate(self, value: Value, name: str) -> None:
        """Check that ``value`` is an option.

        Raises:
            UserError: It is not; the error names ``name`` and the options.
        """
        if not self.contains(value):
            raise UserError(name, value, allowed=described(self.domain))

    def sample(self, rng: np.random.Generator) -> Value:
        """Return an option drawn uniformly (log-uniformly for a real dimension with ``log``)."""
        return draw(self.domain, None, rng)

    def to_json(self) -> dict[str, Any]:
        """Return the dimension as a JSON object; ``dimension_from_json`` restores it."""
        body = {"type": self.kind, **self.arguments()}
        return body if self.group is None else body | {"group": self.group}


def _checked_options(dimension: str, given: Sequence[Any]) -> tuple[Value, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise UserError(f"{dimension}.options", given, allowed="a list with at least one value")
    options = tuple(frozen_value(value, f"{dimension}.options") for value in given)
    if len(set(options)) != len(options):
        raise UserError(f"{dimension}.options", given, allowed="values that all differ (1, 1.0 and True count as one)")
    return options


@dataclass(frozen=True)
class _Listed(Dimension):
    """A dimension whose options are written out."""

    options: tuple[Value, ...]
    group: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _checked_options(type(self).__name__, self.options))

    @cached_property
    def _index(self) -> dict[tuple[str, Any], int]:
        return {strict_key(value): i for i, value in enumerate(self.options)}

    @property
    def size(self) -> int:
        """Number of options."""
        return len(self.options)

    @property
    def domain(self) -> tuple[Value, ...]:
        """The options, lazily."""
        return self.options

    def index(self, value: Value) -> int:
        """Return the position of ``value``; raises ``ValueError`` when it is not an option."""
        try:
            return self._index[strict_key(value)]
        except (KeyError, TypeError):
            raise ValueError(f"{value!r} is not an option") from None

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments as JSON values."""
        return {"options": list(self.options)}


@dataclass(frozen=True)
class Categorical(_Listed):
    """One of several unordered options; every other option is adjacent.

    Args:
        options: Distinct plain values, at least one.
        group: Class of the decision, see ``Dimension``.
    """

    kind: ClassVar[str] = "categorical"

    def adjacent(self, value: Value) -> list[Value]:
        """Return all other options."""
        here = self.index(value)
        return [other for i, other in enumerate(self.options) if i != here]


@dataclass(frozen=True)
class Ordinal(_Listed):
    """One of several options in a meaningful order; the options before and after are adjacent.

    Args:
        options: Distinct plain values in order, at least one.
        group: Class of the decision, see ``Dimension``.
    """

    kind: ClassVar[str] = "ordinal"

    def adjacent(self, value: Value) -> list[Value]:
        """Return the options before and after."""
        here = self.index(value)
        return [self.options[i] for i in (here - 1, here + 1) if 0 <= i < len(self.options)]


@dataclass(frozen=True)
class Count(Dimension):
    """An integer from ``low`` to ``high`` inclusive, in steps; the numbers one step away are adjacent.

    Args:
        low: Smallest value.
        high: Largest value; ``high - low`` is a multiple of ``step``.
        step: Distance of neighbouring values, at least 1 (a width divisor, say).
        group: Class of the decision, see ``Dimension``.
    """

    kind: ClassVar[str] = "count"
    low: int
    high: int
    step: int = 1
    group: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | np.integer):
                raise UserError(f"Count.{name}", given, allowed="an integer")
            object.__setattr__(self, name, int(given))
        if self.step < 1:
            raise UserError("Count.step", self.step, allowed="an integer of at least 1")
        if self.high < self.low or (self.high - self.low) % self.step:
            raise UserError(
                "Count.high",
                self.high,
                allowed=f"low + a multiple of the step: {self.low}, {self.low + self.step}, ...",
            )

    @property
    def size(self) -> int:
        """Number of options."""
        return (self.high - self.low) // self.step + 1

    @property
    def domain(self) -> range:
        """The options, lazily."""
        return range(self.low, self.high + 1, self.step)

    def index(self, value: Value) -> int:
        """Return the position of ``value``; raises ``ValueError`` when it is not an option."""
        if type(value) is int and self.low <= value <= self.high:
            index, rest = divmod(value - self.low, self.step)
            if not rest:
                return index
        raise ValueError(f"{value!r} is not an option")

    def adjacent(self, value: Value) -> list[Value]:
        """Return the counts one step below and above."""
        here = self.index(value)
        return [self.domain[i] for i in (here - 1, here + 1) if 0 <= i < self.size]

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments as JSON values."""
        return {"low": self.low, "high": self.high, "step": self.step}


@dataclass(frozen=True)
class Real(Dimension):
    """A float from ``low`` to ``high`` inclusive; one twentieth of the range up and down are adjacent.

    Args:
        low: Smallest value, finite; above zero with ``log``.
        high: Largest value, finite.
        log: Sample, and step to neighbours, on the logarithmic scale.
        group: Class of the decision, see ``Dimension``.
    """

    kind: ClassVar[str] = "real"
    low: float
    high: float
    log: bool = False
    group: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float | np.number) or not math.isfinite(given):
                raise UserError(f"Real.{name}", given, allowed="a finite number")
            object.__setattr__(self, name, float(given) + 0.0)
        if self.high < self.low:
            raise UserError("Real.high", self.high, allowed=f"at least low = {self.low}")
        if self.log and self.low <= 0:
            raise UserError("Real.low", self.low, allowed="a number above zero when log=True")

    @property
    def size(self) -> int | float:
        """Number of options."""
        return 1 if self.low == self.high else math.inf

    @property
    def domain(self) -> Interval:
        """The options, lazily."""
        return Interval(self.low, self.high, self.log)

    def index(self, value: Value) -> int:
        """Return 0 for any value of the interval; raises ``ValueError`` outside."""
        if value in self.domain:
            return 0  # a real dimension is one class of options: its values are not numbered
        raise ValueError(f"{value!r} is not an option")

    def adjacent(self, value: Value) -> list[Value]:
        """Return the values one twentieth of the range below and above, cut at the ends."""
        self.index(value)
        assert isinstance(value, float)
        here = self.domain.fraction(value)
        steps = (self.domain.at(min(max(here + d, 0.0), 1.0)) for d in (-1 / REAL_STEPS, 1 / REAL_STEPS))
        return [other for other in steps if other != value]

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments as JSON values."""
        return {"low": self.low, "high": self.high, "log": self.log}


@dataclass(frozen=True)
class Subset(Dimension):
    """A set of options, stored as a tuple in option order; adding or removing one member is adjacent.

    Args:
        options: Distinct plain values to choose from, at least one.
        minimum: Fewest members chosen.
        maximum: Most members chosen; ``None`` for all.
        group: Class of the decision, see ``Dimension``.
    """

    kind: ClassVar[str] = "subset"
    options: tuple[Value, ...]
    minimum: int = 0
    maximum: int | None = None
    group: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        options = _checked_options("Subset", self.options)
        maximum = len(options) if self.maximum is None else self.maximum
        if not 0 <= self.minimum <= maximum <= len(options):
            raise UserError(
                "Subset.minimum, maximum",
                (self.minimum, self.maximum),
                allowed=f"0 <= minimum <= maximum <= {len(options)}",
            )
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "maximum", maximum)

    @cached_property
    def _position(self) -> dict[tuple[str, Any], int]:
        return {strict_key(value): i for i, value in enumerate(self.options)}

    @cached_property
    def domain(self) -> Subsets:
        """The options, lazily."""
        assert self.maximum is not None
        return Subsets(self.options, self.minimum, self.maximum)

    @property
    def size(self) -> int:
        """Number of options."""
        return self.domain.total

    def flags(self, value: Value) -> list[bool]:
        """Return one membership flag per member.

        Raises:
            ValueError: ``value`` is not a tuple of members in their order, or has too few or too many.
        """
        try:
            positions = [self._position[strict_key(item)] for item in value] if isinstance(value, tuple) else None
        except (KeyError, TypeError):
            positions = None
        if positions is None or any(a >= b for a, b in pairwise(positions)):
            raise ValueError(f"{value!r} is not an option")
        if not self.minimum <= len(positions) <= (self.maximum or 0):
            raise ValueError(f"{value!r} is not an option")
        chosen = set(positions)
        return [i in chosen for i in range(len(self.options))]

    def of_flags(self, flags: Sequence[bool]) -> tuple[Value, ...]:
        """Return the subset with the given membership flags."""
        return tuple(item for item, inside in zip(self.options, flags, strict=True) if inside)

    def index(self, value: Value) -> int:
        """Return 0 for any value of the interval; raises ``ValueError`` outside."""
        return self.domain.rank(self.flags(value))

    def adjacent(self, value: Value) -> list[Value]:
        """Return the subsets with one member less or more."""
        flags = self.flags(value)
        flipped = (
            self.of_flags([not f if i == j else f for j, f in enumerate(flags)]) for i in range(len(self.options))
        )
        return [other for other in flipped if self.minimum <= len(other) <= (self.maximum or 0)]

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments as JSON values."""
        return {"options": list(self.options), "minimum": self.minimum, "maximum": self.maximum}


DIMENSIONS: tuple[type[Dimension], ...] = (Categorical, Ordinal, Count, Real, Subset)


def dimension_from_json(data: Mapping[str, Any]) -> Dimension:
    """Return the dimension that ``Dimension.to_json`` wrote.

    Raises:
        UserError: Unknown type, or arguments that the type does not take.
    """
    arguments = {name: value for name, value in data.items() if name != "type"}
    for dimension in DIMENSIONS:
        if dimension.kind == data.get("type"):
            try:
                return dimension(**arguments)
            except TypeError as error:
                raise UserError(
                    f"{dimension.kind} dimension", arguments, allowed="its constructor's arguments"
                ) from error
    raise UserError("dimension.type", data.get("type"), allowed=f"one of {[d.kind for d in DIMENSIONS]}")
