"""The parts a product space is written with, and how they flatten into slots with stable paths.

A group's names become path segments; a repeat unrolls to its largest count, each repetition active only when the count
reaches it; a ``Given`` adds a condition. What remains is a flat list of slots: path, dimension, condition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from archsmith.core.errors import UserError
from archsmith.space.conditions import AllOf, Condition, When, condition_from_json
from archsmith.space.constraints import Constraint, Linear, Predicate, linear_from_json
from archsmith.space.dimensions import Count, Dimension, Ordinal, dimension_from_json
from archsmith.space.options import Interval


@dataclass(frozen=True)
class Group:
    """Named elements, with constraints whose paths are relative to the group.

    Args:
        elements: Element per name, in the order of the decisions. A name may hold several segments: "blocks/3/k5".
        constraints: Hold whenever some path of the group is active.
    """

    elements: Mapping[str, Element]
    constraints: Sequence[Constraint] = ()


@dataclass(frozen=True)
class Repeat:
    """A body repeated as often as a decision says, so that depth is itself a choice.

    Args:
        count: ``Count``, or an ``Ordinal`` of integers, none negative. Its path is ``<name>/count``.
        body: Elements of one repetition; those of repetition i (from 0) have the paths ``<name>/<i>/...``.

    Repetition i is active when the count is above i, so a deeper architecture keeps the decisions of a shallower one.
    """

    count: Count | Ordinal
    body: Element


@dataclass(frozen=True)
class Given:
    """An element that is active only if a condition on earlier decisions holds.

    Args:
        condition: Its paths are looked up beside the element first, then outwards.
        element: Dimension, group or repeat.
    """

    condition: Condition
    element: Element


Element: TypeAlias = "Dimension | Group | Repeat | Given | Mapping[str, Element]"


@dataclass(frozen=True)
class Slot:
    """One place where a decision may be asked for."""

    path: str
    dimension: Dimension
    group: str
    condition: Condition | None


@dataclass(frozen=True)
class Scoped:
    """A predicate and the path prefix of the group it speaks about ("" for the whole space)."""

    prefix: str
    predicate: Predicate


class Flattened:
    """Slots, linear constraints with full paths, and predicates of a tree of elements.

    Raises:
        UserError: A bad or repeated path; a condition or constraint that names no (earlier) path; a repeat without
            integer counts; a linear constraint over something that is not a number.
    """

    def __init__(self, root: Group) -> None:
        self.slots: dict[str, Slot] = {}
        self.linear: list[Linear] = []
        self.predicates: list[Scoped] = []
        self._add(root, "", None, ("",))

    def _add(self, element: Element, path: str, condition: Condition | None, scopes: tuple[str, ...]) -> None:
        match element:
            case Dimension():
                self._add_slot(path, element, condition)
            case Given():
                more = self._resolved(element.condition, path, scopes)
                self._add(element.element, path, more if condition is None else AllOf((condition, more)), scopes)
            case Repeat():
                self._add_repeat(element, path, condition, scopes)
            case Group():
                prefix = f"{path}/" if path else ""
                inner = scopes if prefix in scopes else (*scopes, prefix)
                for name, child in element.elements.items():
                    if not isinstance(name, str) or not re.fullmatch(r"[^/*\s]+(/[^/*\s]+)*", name):
                        raise UserError("path", name, allowed="segments joined by '/', without spaces or '*'")
                    self._add(child, prefix + name, condition, inner)
                for constraint in element.constraints:
                    self._add_constraint(constraint, prefix, inner)
            case Mapping():
                self._add(Group(element), path, condition, scopes)
            case _:
                raise UserError(
                    f"element {path!r}", element, allowed="a dimension, Group, Repeat, Given or mapping of these"
                )

    def _add_slot(self, path: str, dimension: Dimension, condition: Condition | None) -> None:
        if path in self.slots:
            raise UserError("path", path, allowed="each path once", hint="Another element has this path already.")
        group = dimension.group or "/".join("*" if part.isdigit() else part for part in path.split("/"))
        self.slots[path] = Slot(path, dimension, group, condition)

    def _add_repeat(self, repeat: Repeat, path: str, condition: Condition | None, scopes: tuple[str, ...]) -> None:
        counts = list(repeat.count.domain) if isinstance(repeat.count, Count | Ordinal) else [None]
        if any(type(n) is not int or n < 0 for n in counts):
            raise UserError(f"Repeat {path!r}.count", repeat.count, allowed="a Count or an Ordinal of integers from 0")
        numbers = [n for n in counts if type(n) is int]
        self._add_slot(f"{path}/count", repeat.count, condition)
        for i in range(max(numbers)):
            reached = When(f"{path}/count", tuple(n for n in numbers if n > i))
            both: Condition = reached if condition is None else AllOf((condition, reached))
            self._add(repeat.body, f"{path}/{i}", both, (*scopes, f"{path}/{i}/"))

    def _add_constraint(self, constraint: Constraint, prefix: str, scopes: tuple[str, ...]) -> None:
        if isinstance(constraint, Predicate):
            self.predicates.append(Scoped(prefix, constraint))
            return
        weights: dict[str, float] = {}
        for pattern, weight in constraint.weights.items():
            for path in self._matches(pattern, str(constraint), scopes):
                if path in weights:
                    raise UserError(f"constraint {constraint}", path, allowed="each path once")
                if not _is_numeric(self.slots[path].dimension):
                    raise UserError(
                        f"constraint {constraint}", path, allowed="paths whose dimension holds numbers only"
                    )
                weights[path] = weight
        in_order = {path: weights[path] for path in self.slots if path in weights}
        self.linear.append(Linear(in_order, constraint.low, constraint.high))

    def _matches(self, pattern: str, owner: str, scopes: tuple[str, ...]) -> list[str]:
        if "*" not in pattern:
            return [self._lookup(pattern, owner, scopes)]
        for scope in reversed(scopes):
            shape = re.compile("/".join("[^/]+" if p == "*" else re.escape(p) for p in (scope + pattern).split("/")))
            if found := [path for path in self.slots if shape.fullmatch(path)]:
                return found
        raise UserError(f"constraint {owner}", pattern, allowed="a pattern that matches a path")

    def _resolved(self, condition: Condition, path: str, scopes: tuple[str, ...]) -> Condition:
        owner = f"of {path!r}"
        resolved = condition.renamed(lambda name: self._lookup(name, owner, scopes))
        for atom in resolved.atoms():
            if math.isinf(self.slots[atom.path].dimension.size):
                raise UserError(
                    f"condition {owner}", atom.path, allowed="paths of dimensions with finitely many options"
                )
            # A value that can never be decided would silently keep the element inactive for ever.
            if isinstance(atom, When) and (
                bad := [v for v in atom.values if not self.slots[atom.path].dimension.contains(v)]
            ):
                raise UserError(
                    f"condition {owner} on {atom.path!r}", bad[0], allowed="values that may be decided there"
                )
        return resolved

    def _lookup(self, name: str, owner: str, scopes: tuple[str, ...]) -> str:
        for scope in reversed(scopes):
            if scope + name in self.slots:
                return scope + name
        raise UserError(f"condition or constraint {owner}", name, allowed=f"an earlier path: {_some(list(self.slots))}")


def _some(paths: list[str]) -> str:
    return ", ".join(paths if len(paths) <= 10 else [*paths[:4], "...", *paths[-4:]]) or "there is none yet"


def _is_numeric(dimension: Dimension) -> bool:
    if isinstance(dimension.domain, range | Interval):
        return True
    return isinstance(dimension, Ordinal) and all(type(value) in (int, float) for value in dimension.options)


def element_to_json(element: Element) -> dict[str, Any]:
    """Return an element as a JSON object; ``element_from_json`` restores it.

    Raises:
        UserError: It holds a ``Predicate``, which is a function and has no JSON form.
    """
    match element:
        case Dimension():
            return element.to_json()
        case Given():
            return {
                "type": "given",
                "condition": element.condition.to_json(),
                "element": element_to_json(element.element),
            }
        case Repeat():
            return {"type": "repeat", "count": element.count.to_json(), "body": element_to_json(element.body)}
        case Group():
            # Pairs, not an object: the order of decisions must survive writers that sort keys.
            pairs = [[name, element_to_json(child)] for name, child in element.elements.items()]
            return {"type": "group", "elements": pairs, "constraints": list(_constraints_to_json(element.constraints))}
        case _:
            return element_to_json(Group(element))


def _constraints_to_json(constraints: Sequence[Constraint]) -> Iterator[dict[str, Any]]:
    for constraint in constraints:
        if isinstance(constraint, Predicate):
            raise UserError(
                "space.to_json",
                constraint.name,
                allowed="spaces with declarative constraints only",
                hint="A Predicate is a function: build this space in code.",
            )
        yield constraint.to_json()


def element_from_json(data: Mapping[str, Any]) -> Element:
    """Return the element that ``element_to_json`` wrote.

    Raises:
        UserError: Unknown type of element, dimension, condition or constraint.
    """
    restore: Callable[[Mapping[str, Any]], Element] = element_from_json
    match data.get("type"):
        case "given":
            return Given(condition_from_json(data["condition"]), restore(data["element"]))
        case "repeat":
            count = dimension_from_json(data["count"])
            assert isinstance(count, Count | Ordinal)
            return Repeat(count, restore(data["body"]))
        case "group":
            constraints = tuple(linear_from_json(each) for each in data["constraints"])
            return Group({name: restore(child) for name, child in data["elements"]}, constraints)
        case _:
            return dimension_from_json(data)
