"""The NAS-Bench-101 space without the networks: small directed graphs with an operation on each inner vertex.

Vertex 0 is the input, the last vertex the output; edges go from lower to higher numbers, at most 9 of them, and every
vertex lies on a way from input to output (the benchmark removes what does not). A walk asks for the number of vertices,
then for each vertex in turn its incoming edges and its operation; a choice is offered only if the graph can still be
completed, so walks never end dead.

The same network can be numbered in several ways. ``network_digest`` goes by the first of them, which is exact
isomorphism (423,624 networks); ``graph_hash`` is the benchmark's own name of a network, an iterated hash of
neighbourhoods.

Source: NAS-Bench-101, arXiv 1902.09635, Sec. 2.1 and its appendix on the graph hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import (
    Architecture,
    Categorical,
    Decide,
    EncodingKind,
    Given,
    Invalid,
    Options,
    Ordinal,
    ProductSpace,
    Space,
    Value,
    When,
)
from archsmith.space.deciders import checked

NB101_OPERATIONS = ("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3")
"""Operations of an inner vertex, in the order of the table's codes 0 to 2."""

_BOTH = (False, True)


class Cell(NamedTuple):
    """A graph as plain numbers.

    Attributes:
        vertices: Number of vertices, input and output included.
        edges: Pairs (source, target), source < target.
        operations: Code of each inner vertex, in order.
    """

    vertices: int
    edges: tuple[tuple[int, int], ...]
    operations: tuple[int, ...]


