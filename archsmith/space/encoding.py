"""Encodings: an architecture as a float64 vector of fixed length, and back.

=========  ====================================================================================  =========
kind       columns                                                                               lossless
=========  ====================================================================================  =========
one-hot    per listed or counted dimension one column per option; a subset one per member;       yes
           a real number its value. Inactive: all zero.
ordinal    per listed or counted dimension the option's number (inactive: -1); a subset one      yes
           column per member (inactive: all -1); a real number its value (inactive: 0).
path       per group and option, how often a decision of that group took that option: what is    no
           chosen along the walk, positions forgotten, so that equal multisets of layers agree.
=========  ====================================================================================  =========

All zero would be ambiguous for real numbers and for empty subsets, so where such a dimension can be inactive it has one
more column in front, ``<path>?``, that is 1 when it is active. The path encoding decodes only where positions cannot
matter (all active decisions of each group took the same option), and is ``Invalid`` otherwise; real numbers have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.architecture import Architecture
from archsmith.space.base import EncodingKind, Invalid
from archsmith.space.conditions import Condition
from archsmith.space.dimensions import Dimension, Real, Subset
from archsmith.space.elements import Slot
from archsmith.space.options import option_count
from archsmith.space.values import Value, strict_key

INACTIVE: Any = object()
"""Stands for the value of a slot that is not active."""


class Encoding:
    """The column layout of all kinds for a list of slots."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)

    def columns(self, kind: EncodingKind) -> list[str]:
        """Return a name per column."""
        _check_kind(kind)
        if kind == "path":
            return [f"{group}={value!r}" for group, options in self._path_groups().items() for value in options]
        names: list[str] = []
        for slot in self.slots:
            names += [f"{slot.path}?"] if _has_flag(slot, kind) else []
            if isinstance(slot.dimension, Subset):
                names += [f"{slot.path}:{member!r}" for member in slot.dimension.options]
            elif isinstance(slot.dimension, Real) or kind == "ordinal":
                names.append(slot.path)
            else:
                names += [f"{slot.path}={value!r}" for value in _finite(slot.dimension)]
        return names

    def width(self, kind: EncodingKind) -> int:
        """Return the number of columns."""
        _check_kind(kind)
        if kind == "path":
            return sum(len(options) for options in self._path_groups().values())
        return sum(_width(slot, kind) for slot in self.slots)

    def encode(self, architectures: Sequence[Architecture], kind: EncodingKind) -> np.ndarray:
        """Return one row per architecture."""
        out = np.zeros((len(architectures), self.width(kind)))
        if kind == "path":
            self._encode_path(architectures, out)
            return out
        tables = [architecture.decisions for architecture in architectures]
        cells = _Cells()
        start = 0
        for slot in self.slots:
            values = [table.get(slot.path, INACTIVE) for table in tables]
            _write(cells, start, slot, values, kind)
            start += _width(slot, kind)
        out[cells.rows, cells.columns] = cells.values
        return out

    def decode(self, kind: EncodingKind, array: np.ndarray) -> dict[str, Value] | Invalid:
        """Return the decisions of one row; whether they are valid together the space says.

        Raises:
            UserError: The array has another shape than ``encode`` gives.
        """
        row = np.asarray(array, dtype=np.float64)
        if row.shape != (self.width(kind),):
            raise UserError(
                "array", f"shape {row.shape}", allowed=f"shape ({self.width(kind)},), one {kind} row of the space"
            )
        if not np.isfinite(row).all():
            return Invalid("the array holds NaN or infinity")
        if kind == "path":
            return self._decode_path(row)
        decisions: dict[str, Value] = {}
        start = 0
        for slot in self.slots:
            end = start + _width(slot, kind)
            found = _read(slot, row[start:end], kind)
            if isinstance(found, Invalid):
                return found
            if found:
                decisions[slot.path] = found[0]
            start = end
        return decisions

    def _path_groups(self) -> dict[str, list[Value]]:
        """Return the options of each group, over all its slots, in order of appearance."""
        groups: dict[str, dict[object, Value]] = {}
        for slot in self.slots:
            if isinstance(slot.dimension, Real):
                raise UserError(
                    "kind", "path", allowed="'one-hot' or 'ordinal'", hint=f"{slot.path!r} is a real number."
                )
            known = groups.setdefault(slot.group, {})
            for value in _finite(slot.dimension):
                known.setdefault(strict_key(value), value)
        return {group: list(options.values()) for group, options in groups.items()}

    def _path_columns(self) -> dict[tuple[str, object], int]:
        pairs = ((group, strict_key(value)) for group, options in self._path_groups().items() for value in options)
        return {pair: column for column, pair in enumerate(pairs)}

    def _encode_path(self, architectures: Sequence[Architecture], out: np.ndarray) -> None:
        columns = self._path_columns()
        for slot in self.slots:
            for row, architecture in enumerate(architectures):
                if slot.path in architecture:
                    out[row, columns[slot.group, strict_key(architecture[slot.path])]] += 1

    def _decode_path(self, row: np.ndarray) -> dict[str, Value] | Invalid:
        chosen: dict[str, tuple[Value, int]] = {}
        start = 0
        for group, options in self._path_groups().items():
            counts = row[start : start + len(options)]
            taken = np.flatnonzero(counts)
            if len(taken) > 1:
                values = [options[int(i)] for i in taken]
                return Invalid(
                    f"ambiguous: the decisions of group {group!r} took {values}; which took which is not encoded"
                )
            if len(taken):
                chosen[group] = (options[int(taken[0])], int(counts[taken[0]]))
            start += len(options)
        decisions: dict[str, Value] = {}
        left = {group: count for group, (_, count) in chosen.items()}
        for slot in self.slots:
            if _is_active(slot.condition, decisions) and left.get(slot.group, 0):
                decisions[slot.path] = chosen[slot.group][0]
                left[slot.group] -= 1
        again = np.zeros((1, len(row)))
        try:
            self._encode_path([Architecture(decisions, space="")], again)
        except KeyError:
            return Invalid("no architecture has these counts")
        return decisions if (again[0] == row).all() else Invalid("no architecture has these counts")


