"""Groups of a network after a cut: the surviving units at their new positions, nothing traced again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from archsmith.atoms.units import Cut, IntArray, Place, TensorCut, UnitGroup
from archsmith.core.errors import ArchsmithError


def kept_units(groups: Sequence[UnitGroup], cut: Cut) -> dict[str, IntArray]:
    """Return the positions of the units that survive ``cut``, ascending, for every group."""
    return {
        group.name: np.setdiff1d(np.arange(group.size), cut.removed.get(group.name, np.zeros(0, dtype=np.int64)))
        for group in groups
    }


def groups_after(
    groups: Sequence[UnitGroup], cut: Cut, shapes: Mapping[str, tuple[int, ...]], ties: Mapping[str, str] | None = None
) -> list[UnitGroup]:
    """Return the groups that describe the network after ``cut``; groups without units left are dropped.

    Args:
        groups: Groups before the cut.
        cut: The cut.
        shapes: Shapes of the tensors before the cut, by qualified name.
        ties: First name of every tensor by its name, where places name tied tensors otherwise.

    Raises:
        ArchsmithError: Units of one group keep different numbers of positions in a tensor, which no legal cut does.
    """
    kept = kept_units(groups, cut)
    result = []
    for group in groups:
        units = kept[group.name]
        if not len(units):
            continue
        places = []
        for place in group.places:
            tensor_cut = cut.tensors.get((ties or {}).get(place.tensor, place.tensor))
            if tensor_cut is None:
                places.append(dataclasses.replace(place, index=place.index[units]))
                continue
            moved = new_positions(place, tensor_cut, shapes[place.tensor])
            rows = moved[place.index[units]]
            alive = rows >= 0
            counts = set(alive.sum(axis=1).tolist())
            if len(counts) > 1:
                raise ArchsmithError(f"units of {group.name} keep {sorted(counts)} positions of '{place.tensor}' each.")
            index = rows[alive].reshape(len(units), -1)
            if index.shape[1]:
                places.append(Place(place.tensor, place.axes, index))
        number = {int(old): new for new, old in enumerate(units)}
        balance = tuple(tuple(number[unit] for unit in each if unit in number) for each in group.balance)
        result.append(
            dataclasses.replace(
                group, size=len(units), places=tuple(places), balance=tuple(each for each in balance if each)
            )
        )
    return result


def new_positions(place: Place, cut: TensorCut, shape: tuple[int, ...]) -> IntArray:
    """Return the new position of every old one along a place's axes, -1 for those that are gone."""
    sizes = [shape[axis] for axis in place.axes]
    old = np.arange(prod(sizes), dtype=np.int64)
    if cut.joint is not None and cut.joint[0] == place.axes:
        living = cut.joint[1].reshape(-1)
        moved = np.full(len(old), -1, dtype=np.int64)
        moved[living] = np.arange(len(living))
        return moved
    if cut.joint is not None and len(place.axes) == 1 and place.axes[0] in cut.joint[0]:
        axes, flat = cut.joint
        which = axes.index(place.axes[0])
        living = np.unique(np.unravel_index(flat.reshape(-1), [shape[axis] for axis in axes])[which])
        if which == len(axes) - 1 and len(living) != flat.shape[1]:
            raise ArchsmithError(f"positions of axis {place.axes[0]} of '{place.tensor}' have moved row by row.")
        return _ranks(living, shape[place.axes[0]])
    coordinates = np.unravel_index(old, sizes)
    moved = np.zeros(len(old), dtype=np.int64)
    gone = np.zeros(len(old), dtype=bool)
    for axis, size, coordinate in zip(place.axes, sizes, coordinates, strict=True):
        kept = cut.axes.get(axis, np.arange(size))
        ranks = _ranks(kept, size)[coordinate]
        gone |= ranks < 0
        moved = moved * len(kept) + ranks
    moved[gone] = -1
    return moved


def _ranks(kept: IntArray, size: int) -> IntArray:
    ranks = np.full(size, -1, dtype=np.int64)
    ranks[kept] = np.arange(len(kept))
    return ranks