class GraphCellSpace(Space):
    """Cells as labelled graphs.

    Args:
        name: Name of the space.
        vertices: Largest number of vertices, from 2.
        edges: Largest number of edges.
        operations: Names of the operations.

    Decisions: ``vertices``; for each vertex ``j`` from 1 the edges ``edge/<i>-<j>`` (False, True) for ``i < j``, and
    for inner ones ``op/<j>``. ``sample`` is uniform over these labelled cells (a network with more numberings is
    likelier; ``Table.sample`` is uniform over networks). ``size`` counts labelled cells.

    Raises:
        UserError: Fewer than 2 or more than 7 vertices, no edge, or no operation.
    """

    def __init__(self, name: str, *, vertices: int, edges: int, operations: Sequence[str]) -> None:
        if not 2 <= vertices <= 7:
            raise UserError("vertices", vertices, allowed="an integer from 2 to 7")
        if edges < 1 or not operations:
            raise UserError("edges, operations", (edges, list(operations)), allowed="at least one of each")
        self.name = name
        self.operations = tuple(operations)
        self.max_edges = edges
        graphs = {count: _graphs(count, edges) for count in range(2, vertices + 1)}
        self._graphs = {count: codes for count, codes in graphs.items() if len(codes)}
        self._sizes = tuple(self._graphs)
        self._start, total = {}, 0
        for count, codes in self._graphs.items():
            self._start[count] = total
            total += len(codes) * self._labellings(count)
        self.total = total
        self._number = {n: {code: k for k, code in enumerate(codes.tolist())} for n, codes in self._graphs.items()}
        self._paths = {count: [f"edge/{i}-{j}" for i, j in _decided(count)] for count in self._sizes}
        self._ops = {count: [f"op/{j}" for j in range(1, count - 1)] for count in self._sizes}
        self._code_of: dict[Value, int] = {operation: code for code, operation in enumerate(self.operations)}
        self._layout = _layout(name, self._sizes, self.operations)

    def _labellings(self, count: int) -> int:
        return len(self.operations) ** (count - 2)

    def __repr__(self) -> str:
        return f"GraphCellSpace({self.name!r}, at most {self._sizes[-1]} vertices and {self.max_edges} edges)"

    def walk(self, decide: Decide) -> Architecture:
        """Ask for the number of vertices, then vertex by vertex for edges and operation; see ``Space.walk``."""
        count = checked(decide, "vertices", self._sizes, None, "vertices")
        assert isinstance(count, int)
        graphs = self._graphs[count]
        decisions: dict[str, Value] = {"vertices": count}
        low, high, bit = 0, len(graphs), count * (count - 1) // 2
        prefix = 0
        for target in range(1, count):
            for source in range(target):
                bit -= 1
                # The graphs are sorted, the first decision on top: those with this prefix are one stretch.
                middle = low + int(np.searchsorted(graphs[low:high], prefix | (1 << bit)))
                mask = None if low < middle < high else np.array([middle > low, middle < high])
                path = f"edge/{source}-{target}"
                decisions[path] = checked(decide, path, _BOTH, mask, "edge")
                if decisions[path]:
                    low, prefix = middle, prefix | (1 << bit)
                else:
                    high = middle
            if target < count - 1:
                decisions[f"op/{target}"] = checked(decide, f"op/{target}", self.operations, None, "op")
        return self._made(decisions)

    def _made(self, decisions: dict[str, Value]) -> Architecture:
        return Architecture.of_valid(decisions, space=self.name, canonical=self._canonical)

    def _canonical(self, architecture: Architecture) -> int:
        return self.class_of(self.index(architecture))

    def index(self, architecture: Architecture) -> int:
        """Return the number of a labelled cell, from 0 to ``size`` - 1.

        Raises:
            KeyError: Not a cell of this space; ``validate`` says why.
        """
        decisions = architecture.decisions
        count = decisions["vertices"]
        graph = code = 0
        for path in self._paths[count]:  # type: ignore[index]
            graph += graph + (decisions[path] is True)
        for path in self._ops[count]:  # type: ignore[index]
            code = code * len(self.operations) + self._code_of[decisions[path]]
        if len(decisions) != 1 + len(self._paths[count]) + len(self._ops[count]):  # type: ignore[index]
            raise KeyError("decisions that the space does not have")
        number = self._number[count][graph]  # type: ignore[index]
        return self._start[count] + number * self._labellings(count) + code  # type: ignore[index, arg-type]

    def indices(self, vertices: np.ndarray, adjacency: np.ndarray, operations: np.ndarray) -> np.ndarray:
        """Return ``index`` of many cells at once, -1 for what is no cell of the space; int64.

        Args:
            vertices: Number of vertices of each cell.
            adjacency: Edges as bits, bit k for the k-th pair (0,1), (0,2), ..., (1,2), ... counted from the lowest.
            operations: Codes of the inner vertices as one number, the last vertex lowest.
        """
        found = np.full(len(vertices), -1, dtype=np.int64)
        for count, graphs in self._graphs.items():
            here = np.flatnonzero(vertices == count)
            given = {pair: adjacency[here].astype(np.int64) >> k & 1 for k, pair in enumerate(_pairs(count))}
            graph = np.zeros(len(here), dtype=np.int64)
            for pair in _decided(count):
                graph += graph + given[pair]
            number = np.minimum(np.searchsorted(graphs, graph), len(graphs) - 1)
            valid = (graphs[number] == graph) & (operations[here] < self._labellings(count))
            index = self._start[count] + number * self._labellings(count) + operations[here].astype(np.int64)
            found[here] = np.where(valid, index, -1)
        return found

    def at(self, index: int) -> Architecture:
        """Return the labelled cell of a number: the inverse of ``index``."""
        count = max(count for count, start in self._start.items() if start <= index)
        number, code = divmod(index - self._start[count], self._labellings(count))
        graph = int(self._graphs[count][number])
        codes = _digits(code, len(self.operations), count - 2)
        decisions: dict[str, Value] = {"vertices": count}
        for k, (source, target) in enumerate(pairs := _decided(count)):
            decisions[f"edge/{source}-{target}"] = bool(graph >> (len(pairs) - 1 - k) & 1)
            if source == target - 1 < count - 2:
                decisions[f"op/{target}"] = self.operations[codes[target - 1]]
        return self._made(decisions)

    def class_of(self, index: int) -> int:
        """Return the smallest number of an isomorphic cell; equal for two numbers exactly if the networks are."""
        return int(self.classes[index])

    @cached_property
    def classes(self) -> np.ndarray:
        """``class_of`` every number, int32 of shape (size,); made when first asked for."""
        parts = [_classes(n, graphs, len(self.operations)) + self._start[n] for n, graphs in self._graphs.items()]
        return np.concatenate(parts).astype(np.int32)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Return a labelled cell, uniformly."""
        return self.at(int(rng.integers(self.total)))

    @property
    def size(self) -> int:
        """Number of labelled cells, exactly."""
        return self.total

    def adjacent(self, path: str, value: Value, options: Options) -> list[Value]:
        """Return the values next to ``value``: the neighbouring numbers of vertices, or every other option."""
        return self._layout.adjacent(path, value, options)

    def encode(self, architecture: Architecture, kind: EncodingKind) -> np.ndarray:
        """Return the columns of ``archsmith.space.encoding``, what the number of vertices leaves out being inactive."""
        return self._layout.encode(architecture, kind)

    def decode(self, kind: EncodingKind, array: np.ndarray) -> Architecture | Invalid:
        """Return the architecture of a row that ``encode`` gives, or why there is none."""
        found = self._layout.decode(kind, array)
        if isinstance(found, Invalid):
            return found
        try:
            return self.validate(dict(found))
        except UserError as error:
            return Invalid(str(error))

    def cell(self, architecture: Mapping[str, Value]) -> Cell:
        """Return a valid architecture as plain numbers."""
        count = architecture["vertices"]
        assert isinstance(count, int)
        edges = tuple((i, j) for i, j in _pairs(count) if architecture[f"edge/{i}-{j}"])
        codes = tuple(self._code_of[str(architecture[f"op/{j}"])] for j in range(1, count - 1))
        return Cell(count, edges, codes)

    def of_cell(self, cell: Cell) -> Architecture:
        """Return plain numbers as an architecture.

        Raises:
            UserError: Not a cell of the space: too many vertices or edges, a vertex off every way, an unknown code.
        """
        decisions: dict[str, Value] = {"vertices": cell.vertices}
        decisions |= {f"edge/{i}-{j}": (i, j) in cell.edges for i, j in _pairs(cell.vertices)}
        if any(not 0 <= code < len(self.operations) for code in cell.operations):
            raise UserError("cell.operations", cell.operations, allowed=f"codes below {len(self.operations)}")
        decisions |= {f"op/{j}": self.operations[code] for j, code in enumerate(cell.operations, 1)}
        return self.validate(decisions)


@lru_cache(maxsize=1)
def nas_bench_101_space() -> GraphCellSpace:
    """Return the NAS-Bench-101 cells: at most 7 vertices and 9 edges, three operations."""
    return GraphCellSpace("nas-bench-101", vertices=7, edges=9, operations=NB101_OPERATIONS)


def graph_hash(cell: Cell) -> str:
    """Return the name that NAS-Bench-101 gives a network: 32 hexadecimal digits, equal for isomorphic graphs.

    Each vertex starts with the MD5 of (out-degree, in-degree, label), the label being the operation's code, -1 for the
    input and -2 for the output. As often as there are vertices, each takes the MD5 of its predecessors' names, sorted,
    its successors', sorted, and its own. The network's name is the MD5 of the sorted list.
    """
    labels = [-1, *cell.operations, -2]
    before: list[list[int]] = [[] for _ in labels]
    after: list[list[int]] = [[] for _ in labels]
    for source, target in cell.edges:
        before[target].append(source)
        after[source].append(target)
    names = [_md5(str((len(after[v]), len(before[v]), labels[v]))) for v in range(cell.vertices)]
    for _ in range(cell.vertices):
        around = [
            ["".join(sorted(names[w] for w in near)) for near in pair] for pair in zip(before, after, strict=True)
        ]
        names = [_md5("|".join((*near, own))) for near, own in zip(around, names, strict=True)]
    return _md5(str(sorted(names)))


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _digits(code: int, base: int, length: int) -> list[int]:
    """Return a number's digits, the highest first."""
    digits = []
    for _ in range(length):
        code, digit = divmod(code, base)
        digits.append(digit)
    return digits[::-1]


