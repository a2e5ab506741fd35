"""Features of cells for predictors: what a network made of a cell *does*, as numbers; free of torch.

A cell is a directed acyclic graph from its input to its output. Its *words* are the operations along each path, in
order, with skips left out (a skip is the identity) and paths over a missing edge dropped (they carry zeros). Cells that
differ only in dead edges, or in where a skip stands, have the same words. All features are counts or lengths; none says
which operation is a good one.

Sources: the path encoding of White et al. 2021 ("BANANAS", arXiv 1910.11858), which marks paths with skips as they are
written; NAS-Bench-201 (arXiv 2001.00326) and NAS-Bench-101 (Ying et al. 2019, arXiv 1902.09635) for the cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS
from archsmith.space import Value

# V vertices

Word = tuple[int, ...]

NONE, SKIP = NB201_OPERATIONS.index("none"), NB201_OPERATIONS.index("skip_connect")

_ROUTES = ((3,), (0, 4), (1, 5), (0, 2, 5))
"""The four paths of a NAS-Bench-201 cell from input to output, as positions in ``NB201_EDGES``."""

NB201_FEATURE_GROUPS = (30, 40, 12)
"""Columns of ``nas_bench_201_features`` per part: operations in use, words, shape."""


def nas_bench_201_codes(cell: Mapping[str, Value]) -> tuple[int, ...]:
    """Return the operation of each edge as its number, in the order of ``NB201_EDGES``.

    Raises:
        UserError: An edge that is missing, or an operation that the space does not have.
    """
    try:
        return tuple(NB201_OPERATIONS.index(str(cell[f"edge/{source}-{target}"])) for source, target in NB201_EDGES)
    except (KeyError, ValueError) as error:
        raise UserError("cell", dict(cell), allowed=f"six edges with one of {list(NB201_OPERATIONS)}") from error


def live_operations(codes: Sequence[int]) -> tuple[int, ...]:
    """Return the operations with "none" on every edge that no path from input to output passes."""
    used = {edge for route in _ROUTES if NONE not in (codes[e] for e in route) for edge in route}
    return tuple(code if edge in used else NONE for edge, code in enumerate(codes))


def cell_words(codes: Sequence[int]) -> list[Word]:
    """Return the words of a NAS-Bench-201 cell: 0 for 1x1, 1 for 3x3 convolution, 2 for pooling."""
    routes = ([codes[edge] for edge in route] for route in _ROUTES)
    return [tuple(code - SKIP - 1 for code in route if code != SKIP) for route in routes if NONE not in route]


def path_encoding(cell: Mapping[str, Value]) -> np.ndarray:
    """Return the path encoding of White et al.: 1 for each sequence of operations, skips included, that is a path.

    Returns:
        Float64 of shape (84,): the 4 + 16 + 64 sequences of up to three operations other than "none", shorter ones
        first. A path over a "none" is no path.
    """
    codes = nas_bench_201_codes(cell)
    routes = ([codes[edge] for edge in route] for route in _ROUTES)
    row = np.zeros(len(_alphabetical(4, 3)) - 1)
    for route in routes:
        if NONE not in route:
            row[_alphabetical(4, 3)[tuple(code - 1 for code in route)] - 1] = 1.0
    return row


def word_counts(words: Iterable[Word], *, operations: int, longest: int) -> np.ndarray:
    """Return how often each word occurs: shape (sum of operations^l for l from 0 to ``longest``,), shorter ones first.

    Raises:
        UserError: A word that is too long or has an operation that does not exist.
    """
    places = _alphabetical(operations, longest)
    row = np.zeros(len(places))
    for word in words:
        if word not in places:
            raise UserError("words", word, allowed=f"up to {longest} numbers from 0 to {operations - 1}")
        row[places[word]] += 1
    return row


def word_shape(words: Sequence[Word], *, operations: int) -> np.ndarray:
    """Return what a set of words looks like: per operation its largest number in one word; then paths and lengths.

    Returns:
        Float64 of shape (operations + 4,): the largest numbers; number of words; longest, shortest and mean length
        (zeros without words).
    """
    most = [max((word.count(operation) for word in words), default=0) for operation in range(operations)]
    lengths = [len(word) for word in words] or [0]
    return np.array([*most, len(words), max(lengths), min(lengths), np.mean(lengths)], dtype=np.float64)


def nas_bench_201_features(cell: Mapping[str, Value]) -> np.ndarray:
    """Return the features of a cell in three parts (``NB201_FEATURE_GROUPS``).

    Returns:
        Float64 of shape (82,): one-hot operations of the live edges (30); counts of words (40); their shape and, per
        operation from "none" on, the number of live edges that have it (7 + 5).
    """
    codes = nas_bench_201_codes(cell)
    live = live_operations(codes)
    words = cell_words(codes)
    shape = [*word_shape(words, operations=3), *(live.count(code) for code in range(len(NB201_OPERATIONS)))]
    hot = np.eye(len(NB201_OPERATIONS))[list(live)].ravel()
    return np.concatenate([hot, word_counts(words, operations=3, longest=3), np.array(shape, dtype=np.float64)])


def nas_bench_201_graph(cell: Mapping[str, Value]) -> tuple[np.ndarray, np.ndarray]:
    """Return a cell with its operations on vertices: for ``archsmith.predictors.graph_features`` and ``GraphNetwork``.

    Vertex 0 is the input (operation 5), vertices 1 to 6 are the edges of the cell in the order of ``NB201_EDGES``,
    vertex 7 is the output (operation 6); a vertex precedes another when its result is an operand of it.

    Returns:
        Booleans of shape (8, 8), strictly upper triangular, and integers of shape (8,).
    """
    codes = nas_bench_201_codes(cell)
    adjacency = np.zeros((8, 8), dtype=bool)
    for edge, (source, target) in enumerate(NB201_EDGES, start=1):
        before = [0] if source == 0 else [i for i, (_, t) in enumerate(NB201_EDGES, start=1) if t == source]
        adjacency[before, edge] = True
        adjacency[edge, 7] |= target == 3
    return adjacency, np.array([5, *codes, 6])


def vertex_words(adjacency_VV: np.ndarray, operations: Sequence[int]) -> list[Word]:
    """Return the words of a cell with operations on its inner vertices, NAS-Bench-101's form.

    Args:
        adjacency_VV: Strictly upper triangular; vertex 0 is the input, the last one the output.
        operations: Number of the operation of each inner vertex, V - 2 of them.

    Raises:
        UserError: Numbers of vertices that do not fit, or an edge that does not go forward.
    """
    adjacency = np.asarray(adjacency_VV, dtype=bool)
    last = len(adjacency) - 1
    if adjacency.shape != (last + 1, last + 1) or last < 1 or len(operations) != last - 1:
        raise UserError(
            "adjacency",
            Shown(f"shape {adjacency.shape} with {len(operations)} operations"),
            allowed="shape (V, V), V from 2, with V - 2 operations",
        )
    if np.tril(adjacency).any():
        raise UserError("adjacency", adjacency.astype(int).tolist(), allowed="edges from a vertex to a later one")
    found: list[list[Word]] = [[()]]
    for vertex in range(1, last + 1):
        here = (int(operations[vertex - 1]),) if vertex < last else ()
        found.append([word + here for before in range(vertex) if adjacency[before, vertex] for word in found[before]])
    return found[last]


def graph_cell_features(adjacency_VV: np.ndarray, operations: Sequence[int], *, kinds: int, longest: int) -> np.ndarray:
    """Return the features of a cell with operations on its inner vertices in two parts: words, and their shape.

    They do not depend on how the vertices are numbered.

    Args:
        adjacency_VV: Strictly upper triangular; vertex 0 is the input, the last one the output.
        operations: Number of the operation of each inner vertex.
        kinds: Number of operations there are.
        longest: Largest number of inner vertices.

    Returns:
        Float64: counts of words (sum of kinds^l for l from 0 to ``longest``); then ``word_shape``, how many vertices
        have each operation, and the number of edges (2 * kinds + 5).

    Raises:
        UserError: As ``vertex_words`` and ``word_counts``.
    """
    words = vertex_words(adjacency_VV, operations)
    counts = [list(operations).count(kind) for kind in range(kinds)]
    shape = [*word_shape(words, operations=kinds), *counts, float(np.sum(adjacency_VV))]
    return np.concatenate([word_counts(words, operations=kinds, longest=longest), np.array(shape, dtype=np.float64)])


@cache
def _alphabetical(operations: int, longest: int) -> dict[Word, int]:
    """Return the place of every word of up to ``longest`` letters, shorter ones first."""
    words = (w for length in range(longest + 1) for w in itertools.product(range(operations), repeat=length))
    return {word: place for place, word in enumerate(words)}
