"""A small graph network over cells: operations on vertices of a directed acyclic graph, messages along and against it.

Source: the graph predictor of BRP-NAS (Dudziak et al. 2020, arXiv 2007.08668) - layers of graph convolution over a cell
with a vertex that sees all others - with one weight for messages along the edges and one against them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.predictors.base import Predictor, at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# N graphs, V vertices, O operations, H hidden units


def graph_features(adjacency_VV: np.ndarray, operations_V: np.ndarray, *, vertices: int, operations: int) -> np.ndarray:
    """Return a cell as one vector: upper triangle of the adjacency, then one-hot operations; padded to ``vertices``.

    Args:
        adjacency_VV: Booleans, strictly upper triangular; (i, j) says that the output of i is an input of j.
        operations_V: Number of each vertex's operation, from 0.
        vertices: Number of vertices of the largest cell.
        operations: Number of operations.

    Returns:
        Float64 of shape (vertices * (vertices - 1) / 2 + vertices * operations,); absent vertices have no operation.

    Raises:
        UserError: Too many vertices, an edge that does not go forward, or an operation that does not exist.
    """
    adjacency, codes = np.asarray(adjacency_VV), np.asarray(operations_V)
    count = len(codes)
    if count > vertices or adjacency.shape != (count, count):
        raise UserError(
            "adjacency", Shown(f"shape {adjacency.shape} for {count} operations"), allowed=f"up to {vertices} vertices"
        )
    if np.tril(adjacency).any():
        raise UserError("adjacency", adjacency.astype(int).tolist(), allowed="edges from a vertex to a later one")
    if count and (codes.min() < 0 or codes.max() >= operations):
        raise UserError("operations", codes.tolist(), allowed=f"numbers from 0 to {operations - 1}")
    padded = np.zeros((vertices, vertices))
    padded[:count, :count] = adjacency
    present = np.zeros((vertices, operations))
    present[np.arange(count), codes] = 1
    return np.concatenate([padded[np.triu_indices(vertices, 1)], present.ravel()])


class GraphNetwork(Predictor):
    """Graph convolutions over a cell, read out by the mean over its vertices; needs torch.

    ``H' = relu(H W + A_in H W_in + A_out H W_out + m W_all)`` with row-normalised adjacency in both directions and m
    the mean over the cell's vertices. Features are those of ``graph_features``. One network has no uncertainty (its
    standard deviation is zero): put it into an ``Ensemble``.

    Args:
        vertices: Number of vertices of the largest cell, from 1.
        operations: Number of operations, from 1.
        hidden: Units of a layer, from 1.
        layers: Graph convolutions, from 1.
        epochs: Passes over the examples, from 1.
        batch_size: Examples of a step, from 1.
        learning_rate: Of AdamW, above 0, with a cosine to 0.
        penalty: Decoupled weight decay, from 0.
        seed: Seed of the initial weights and the order of the examples; torch's global stream is left alone.

    Raises:
        UserError: A setting out of range, or features of another width.
    """

    def __init__(
        self,
        *,
        vertices: int,
        operations: int,
        hidden: int = 64,
        layers: int = 3,
        epochs: int = 150,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        penalty: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        counts = {"vertices": vertices, "operations": operations, "hidden": hidden, "layers": layers, "epochs": epochs}
        for name, value in (counts | {"batch_size": batch_size}).items():
            at_least(name, value, 1)
        at_least("learning_rate", learning_rate, 1e-9)
        at_least("penalty", penalty, 0)
        self.vertices, self.operations, self.hidden, self.layers = vertices, operations, hidden, layers
        self.epochs, self.batch_size, self.learning_rate, self.penalty = epochs, batch_size, learning_rate, penalty

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        import torch

        edges = self.vertices * (self.vertices - 1) // 2
        width = edges + self.vertices * self.operations
        if features.shape[1] != width:
            raise UserError(
                "features", Shown(f"shape {features.shape}"), allowed=f"shape (N, {width}), rows of graph_features"
            )
        generator = torch.Generator().manual_seed(self._library_seed())
        self._tensors = self._initial(generator)
        graphs, goals = self._graphs(features), torch.from_numpy(targets).float()
        optimiser = torch.optim.AdamW(self._tensors, lr=self.learning_rate, weight_decay=self.penalty)
        steps = self.epochs * -(-len(goals) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(goals), generator=generator).split(self.batch_size):
                optimiser.zero_grad()
                found = self._forward(*(part[rows] for part in graphs))
                ((found - goals[rows]) ** 2).mean().backward()
                optimiser.step()
                schedule.step()

    def _initial(self, generator: torch.Generator) -> list[Tensor]:
        """Return the weights: four matrices and a bias for each layer, then the readout."""
        import torch

        tensors = []
        wide = self.operations
        for _ in range(self.layers):
            for _ in range(4):
                tensors.append(torch.randn(wide, self.hidden, generator=generator) * wide**-0.5)
            tensors.append(torch.zeros(self.hidden))
            wide = self.hidden
        tensors += [torch.randn(wide, generator=generator) * wide**-0.5, torch.zeros(())]
        return [tensor.requires_grad_() for tensor in tensors]

    def _graphs(self, features: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return row-normalised predecessors and successors (N, V, V) and operations (N, V, O)."""
        import torch

        n, v = len(features), self.vertices
        edges = v * (v - 1) // 2
        adjacency = np.zeros((n, v, v))
        adjacency[:, *np.triu_indices(v, 1)] = features[:, :edges]
        before, after = adjacency.transpose(0, 2, 1), adjacency
        normed = [a / np.maximum(a.sum(2, keepdims=True), 1) for a in (before, after)]
        codes = features[:, edges:].reshape(n, v, self.operations)
        into, out, hot = (torch.from_numpy(array).float() for array in (*normed, codes))
        return into, out, hot

    def _forward(self, into: Tensor, out: Tensor, hot: Tensor) -> Tensor:
        present = hot.sum(2, keepdim=True)
        count = present.sum(1, keepdim=True).clamp(min=1)
        states = hot
        for layer in range(self.layers):
            own, along, against, everywhere, bias = self._tensors[5 * layer : 5 * layer + 5]
            mean = states.sum(1, keepdim=True) / count
            states = (
                states @ own + into @ (states @ along) + out @ (states @ against) + mean @ everywhere + bias
            ).relu() * present
        weight, bias = self._tensors[-2:]
        return (states.sum(1) / count[:, 0]) @ weight + bias

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.no_grad():
            mean = self._forward(*self._graphs(features)).double().numpy()
        return mean, np.zeros(len(features))
