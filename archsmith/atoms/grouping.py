"""From classes of labels to groups of units: interchangeable classes that stand for one width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from archsmith.atoms.labels import Cause, IntArray, Labels
from archsmith.atoms.propagate import LabelledGraph
from archsmith.atoms.rules.contraction import KERNEL
from archsmith.atoms.units import Pinned, Place, UnitGroup


def grouped(graph: LabelledGraph) -> Grouping:
    """Return the groups; those of which a split into equal pieces needs as many are united, unit by unit.

    A channel of the left half of a shuffle network can only go with one of the right half; which ones go together is
    free, so the units are paired in their order (one with several, where one group has a multiple of the other's).

    Args:
        graph: Its labels are changed.
    """
    while True:
        grouping = Grouping(graph)
        units = grouping.units
        pair = next(filter(None, (_halves(graph, split.pieces, units) for split in graph.propagation.splits)), None)
        if pair is None:
            return grouping
        first, second = pair
        cause = Cause("split", "", "it must go together with what stays, so that the pieces of a split stay equal")
        graph.labels.join(np.repeat(units[first], len(units[second]) // len(units[first])), units[second], cause)


def _halves(graph: LabelledGraph, pieces: Sequence[IntArray], units: dict[str, IntArray]) -> tuple[str, str] | None:
    """Return two groups, the smaller first, whose units together have equally many positions in every piece."""
    labels = graph.labels
    counts: dict[int, list[int]] = {}
    for number, piece in enumerate(pieces):
        for root in labels.roots(piece).tolist():
            for leaf in dict.fromkeys(labels.leaves(root)):
                counts.setdefault(leaf, [0] * len(pieces))[number] += 1
    uneven: list[tuple[str, tuple[int, ...]]] = []
    for name, members in sorted(units.items(), key=lambda item: len(item[1])):
        each = {tuple(counts.get(unit, [0] * len(pieces))) for unit in members.tolist()}
        if len(each) != 1 or len(set(own := each.pop())) == 1:
            continue
        for smaller, other in uneven:
            times, rest = divmod(len(members), len(units[smaller]))
            if not rest and len({a + times * b for a, b in zip(other, own, strict=True)}) == 1:
                return smaller, name
        uneven.append((name, own))
    return None


class Grouping:
    """Groups of units of a labelled graph.

    Attributes:
        groups: Groups, in the order of their first tensors.
        units: Class representative of every unit, by group name.
        pinned: What stays, by cause.
    """

    def __init__(self, graph: LabelledGraph) -> None:
        self._graph = graph
        self._keys = [(name, axis) for name, axes in graph.sources.items() for axis in axes]
        self._indices: dict[tuple[tuple[int, ...], bytes], IntArray] = {}  # places of one kind share their positions
        self._collect()
        self.groups: list[UnitGroup] = []
        self.units: dict[str, IntArray] = {}
        self._build()
        self.pinned = self._pinned()

    def _collect(self) -> None:
        """List every (class, axis, position, slot): which positions of which axes belong to which plain class."""
        labels = self._graph.labels
        parts: list[IntArray] = []
        for number, (name, axis) in enumerate(self._keys):
            roots = labels.roots(self._graph.sources[name][axis])
            unique, inverse = np.unique(roots, return_inverse=True)
            leaves = [_ordered(labels, root) for root in unique.tolist()] if labels.any_product(unique) else None
            if leaves is None:
                parts.append(_entries(roots, number, np.arange(len(roots)), 0))
                continue
            for slot in range(max(map(len, leaves))):
                has = np.array([len(row) > slot for row in leaves])
                leaf = np.array([row[slot] if len(row) > slot else 0 for row in leaves], dtype=np.int64)
                there = np.flatnonzero(has[inverse.ravel()])
                parts.append(_entries(leaf[inverse.ravel()][there], number, there, slot + 1))
        table = np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int64)
        self._all = table
        self._table = table[~labels.pinned(table[:, 0])]

    def _build(self) -> None:
        table = self._table
        if not len(table):
            return
        classes, index = np.unique(table[:, 0], return_inverse=True)
        # Units whose positions are counted alike on the same axes are of one kind.
        random = np.random.Generator(np.random.PCG64(0)).integers(1, 2**62, size=(len(self._keys), 16), dtype=np.uint64)
        weights = random[table[:, 1], np.minimum(table[:, 3], 15)]
        kinds = np.zeros(len(classes), dtype=np.uint64)
        np.add.at(kinds, index, weights)
        order = np.lexsort((table[:, 3], table[:, 2], table[:, 1], index))
        table, index = table[order], index[order]
        starts = np.searchsorted(index, np.arange(len(classes)))
        first = table[starts][:, 1:3]  # first axis and position of every class
        by_kind: dict[int, list[int]] = {}
        for unit in np.lexsort((first[:, 1], first[:, 0])).tolist():
            by_kind.setdefault(int(kinds[unit]), []).append(unit)
        lengths = np.diff(np.append(starts, len(table)))
        made: list[tuple[IntArray, list[Place], int]] = []
        for members in by_kind.values():
            own = np.array(members)
            stacked = table[starts[own][:, None] + np.arange(lengths[own[0]])]
            for chosen in _without_overlap(stacked):
                if len(chosen) > 1:  # of a single unit the last always stays
                    made.append((classes[own[chosen]], self._places(stacked[chosen]), int(stacked[chosen[0], 0, 3])))
        self._name(made)

    def _places(self, stacked: IntArray) -> list[Place]:
        """Return the places of units whose rows (units, positions, columns) list the same axes in the same order."""
        keys = stacked[0, :, 1]
        places = []
        for key in dict.fromkeys(keys.tolist()):
            name, axis = self._keys[key]
            index = np.sort(stacked[:, keys == key, 2], axis=1)
            places.append(Place(name, (axis,), self._indices.setdefault((index.shape, index.tobytes()), index)))
        return places

    def _name(self, made: Sequence[tuple[IntArray, list[Place], int]]) -> None:
        changes = self._changes()
        wanted: dict[str, list[int]] = {}
        for number, (_, places, _) in enumerate(made):
            inside = [place.tensor for place in places if "." in place.tensor]
            wanted.setdefault(inside[0].rpartition(".")[0] if inside else places[0].tensor, []).append(number)
        names: dict[int, str] = {}
        taken: set[str] = set()
        for base, numbers in wanted.items():
            for number in numbers:
                _, places, slot = made[number]
                name = base
                if len(numbers) > 1:
                    kind = (
                        "rows" if slot == 1 else "columns" if slot > 1 else "inputs" if places[0].axes[0] else "outputs"
                    )
                    name = f"{base}.{kind}"
                unique, count = name, 1
                while unique in taken:
                    count += 1
                    unique = f"{name}{count}"
                taken.add(unique)
                names[number] = unique
        for number, (units, places, _) in enumerate(made):
            self.units[names[number]] = units
            self.groups.append(
                UnitGroup(
                    name=names[number],
                    size=len(units),
                    places=tuple(places),
                    balance=self._balance(units),
                    changes=tuple(dict.fromkeys(text for unit in units.tolist() for text in changes.get(unit, ()))),
                )
            )

    def _changes(self) -> dict[int, tuple[str, ...]]:
        labels = self._graph.labels
        found: dict[int, list[str]] = {}
        for change in self._graph.propagation.changes:
            for root in np.unique(labels.roots(change.labels)).tolist():
                for leaf in labels.leaves(root):
                    found.setdefault(leaf, []).append(change.text)
        return {leaf: tuple(dict.fromkeys(texts)) for leaf, texts in found.items()}

    def _balance(self, units: IntArray) -> tuple[tuple[int, ...], ...]:
        """Return the parts of a group that must stay equal, where a split concerns it alone."""
        position = {unit: i for i, unit in enumerate(units.tolist())}
        labels = self._graph.labels
        for split in self._graph.propagation.splits:
            parts = []
            for piece in split.pieces:
                leaves = [labels.leaves(root) for root in labels.roots(piece).tolist()]
                if any(len(row) != 1 or row[0] not in position for row in leaves):
                    break
                parts.append(tuple(position[row[0]] for row in leaves))
            else:
                if len({unit for part in parts for unit in part}) == sum(map(len, parts)):
                    return tuple(tuple(sorted(part)) for part in parts)
        return ()

    def _pinned(self) -> list[Pinned]:
        labels = self._graph.labels
        table = self._all[labels.pinned(self._all[:, 0])]
        tensors: dict[tuple[str, str, str], dict[str, None]] = {}
        pairs = np.unique(np.stack([labels.cause_index(table[:, 0]), table[:, 1]], 1), axis=0)
        for cause_number, key in pairs.tolist():
            if cause_number < 0:
                continue
            cause = labels.causes[cause_number]
            if cause.reason == KERNEL:
                continue
            tensors.setdefault((cause.operator, cause.module, cause.reason), {})[self._keys[key][0]] = None
        return [Pinned(tuple(names), operator, module, reason) for (operator, module, reason), names in tensors.items()]


def _ordered(labels: Labels, label: int) -> tuple[int, ...]:
    """Return the different factors of a label, those that may be removed first."""
    leaves = dict.fromkeys(labels.leaves(label))
    return tuple(sorted(leaves, key=lambda leaf: labels.cause(leaf) is not None))


def _entries(classes: IntArray, key: int, positions: IntArray, slot: int) -> IntArray:
    rows = np.empty((len(classes), 4), dtype=np.int64)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = classes, key, positions, slot
    return rows


def _without_overlap(stacked: IntArray) -> list[IntArray]:
    """Split units into sets in which no two own the same position: rows and columns of one axis never mix.

    Args:
        stacked: Entries (units, positions, 4), the positions of one unit all different.
    """
    owned = stacked[:, :, 1] * (int(stacked[:, :, 2].max()) + 1) + stacked[:, :, 2]
    if len(np.unique(owned)) == owned.size:
        return [np.arange(len(stacked))]
    sets: list[tuple[set[int], list[int]]] = []
    for number, row in enumerate(owned.tolist()):
        own = set(row)
        for taken, members in sets:
            if not taken & own:
                taken |= own
                members.append(number)
                break
        else:
            sets.append((own, [number]))
    return [np.array(members) for _, members in sets]
