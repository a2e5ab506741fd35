"""Counting what is valid, exactly: independent parts of a space as small automata.

Slots that share no condition and no linear constraint are independent, so a space falls apart into components, and its
size is the product of theirs. A component is walked slot by slot. All that the rest of the walk can notice is its
*state*: the truth of the atomic conditions that later slots still ask for, and the partial sum of each linear
constraint that is still open (a sum that can no longer fail is forgotten). Counting the ways to finish from every
state, backwards, gives the exact size, exactly uniform sampling, and masks that allow an option only if a valid
architecture can follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from archsmith.space.conditions import Atom
from archsmith.space.constraints import Linear
from archsmith.space.elements import Slot
from archsmith.space.options import Interval, draw, draw_below
from archsmith.space.values import Value

WORK_LIMIT = 500_000
"""Most (state, option) pairs that are followed per component; beyond it, after about a second, counting gives up."""

Sum = float | Literal["untouched", "satisfied"]


class State(NamedTuple):
    """What the remaining slots of a component can notice of the decisions before them."""

    truths: tuple[bool, ...]
    sums: tuple[Sum, ...]


class Branch(NamedTuple):
    """Options of one slot that lead from one state to the same next state; ``None`` when the slot is inactive."""

    options: Sequence[int] | None
    following: State


class TooLarge(Exception):
    """Following all states would exceed ``WORK_LIMIT``."""


class Component:
    """Slots tied together by conditions and linear constraints.

    Args:
        slots: In the order of the walk; every path that a condition or constraint names is among them.
        constraints: Linear constraints over their paths.
    """

    def __init__(self, slots: Sequence[Slot], constraints: Sequence[Linear]) -> None:
        self.slots = tuple(slots)
        self.constraints = tuple(constraints)
        self._open_atoms = _open_atoms(self.slots)
        self._rest = [_rest_bounds(self.slots, constraint) for constraint in self.constraints]
        self._slack = [_slack(self.slots, constraint) for constraint in self.constraints]
        self._carried = [self._carry(at) for at in range(len(self.slots))]
        self._weights = [
            [(n, c.weights[slot.path]) for n, c in enumerate(self.constraints) if slot.path in c.weights]
            for slot in self.slots
        ]
        self._masks: dict[tuple[int, State], np.ndarray | None] = {}

    @cached_property
    def start(self) -> State:
        """The state before the first slot."""
        conditional = {slot.path for slot in self.slots if slot.condition is not None}
        sums: tuple[Sum, ...] = tuple("untouched" if set(c.weights) <= conditional else 0 for c in self.constraints)
        return State((), sums)

    def is_active(self, at: int, state: State) -> bool:
        """Return whether slot ``at`` is active in ``state``."""
        condition = self.slots[at].condition
        if condition is None:
            return True
        truth = dict(zip(self._open_atoms[at], state.truths, strict=True))
        return condition.holds(truth.__getitem__)

    def step(self, at: int, state: State, value: Value, *, active: bool = True) -> State | None:
        """Return the state after slot ``at``, or ``None`` when a constraint can no longer hold.

        Args:
            at: Position of the slot in the component.
            state: The state before it.
            value: The decision; ignored when the slot is not active.
            active: Whether the slot's condition holds.
        """
        truths = tuple(
            [state.truths[old] if atom is None else active and atom.test(value) for old, atom in self._carried[at]]
        )
        if not self._weights[at]:
            return State(truths, state.sums)
        sums = list(state.sums)
        for number, weight in self._weights[at]:
            total = sums[number]
            if total == "satisfied":
                continue
            if active:
                assert isinstance(value, int | float)
                total = (0 if isinstance(total, str) else total) + weight * value
            settled = self._settled(number, at, total)
            if settled is None:
                return None
            sums[number] = settled
        return State(truths, tuple(sums))

    def _carry(self, at: int) -> list[tuple[int, Atom | None]]:
        """Return per atom that is open after the slot where its truth stands before, or the atom to test there."""
        before = {atom: i for i, atom in enumerate(self._open_atoms[at])}
        return [(before[a], None) if a in before else (0, a) for a in self._open_atoms[at + 1]]

    def _settled(self, number: int, at: int, total: Sum) -> Sum | None:
        """Return the sum, "satisfied" when nothing can break it any more, ``None`` when nothing can save it."""
        if isinstance(total, str):
            return total
        constraint = self.constraints[number]
        least, most = self._rest[number][at + 1]
        # Rounding may differ between the bound on the rest and the sum itself; the last slot decides without slack.
        slack = self._slack[number] if least != 0 or most != 0 else 0
        low, high = constraint.low, constraint.high
        if (low is not None and total + most < low - slack) or (high is not None and total + least > high + slack):
            return None
        low_is_safe = low is None or total + least >= low + slack
        high_is_safe = high is None or total + most <= high - slack
        return "satisfied" if low_is_safe and high_is_safe else total

    @cached_property
    def exact(self) -> bool:
        """True when counting is possible: no real number in a constraint, and not more than ``WORK_LIMIT`` pairs."""
        constrained = {path for constraint in self.constraints for path in constraint.weights}
        if any(slot.path in constrained and isinstance(slot.dimension.domain, Interval) for slot in self.slots):
            return False
        try:
            return bool(self._layers) or not self.slots
        except TooLarge:
            return False

    @cached_property
    def _layers(self) -> list[dict[State, list[Branch]]]:
        """Per slot, every reachable state with its branches."""
        layers: list[dict[State, list[Branch]]] = []
        frontier, work = {self.start: None}, 0
        for at in range(len(self.slots)):
            layer: dict[State, list[Branch]] = {}
            for state in frontier:
                layer[state] = self._branches(at, state)
                work += self._effort(at)
                if work > WORK_LIMIT:
                    raise TooLarge
            layers.append(layer)
            frontier = {branch.following: None for branches in layer.values() for branch in branches}
        return layers

    def _is_plain(self, at: int) -> bool:
        """Tell whether all options of the slot have the same effect, so that they need not be told apart."""
        path = self.slots[at].path
        return not self._weights[at] and all(atom.path != path for atom in self._open_atoms[at + 1])

    def _effort(self, at: int) -> int:
        return 1 if self._is_plain(at) else int(self.slots[at].dimension.size)

    def _branches(self, at: int, state: State) -> list[Branch]:
        if not self.is_active(at, state):
            following = self.step(at, state, None, active=False)
            return [] if following is None else [Branch(None, following)]
        domain = self.slots[at].dimension.domain
        if self._is_plain(at):
            following = self.step(at, state, None)
            assert following is not None
            # A proper interval counts once: a real number multiplies the discrete architectures, not their number.
            return [Branch(range(1 if isinstance(domain, Interval) else int(self.slots[at].dimension.size)), following)]
        if self._effort(at) > WORK_LIMIT:
            raise TooLarge
        assert not isinstance(domain, Interval)
        grouped: dict[State, list[int]] = {}
        for index, value in enumerate(domain):
            following = self.step(at, state, value)
            if following is not None:
                grouped.setdefault(following, []).append(index)
        return [Branch(_compact(indices), following) for following, indices in grouped.items()]

    @cached_property
    def _ways(self) -> list[dict[State, int]]:
        """Per slot and state, in how many ways the walk can be finished; one more entry for the end."""
        ways: list[dict[State, int]] = [{}]
        for layer in reversed(self._layers):
            after = ways[0]
            ways.insert(
                0,
                {
                    state: sum(_width(b) * after.get(b.following, int(not after)) for b in bs)
                    for state, bs in layer.items()
                },
            )
        return ways

    @property
    def total(self) -> int:
        """Number of valid assignments, each real dimension counting once; needs ``exact``."""
        return self._ways[0][self.start]

    @cached_property
    def has_reals(self) -> bool:
        """True when a slot that can be active is a proper interval: the number of assignments is infinite."""
        return any(
            _width(branch) > 0 and branch.options is not None and not isinstance(slot.dimension.size, int)
            for slot, layer, ways in zip(self.slots, self._layers, self._ways, strict=False)
            for state, branches in layer.items()
            if ways[state]
            for branch in branches
        )

    def mask(self, at: int, state: State) -> np.ndarray | None:
        """Return which options of the active slot ``at`` are allowed in ``state``; ``None`` when all are.

        With ``exact`` an option is allowed if and only if some valid assignment follows; otherwise if the bounds of the
        remaining slots do not rule it out.
        """
        key = (at, state)
        if key not in self._masks:
            if len(self._masks) > 10_000:  # states of inexact components are not bounded
                self._masks.clear()
            self._masks[key] = self._mask(at, state)
        return self._masks[key]

    def _mask(self, at: int, state: State) -> np.ndarray | None:
        domain = self.slots[at].dimension.domain
        if isinstance(domain, Interval) or (self._is_plain(at) and not self.exact):
            return None
        if not self.exact:
            allowed = np.array([self.step(at, state, value) is not None for value in domain])
        else:
            branches = self._layers[at].get(state, [])
            alive = [b for b in branches if self._ways_after(at, b)]
            if sum(map(_width, alive)) == self.slots[at].dimension.size:
                return None
            allowed = np.zeros(len(domain), dtype=bool)
            for branch in alive:
                assert branch.options is not None
                allowed[np.asarray(branch.options)] = True
        allowed.setflags(write=False)
        return None if allowed.all() else allowed

    def _ways_after(self, at: int, branch: Branch) -> int:
        return self._ways[at + 1][branch.following] if at + 1 < len(self.slots) else 1

    def sample(self, rng: np.random.Generator, *, rank: int | None = None) -> dict[str, Value]:
        """Return a valid assignment, uniformly among all; needs ``exact`` and ``total > 0``.

        Args:
            rng: Stream for the rank, and for the values of real dimensions.
            rank: Number of the assignment in [0, total), drawn when ``None``.
        """
        rank = draw_below(self.total, rng) if rank is None else rank
        state, decisions = self.start, dict[str, Value]()
        for at, slot in enumerate(self.slots):
            for branch in self._layers[at][state]:
                each = self._ways_after(at, branch)
                if rank < _width(branch) * each:
                    break
                rank -= _width(branch) * each
            if branch.options is not None:
                option, rank = divmod(rank, each)
                domain = slot.dimension.domain
                decisions[slot.path] = (
                    draw(domain, None, rng) if isinstance(domain, Interval) else domain[branch.options[option]]
                )
            state = branch.following
        return decisions


def _width(branch: Branch) -> int:
    if isinstance(branch.options, range):  # len() of a range stops at 2**63
        return branch.options.stop - branch.options.start
    return 1 if branch.options is None else len(branch.options)


def _compact(indices: list[int]) -> Sequence[int]:
    first, last = indices[0], indices[-1]
    return range(first, last + 1) if last - first + 1 == len(indices) else indices


def _open_atoms(slots: tuple[Slot, ...]) -> list[tuple[Atom, ...]]:
    """Return per position the atomic conditions on earlier slots that this or a later slot asks for."""
    position = {slot.path: i for i, slot in enumerate(slots)}
    wanted: dict[Atom, int] = {}
    for i, slot in enumerate(slots):
        for atom in slot.condition.atoms() if slot.condition else ():
            wanted[atom] = i
    return [tuple(a for a, last in wanted.items() if position[a.path] < i <= last) for i in range(len(slots) + 1)]


def _value_bounds(slot: Slot, weight: float) -> tuple[float, float]:
    """Return the least and the most that a slot can add to a sum; an inactive slot adds 0."""
    domain = slot.dimension.domain
    if isinstance(domain, Interval):
        values: list[float] = [domain.low, domain.high]
    elif isinstance(domain, range):
        values = [domain[0], domain[-1]]
    else:
        values = [value for value in domain if isinstance(value, int | float)]
    terms = [weight * value for value in values] + ([0] if slot.condition is not None else [])
    return min(terms), max(terms)


def _rest_bounds(slots: tuple[Slot, ...], constraint: Linear) -> list[tuple[float, float]]:
    """Return per position the least and the most that this and the later slots can add to the sum."""
    rest: list[tuple[float, float]] = [(0, 0)]
    for slot in reversed(slots):
        least, most = _value_bounds(slot, constraint.weights[slot.path]) if slot.path in constraint.weights else (0, 0)
        rest.insert(0, (rest[0][0] + least, rest[0][1] + most))
    return rest


def _slack(slots: tuple[Slot, ...], constraint: Linear) -> float:
    """Return 0 when all sums are integers, else a margin above their rounding errors."""
    members = [slot for slot in slots if slot.path in constraint.weights]
    whole = all(
        isinstance(slot.dimension.domain, range)
        or (
            not isinstance(slot.dimension.domain, Interval)
            and all(type(value) is int for value in slot.dimension.domain)
        )
        for slot in members
    )
    if constraint.exact and whole:
        return 0
    return 1e-12 * sum(max(map(abs, _value_bounds(slot, constraint.weights[slot.path]))) for slot in members)


def split(
    slots: Sequence[Slot], constraints: Sequence[Linear]
) -> tuple[list[int], list[tuple[list[int], list[Linear]]]]:
    """Split a space into independent parts.

    Returns:
        Positions of the slots that are free of conditions and constraints, and per remaining part its positions, in
        order, with its constraints.
    """
    position = {slot.path: i for i, slot in enumerate(slots)}
    leader = list(range(len(slots)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    tied: set[int] = set()

    def tie(members: list[int]) -> None:
        tied.update(members)
        for other in members[1:]:
            leader[find(other)] = find(members[0])

    for i, slot in enumerate(slots):
        if slot.condition is not None:
            tie([i, *(position[atom.path] for atom in slot.condition.atoms())])
    for constraint in constraints:
        tie([position[path] for path in constraint.weights])
    parts: dict[int, tuple[list[int], list[Linear]]] = {}
    for i in sorted(tied):
        parts.setdefault(find(i), ([], []))[0].append(i)
    for constraint in constraints:
        parts[find(position[next(iter(constraint.weights))])][1].append(constraint)
    return [i for i in range(len(slots)) if i not in tied], list(parts.values())
