"""Vectors for the graphs of a library, such that near vectors mean that one graph is cheaply edited into the other.

Source: Tuli et al. 2022, "FlexiBERT", arXiv 2205.11656 ("Transformer2vec").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream
from archsmith.predictors.base import at_least
from archsmith.space.labelled_graph import LabelledGraph

# N graphs, D dimensions, P pairs of a batch

Distance = Callable[[LabelledGraph, LabelledGraph], float]


def library_distances(
    graphs: Sequence[LabelledGraph], distance: Distance, *, share: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Return the distances between all graphs of a library; with a share below 1, most of them interpolated.

    Args:
        graphs: N graphs; interpolation makes use of their order: neighbours should be alike.
        distance: Symmetric, zero for equal graphs: ``archsmith.space.labelled_graph.edit_distance`` or ``edit_bound``.
        share: Of the pairs that are computed, drawn uniformly, the corner (first, last) always. The others come from
            linear interpolation over the two numbers of a pair, with zeros on the diagonal. The paper took 1 %.
        seed: Of the pairs that are computed.

    Returns:
        Float64 of shape (N, N), symmetric, zeros on the diagonal.

    Raises:
        UserError: No graph, or a share outside (0, 1].
    """
    if not graphs or not 0 < share <= 1:
        raise UserError("share", share, allowed="above 0 to 1, for at least one graph")
    pairs = np.array(list(combinations(range(len(graphs)), 2)), dtype=int).reshape(-1, 2)
    computed = np.ones(len(pairs), dtype=bool)
    if share < 1 and len(graphs) > 3:
        chosen = numpy_stream(seed, "library distances").permutation(len(pairs))[: math.ceil(share * len(pairs))]
        computed = np.isin(np.arange(len(pairs)), [*chosen, len(graphs) - 2])  # pair number N - 2 is (0, N - 1)
    found = np.array([distance(graphs[i], graphs[j]) for i, j in pairs[computed]])
    matrix = np.zeros((len(graphs), len(graphs)))
    matrix[tuple(pairs[computed].T)] = found
    if not computed.all():
        from scipy.interpolate import LinearNDInterpolator

        diagonal = np.arange(len(graphs))
        places = np.concatenate([pairs[computed], np.stack([diagonal, diagonal], axis=1)])
        values = np.concatenate([found, np.zeros(len(graphs))])
        matrix[tuple(pairs[~computed].T)] = LinearNDInterpolator(places, values)(pairs[~computed])
    return matrix + matrix.T


def stress(rows_ND: np.ndarray, distances_NN: np.ndarray) -> float:
    """Return how badly Euclidean distances of rows fit given ones: ``sqrt(sum (r - d)^2 / sum d^2)``, 0 is perfect."""
    upper = np.triu_indices(len(rows_ND), 1)
    wanted = distances_NN[upper]
    gaps = row_distances(rows_ND)[upper] - wanted
    return float(np.sqrt((gaps**2).sum() / (wanted**2).sum()))


