"""Labels: which positions of which tensors live and die together.

Every axis of every parameter and buffer starts with one label per position. Following the labels through a network
unites those that meet. A label is *plain*, or a *product* of others: position (i, j) of an axis that a view splits is
row i AND column j, and lives while both live. Uniting two products unites row with row and column with column; where
two factorings do not nest they collapse to the coarser union, which removes choices and never makes a wrong one.
Label 0 stands for what can not be removed (inputs, constants); whatever meets it is *pinned*, with the cause.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cause:
    """Why labels are pinned.

    Attributes:
        operator: The operator ("aten.foo.default"), or a word for other causes ("input", "frozen").
        module: Qualified name of the module that issued it.
        reason: One sentence.
    """

    operator: str
    module: str
    reason: str


class Labels:
    """Union-find over labels with products and pins.

    Attributes:
        causes: All causes of pins so far, in the order of their appearance.
    """

    def __init__(self) -> None:
        self._count = 1
        self._parent = np.zeros(1024, dtype=np.int64)
        self._pinned = np.full(1024, -1, dtype=np.int64)
        self._derived = np.zeros(1024, dtype=np.bool_)
        self._parts: dict[int, tuple[int, ...]] = {}
        self._products: dict[tuple[int, ...], int] = {}
        self.causes: list[Cause] = []

    def __len__(self) -> int:
        """Number of labels, label 0 included."""
        return self._count

    def fresh(self, count: int) -> IntArray:
        """Return ``count`` new labels."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            size = max(2 * len(self._parent), self._count)
            extra = size - len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(extra, dtype=np.int64)])
            self._pinned = np.concatenate([self._pinned, np.full(extra, -1, dtype=np.int64)])
            self._derived = np.concatenate([self._derived, np.zeros(extra, dtype=np.bool_)])
        labels = np.arange(first, self._count, dtype=np.int64)
        self._parent[first : self._count] = labels
        return labels

    def roots(self, labels: IntArray) -> IntArray:
        """Return the representative of each label's class, of the same shape."""
        root = self._parent[labels]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                break
            root = above
        self._parent[labels] = root
        return root

    def root(self, label: int) -> int:
        """Return the representative of one label's class."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = int(parent[label])
        return label

    def leaves(self, label: int) -> tuple[int, ...]:
        """Return the classes whose conjunction a label is: its own, or those of its factors down to plain ones."""
        label = self.root(label)
        parts = self._parts.get(label)
        if parts is None:
            return (label,)
        return tuple(itertools.chain.from_iterable(self.leaves(part) for part in parts))

    def cause(self, label: int) -> Cause | None:
        """Return why a label is pinned; None when it is not."""
        index = int(self._pinned[self.root(label)])
        return None if index < 0 else self.causes[index]

    def cause_index(self, labels: IntArray) -> IntArray:
        """Return the position in ``causes`` of each label's cause, -1 where there is none."""
        return self._pinned[self.roots(labels)]

    def any_product(self, labels: IntArray) -> bool:
        """Whether some of the labels are products."""
        return bool(self._derived[self.roots(labels)].any())

    def pinned(self, labels: IntArray) -> BoolArray:
        """Return which labels can not be removed, label 0 included; a product is pinned when all its factors are."""
        roots = self.roots(labels)
        return (roots == 0) | (self._pinned[roots] >= 0)

    def pin(self, labels: IntArray, cause: Cause) -> None:
        """Pin labels; with a product, all its factors."""
        todo = np.unique(self.roots(labels.ravel()))
        todo = todo[(todo != 0) & (self._pinned[todo] < 0)]
        if len(todo):
            if not self.causes or self.causes[-1] is not cause:
                self.causes.append(cause)
            self._pin(todo.tolist(), len(self.causes) - 1)

    def _pin(self, roots: Iterable[int], cause: int) -> None:
        stack = list(roots)
        while stack:
            root = self.root(stack.pop())
            if root and self._pinned[root] < 0:
                self._pinned[root] = cause
                stack.extend(self._parts.get(root, ()))

    def join(self, first: IntArray, second: IntArray, cause: Cause) -> None:
        """Unite labels position by position.

        Args:
            first: Labels of any shape.
            second: As many labels.
            cause: Recorded for labels that meet label 0.
        """
        a, b = self.roots(first.ravel()), self.roots(second.ravel())
        differ = a != b
        if not differ.any():
            return
        a, b = a[differ], b[differ]
        zero = (a == 0) | (b == 0)
        if zero.any():
            self.pin(np.where(a == 0, b, a)[zero], cause)
            a, b = a[~zero], b[~zero]
        plain = ~(self._derived[a] | self._derived[b])
        if plain.any():
            self._join_plain(a[plain], b[plain])
        if not plain.all():
            self._join_products(a[~plain], b[~plain])

    def _join_plain(self, a: IntArray, b: IntArray) -> None:
        members = np.unique(np.concatenate([a, b]))
        causes = self._pinned[members]
        while len(a):
            low, high = np.minimum(a, b), np.maximum(a, b)
            self._parent[high] = low
            a, b = self.roots(a), self.roots(b)
            differ = a != b
            a, b = a[differ], b[differ]
        pinned = causes >= 0
        self._pinned[self.roots(members[pinned])] = causes[pinned]

    def _join_products(self, a: IntArray, b: IntArray) -> None:
        pairs = np.unique(np.stack([a, b], 1), axis=0)
        stack: list[tuple[int, int]] = []
        by_arity: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for x, y in pairs.tolist():
            p, q = self._comparable(self.leaves(x), self.leaves(y))
            if len(p) > 1 and len(q) > 1:
                by_arity.setdefault((len(p), len(q)), []).append((p, q))
            stack.append((x, y))
        for found in by_arity.values():
            left, right = np.array([p for p, _ in found]), np.array([q for _, q in found])
            stack.extend(self._aligned(left, right))
        self._unite(stack)

    def _comparable(self, p: tuple[int, ...], q: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the factors of two products that must agree: where their numbers differ, pinned ones do not count."""
        if len(p) == len(q):
            return p, q
        free_p = tuple(label for label in p if self._pinned[label] < 0)
        free_q = tuple(label for label in q if self._pinned[label] < 0)
        return (free_p, free_q) if free_p and free_q else (p, q)

    def _aligned(self, left: IntArray, right: IntArray) -> list[tuple[int, int]]:
        """Return which factors to unite so that products with the rows of ``left`` and ``right`` as factors agree.

        Chosen is the way that loses least: factors one to one where that is possible (in any order), a factor of one
        side against a product of neighbouring factors of the other, else everything with everything.
        """
        if left.shape[1] > right.shape[1]:
            left, right = right, left
        few, many = left.shape[1], right.shape[1]
        best: list[tuple[int, tuple[int, ...]]] | None = None
        best_loss = None
        for option in _groupings(few, many):
            loss = sum(_mixing(left[:, [i]], right[:, list(columns)]) for i, columns in option)
            if best_loss is None or loss < best_loss:
                best, best_loss = option, loss
            if best_loss == 0:
                break
        assert best is not None and best_loss is not None
        pairs: list[tuple[int, int]] = []
        if few != many and best_loss:
            everything = np.concatenate([left, right], 1)
            return [(int(row[0]), int(other)) for row in everything for other in row[1:]]
        for i, columns in best:
            other = right[:, columns[0]] if len(columns) == 1 else self.product([right[:, c] for c in columns])
            pairs.extend({(int(x), int(y)) for x, y in zip(left[:, i], other, strict=True)})
        return pairs

    def _unite(self, stack: list[tuple[int, int]]) -> None:
        """Unite pairs of which some are products; whatever has two factorings afterwards gets them united as well."""
        while stack:
            x, y = stack.pop()
            x, y = self.root(x), self.root(y)
            if x == y:
                continue
            if x == 0 or y == 0:
                raise AssertionError("label 0 is pinned against, never united")
            low, high = min(x, y), max(x, y)
            p, q = self.leaves(low), self.leaves(high)
            first, second = self._parts.get(low), self._parts.pop(high, None)
            if first is not None and second is not None and set(p) != set(q):
                mine, theirs = self._comparable(p, q)
                if len(mine) == len(theirs):
                    stack.extend(zip(mine, theirs, strict=True))
                else:
                    stack.extend((mine[0], other) for other in (*mine[1:], *theirs))
            if (first is None and low in q) or (second is None and high in p):
                # A label that is a factor of what it meets: it lives only with all the others.
                stack.extend((p[0], other) for other in (*p, *q) if other != p[0])
                if first is None:
                    second = None
            causes = (int(self._pinned[low]), int(self._pinned[high]))
            self._parent[high] = low
            parts = first if first is not None else second
            if parts is not None:
                self._parts[low] = parts
                self._derived[low] = True
            pinned = max(causes)
            if pinned >= 0:
                self._pinned[low] = pinned
                self._pin(parts or (), pinned)

    def product(self, factors: Sequence[IntArray]) -> IntArray:
        """Return one label per position that lives while all its factors live.

        Args:
            factors: Label arrays of equal shape; factors that are 0 or pinned impose nothing and stay in the product.
        """
        rows = np.stack([self.roots(factor).ravel() for factor in factors], 1)
        unique, inverse = np.unique(rows, axis=0, return_inverse=True)
        labels = np.array([self._product(row) for row in unique.tolist()], dtype=np.int64)
        return labels[inverse.ravel()].reshape(factors[0].shape)

    def _product(self, factors: Sequence[int]) -> int:
        leaves = tuple(dict.fromkeys(leaf for factor in factors if factor for leaf in self.leaves(factor)))
        if not leaves:
            return 0
        if len(leaves) == 1:
            return leaves[0]
        key = tuple(sorted(leaves))
        known = self._products.get(key)
        if known is not None and set(self.leaves(known)) == set(leaves):
            return self.root(known)
        label = int(self.fresh(1)[0])
        self._parts[label] = leaves
        self._derived[label] = True
        self._products[key] = label
        causes = [int(self._pinned[leaf]) for leaf in leaves]
        if min(causes) >= 0:
            self._pinned[label] = causes[0]
        return label

    def factor(self, field: IntArray, cause: Cause) -> list[IntArray]:
        """Return labels for each axis of ``field`` such that a position lives while its labels on all axes live.

        Args:
            field: Labels (n_1, ..., n_k), k at least 2; they vary along every axis.
            cause: Recorded for rows and columns that hold label 0.
        """
        field = self.roots(field)
        if self.pinned(field).all():
            return [np.zeros(n, dtype=np.int64) for n in field.shape]
        nested = self._nested(field, cause)
        if nested is not None:
            return nested
        axes = [self.fresh(n) for n in field.shape]
        grid = [np.broadcast_to(_along(axis, i, field.ndim), field.shape) for i, axis in enumerate(axes)]
        unique = np.unique(field)
        if len(unique) == field.size and 0 not in unique and not self._derived[unique].any():
            # The common case, all labels plain and different: they become products at once.
            leaves = np.stack([g.ravel() for g in grid], 1)
            causes = self._pinned[field.ravel()]
            for label, parts in zip(field.ravel().tolist(), leaves.tolist(), strict=True):
                self._parts[label] = tuple(parts)
                self._products[tuple(parts)] = label
            self._derived[unique] = True
            for index in np.flatnonzero(causes >= 0).tolist():
                self._pin(leaves[index].tolist(), int(causes[index]))
        else:
            self.join(field, self.product(grid), cause)
        return axes

    def _nested(self, field: IntArray, cause: Cause) -> list[IntArray] | None:
        """Return the labels of each axis where ``field`` holds products that these axes divide; None otherwise."""
        unique, inverse = np.unique(field, return_inverse=True)
        leaves = [self.leaves(label) for label in unique.tolist()]
        arity = len(leaves[0])
        if arity < 2 or any(len(row) != arity for row in leaves):
            return None
        table = np.array(leaves, dtype=np.int64)[inverse.ravel()].reshape(*field.shape, arity)
        on_axis: list[list[IntArray]] = [[] for _ in field.shape]
        wide: list[tuple[tuple[int, ...], IntArray]] = []
        for slot in range(arity):
            values = compress(table[..., slot])
            varying = tuple(axis for axis, n in enumerate(values.shape) if n > 1)
            if not varying:
                self.pin(values, cause)
            elif len(varying) == 1:
                on_axis[varying[0]].append(values.ravel())
            else:
                wide.append((varying, values))
        taken = [axis for varying, _ in wide for axis in varying]
        if len(taken) != len(set(taken)) or any(on_axis[axis] for axis in taken):
            return None
        for varying, values in wide:
            factors = self.factor(values.reshape([field.shape[axis] for axis in varying]), cause)
            for axis, labels in zip(varying, factors, strict=True):
                on_axis[axis].append(labels)
        return [
            np.zeros(n, dtype=np.int64) if not found else found[0] if len(found) == 1 else self.product(found)
            for n, found in zip(field.shape, on_axis, strict=True)
        ]

    def dead(self, labels: IntArray, dead_units: BoolArray) -> BoolArray:
        """Return which labels die with the given units.

        Args:
            labels: Labels of any shape.
            dead_units: By class representative, for plain classes.
        """
        roots = self.roots(labels)
        dead = dead_units[roots]
        derived = self._derived[roots]
        if derived.any():
            unique, inverse = np.unique(roots[derived], return_inverse=True)
            found = np.array([any(dead_units[leaf] for leaf in self.leaves(label)) for label in unique.tolist()])
            dead[derived] = found[inverse.ravel()]
        return dead


def compress(field: IntArray) -> IntArray:
    """Return ``field`` with every axis along which it does not vary reduced to length one."""
    for axis in range(field.ndim):
        if field.shape[axis] > 1:
            first = field.take([0], axis)
            if bool((field == first).all()):
                field = first
    return field


def _along(labels: IntArray, axis: int, ndim: int) -> IntArray:
    return labels.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _groupings(few: int, many: int) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Return the ways to give each of ``few`` factors one of ``many``, or a run of neighbours where there are more."""
    if few == many:
        return [[(i, (j,)) for i, j in enumerate(order)] for order in itertools.permutations(range(few))]
    ways = []
    for cuts in itertools.combinations(range(1, many), few - 1):
        bounds = [0, *cuts, many]
        ways.append([(i, tuple(range(bounds[i], bounds[i + 1]))) for i in range(few)])
    return ways


def _mixing(left: IntArray, right: IntArray) -> int:
    """Return how far two columns of factors are from a one-to-one relation; 0 is exactly one to one."""
    pairs = len(np.unique(np.concatenate([left, right], 1), axis=0))
    return 2 * pairs - len(np.unique(left, axis=0)) - len(np.unique(right, axis=0))
