"""Putting the important units first, before an elastic network is trained; what the network computes stays.

"The first k units" are the best k only when the units are in that order. A unit moves with all of its slices, so a
permutation within a group changes nothing, unless a constant of the code stands for a position (rotary tables): each
group is tried, and one whose permutation changes the outputs is put back and noted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from archsmith.atoms.fingerprint import named_tensors
from archsmith.atoms.transaction import relative_gap
from archsmith.atoms.units import IntArray, UnitGroup

TOLERANCE = 1e-4
"""Largest relative difference of outputs that reordering a sum may make, in single precision."""


@torch.no_grad()
def sort_units_(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    tied: Sequence[Sequence[str]],
    scores: Mapping[str, npt.NDArray[np.float64]],
    outputs: Callable[[], list[Tensor]],
    notes: list[str],
) -> dict[str, IntArray]:
    """Permute the units of groups by falling scores, within balanced parts where there are any.

    Args:
        model: Changed in place; every tensor keeps its identity.
        groups: The groups.
        tied: Names of groups that are chosen together; each is permuted by itself.
        scores: One number for each unit, by group.
        outputs: Computes the whole network's outputs on example inputs.
        notes: Takes a sentence for every group that could not be sorted.

    Returns:
        Permutations by group: new position i holds the old unit ``permutation[i]``.
    """
    tensors = named_tensors(model)[0]
    by_name = {group.name: group for group in groups}
    before = outputs()
    done: dict[str, IntArray] = {}
    for names in tied:
        for name in names:
            group = by_name[name]
            order = falling(group, scores[name])
            if (order == np.arange(group.size)).all():
                continue
            permute_(tensors, group, order)
            if relative_gap(outputs(), before) > TOLERANCE:
                permute_(tensors, group, np.argsort(order))
                notes.append(f"'{name}' is not sorted: the order of its units matters to the network")
            else:
                done[name] = order
    return done


def falling(group: UnitGroup, scores: npt.NDArray[np.float64]) -> IntArray:
    """Return the permutation by falling scores; units stay in their part of a balanced group. Equal scores stay."""
    order = np.arange(group.size)
    for part in group.balance or (tuple(range(group.size)),):
        positions = np.array(sorted(part))
        order[positions] = positions[np.argsort(-scores[positions], kind="stable")]
    return order


def permute_(tensors: Mapping[str, Tensor], group: UnitGroup, order: IntArray) -> None:
    """Move the slices of every unit: position i gets those of unit ``order[i]``."""
    for place in group.places:
        tensor = tensors[place.tensor]
        to = torch.from_numpy(place.index.reshape(-1)).to(tensor.device)
        source = torch.from_numpy(place.index[order].reshape(-1)).to(tensor.device)
        if len(place.axes) == 1:
            tensor.data.index_copy_(place.axes[0], to, tensor.data.index_select(place.axes[0], source))
            continue
        front = tuple(range(len(place.axes)))
        moved = tensor.data.movedim(place.axes, front)
        flat = moved.reshape(-1, *moved.shape[len(front) :]).clone()
        flat[to] = flat[source]
        tensor.data.copy_(flat.reshape(moved.shape).movedim(front, place.axes))
