"""Budgets: limits on costs, written the same way everywhere.

``"macs<=0.4x, latency<=4ms, throughput>=1200/s, memory<=78000MiB, params<=1M"``: limits joined by commas, each a cost,
``<=`` (``>=`` for throughput), a number and a unit. The unit ``x`` is relative to the largest network.

==========  =======================================  ======================
cost        units                                    stored in
==========  =======================================  ======================
macs        none, k or K, M, G                       multiply-accumulates
params      none, k or K, M, G                       parameters
memory      B, kB, MB, GB, KiB, MiB, GiB             bytes
latency     us, ms, s                                milliseconds
throughput  /s                                       examples per second
energy      uJ, mJ, J                                millijoules
==========  =======================================  ======================

Costs given to ``resolve``, ``violations`` and ``check_feasible`` are mappings from these names to numbers in the units
of the last column.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from archsmith.core.errors import Shown, UserError

Relation = Literal["<=", ">="]

_COUNTS = {"": Fraction(1), "k": Fraction(10**3), "K": Fraction(10**3), "M": Fraction(10**6), "G": Fraction(10**9)}
_UNITS: dict[str, dict[str, Fraction]] = {
    "macs": _COUNTS,
    "params": _COUNTS,
    "memory": {"B": Fraction(1)}
    | {f"{p}B": Fraction(1000 ** (i + 1)) for i, p in enumerate("kMG")}
    | {f"{p}iB": Fraction(1024 ** (i + 1)) for i, p in enumerate("KMG")},
    "latency": {"us": Fraction(1, 1000), "ms": Fraction(1), "s": Fraction(1000)},
    "throughput": {"/s": Fraction(1)},
    "energy": {"uJ": Fraction(1, 1000), "mJ": Fraction(1), "J": Fraction(1000)},
}
_STORED = {"macs": "", "params": "", "memory": "B", "latency": "ms", "throughput": "/s", "energy": "mJ"}
COSTS = tuple(_UNITS)

_EXAMPLE = "macs<=0.4x, latency<=4ms"
_LIMIT = re.compile(
    r"([A-Za-z_]*)\s*(<=|>=|==|=|<|>|)\s*([+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|nan|inf(?:inity)?))\s*(/?[A-Za-z]*)",
    re.I,
)


@dataclass(frozen=True)
class Limit:
    """One limit of a budget.

    Args:
        cost: One of ``COSTS``.
        relation: ``">="`` for throughput, ``"<="`` for all others.
        value: Positive and finite, in ``unit``.
        unit: The cost's stored unit ("", "B", "ms", "/s", "mJ"), or "x" when relative.
        relative: Whether ``value`` is a multiple of the largest network's cost.
    """

    cost: str
    relation: Relation
    value: float
    unit: str
    relative: bool

    def __str__(self) -> str:
        return f"{self.cost}{self.relation}{self.value!r}{self.unit}"

    def admits(self, cost: float) -> bool:
        """Return whether a cost keeps the limit; NaN never does."""
        return cost >= self.value if self.relation == ">=" else cost <= self.value


@dataclass(frozen=True)
class Violation:
    """A limit that does not hold, and the cost that breaks it."""

    limit: Limit
    cost: float

    def __str__(self) -> str:
        return f"{self.limit.cost} is {self.cost!r}{self.limit.unit}, the budget says {self.limit}"


@dataclass(frozen=True)
class Budget:
    """Limits on costs, at most one per cost.

    Example:
        >>> budget = Budget.parse("macs<=0.5x, latency<=4ms")
        >>> str(budget.resolve({"macs": 3001}))
        'macs<=1500.5, latency<=4ms'
    """

    limits: tuple[Limit, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget that ``text`` writes; ``str`` of it parses to an equal one.

        Raises:
            UserError: Not text or empty, a limit that cannot be read or has no cost name, an unknown cost, unit or
                relation, a limit that is zero, negative, infinite or NaN, or two limits on one cost.
        """
        if not isinstance(text, str) or not text.strip():
            raise UserError("budget", text, allowed=f"limits joined by commas, like {_EXAMPLE!r}")
        limits = tuple(_parse_limit(part.strip(), text) for part in text.split(","))
        for i, limit in enumerate(limits):
            if limit.cost in (earlier.cost for earlier in limits[:i]):
                raise UserError(
                    "budget", text, allowed="one limit per cost", hint=f"Remove one of the limits on {limit.cost}."
                )
        return cls(limits)

    def __str__(self) -> str:
        return ", ".join(map(str, self.limits))

    def resolve(self, reference: Mapping[str, float]) -> Budget:
        """Return the budget with every relative limit made absolute.

        Args:
            reference: Costs of the largest network, in stored units. Products are exact before they are rounded once.

        Raises:
            UserError: The cost of a relative limit is missing, or not positive and finite.
        """
        return Budget(tuple(_absolute(limit, reference) if limit.relative else limit for limit in self.limits))

    def violations(self, costs: Mapping[str, float]) -> list[Violation]:
        """Return the limits that ``costs`` break, with the cost of each; empty when the budget holds.

        Args:
            costs: Costs of one network, in stored units; a NaN breaks its limit.

        Raises:
            UserError: A limit is still relative, or its cost is missing: unknown is not "within budget".
        """
        self._insist_on_absolute()
        for limit in self.limits:
            if limit.cost not in costs:
                raise UserError("costs", sorted(costs), allowed=f"every cost of the budget; {limit.cost!r} is missing")
        return [Violation(limit, costs[limit.cost]) for limit in self.limits if not limit.admits(costs[limit.cost])]

    def check_feasible(self, *, smallest: Mapping[str, float], largest: Mapping[str, float]) -> tuple[str, ...]:
        """Refuse limits that the largest network keeps already, or that even the smallest breaks.

        Args:
            smallest: Costs of the smallest network, in stored units.
            largest: Costs of the largest network, in stored units. Relative limits are resolved with them.

        Returns:
            The costs with a limit that could not be checked, because ``smallest`` or ``largest`` lacks them.

        Raises:
            UserError: Above the largest network (nothing to search) or below the smallest one (nothing fits).
        """
        known = [limit for limit in self.limits if limit.cost in smallest and limit.cost in largest]
        for given in known:
            limit = _absolute(given, largest) if given.relative else given
            low, high = (
                Limit(limit.cost, limit.relation, c[limit.cost], limit.unit, False) for c in (smallest, largest)
            )
            tight, loose = ("at most", "above") if limit.relation == ">=" else ("at least", "below")
            shown = Shown(str(given) if not given.relative else f"{given} ({limit})")
            if not limit.admits(low.value):
                raise UserError(
                    "budget",
                    shown,
                    allowed=f"{limit.cost} {tight} {_amount(low)}, what the smallest network reaches",
                    hint="This budget is below the smallest network: nothing can keep it.",
                )
            if limit.admits(high.value):
                raise UserError(
                    "budget",
                    shown,
                    allowed=f"{limit.cost} {loose} {_amount(high)}, what the largest network has",
                    hint="This budget is above the supernet: every network keeps it, there is nothing to search.",
                )
        return tuple(limit.cost for limit in self.limits if limit not in known)

    def _insist_on_absolute(self) -> None:
        for limit in self.limits:
            if limit.relative:
                raise UserError(
                    "budget",
                    Shown(str(limit)),
                    allowed="absolute limits here",
                    hint="Call resolve(costs of the largest) first.",
                )


