"""Paths through a grid of widths: which chain a grid of weights stands for.

A grid has L layers. Each leads from one of the widths to one of the widths by one of P operations, and every such step
has a weight. A path takes one step in each layer and begins where the step before it ended.

Source: Hundt, Jain, Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", arXiv 1903.09900
(longest path and both greedy searches). How it uses measured times is not described; ``priced_path`` is ours.
"""

# L layers, I widths in front of a step, J widths behind it, P operations

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from archsmith.core.errors import Shown, UserError


@dataclass(frozen=True)
class GridPath:
    """One step in each layer.

    Attributes:
        widths: Numbers of the widths: in front of the first step, and behind every step.
        operations: Number of the operation of every step.
    """

    widths: tuple[int, ...]
    operations: tuple[int, ...]


@dataclass(frozen=True)
class GridCosts:
    """A cost that is a sum over the parts of a path.

    Attributes:
        steps: Cost of every step (L, I, J, P).
        first: Cost of beginning with each width (I,).
        last: Cost of ending with each width (J,).
        fixed: What every path has.
    """

    steps: np.ndarray
    first: np.ndarray
    last: np.ndarray
    fixed: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the costs as plain JSON values; ``from_json`` is the way back."""
        axes = {name: getattr(self, name).tolist() for name in ("steps", "first", "last")}
        return {**axes, "fixed": self.fixed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GridCosts:
        """Return the costs that ``to_json`` wrote."""
        steps, first, last = (np.array(data[name], dtype=np.float64) for name in ("steps", "first", "last"))
        return cls(steps, first, last, float(data["fixed"]))

    def of(self, path: GridPath) -> float:
        """Return the cost of a path."""
        steps = sum(
            self.steps[layer, path.widths[layer], path.widths[layer + 1], operation]
            for layer, operation in enumerate(path.operations)
        )
        return float(self.fixed + self.first[path.widths[0]] + steps + self.last[path.widths[-1]])


def longest_path(weights_LIJP: Any, first_I: Any = 0.0, last_J: Any = 0.0) -> GridPath:
    """Return the path with the largest sum of weights; of equal ones that with the lower numbers, from the end.

    Args:
        weights_LIJP: Weight of every step, also negative.
        first_I: Weight of beginning with each width.
        last_J: Weight of ending with each width.

    Raises:
        UserError: Not four axes, or NaN.
    """
    weights = _checked(weights_LIJP)
    layers, widths, _, operations = weights.shape
    total = np.zeros(widths) + first_I  # largest sum of a path that ends here
    back: list[np.ndarray] = []
    for layer in range(layers):
        # (J, I * P): for every width behind the step all ways to get there.
        ways = (total[:, None, None] + weights[layer]).transpose(1, 0, 2).reshape(widths, widths * operations)
        back.append(ways.argmax(axis=1))
        total = ways.max(axis=1)
    width = int((total + last_J).argmax())
    path, chosen = [width], []
    for best in reversed(back):
        width, operation = divmod(int(best[width]), operations)
        path.append(width)
        chosen.append(operation)
    return GridPath(tuple(reversed(path)), tuple(reversed(chosen)))


def bottom_up_path(weights_LIJP: Any) -> GridPath:
    """Return the path of the strongest step into each width, beginning with the strongest step of the last layer.

    Raises:
        UserError: Not four axes, or NaN.
    """
    weights = _checked(weights_LIJP)
    operations = weights.shape[-1]
    path = [int(weights[-1].max(axis=(0, 2)).argmax())]
    chosen = []
    for layer in reversed(range(len(weights))):
        width, operation = divmod(int(weights[layer, :, path[-1], :].argmax()), operations)
        path.append(width)
        chosen.append(operation)
    return GridPath(tuple(reversed(path)), tuple(reversed(chosen)))


def top_down_path(weights_LIJP: Any) -> GridPath:
    """Return the path of the strongest step out of each width, beginning with the strongest step of the first layer.

    Raises:
        UserError: Not four axes, or NaN.
    """
    weights = _checked(weights_LIJP)
    operations = weights.shape[-1]
    path = [int(weights[0].max(axis=(1, 2)).argmax())]
    chosen = []
    for layer in range(len(weights)):
        width, operation = divmod(int(weights[layer, path[-1]].argmax()), operations)
        path.append(width)
        chosen.append(operation)
    return GridPath(tuple(path), tuple(chosen))


def cheapest_path(costs: GridCosts) -> GridPath:
    """Return the path of the least cost, whatever the weights are."""
    return longest_path(-costs.steps, -costs.first, -costs.last)


def dearest_path(costs: GridCosts) -> GridPath:
    """Return the path of the largest cost."""
    return longest_path(costs.steps, costs.first, costs.last)


def priced_path(weights_LIJP: Any, costs: GridCosts, price: float) -> GridPath:
    """Return the path with the largest sum of weights less its cost, in units of the dearest path's.

    Args:
        weights_LIJP: Weight of every step.
        costs: Say measured times.
        price: How much weight the cost of the dearest path is worth; 0 gives the longest path, much the cheapest.

    Raises:
        UserError: A negative price, or weights of another grid.
    """
    weights = _checked(weights_LIJP)
    if not price >= 0:
        raise UserError("price", price, allowed="a number from 0")
    if weights.shape != costs.steps.shape:
        raise UserError(
            "weights", Shown(f"shape {weights.shape}"), allowed=f"the grid of the costs, {costs.steps.shape}"
        )
    largest = costs.of(dearest_path(costs))
    unit = price / largest if largest > 0 else 0.0
    return longest_path(weights - unit * costs.steps, -unit * costs.first, -unit * costs.last)


def _checked(weights_LIJP: Any) -> np.ndarray:
    weights = np.asarray(weights_LIJP, dtype=np.float64)
    if weights.ndim != 4 or weights.shape[1] != weights.shape[2] or not weights.size:
        raise UserError("weights", Shown(f"shape {weights.shape}"), allowed="(layers, widths, widths, operations)")
    if bool(np.isnan(weights).any()):
        raise UserError("weights", "NaN", allowed="numbers", hint="The search diverged; lower its learning rates.")
    return weights
