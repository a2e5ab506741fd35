"""Directed graphs with labelled vertices: a name that isomorphic graphs share, and the exact cost of edits.

The edit distance is an integer programme: which vertex becomes which, and which edges are kept by that. It is stated in
the form whose relaxation is known to be tight (Lerouge et al. 2017, "New binary linear programming formulation to
compute the graph edit distance"), after vertices that nobody can tell apart - parallel heads - are counted instead of
told apart, and solved by HiGHS through scipy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from archsmith.core.errors import Shown, UserError

# Classes C of the first graph, D of the second


@dataclass(frozen=True)
class LabelledGraph:
    """A directed graph.

    Attributes:
        labels: Label of each vertex.
        edges: (source, target), each pair once.

    Raises:
        UserError: An edge without a vertex at its end, or one that is there twice.
    """

    labels: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if bad := [edge for edge in self.edges if not all(0 <= end < len(self.labels) for end in edge)]:
            raise UserError("edges", bad[0], allowed=f"numbers of the {len(self.labels)} vertices")
        if len(set(self.edges)) != len(self.edges):
            raise UserError("edges", Shown("an edge twice"), allowed="each pair of vertices once")

    def around(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the vertices before and after each vertex."""
        before: list[list[int]] = [[] for _ in self.labels]
        after: list[list[int]] = [[] for _ in self.labels]
        for source, target in self.edges:
            before[target].append(source)
            after[source].append(target)
        return before, after


def graph_name(graph: LabelledGraph, *, rounds: int = 5) -> str:
    """Return 32 hexadecimal digits that isomorphic graphs share.

    Each vertex starts with its out-degree, in-degree and label; ``rounds`` times it takes in the sorted names before
    and after it. Graphs that differ only farther than that from every vertex would share a name too.
    """
    before, after = graph.around()
    names = [_md5(f"{len(after[v])},{len(before[v])},{label}") for v, label in enumerate(graph.labels)]
    for _ in range(rounds):
        near = [["".join(sorted(names[w] for w in side)) for side in pair] for pair in zip(before, after, strict=True)]
        names = [_md5("|".join((*sides, own))) for sides, own in zip(near, names, strict=True)]
    return _md5(str(sorted(names)))


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def edit_distance(
    first: LabelledGraph, second: LabelledGraph, order: Mapping[str, int], *, edge_cost: float = 0.1
) -> float:
    """Return the least total cost of edits that turn one graph into the other; exact.

    Args:
        first: A graph.
        second: Another.
        order: Number of each label, from 0: turning one vertex into another costs the difference, putting one in or
            taking it out costs its number.
        edge_cost: Of putting in an edge or taking it out.

    Returns:
        Symmetric. Zero for graphs that are equal up to the order of their vertices, and for no others as long as all
        labels have different numbers, no number but one is 0, and edges cost something.

    Raises:
        UserError: A label without a number.
        RuntimeError: The solver stopped without the proven optimum.
    """
    from scipy.optimize import LinearConstraint, milp

    if missing := sorted({*first.labels, *second.labels} - set(order)):
        raise UserError("order", missing, allowed="a number for every label of both graphs")
    programme = _Programme(_classes(first), _classes(second), order, edge_cost)
    if not len(programme.costs):
        return programme.constant
    solved = milp(
        programme.costs,
        integrality=programme.integrality,
        bounds=(np.zeros(len(programme.costs)), programme.upper),
        constraints=LinearConstraint(programme.matrix(), -np.inf, programme.right),
        options={"mip_rel_gap": 0.0},
    )
    if solved.status != 0:
        raise RuntimeError(f"the edit distance was not found: {solved.message}")
    return programme.exact_value(solved.x)


def edit_bound(
    first: LabelledGraph, second: LabelledGraph, order: Mapping[str, int], *, edge_cost: float = 0.1
) -> float:
    """Return the cost of one good way to edit, never below ``edit_distance``; in about a millisecond.

    Vertices are assigned by their labels, degrees and places in the graph (Riesen and Bunke 2009); what the assignment
    means for the edges is then counted exactly. Arguments as for ``edit_distance``; not quite symmetric.
    """
    from scipy.optimize import linear_sum_assignment

    graphs = (first, second)
    numbers = [np.array([order[label] for label in graph.labels], dtype=float) for graph in graphs]
    sizes = [len(graph.labels) for graph in graphs]
    degrees, places = [], []
    for graph in graphs:
        before, after = graph.around()
        degrees.append(np.array([[len(b), len(a)] for b, a in zip(before, after, strict=True)], dtype=float))
        places.append(np.linspace(0.0, 1.0, len(graph.labels)))
    costs = np.full((sum(sizes), sum(sizes)), np.inf)
    swap = np.abs(numbers[0][:, None] - numbers[1])
    swap = swap + edge_cost / 2 * np.abs(degrees[0][:, None] - degrees[1]).sum(-1)
    costs[: sizes[0], : sizes[1]] = swap + edge_cost * np.abs(places[0][:, None] - places[1])
    for own, at in ((0, (slice(0, sizes[0]), slice(sizes[1], None))), (1, (slice(sizes[0], None), slice(0, sizes[1])))):
        alone = numbers[own] + edge_cost / 2 * degrees[own].sum(-1)
        costs[at] = np.where(np.eye(sizes[own], dtype=bool), alone, np.inf)
    costs[sizes[0] :, sizes[1] :] = 0.0
    rows, columns = linear_sum_assignment(costs)
    became = {int(r): int(c) for r, c in zip(rows, columns, strict=True) if r < sizes[0] and c < sizes[1]}
    kept = set(second.edges)
    shared = sum((became.get(a, -1), became.get(b, -1)) in kept for a, b in first.edges)
    total = edge_cost * (len(first.edges) + len(second.edges) - 2 * shared)
    total += sum(abs(numbers[0][r] - numbers[1][c]) for r, c in became.items())
    gone = numbers[0].sum() - sum(numbers[0][r] for r in became)
    return float(total + gone + numbers[1].sum() - sum(numbers[1][c] for c in became.values()))