def _pairs(vertices: int) -> list[tuple[int, int]]:
    """Return the edges (source, target) in the order of the table: by source."""
    return list(combinations(range(vertices), 2))


def _decided(vertices: int) -> list[tuple[int, int]]:
    """Return the edges (source, target) in the order of the walk: by target."""
    return [(source, target) for target in range(1, vertices) for source in range(target)]


def _classes(vertices: int, graphs: np.ndarray, operations: int) -> np.ndarray:
    """Return for every labelled cell the smallest number of an isomorphic one, int32.

    Each order of the inner vertices in which a graph's edges still go upwards gives an isomorphic cell.
    """
    pairs = _decided(vertices)
    bit = {pair: 1 << (len(pairs) - 1 - k) for k, pair in enumerate(pairs)}
    bits = np.stack([graphs.astype(np.int64) >> (len(pairs) - 1 - k) & 1 for k in range(len(pairs))], axis=1)
    inner = vertices - 2
    labellings = operations**inner
    digits = np.array([_digits(code, operations, inner) for code in range(labellings)], dtype=np.int64)
    smallest = np.arange(len(graphs) * labellings, dtype=np.int64).reshape(len(graphs), labellings)
    downwards = 1 << len(pairs)
    for order in permutations(range(1, vertices - 1)):
        new = (0, *order, vertices - 1)
        moved = bits @ np.array([bit.get((new[i], new[j]), downwards) for i, j in pairs], dtype=np.int64)
        upwards = moved < downwards
        weights = operations ** (inner - np.array(order, dtype=np.int64))
        codes = digits.reshape(labellings, inner) @ weights
        found = np.searchsorted(graphs, moved[upwards])[:, None] * labellings + codes
        smallest[upwards] = np.minimum(smallest[upwards], found)
    return smallest.ravel().astype(np.int32)


