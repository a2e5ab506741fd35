"""A product of choices: named dimensions, conditions, constraints, repeats and side spaces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.architecture import Architecture, Canonical, check_version
from archsmith.space.base import (
    ATTEMPTS,
    EncodingKind,
    Invalid,
    Space,
    completed_walks,
    nothing_valid,
    sample_by_decisions,
)
from archsmith.space.components import Component, State, split
from archsmith.space.constraints import Constraint
from archsmith.space.deciders import DeadEnd, Decide, checked
from archsmith.space.dimensions import Dimension
from archsmith.space.elements import Element, Flattened, Group, Slot, element_from_json, element_to_json
from archsmith.space.encoding import Encoding
from archsmith.space.options import Interval, Options, draw, draw_below
from archsmith.space.values import FrozenDict, Value

FORMAT_VERSION = 1

ENUMERATION_LIMIT = 20_000
"""Spaces with predicates are counted one by one up to this many candidates; see ``ProductSpace.size``."""


class ProductSpace(Space):
    """A space of named dimensions.

    Args:
        name: Name of the space; its architectures carry it.
        elements: Element per name, in the order of the decisions: a dimension, ``Group``, ``Repeat``, ``Given``, or a
            nested mapping. A name may hold several path segments ("blocks/3/k5").
        constraints: ``AtLeast``, ``AtMost``, ``Linear`` or ``Predicate``.
        canonical: Gives an architecture's canonical form (an architecture, or any JSON value), so that equal networks
            have an equal ``network_digest``. Without it the decisions themselves are the canonical form.

    Sampling is uniform over the valid architectures whenever ``samples_uniformly``: conditions and linear constraints
    are counted exactly, part by independent part, up to ``components.WORK_LIMIT`` pairs of state and option each, and
    predicates reject. (Real dimensions multiply the discrete architectures by their own uniform or log-uniform
    distribution.) Where a part is too large to be counted, or a real number stands in a linear constraint, that space
    is sampled decision by decision with rejection, which is not uniform.

    Raises:
        UserError: See ``elements.Flattened``.

    Example:
        >>> from archsmith.space import AtLeast, Count
        >>> space = ProductSpace("toy", {"k3": Count(0, 4), "k5": Count(0, 4)}, constraints=[AtLeast(["k3", "k5"], 1)])
        >>> space.size
        24
    """

    def __init__(
        self,
        name: str,
        elements: Mapping[str, Element],
        *,
        constraints: Sequence[Constraint] = (),
        canonical: Canonical | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise UserError("space.name", name, allowed="text that is not empty")
        self.name = name
        self.root = Group(dict(elements), tuple(constraints))
        self.canonical = canonical
        self.sides: Mapping[str, ProductSpace] = {}
        self.main: ProductSpace = self
        flat = Flattened(self.root)
        self.slots: tuple[Slot, ...] = tuple(flat.slots.values())
        self.linear = tuple(flat.linear)
        self.predicates = tuple(flat.predicates)
        self._slot_of = flat.slots
        self._free, parts = split(self.slots, self.linear)
        self._components = [Component([self.slots[i] for i in members], linear) for members, linear in parts]
        self._located = {i: (part, at) for part, (members, _) in enumerate(parts) for at, i in enumerate(members)}

    def __repr__(self) -> str:
        return f"ProductSpace({self.name!r}, {len(self.slots)} dimensions)"

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths, active or not, in the order of the walk."""
        return tuple(slot.path for slot in self.slots)

    def dimension(self, path: str) -> Dimension:
        """Return the dimension at ``path``.

        Raises:
            UserError: No such path.
        """
        if path not in self._slot_of:
            raise UserError("path", path, allowed=f"one of {list(self._slot_of)[:8]}")
        return self._slot_of[path].dimension

    def walk(self, decide: Decide) -> Architecture:
        """Ask for the active dimensions in order; see ``Space.walk``."""
        states: list[State] = [component.start for component in self._components]
        decisions: dict[str, Value] = {}
        for position, slot in enumerate(self.slots):
            if position not in self._located:
                decisions[slot.path] = checked(decide, slot.path, slot.dimension.domain, None, slot.group)
                continue
            part, at = self._located[position]
            component, state = self._components[part], states[part]
            active = component.is_active(at, state)
            if active:
                mask = component.mask(at, state)
                decisions[slot.path] = checked(decide, slot.path, slot.dimension.domain, mask, slot.group)
            following = component.step(at, state, decisions.get(slot.path), active=active)
            if following is None:
                raise DeadEnd(slot.path, "broken: " + "; ".join(map(str, component.constraints)))
            states[part] = following
        architecture = self._made(decisions)
        if broken := self._broken_predicate(architecture):
            raise DeadEnd("", f"broken: {broken}")
        return architecture

    def _made(self, decisions: dict[str, Value]) -> Architecture:
        return Architecture.of_valid(decisions, space=self.name, canonical=self.canonical)

    def _broken_predicate(self, architecture: Architecture) -> str | None:
        for scoped in self.predicates:
            relative = FrozenDict(architecture.under(scoped.prefix)) if scoped.prefix else architecture
            if relative and not scoped.predicate.holds(relative):
                return scoped.predicate.name
        return None

    @cached_property
    def _countable(self) -> bool:
        return all(component.exact for component in self._components)

    @cached_property
    def _declared_size(self) -> int | float:
        """Size without the predicates: exact if countable, else the product of the sizes of all dimensions."""
        if not self._countable:
            return _product(slot.dimension.size for slot in self.slots)
        discrete = math.prod(component.total for component in self._components)
        reals = any(component.has_reals for component in self._components)
        free = _product(self.slots[i].dimension.size for i in self._free)
        return 0 if discrete == 0 else (math.inf if reals else discrete * free)

    @property
    def samples_uniformly(self) -> bool:
        """Whether ``sample`` draws uniformly from the valid architectures."""
        return self._countable

    @property
    def size_is_exact(self) -> bool:
        """Whether ``size`` is exact; if not it is an upper bound."""
        return self._countable and (not self.predicates or self._enumerable or self._declared_size == 0)

    @property
    def _enumerable(self) -> bool:
        return self._declared_size <= ENUMERATION_LIMIT

    @cached_property
    def size(self) -> int | float:
        """Number of valid architectures: an exact int, ``math.inf`` with real dimensions, or an upper bound.

        Conditions and linear constraints are counted exactly, whatever the size. Predicates are tried one by one up to
        ``ENUMERATION_LIMIT`` candidates; beyond it, or where a part is too large to be counted, this is an upper bound
        and ``size_is_exact`` says so.
        """
        if self.predicates and self._countable and self._enumerable:
            return len(self._valid)
        return self._declared_size

    @cached_property
    def _valid(self) -> list[Architecture]:
        """All valid architectures of an enumerable space."""
        return list(completed_walks(self.walk))

    def adjacent(self, path: str, value: Value, options: Options) -> list[Value]:
        """Return the values that the dimension at ``path`` calls adjacent."""
        return self._slot_of[path].dimension.adjacent(value)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Return a random valid architecture, uniformly if ``samples_uniformly`` (see the class)."""
        return self.sample_many(rng, 1)[0]

    def sample_many(self, rng: np.random.Generator, n: int) -> list[Architecture]:
        """Return ``n`` valid architectures, drawn as by ``sample``; free dimensions are drawn in one call.

        The stream is used in another order than by ``n`` calls of ``sample``.

        Raises:
            UserError: No valid architecture was found.
        """
        if not self._countable:
            return [sample_by_decisions(self, rng) for _ in range(n)]
        if self._declared_size == 0:
            raise nothing_valid(self.name, "the declared constraints contradict each other")
        found: list[Architecture] = []
        failures = 0
        while len(found) < n:
            for architecture in self._drawn(rng, n - len(found)):
                if (broken := self._broken_predicate(architecture)) is None:
                    found.append(architecture)
                    failures = 0
                elif (failures := failures + 1) >= ATTEMPTS:
                    return found + self._drawn_from_all(rng, n - len(found), broken)
        return found

    def _drawn(self, rng: np.random.Generator, n: int) -> list[Architecture]:
        """Return ``n`` architectures, uniform over what the declared constraints admit."""
        columns: dict[str, list[Value]] = {}
        small = [
            i
            for i in self._free
            if isinstance(self.slots[i].dimension.size, int) and self.slots[i].dimension.size < 1 << 63
        ]
        indices = rng.integers(0, self._small_sizes, size=(n, len(small))).T.tolist() if small else []
        for i, column in zip(small, indices, strict=True):
            domain = self.slots[i].dimension.domain
            columns[self.slots[i].path] = (
                [domain.low] * n if isinstance(domain, Interval) else [domain[k] for k in column]
            )
        for i in set(self._free).difference(small):
            columns[self.slots[i].path] = [draw(self.slots[i].dimension.domain, None, rng) for _ in range(n)]
        for component in self._components:
            for row in range(n):
                for path, value in component.sample(rng, rank=draw_below(component.total, rng)).items():
                    columns.setdefault(path, [ABSENT] * n)[row] = value
        paths = [slot.path for slot in self.slots if slot.path in columns]
        rows = zip(*(columns[path] for path in paths), strict=True) if paths else [()] * n
        return [self._made({p: v for p, v in zip(paths, row, strict=True) if v is not ABSENT}) for row in rows]

    @cached_property
    def _small_sizes(self) -> np.ndarray:
        sizes = [self.slots[i].dimension.size for i in self._free]
        return np.array([size for size in sizes if isinstance(size, int) and size < 1 << 63], dtype=np.int64)

    def _drawn_from_all(self, rng: np.random.Generator, n: int, broken: str) -> list[Architecture]:
        if not self._enumerable or not self._valid:
            raise nothing_valid(self.name, f"{ATTEMPTS} candidates broke: {broken}")
        return [self._valid[int(i)] for i in rng.integers(len(self._valid), size=n)]

    def activity(self, architecture: Architecture) -> np.ndarray:
        """Return one bool per entry of ``paths``: whether the architecture decides it."""
        return np.array([path in architecture for path in self.paths], dtype=bool)

    @cached_property
    def _encoding(self) -> Encoding:
        return Encoding(self.slots)

    def encode(self, architecture: Architecture, kind: EncodingKind) -> np.ndarray:
        """Return one row of ``encode_many``."""
        return self.encode_many([architecture], kind)[0]

    def encode_many(self, architectures: Sequence[Architecture], kind: EncodingKind) -> np.ndarray:
        """Return a float64 matrix, one row per architecture; see ``archsmith.space.encoding`` for the kinds.

        The architectures are taken to be valid; a value that is not an option raises ``ValueError``.

        Raises:
            UserError: Unknown kind, or a kind that cannot express this space.
        """
        return self._encoding.encode(architectures, kind)

    def columns(self, kind: EncodingKind) -> list[str]:
        """Return a name per column of an encoding, for tables and predictors."""
        return self._encoding.columns(kind)

    def decode(self, kind: EncodingKind, array: np.ndarray) -> Architecture | Invalid:
        """Return the architecture of a row that ``encode`` gives, or why there is none (or no single one)."""
        decisions = self._encoding.decode(kind, array)
        if isinstance(decisions, Invalid):
            return decisions
        try:
            return self.validate(decisions)
        except UserError as error:
            return Invalid(str(error))

    def with_side(self, side: str, other: ProductSpace) -> ProductSpace:
        """Return this space with another one beside it; its decisions get the paths ``<side>/...``.

        Args:
            side: First path segment of the other space's decisions ("recipe").
            other: Any product space without sides of its own; its conditions and constraints come along.

        Raises:
            UserError: The name is taken.
        """
        if side in self.sides or "/" in side or any(path.split("/")[0] == side for path in self.paths):
            raise UserError("side", side, allowed="one path segment that this space does not use")
        if other.sides:
            raise UserError("side space", other.name, allowed="a space without sides; add those to the main space")
        sides = {**self.sides, side: other}
        canonical = _canonical_of_all(self.main, sides)
        elements = {**self.root.elements, side: other.root}
        joined = ProductSpace(f"{self.name}+{side}", elements, constraints=self.root.constraints, canonical=canonical)
        joined.sides, joined.main = sides, self.main
        return joined

    def main_part(self, architecture: Architecture) -> Architecture:
        """Return the decisions of the main space alone, as its architecture."""
        return _main_part(architecture, self.main, self.sides)

    def side_part(self, architecture: Architecture, side: str) -> Architecture:
        """Return the decisions of one side alone, as an architecture of that side's space.

        Raises:
            UserError: No such side.
        """
        if side not in self.sides:
            raise UserError("side", side, allowed=f"one of {sorted(self.sides)}")
        return self.sides[side]._made(architecture.under(f"{side}/"))

    def without_canonical_form(self) -> ProductSpace:
        """Return the space of the same architectures and digests without its canonical forms, which JSON cannot hold.

        Its architectures are told apart by their decisions alone: ``network_digest`` is the digest itself.
        """
        plain = ProductSpace(self.main.name, self.main.root.elements, constraints=self.main.root.constraints)
        for side, other in self.sides.items():
            plain = plain.with_side(side, other.without_canonical_form())
        return plain

    def to_json(self) -> dict[str, Any]:
        """Return the space as a JSON object; ``from_json`` restores it.

        Raises:
            UserError: It has a predicate or a canonical function, which have no JSON form.
        """
        if self.main.canonical is not None or any(other.canonical is not None for other in self.sides.values()):
            raise UserError(
                "space.to_json",
                self.name,
                allowed="spaces without a canonical function",
                hint="Build this space in code, or take its without_canonical_form().",
            )
        body = {"format_version": FORMAT_VERSION, "name": self.main.name, **element_to_json(self.main.root)}
        return body | {"sides": [[side, other.to_json()] for side, other in self.sides.items()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProductSpace:
        """Return the space that ``to_json`` wrote.

        Raises:
            UserError: Not such an object, or written by a newer format version.
        """
        if not isinstance(data, Mapping) or data.get("type") != "group":
            raise UserError(
                "space", data, allowed='an object {"format_version", "name", "type": "group", "elements", ...}'
            )
        check_version("space", data.get("format_version"), FORMAT_VERSION)
        root = element_from_json(data)
        assert isinstance(root, Group)
        space = cls(data["name"], root.elements, constraints=root.constraints)
        for side, other in data.get("sides", ()):
            space = space.with_side(side, cls.from_json(other))
        return space


class _Absent:
    """Marks the cell of an inactive path in a table of samples."""


ABSENT: Any = _Absent()


def _product(sizes: Iterable[int | float]) -> int | float:
    """Return the product, keeping integers exact and letting 0 win over infinity."""
    factors = list(sizes)
    if 0 in factors:
        return 0
    return math.inf if math.inf in factors else math.prod(factors)


def _main_part(architecture: Architecture, main: ProductSpace, sides: Mapping[str, ProductSpace]) -> Architecture:
    own = {path: value for path, value in architecture.items() if path.split("/")[0] not in sides}
    return main._made(own)


def _canonical_of_all(main: ProductSpace, sides: Mapping[str, ProductSpace]) -> Canonical | None:
    """Return a canonical form made of the parts' own, ``None`` when no part has one."""
    if main.canonical is None and all(other.canonical is None for other in sides.values()):
        return None

    def canonical(architecture: Architecture) -> dict[str, str]:
        parts = {side: other._made(architecture.under(f"{side}/")) for side, other in sides.items()}
        parts["main:"] = _main_part(architecture, main, sides)
        return {name: part.network_digest for name, part in parts.items()}

    return canonical
