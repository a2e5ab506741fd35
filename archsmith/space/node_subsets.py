"""Which nodes of a network stay: one subset of the nodes for each of its layers.

A point is a sub-network of one parent: for every layer the kept nodes, ascending. Either each layer keeps a fixed
number of them, or the whole network does, with at least one in every layer. Sampling is uniform over the points, and
a mutation swaps one kept node for one that was removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.space.architecture import Architecture
from archsmith.space.base import EncodingKind, Invalid, Space
from archsmith.space.deciders import Decide, checked
from archsmith.space.options import Options, Subsets, draw_below
from archsmith.space.values import Value


def kept_nodes(nodes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """Return how many nodes each layer keeps: ``max(1, round(n (1 - sparsity)))``.

    Args:
        nodes: Number of nodes by layer.
        sparsity: Share of the nodes that go, from 0, below 1.

    Raises:
        UserError: The sparsity is out of its range.
    """
    if not 0 <= sparsity < 1:
        raise UserError("sparsity", sparsity, allowed="a number from 0, below 1")
    return {layer: max(1, round(n * (1 - sparsity))) for layer, n in nodes.items()}


class NodeSubsetSpace(Space):
    """The sub-networks that keep so many nodes of a parent.

    Decisions are named by layer; a choice is the tuple of kept nodes, numbers from 0, ascending.

    Args:
        nodes: Number of nodes by layer, in the order of the network. Inputs and outputs are no nodes.
        kept: Nodes to keep by layer; or one number for the whole network, with at least one node in every layer.
        name: Name of the space.

    ``sample`` is uniform in both cases; ``size`` is exact. With one number for the whole network a layer's size cannot
    change alone, so a mutation may touch two layers, and what a layer may keep depends on the choices before it:
    learned controllers, which need the same options each time, refuse such a space. Strategies that list all options
    of a decision (plain tree search) are for small layers only.

    Raises:
        UserError: No layer, or a number that cannot be kept.

    Example:
        >>> space = NodeSubsetSpace({"hidden": 8}, {"hidden": 3})
        >>> space.size
        56
        >>> len(space.sample(np.random.default_rng(0))["hidden"])
        3
    """

    def __init__(self, nodes: Mapping[str, int], kept: Mapping[str, int] | int, *, name: str = "node-subsets") -> None:
        if not nodes or any(n < 1 for n in nodes.values()):
            raise UserError("nodes", dict(nodes), allowed="at least one layer, each of at least one node")
        if isinstance(kept, int):
            if not len(nodes) <= kept <= sum(nodes.values()):
                raise UserError("kept", kept, allowed=f"{len(nodes)} (one in each layer) to {sum(nodes.values())}")
        elif set(kept) != set(nodes) or any(not 1 <= kept[layer] <= nodes[layer] for layer in nodes):
            raise UserError(
                "kept", dict(kept), allowed=f"for each layer a number from 1 to that of its nodes: {dict(nodes)}"
            )
        self.name = name
        self.nodes = dict(nodes)
        self.kept = kept if isinstance(kept, int) else {layer: kept[layer] for layer in nodes}
        self._layers = tuple(self.nodes.items())
        self._options: dict[tuple[int, int, int], Subsets] = {}

    def __repr__(self) -> str:
        return f"NodeSubsetSpace({self.nodes}, {self.kept})"

    @cached_property
    def _behind(self) -> list[int]:
        """Nodes of the layers behind each layer."""
        return [sum(self.nodes.values()) - total for total in accumulate(self.nodes.values())]

    def _bounds(self, at: int, left: int) -> tuple[int, int]:
        """Return fewest and most nodes that layer ``at`` can keep when ``left`` are to be kept from it on."""
        layer, n = self._layers[at]
        if not isinstance(self.kept, int):
            return self.kept[layer], self.kept[layer]
        return max(1, left - self._behind[at]), min(n, left - (len(self._layers) - at - 1))

    @property
    def _total(self) -> int:
        return self.kept if isinstance(self.kept, int) else sum(self.kept.values())

    def walk(self, decide: Decide) -> Architecture:
        """Ask for the kept nodes of every layer in order; see ``Space.walk``."""
        left = self._total
        decisions: dict[str, Value] = {}
        for at, (layer, n) in enumerate(self._layers):
            low, high = self._bounds(at, left)
            options = self._options.get((n, low, high))
            if options is None:
                options = self._options.setdefault((n, low, high), Subsets(tuple(range(n)), low, high))
            chosen = checked(decide, layer, options, None, "nodes")
            assert isinstance(chosen, tuple)
            decisions[layer] = chosen
            left -= len(chosen)
        return self._made(decisions)

    def _made(self, decisions: dict[str, Value]) -> Architecture:
        return Architecture.of_valid(decisions, space=self.name, canonical=None)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Return a sub-network, uniformly among all of the space."""
        left = self._total
        decisions: dict[str, Value] = {}
        for at, (layer, n) in enumerate(self._layers):
            size = self._drawn_size(at, left, rng)
            decisions[layer] = tuple(sorted(rng.choice(n, size, replace=False).tolist()))
            left -= size
        return self._made(decisions)

    def _drawn_size(self, at: int, left: int, rng: np.random.Generator) -> int:
        """Return how many nodes a layer keeps, each number as likely as the sub-networks that have it."""
        low, high = self._bounds(at, left)
        if low == high:
            return low
        n = self._layers[at][1]
        rank = draw_below(self._completions[at][left], rng)
        for size in range(low, high + 1):
            ways = math.comb(n, size) * self._completions[at + 1][left - size]
            if rank < ways:
                return size
            rank -= ways
        raise AssertionError("the completions of a layer add up to their sum")

    @cached_property
    def _completions(self) -> list[dict[int, int]]:
        """Return for each layer, by number of nodes left, in how many ways it and those behind it keep them."""
        table: list[dict[int, int]] = [{0: 1}]
        for _, n in reversed(self._layers):
            ways: dict[int, int] = {}
            for size in range(1, n + 1):
                here = math.comb(n, size)
                for rest, count in table[0].items():
                    if size + rest <= self._total:
                        ways[size + rest] = ways.get(size + rest, 0) + here * count
            table.insert(0, ways)
        return table

    @cached_property
    def size(self) -> int:
        """Number of sub-networks, exact."""
        if isinstance(self.kept, int):
            return self._completions[0][self.kept]
        return math.prod(math.comb(n, self.kept[layer]) for layer, n in self._layers)

    @property
    def log10_size(self) -> float:
        """Logarithm of the number of sub-networks to the base 10."""
        return math.log10(self.size)

    def adjacent(self, path: str, value: Value, options: Options) -> list[Value]:
        """Return the subsets of the same size with one kept node swapped for one that was removed."""
        assert isinstance(value, tuple)
        kept = set(value)
        outside = [node for node in range(self.nodes[path]) if node not in kept]
        return [tuple(sorted((kept - {gone}) | {new})) for gone in value for new in outside]  # type: ignore[type-var]

    def mutate(
        self, architecture: Architecture, rng: np.random.Generator, *, subtree: str | None = None
    ) -> Architecture:
        """Return a sub-network in which one kept node is swapped for a removed one, each swap equally likely.

        Args:
            architecture: A valid point, left as it is.
            rng: Stream of all choices.
            subtree: A layer, whose nodes are then drawn anew.

        Raises:
            UserError: Nothing else can be kept, or ``subtree`` names no layer.
        """
        if subtree is not None:
            return super().mutate(architecture, rng, subtree=subtree)
        masks = self.masks(self.validate(architecture))
        gone_and_new = [
            (gone, new, int(masks[gone].sum()) * int((~masks[new]).sum()))
            for gone in self.nodes
            for new in self.nodes
            if gone == new or (isinstance(self.kept, int) and masks[gone].sum() > 1)
        ]
        total = sum(swaps for _, _, swaps in gone_and_new)
        if not total:
            raise UserError(
                "architecture", Shown("one that keeps every node"), allowed="one with a valid neighbour in the space"
            )
        rank = draw_below(total, rng)
        for gone, new, swaps in gone_and_new:
            if rank < swaps:
                removed, added = divmod(rank, int((~masks[new]).sum()))
                was, becomes = np.flatnonzero(masks[gone])[removed], np.flatnonzero(~masks[new])[added]
                masks[gone][was], masks[new][becomes] = False, True
                return self.of_masks(masks)
            rank -= swaps
        raise AssertionError("the swaps add up to their sum")

    def masks(self, architecture: Mapping[str, Value]) -> dict[str, np.ndarray]:
        """Return by layer one bool for each node: whether a valid point keeps it."""
        found = {}
        for layer, n in self._layers:
            mask = np.zeros(n, dtype=bool)
            mask[np.asarray(architecture[layer], dtype=np.int64)] = True
            found[layer] = mask
        return found

    def of_masks(self, masks: Mapping[str, Sequence[bool] | np.ndarray]) -> Architecture:
        """Return the point that ``masks`` gives these masks for.

        Raises:
            UserError: The space has no such point.
        """
        return self.validate({layer: tuple(np.flatnonzero(masks[layer]).tolist()) for layer in self.nodes})

    def encode(self, architecture: Architecture, kind: EncodingKind) -> np.ndarray:
        """Return one column for each node, 1 where it is kept; "one-hot" and "ordinal" are the same here.

        Raises:
            UserError: The kind "path": nodes of different layers are different nodes.
        """
        self._refuse_paths(kind)
        return np.concatenate(list(self.masks(architecture).values())).astype(np.float64)

    def decode(self, kind: EncodingKind, array: np.ndarray) -> Architecture | Invalid:
        """Return the point of a row that ``encode`` gives, or why there is none."""
        self._refuse_paths(kind)
        row = np.asarray(array, dtype=np.float64)
        width = sum(self.nodes.values())
        if row.shape != (width,):
            raise UserError("array", Shown(f"shape {row.shape}"), allowed=f"shape ({width},), one column for each node")
        if not np.isin(row, (0.0, 1.0)).all():
            return Invalid("the array holds something else than 0 and 1")
        parts = np.split(row == 1, np.cumsum(list(self.nodes.values()))[:-1])
        try:
            return self.of_masks(dict(zip(self.nodes, parts, strict=True)))
        except UserError as error:
            return Invalid(str(error))

    def _refuse_paths(self, kind: EncodingKind) -> None:
        if kind not in ("one-hot", "ordinal"):
            raise UserError("kind", kind, allowed="'one-hot' or 'ordinal'")
