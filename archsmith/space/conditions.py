"""Conditions: when a dimension is active, as a declarative predicate over earlier decisions.

An atomic condition (``When``, ``Has``) tests the value of one path; ``AllOf``, ``AnyOf`` and ``Not`` combine them. An
atomic condition on a path that is inactive itself is false. All are frozen and JSON-able.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

from archsmith.core.errors import UserError
from archsmith.space.values import Value, frozen_value, strict_key


class Condition(ABC):
    """A predicate over earlier decisions."""

    kind: ClassVar[str]

    @abstractmethod
    def atoms(self) -> tuple[Atom, ...]:
        """Return the atomic conditions it is made of."""

    @abstractmethod
    def holds(self, truth: Callable[[Atom], bool]) -> bool:
        """Return its value, given the value of each atomic condition."""

    @abstractmethod
    def renamed(self, rename: Callable[[str], str]) -> Condition:
        """Return the same condition about other paths."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the condition as a JSON object; ``condition_from_json`` restores it."""

    def holds_for(self, decisions: Mapping[str, Value]) -> bool:
        """Return its value for a mapping path → value of the decisions made so far."""
        return self.holds(lambda atom: atom.path in decisions and atom.test(decisions[atom.path]))


@dataclass(frozen=True)
class Atom(Condition):
    """A condition that tests the value of one path; hashable."""

    path: str

    @abstractmethod
    def test(self, value: Value) -> bool:
        """Return whether a decision of ``value`` makes the condition true."""

    def atoms(self) -> tuple[Atom, ...]:
        """Return the condition alone."""
        return (self,)

    def holds(self, truth: Callable[[Atom], bool]) -> bool:
        """Return the given value."""
        return truth(self)

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """Return the same test of another path."""
        return replace(self, path=rename(self.path))


@dataclass(frozen=True)
class When(Atom):
    """True when the decision at ``path`` is one of ``values``.

    Args:
        path: An earlier path; inside a repeat or group first looked up beside the condition, then outwards.
        values: One plain value, or a list, tuple or range of them. To test a ``Subset``, use ``Has``.
    """

    kind: ClassVar[str] = "when"
    values: Any

    def __post_init__(self) -> None:
        given = self.values if isinstance(self.values, list | tuple | range) else (self.values,)
        object.__setattr__(self, "values", tuple(frozen_value(value, f"When({self.path!r}).values") for value in given))
        if not self.values:
            raise UserError(f"When({self.path!r}).values", given, allowed="at least one value")

    @cached_property
    def _keys(self) -> frozenset[Any]:
        return frozenset(map(strict_key, self.values))

    def test(self, value: Value) -> bool:
        """Return whether ``value`` is one of the values."""
        return strict_key(value) in self._keys

    def to_json(self) -> dict[str, Any]:
        """Return ``{"type": "when", "path", "values"}``."""
        return {"type": self.kind, "path": self.path, "values": list(self.values)}


@dataclass(frozen=True)
class Has(Atom):
    """True when the subset decided at ``path`` contains ``member``."""

    kind: ClassVar[str] = "has"
    member: Value

    def __post_init__(self) -> None:
        object.__setattr__(self, "member", frozen_value(self.member, f"Has({self.path!r}).member"))

    def test(self, value: Value) -> bool:
        """Return whether ``value`` is a subset with the member."""
        return isinstance(value, tuple) and strict_key(self.member) in map(strict_key, value)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"type": "has", "path", "member"}``."""
        return {"type": self.kind, "path": self.path, "member": self.member}


@dataclass(frozen=True)
class _Joined(Condition):
    """Several conditions taken together."""

    conditions: tuple[Condition, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))

    def atoms(self) -> tuple[Atom, ...]:
        """Return the atoms of all conditions."""
        return tuple(atom for condition in self.conditions for atom in condition.atoms())

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """Return the same condition about other paths."""
        return type(self)(tuple(condition.renamed(rename) for condition in self.conditions))

    def to_json(self) -> dict[str, Any]:
        """Return ``{"type", "conditions"}``."""
        return {"type": self.kind, "conditions": [condition.to_json() for condition in self.conditions]}


@dataclass(frozen=True)
class AllOf(_Joined):
    """True when every one of ``conditions`` is."""

    kind: ClassVar[str] = "all"

    def holds(self, truth: Callable[[Atom], bool]) -> bool:
        """Return whether all hold."""
        return all(condition.holds(truth) for condition in self.conditions)


@dataclass(frozen=True)
class AnyOf(_Joined):
    """True when at least one of ``conditions`` is."""

    kind: ClassVar[str] = "any"

    def holds(self, truth: Callable[[Atom], bool]) -> bool:
        """Return whether any holds."""
        return any(condition.holds(truth) for condition in self.conditions)


@dataclass(frozen=True)
class Not(Condition):
    """True when ``condition`` is false, which includes a path that is inactive."""

    kind: ClassVar[str] = "not"
    condition: Condition

    def atoms(self) -> tuple[Atom, ...]:
        """Return the atoms of the negated condition."""
        return self.condition.atoms()

    def holds(self, truth: Callable[[Atom], bool]) -> bool:
        """Return whether the condition does not hold."""
        return not self.condition.holds(truth)

    def renamed(self, rename: Callable[[str], str]) -> Not:
        """Return the negation about other paths."""
        return Not(self.condition.renamed(rename))

    def to_json(self) -> dict[str, Any]:
        """Return ``{"type": "not", "condition"}``."""
        return {"type": self.kind, "condition": self.condition.to_json()}


def condition_from_json(data: Mapping[str, Any]) -> Condition:
    """Return the condition that ``Condition.to_json`` wrote.

    Raises:
        UserError: Unknown type.
    """
    match data.get("type"):
        case "when":
            return When(data["path"], tuple(data["values"]))
        case "has":
            return Has(data["path"], data["member"])
        case "all":
            return AllOf(tuple(condition_from_json(each) for each in data["conditions"]))
        case "any":
            return AnyOf(tuple(condition_from_json(each) for each in data["conditions"]))
        case "not":
            return Not(condition_from_json(data["condition"]))
        case other:
            raise UserError("condition.type", other, allowed="one of 'when', 'has', 'all', 'any', 'not'")