@dataclass(frozen=True)
class _Classes:
    """A graph whose indistinguishable vertices are counted: equal labels, equal neighbours."""

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]


def _classes(graph: LabelledGraph) -> _Classes:
    """Count vertices with equal labels and neighbours; classes are merged only where their neighbours stand alone."""
    before, after = graph.around()
    keys = [(label, *map(tuple, map(sorted, (before[v], after[v])))) for v, label in enumerate(graph.labels)]
    groups: dict[object, list[int]] = {}
    for vertex, key in enumerate(keys):
        groups.setdefault(key, []).append(vertex)
    alone = {v for members in groups.values() if len(members) == 1 for v in members}
    merged = [m for m in groups.values() if len(m) == 1 or all(w in alone for v in m for w in (*before[v], *after[v]))]
    kept = {vertex for members in merged for vertex in members}
    merged += [[vertex] for vertex in range(len(graph.labels)) if vertex not in kept]
    home = {vertex: number for number, members in enumerate(merged) for vertex in members}
    edges = tuple(dict.fromkeys((home[source], home[target]) for source, target in graph.edges))
    return _Classes(tuple(graph.labels[m[0]] for m in merged), tuple(map(len, merged)), edges)


class _Programme:
    """Variables x_CD, how many of class C become class D, and y_ef, how many edges of e become edges of f.

    With one end of each edge a single vertex, ``y_ef = x_CD * x_C'D'`` is at most linear in either, so the best y is
    whole whenever x is.
    """

    def __init__(self, first: _Classes, second: _Classes, order: Mapping[str, int], edge_cost: float) -> None:
        numbers = [np.array([order[label] for label in graph.labels], dtype=float) for graph in (first, second)]
        sizes = [np.array(graph.sizes) for graph in (first, second)]
        total_edges = [sum(g.sizes[a] * g.sizes[b] for a, b in g.edges) for g in (first, second)]
        self.constant = float(sum((n * s).sum() for n, s in zip(numbers, sizes, strict=True)))
        self.constant += edge_cost * sum(total_edges)
        rows, columns = len(first.labels), len(second.labels)
        saved = np.abs(numbers[0][:, None] - numbers[1]) - numbers[0][:, None] - numbers[1]
        edges = len(first.edges) * len(second.edges)
        self.costs = np.concatenate([saved.ravel(), np.full(edges, -2 * edge_cost)])
        self.integrality = np.concatenate([np.ones(rows * columns), np.zeros(edges)])
        limit = np.minimum(sizes[0][:, None], sizes[1]).astype(float)
        self._entries: list[tuple[int, int, float]] = []
        self.right: list[float] = []
        for row in range(rows):
            self._below({row * columns + column: 1.0 for column in range(columns)}, float(sizes[0][row]))
        for column in range(columns):
            self._below({row * columns + column: 1.0 for row in range(rows)}, float(sizes[1][column]))
        start = rows * columns
        ends = np.array(
            [(a * columns + c, b * columns + d) for a, b in first.edges for c, d in second.edges], dtype=int
        ).reshape(-1, 2)
        self._kept = (np.arange(start), ends[:, 0], ends[:, 1])
        self.upper = np.concatenate([limit.ravel(), limit.ravel()[ends].prod(axis=1)])
        for e, (a, b) in enumerate(first.edges):
            for class_ in range(columns):
                leaving = [f for f, (c, _) in enumerate(second.edges) if c == class_]
                entering = [f for f, (_, d) in enumerate(second.edges) if d == class_]
                for near, own, other in ((leaving, a, b), (entering, b, a)):
                    ys = {start + e * len(second.edges) + f: 1.0 for f in near}
                    self._below(ys | {own * columns + class_: -float(sizes[0][other])}, 0.0)
        for f, (c, d) in enumerate(second.edges):
            for class_ in range(rows):
                leaving = [e for e, (a, _) in enumerate(first.edges) if a == class_]
                entering = [e for e, (_, b) in enumerate(first.edges) if b == class_]
                for near, own, other in ((leaving, c, d), (entering, d, c)):
                    ys = {start + e * len(second.edges) + f: 1.0 for e in near}
                    self._below(ys | {class_ * columns + own: -float(sizes[1][other])}, 0.0)

    def exact_value(self, solution: np.ndarray) -> float:
        """Return the value of a solution with its whole numbers rounded: free of the solver's tolerances."""
        x = np.round(solution[: len(self._kept[0])])
        y = x[self._kept[1]] * x[self._kept[2]]
        return float(self.constant + self.costs[: len(x)] @ x + (self.costs[len(x) :] @ y if len(y) else 0.0))

    def _below(self, terms: Mapping[int, float], right: float) -> None:
        row = len(self.right)
        self._entries += [(row, column, value) for column, value in terms.items()]
        self.right.append(right)

    def matrix(self) -> object:
        """Return the constraints as a sparse matrix."""
        from scipy.sparse import coo_array

        row, column, value = (np.array(each) for each in zip(*self._entries, strict=True))
        return coo_array((value, (row, column)), shape=(len(self.right), len(self.costs))).tocsr()