def row_distances(rows_ND: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances between all rows, shape (N, N)."""
    squares = (rows_ND**2).sum(axis=1)
    found: np.ndarray = np.sqrt(np.maximum(squares[:, None] + squares - 2 * rows_ND @ rows_ND.T, 0.0))
    return found


def learned_embedding(
    distances_NN: np.ndarray,
    *,
    dimensions: int = 16,
    epochs: int = 10,
    batch_size: int = 2048,
    learning_rate: float = 0.002,
    restart: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Return rows whose Euclidean distances fit given ones in the mean square, learned by Adam.

    Args:
        distances_NN: Symmetric, zeros on the diagonal.
        dimensions: D.
        epochs: Passes over all pairs. Ten are the published number, for millions of pairs; a library of hundreds takes
            hundreds.
        batch_size: Pairs of a step.
        learning_rate: Of Adam, at the start of each cosine.
        restart: Epochs of a cosine, from ``learning_rate`` towards 0.
        seed: Of the initial rows and the order of pairs.

    Returns:
        Float64 of shape (N, D), in the unit of the distances. Inside, distances are scaled to the mean distance of
        standard normal rows, where learning starts: the published rates then fit distances of any size.

    Raises:
        UserError: A matrix that is no distance matrix, or a setting out of range.
    """
    distances = _checked(distances_NN)
    for name, value in (
        ("dimensions", dimensions),
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("restart", restart),
    ):
        at_least(name, value, 1)
    at_least("learning_rate", learning_rate, 1e-12)
    rng = numpy_stream(seed, "embedding")
    rows = rng.standard_normal((len(distances), dimensions))
    pairs = np.array(list(combinations(range(len(rows)), 2)), dtype=int).reshape(-1, 2)
    wanted = distances[tuple(pairs.T)]
    if not len(pairs) or not wanted.any():
        return np.zeros_like(rows)
    scale = float(wanted.mean()) / math.sqrt(2 * dimensions)
    first, second, step = np.zeros_like(rows), np.zeros_like(rows), 0
    for epoch in range(epochs):
        rate = learning_rate * (1 + math.cos(math.pi * (epoch % restart) / restart)) / 2
        order = rng.permutation(len(pairs))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            gradient = _gradient(rows, pairs[batch], wanted[batch] / scale)
            step += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            rows = rows - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return rows * scale


def _gradient(rows: np.ndarray, pairs_P2: np.ndarray, wanted_P: np.ndarray) -> np.ndarray:
    """Return the gradient of the mean of ``(|x_i - x_j| - d_ij)^2`` over pairs."""
    gaps = rows[pairs_P2[:, 0]] - rows[pairs_P2[:, 1]]
    lengths = np.sqrt((gaps**2).sum(axis=1))
    pull = (2 * (lengths - wanted_P) / np.maximum(lengths, 1e-12) / len(pairs_P2))[:, None] * gaps
    found = np.zeros_like(rows)
    np.add.at(found, pairs_P2[:, 0], pull)
    np.add.at(found, pairs_P2[:, 1], -pull)
    return found


def scaled_embedding(distances_NN: np.ndarray, *, dimensions: int = 16) -> np.ndarray:
    """Return rows by classical multidimensional scaling (Torgerson 1952): the alternative without learning.

    Returns:
        Float64 of shape (N, D); dimensions that distances do not have are zeros.
    """
    distances = _checked(distances_NN)
    at_least("dimensions", dimensions, 1)
    centred = distances**2 - (distances**2).mean(axis=0)
    values, vectors = np.linalg.eigh(-0.5 * (centred - centred.mean(axis=1, keepdims=True)))
    rows = np.zeros((len(distances), dimensions))
    for column, number in enumerate(np.argsort(values)[::-1][:dimensions]):
        vector = vectors[:, number] * np.sign(vectors[np.abs(vectors[:, number]).argmax(), number])
        rows[:, column] = vector * math.sqrt(max(float(values[number]), 0.0))
    return rows


def standardised(rows_ND: np.ndarray) -> np.ndarray:
    """Return columns of mean 0 and variance 1; constant columns become zeros."""
    spread = rows_ND.std(axis=0)
    found: np.ndarray = (rows_ND - rows_ND.mean(axis=0)) / np.where(spread > 1e-12, spread, 1.0)
    return found


def _checked(distances: np.ndarray) -> np.ndarray:
    found = np.asarray(distances, dtype=np.float64)
    square = found.ndim == 2 and found.shape[0] == found.shape[1] and len(found) > 0
    if not square or not np.isfinite(found).all() or (found < 0).any() or not np.allclose(found, found.T):
        raise UserError(
            "distances",
            Shown(f"an array of shape {found.shape}"),
            allowed="a symmetric matrix of finite numbers from 0",
        )
    return found
