"""From the units to remove to what remains of every tensor; refuses what would not be a network any more.

Groups may come from the finder or be written down by hand: a plan needs only their places and constraints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from archsmith.atoms.fingerprint import fingerprint_of, first_of, named_tensors, unwrap
from archsmith.atoms.units import Cut, IntArray, Place, TensorCut, UnitGroup
from archsmith.core.errors import Shown, UserError

BoolArray = npt.NDArray[np.bool_]


class CutRefused(UserError):
    """A cut that would break a constraint or the network, and therefore was not made.

    Args:
        group: Name of the group (or of the tensor) that stands in the way.
        reason: One sentence.
    """

    def __init__(self, group: str, reason: str) -> None:
        self.group = group
        self.reason = reason
        super().__init__(f"group '{group}'", Shown("a cut that is refused"), allowed=reason)
        self.args = (f"cut refused at group '{group}': {reason}",)

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross a process boundary whole."""
        return type(self), (self.group, self.reason)


def plan_cut(
    groups: Sequence[UnitGroup],
    removed: Mapping[str, Iterable[int]],
    model: nn.Module,
    attributes: Mapping[str, Any] | None = None,
) -> Cut:
    """Return what remains of every tensor when units of some groups go.

    An element of a tensor goes with the first of its owners: positions that belong to units of several groups (a row
    of an attention weight belongs to its head and to its column) live while all of them live.

    Args:
        groups: All groups of the model; names are unique.
        removed: Positions of the units to remove by group name, in any order; groups left out stay whole.
        model: The network that the groups describe, read only.
        attributes: New values of the user's module attributes by dotted path, put into the cut as they are.

    Returns:
        The cut, tensors under their first names, with the fingerprint of ``model``. Groups that lose nothing and
        tensors that stay whole are left out.

    Raises:
        CutRefused: A group is frozen or would fall below its minimum, off its divisor or out of balance; a tensor
            would be left empty; rows of a jointly cut tensor would keep different numbers of columns.
        UserError: A group is unknown, a position does not exist, or a place does not fit its tensor.
    """
    tensors, saved = named_tensors(unwrap(model))
    known = {group.name: group for group in groups}
    if len(known) < len(groups):
        names = [group.name for group in groups]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError("groups", Shown(f"several named {twice}"), allowed="unique names")
    gone = {}
    for name, units in removed.items():
        if name not in known:
            raise UserError("removed", name, allowed=f"names of groups: {_some(known)}")
        positions = _positions(known[name], units)
        if len(positions):
            check_units(known[name], positions)
            gone[name] = positions
    return Cut(
        removed=gone,
        tensors=_tensor_cuts([known[name] for name in gone], gone, tensors),
        attributes=dict(attributes or {}),
        fingerprint=fingerprint_of(tensors, saved),
    )


def check_units(group: UnitGroup, removed: IntArray) -> None:
    """Raise ``CutRefused`` when the constraints of ``group`` forbid removing these units (ascending, distinct)."""
    if len(removed) == 0:
        return
    if group.frozen:
        raise CutRefused(group.name, f"it is frozen: {group.frozen}")
    kept = group.size - len(removed)
    minimum = max(group.minimum, 0)
    if kept < minimum:
        raise CutRefused(group.name, f"it would keep {kept} of {group.size} units, at least {minimum} must stay")
    if kept and group.divisor > 1 and group.size % group.divisor == 0 and kept % group.divisor:
        raise CutRefused(group.name, f"it would keep {kept} of {group.size} units, not a multiple of {group.divisor}")
    if group.balance:
        lost = np.zeros(group.size, dtype=bool)
        lost[removed] = True
        counts = [int((~lost[list(units)]).sum()) for units in group.balance]
        if len(set(counts)) > 1:
            raise CutRefused(
                group.name, f"its parts would keep {_some(counts)} units each, they must keep equally many"
            )


def _positions(group: UnitGroup, units: Iterable[int]) -> IntArray:
    positions = np.unique(np.asarray(list(units) if not isinstance(units, np.ndarray) else units).astype(np.int64))
    wrong = positions[(positions < 0) | (positions >= group.size)]
    if len(wrong):
        raise UserError(f"removed['{group.name}']", int(wrong[0]), allowed=f"positions 0 to {group.size - 1}")
    return positions


def _tensor_cuts(
    groups: Sequence[UnitGroup], gone: Mapping[str, IntArray], tensors: Mapping[str, Tensor]
) -> dict[str, TensorCut]:
    """Collect the dead positions of every tensor over all groups, then turn them into what is kept."""
    first = first_of(tensors)
    dead: dict[str, dict[tuple[int, ...], BoolArray]] = {}
    owner: dict[str, str] = {}
    flags: dict[int, tuple[IntArray, BoolArray]] = {}
    for group in groups:
        flags.clear()
        for place in group.places:
            if place.tensor not in first:
                raise UserError(
                    f"group '{group.name}'",
                    place.tensor,
                    allowed="qualified names of parameters and buffers of the model",
                )
            name = first[place.tensor]
            shape = tuple(tensors[name].shape)
            length = _length(group, place.tensor, place.axes, shape)
            known = flags.get(id(place.index))
            if known is None or len(known[1]) != length:
                known = flags[id(place.index)] = (place.index, _flags(group, place, length, shape, gone[group.name]))
            masks = dead.setdefault(name, {})
            masks[place.axes] = masks[place.axes] | known[1] if place.axes in masks else known[1]
            owner.setdefault(name, group.name)
    cuts = {}
    selections = _Selections()
    for name, masks in dead.items():
        cut = _tensor_cut(owner[name], name, tuple(tensors[name].shape), masks, selections)
        if cut is not None:
            cuts[name] = cut
    return cuts