@lru_cache(maxsize=32)
def _graphs(vertices: int, edges: int) -> np.ndarray:
    """Return every graph on so many vertices as bits, ascending; the first edge decided is the highest bit."""
    pairs = _decided(vertices)
    kept = []
    for block in _blocks(1 << len(pairs)):
        column = {pair: block >> (len(pairs) - 1 - k) & 1 for k, pair in enumerate(pairs)}
        good = np.sum(list(column.values()), axis=0) <= edges
        for vertex in range(vertices):
            into = [column[i, vertex] for i in range(vertex)]
            out = [column[vertex, j] for j in range(vertex + 1, vertices)]
            good &= np.any(into, axis=0) if into else True
            good &= np.any(out, axis=0) if out else True
        kept.append(block[good])
    return np.concatenate(kept).astype(np.int32)


def _blocks(total: int) -> Iterator[np.ndarray]:
    """Yield 0 to total - 1 in pieces that are kind to memory."""
    for start in range(0, total, 1 << 18):
        yield np.arange(start, min(start + (1 << 18), total), dtype=np.int32)


def _layout(name: str, sizes: Sequence[int], operations: Sequence[str]) -> ProductSpace:
    """Return the decisions without the rules of a graph: the columns of encodings."""
    elements: dict[str, Categorical | Ordinal | Given] = {"vertices": Ordinal(tuple(sizes))}
    for target in range(1, sizes[-1]):
        larger = [size for size in sizes if size > target]
        for source in range(target):
            elements[f"edge/{source}-{target}"] = Given(When("vertices", larger), Categorical(_BOTH, group="edge"))
        inner = [size for size in sizes if size > target + 1]
        if inner:
            elements[f"op/{target}"] = Given(When("vertices", inner), Categorical(tuple(operations), group="op"))
    return ProductSpace(name, elements)
