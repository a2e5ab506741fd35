"""Weights in two copies, one for each half of the data, tied by a spring, and logits that learn from both halves.

The two levels of a differentiable search become one function,

    L(w, y, a) = L_valid(y, a) + train_weight * L_train(w, a) + coupling / 2 * |y - w|^2,

and a step goes down it in turn: ``w``, then ``y`` with the new ``w``, then the logits ``a`` with both. No gradient
looks through a step of the weights, so there are no second derivatives. With block-wise rates below ``2 / Lipschitz``
``L`` never rises. ``coupling`` to infinity is joint training on all data; ``train_weight = 0`` learns from ``L_valid``.

Nothing here knows networks or optimisers: tensors by name, losses as functions of them, and who moves them.

Source: Xue, Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", arXiv 2008.03901, reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.supernet.updaters import Loss, Tensors

Passes = Literal["gauss-seidel", "fused"]
"""How gradients are taken: each at the newest values (4 passes of forward and backward), or those of the logits in the
same passes as those of the weights, before these move (2 passes)."""


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """The function that is minimised.

    Attributes:
        train_weight: Of the training loss, lambda in the paper; from 0.
        coupling: Strength of the spring between the copies, beta; from 0.
    """

    train_weight: float = 1.0
    coupling: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("train_weight", "coupling"):
            if not getattr(self, name) >= 0:
                raise UserError(name, getattr(self, name), allowed="a number from 0")

    def value(self, train: Loss, valid: Loss, w: Tensors, y: Tensors, logits: Tensors) -> Tensor:
        """Return ``L(w, y, a)``."""
        spring = torch.stack([(y[name] - w[name]).square().sum() for name in w]).sum()
        return valid(y, logits) + self.train_weight * train(w, logits) + self.coupling / 2 * spring

    def pull(self, own: Tensors, other: Tensors) -> dict[str, Tensor]:
        """Return the spring's gradient for one copy, ``coupling * (own - other)``."""
        gaps = torch._foreach_sub([t.detach() for t in own.values()], [other[name].detach() for name in own])
        return dict(zip(own, torch._foreach_mul(gaps, self.coupling), strict=True))


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Who moves the three blocks, in place.

    Attributes:
        w: Given the gradient of the weighted training loss, and the spring's. They come apart because clipping the
            loss's gradient must not take the spring away.
        y: Given the gradient of the validation loss, and the spring's.
        logits: Given the sum of both losses' gradients; None while the logits stay as they are.
    """

    w: Callable[[dict[str, Tensor], dict[str, Tensor]], None]
    y: Callable[[dict[str, Tensor], dict[str, Tensor]], None]
    logits: Callable[[dict[str, Tensor]], None] | None


def relaxed_step(
    relaxed: Relaxed,
    train: Loss,
    valid: Loss,
    w: Tensors,
    y: Tensors,
    logits: Tensors,
    moves: Moves,
    passes: Passes = "fused",
) -> tuple[float, float]:
    """Move ``w``, then ``y``, then the logits.

    Args:
        relaxed: The function.
        train: Training loss of one batch.
        valid: Validation loss of one batch.
        w: Weights that learn from the training loss, by name; read again after they moved.
        y: The other copy.
        logits: Logits by group.
        moves: Moves them.
        passes: "gauss-seidel" for gradients at the newest values, "fused" for half the passes.

    Returns:
        Training loss at ``w`` and validation loss at ``y`` before they moved.

    Raises:
        UserError: Unknown ``passes``.
    """
    if passes not in ("gauss-seidel", "fused"):
        raise UserError("passes", passes, allowed="'gauss-seidel' or 'fused'")
    learning = moves.logits is not None
    together = learning and passes == "fused"
    train_value, of_w, on_train = _gradients(train, w, logits, both=together)
    moves.w(_times(relaxed.train_weight, of_w), relaxed.pull(w, y))
    valid_value, of_y, on_valid = _gradients(valid, y, logits, both=together)
    moves.y(of_y, relaxed.pull(y, w))
    if moves.logits is not None:
        if passes == "gauss-seidel":
            _, _, on_train = _gradients(train, w, logits, both=True, weights_too=False)
            _, _, on_valid = _gradients(valid, y, logits, both=True, weights_too=False)
        moves.logits({name: relaxed.train_weight * on_train[name] + on_valid[name] for name in logits})
    return train_value, valid_value


def _gradients(
    loss: Loss, weights: Tensors, logits: Tensors, *, both: bool, weights_too: bool = True
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Return a loss and its gradients by weights and, for ``both``, by logits, in one pass."""
    w = {name: tensor.detach().requires_grad_(weights_too) for name, tensor in weights.items()}
    a = {name: tensor.detach().requires_grad_(both) for name, tensor in logits.items()}
    value = loss(w, a)
    wanted = {**({f"w {n}": t for n, t in w.items()} if weights_too else {}), **{f"a {n}": t for n, t in a.items()}}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(wanted.items(), found, strict=True)
    }
    return (
        float(value.detach()),
        {name: gradients[f"w {name}"] for name in w if f"w {name}" in gradients},
        {name: gradients[f"a {name}"] for name in a if f"a {name}" in gradients},
    )


def _times(factor: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors if factor == 1.0 else {name: factor * tensor for name, tensor in tensors.items()}