def _flags(group: UnitGroup, place: Place, length: int, shape: tuple[int, ...], gone: IntArray) -> BoolArray:
    """Return which of ``length`` positions the units ``gone`` own in one place."""
    if place.index.ndim != 2 or len(place.index) != group.size:
        raise UserError(
            f"group '{group.name}'",
            Shown(f"an index of shape {place.index.shape} for '{place.tensor}'"),
            allowed=f"({group.size}, k): one row for each unit",
        )
    if place.index.size and not 0 <= place.index.min() <= place.index.max() < length:
        raise UserError(
            f"group '{group.name}'",
            Shown(f"positions up to {place.index.max()} on axes {place.axes} of '{place.tensor}' {shape}"),
            allowed=f"0 to {length - 1}; describe the present model",
        )
    flags = np.zeros(length, dtype=bool)
    flags[place.index[gone]] = True
    return flags


class _Selections:
    """Keeps one array for each different selection: the tensors of one width share it."""

    def __init__(self) -> None:
        self._by_content: dict[bytes, IntArray] = {}
        self._by_dead: dict[int, tuple[BoolArray, IntArray]] = {}

    def of(self, living: BoolArray) -> IntArray:
        """Return the living positions."""
        key = living.tobytes()
        if key not in self._by_content:
            self._by_content[key] = np.flatnonzero(living)
        return self._by_content[key]

    def living(self, dead: BoolArray) -> IntArray:
        """Return the positions that are not dead."""
        if id(dead) not in self._by_dead:
            self._by_dead[id(dead)] = (dead, self.of(~dead))
        return self._by_dead[id(dead)][1]


def _length(group: UnitGroup, tensor: str, axes: tuple[int, ...], shape: tuple[int, ...]) -> int:
    if not (axes and axes[0] >= 0 and axes[-1] < len(shape) and all(a < b for a, b in pairwise(axes))):
        raise UserError(f"group '{group.name}'", axes, allowed=f"ascending axes of '{tensor}', whose shape is {shape}")
    if len(axes) == 1:
        return shape[axes[0]]
    return math.prod(shape[axis] for axis in axes)


def _tensor_cut(
    group: str,
    name: str,
    shape: tuple[int, ...],
    dead: Mapping[tuple[int, ...], BoolArray],
    selections: _Selections,
) -> TensorCut | None:
    """Return what one tensor keeps: a plain cut where the living form a rectangle, else rows of equal length."""
    if all(len(axes) == 1 for axes in dead):
        kept = {axes[0]: selections.living(mask) for axes, mask in sorted(dead.items())}
        return _plain_cut(group, name, shape, kept)
    alone = {axes[0]: ~mask for axes, mask in dead.items() if len(axes) == 1}
    together = {axes: ~mask for axes, mask in dead.items() if len(axes) > 1}
    living = dict(alone)
    joint = None
    for axes, flat in together.items():
        sizes = [shape[axis] for axis in axes]
        block = flat.reshape(sizes)
        for k, axis in enumerate(axes):
            if axis in alone:
                block = block & alone[axis].reshape([-1 if j == k else 1 for j in range(len(axes))])
        edges: list[BoolArray] = [
            np.asarray(block.any(axis=tuple(j for j in range(len(axes)) if j != k))) for k in range(len(axes))
        ]
        if not block.any():
            raise CutRefused(group, f"nothing of '{name}' {shape} would remain")
        if np.array_equal(block, _rectangle(edges)):
            if axes == (0, 1) and len(shape) > 2:  # a convolution: its outputs must not go with their last input
                _no_row_without_inputs(group, name, edges[0] | ~alone.get(0, edges[0] | True))
            living |= {axis: edge for axis, edge in zip(axes, edges, strict=True) if not edge.all()}
            continue
        if joint is not None or len(axes) > 2:
            raise CutRefused(group, f"what would remain of '{name}' {shape} over axes {axes} is no rectangle")
        rows = alone.get(axes[0], np.ones(sizes[0], dtype=bool))
        _no_row_without_inputs(group, name, edges[0] | ~rows)
        counts = block.sum(1)[rows]
        if len(set(counts.tolist())) > 1:
            raise CutRefused(
                group,
                f"rows of '{name}' {shape} would keep {_some(sorted(set(counts.tolist())))} columns each, they "
                "must keep equally many",
            )
        joint = (axes, np.flatnonzero(block.reshape(-1)).reshape(int(rows.sum()), int(counts[0])))
        for axis in axes:
            living.pop(axis, None)
    kept = {axis: selections.of(mask) for axis, mask in sorted(living.items())}
    return _plain_cut(group, name, shape, kept, joint)


def _plain_cut(
    group: str,
    name: str,
    shape: tuple[int, ...],
    kept: Mapping[int, IntArray],
    joint: tuple[tuple[int, ...], IntArray] | None = None,
) -> TensorCut | None:
    for axis, index in kept.items():
        if not len(index):
            raise CutRefused(group, f"nothing of axis {axis} of '{name}' {shape} would remain")
    kept = {axis: index for axis, index in kept.items() if len(index) < shape[axis]}
    return TensorCut(axes=kept, joint=joint) if kept or joint is not None else None


def _rectangle(edges: Sequence[BoolArray]) -> BoolArray:
    rectangle = np.ones((), dtype=bool)
    for edge in edges:
        rectangle = rectangle[..., None] & edge
    return rectangle


def _no_row_without_inputs(group: str, name: str, fine: BoolArray) -> None:
    if not fine.all():
        raise CutRefused(group, f"rows {_some(np.flatnonzero(~fine).tolist())} of '{name}' would have no inputs left")


def _some(items: Iterable[object], limit: int = 6) -> str:
    listed = [str(item) for item in items]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