def _amount(limit: Limit) -> str:
    return f"{limit.value!r}{limit.unit}"


def _is_usable(value: Fraction) -> bool:
    """Return whether a limit is positive and a float can hold it."""
    return sys.float_info.min <= value <= sys.float_info.max


def _exact_number(value: Fraction) -> float:
    """Return an int where the value is whole, also after rounding: the text of the number must read back as it is."""
    number = value.numerator if value.denominator == 1 else float(value)
    return int(number) if number == int(number) else number


def _absolute(limit: Limit, reference: Mapping[str, float]) -> Limit:
    cost = reference.get(limit.cost)
    if cost is None or not math.isfinite(cost) or cost <= 0:
        raise UserError(
            f"budget limit {limit}",
            cost,
            allowed=f"a positive {limit.cost} of the largest network to be relative to",
            hint=f"Known costs: {sorted(reference)}; write an absolute limit otherwise.",
        )
    # Through the decimal that the user typed: 0.29x of 100 is 29, not 28.999999999999996.
    value = Fraction(repr(limit.value)) * Fraction(cost)
    if not _is_usable(value):
        raise UserError("budget", Shown(str(limit)), allowed=f"a share of {cost!r} that is positive and finite")
    return Limit(limit.cost, limit.relation, _exact_number(value), _STORED[limit.cost], relative=False)


def _parse_limit(part: str, text: str) -> Limit:
    def refused(allowed: str, hint: str) -> UserError:
        return UserError("budget", text, allowed=allowed, hint=hint)

    match = _LIMIT.fullmatch(part)
    if match is None:
        raise refused(f"limits like {_EXAMPLE!r}", f"{part!r} cannot be read as a limit.")
    cost, relation, number, unit = match.groups()
    if not cost:
        raise refused(f"a cost name before the limit, one of {list(COSTS)}", f"Write macs<={number}{unit}.")
    if cost not in _UNITS:
        raise refused(f"costs {list(COSTS)}", f"{cost!r} is not a cost.")
    right: Relation = ">=" if cost == "throughput" else "<="
    if relation != right:
        raise refused(f"{right} for {cost}", f"Write {cost}{right}{number}{unit}.")
    relative = unit == "x"
    scale = Fraction(1) if relative else _UNITS[cost].get(unit)
    if scale is None:
        units = [*(repr(known) if known else "no unit" for known in _UNITS[cost]), "'x'"]
        given = f"{unit!r} is not one" if unit else "there is none"
        raise refused(f"for {cost} the units {', '.join(units)}", f"In {part!r} {given}.")
    if not math.isfinite(float(number)) or not _is_usable(value := Fraction(number) * scale):
        raise refused(f"a limit on {cost} that is positive and finite", f"{part!r} is not.")
    return Limit(cost, right, _exact_number(value), "x" if relative else _STORED[cost], relative)
