"""Removable units of any network, as places in its tensors; what a cut is; the records both leave.

``groups.py`` declares the atoms of networks that this package builds. Here nothing is known but tensors by name: a
*unit* is a set of slices that live and die together, a *group* holds units of one shape that stand for one width.
``find`` makes groups from a model; by hand one writes them down. A *cut* says what remains of every tensor, and which
attributes change with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Place:
    """Where the units of a group lie in one tensor.

    Attributes:
        tensor: Qualified name of a parameter or buffer; a tied tensor is named once, by its first name.
        axes: One axis, or several whose row-major flattening ``index`` counts (a grouped convolution's input channel
            owns elements of the axes (0, 1) jointly).
        index: Positions (units, k) along the axis or the flattened axes; row ``i`` belongs to unit ``i``.
    """

    tensor: str
    axes: tuple[int, ...]
    index: IntArray


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of one kind, interchangeable in shape.

    Attributes:
        name: Unique and readable: the qualified name of the first tensor's module, with a suffix where it has several.
        size: Number of units.
        places: All slices; every unit owns row ``i`` of each.
        minimum: Units that must stay.
        divisor: The number of kept units must be a multiple of it (relaxed when ``size`` itself is not).
        balance: Sets of unit positions that must keep equally many units each (groups of a grouped convolution);
            empty when there is no such condition.
        changes: Reductions that a removal changes ("layer_norm norm1", ...). Empty: a unit that is zero at its
            consumers can go without changing the output.
        frozen: Why nothing of it may go, or empty.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    minimum: int = 1
    divisor: int = 1
    balance: tuple[tuple[int, ...], ...] = ()
    changes: tuple[str, ...] = ()
    frozen: str = ""


@dataclass(frozen=True)
class Pinned:
    """Positions that stay because an operator has no rule for removing them.

    Attributes:
        tensors: Qualified names of the parameters concerned.
        operator: The operator ("aten.foo.default").
        module: Qualified name of the module that issued it.
        reason: One sentence.
    """

    tensors: tuple[str, ...]
    operator: str
    module: str
    reason: str


@dataclass(frozen=True, eq=False)
class TensorCut:
    """What remains of one tensor.

    Attributes:
        axes: Kept positions by axis, ascending; axes not named stay whole.
        joint: ``(axes, kept)`` where flattened axes keep an array (rows, columns) of flat positions: row ``r`` of the
            new tensor holds the columns ``kept[r]``. None for a plain cut.
    """

    axes: Mapping[int, IntArray] = field(default_factory=dict)
    joint: tuple[tuple[int, ...], IntArray] | None = None


@dataclass(frozen=True, eq=False)
class Cut:
    """One removal, planned and not yet done.

    Attributes:
        removed: Positions of the removed units by group name.
        tensors: What remains, by qualified name of every tensor that changes.
        attributes: New values of module attributes by dotted path from the model (``"layer1.0.attn.num_heads": 4``,
            ``"config.hidden_size": 96``), those of torch's own modules left out: these follow from the weights.
        fingerprint: Of the model that it fits (names, shapes, kinds), see ``archsmith.atoms.fingerprint``.
    """

    removed: Mapping[str, IntArray]
    tensors: Mapping[str, TensorCut]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


def with_constraints(groups: Sequence[UnitGroup], constraints: Mapping[str, Mapping[str, int]]) -> list[UnitGroup]:
    """Return the groups with ``minimum`` and ``divisor`` replaced where a name or a prefix of it is given.

    Args:
        groups: The groups.
        constraints: By group name or by a dotted prefix of it, e.g. ``{"layer1": {"divisor": 8, "minimum": 16}}``; the
            longest prefix wins.
    """
    changed = []
    for group in groups:
        fitting = [name for name in constraints if group.name == name or group.name.startswith(f"{name}.") or not name]
        best = max(fitting, key=len, default=None)
        given = {} if best is None else constraints[best]
        changed.append(
            dataclasses.replace(
                group, minimum=given.get("minimum", group.minimum), divisor=given.get("divisor", group.divisor)
            )
        )
    return changed