def _is_active(condition: Condition | None, decisions: dict[str, Value]) -> bool:
    return condition is None or condition.holds_for(decisions)


def _check_kind(kind: str) -> None:
    if kind not in get_args(EncodingKind):
        raise UserError("kind", kind, allowed=f"one of {list(get_args(EncodingKind))}")


def _has_flag(slot: Slot, kind: EncodingKind) -> bool:
    needs = isinstance(slot.dimension, Real) or (isinstance(slot.dimension, Subset) and kind == "one-hot")
    return needs and slot.condition is not None


def _finite(dimension: Dimension) -> Sequence[Value]:
    assert isinstance(dimension.domain, Sequence)
    return dimension.domain


def _width(slot: Slot, kind: EncodingKind) -> int:
    if isinstance(slot.dimension, Subset):
        width = len(slot.dimension.options)
    elif isinstance(slot.dimension, Real) or kind == "ordinal":
        width = 1
    else:
        width = int(option_count(slot.dimension.domain))
    return width + _has_flag(slot, kind)


class _Cells:
    """The cells that are not zero, gathered so that numpy writes all of them at once."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []

    def put(self, row: int, column: int, value: float) -> None:
        self.rows.append(row)
        self.columns.append(column)
        self.values.append(value)


def _write(cells: _Cells, start: int, slot: Slot, values: list[Any], kind: EncodingKind) -> None:
    """Write one slot of every row, from column ``start`` on."""
    dimension = slot.dimension
    first = start + _has_flag(slot, kind)
    for row, value in enumerate(values):
        if value is INACTIVE:
            if kind == "ordinal" and not isinstance(dimension, Real):
                for column in range(first, start + _width(slot, kind)):
                    cells.put(row, column, -1)
            continue
        if first > start:
            cells.put(row, start, 1)
        if isinstance(dimension, Subset):
            for offset, inside in enumerate(dimension.flags(value)):
                cells.put(row, first + offset, inside)
        elif isinstance(dimension, Real):
            dimension.index(value)
            cells.put(row, first, value)
        elif kind == "ordinal":
            cells.put(row, first, dimension.index(value))
        else:
            cells.put(row, first + dimension.index(value), 1)


def _read(slot: Slot, cells: np.ndarray, kind: EncodingKind) -> tuple[Value, ...] | Invalid:
    """Return a tuple of the decoded value, an empty one when the slot is inactive."""
    dimension = slot.dimension
    if _has_flag(slot, kind):
        flag, cells = cells[0], cells[1:]
        if flag not in (0, 1) or (flag == 0 and cells.any()):
            return Invalid(f"{slot.path!r}: the activity column must be 1, or 0 with nothing behind it")
        if flag == 0:
            return ()
    if isinstance(dimension, Real):
        return (float(cells[0]),)
    if isinstance(dimension, Subset):
        if kind == "ordinal" and (cells == -1).all():
            return ()
        if not np.isin(cells, (0, 1)).all():
            return Invalid(f"{slot.path!r}: the membership columns must be 0 or 1")
        return (dimension.of_flags([bool(cell) for cell in cells]),)
    options = _finite(dimension)
    if kind == "ordinal":
        index = int(cells[0])
        if index != cells[0] or not -1 <= index < len(options):
            return Invalid(
                f"{slot.path!r}: got {float(cells[0])!r}, an option's number from 0 to {len(options) - 1} was expected"
            )
        return () if index == -1 else (options[index],)
    ones = np.flatnonzero(cells)
    if len(ones) > 1 or (len(ones) and cells[ones[0]] != 1):
        return Invalid(f"{slot.path!r}: the columns are not one-hot")
    return (options[int(ones[0])],) if len(ones) else ()
