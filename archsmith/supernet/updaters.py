"""Gradients of the validation loss with respect to architecture logits.

The problem is bilevel: ``min_a L_val(w*(a), a)`` with ``w*(a) = argmin_w L_train(w, a)``. Both losses are functions of
two sets of named tensors. Nothing here changes any of them: what is perturbed is a new tensor, so the weights
afterwards are bit for bit those before.

Source: DARTS, arXiv 1806.09055, section 2.3: first order, and one unrolled step of momentum SGD, whose mixed second
derivative is a central difference or, exactly, a second backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from archsmith.core.errors import UserError

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]
"""From weights and logits to a scalar; called again with the same tensors it gives the same value."""

RADIUS = 0.01
"""Length, over all weights, of the finite difference's step to each side."""


@dataclass(frozen=True, kw_only=True)
class InnerStep:
    """The step of momentum SGD on the weights that an unrolled update looks through.

    Attributes:
        rate: Its learning rate, xi in the paper; 0 looks through nothing.
        momentum: Factor of the momentum buffers.
        buffers: Momentum buffers by weight; weights without one have none yet.
        weight_decay: L2 factor. It moves the weights, and is no part of the difference quotient.
    """

    rate: float
    momentum: float = 0.0
    buffers: Tensors = field(default_factory=dict)
    weight_decay: float = 0.0

    def taken(self, weights: Tensors, gradients: Tensors) -> dict[str, Tensor]:
        """Return ``w - rate * (momentum * buffer + gradient + weight_decay * w)``."""
        moved = {}
        for name, weight in weights.items():
            direction = gradients[name] + self.weight_decay * weight
            if name in self.buffers:
                direction = direction + self.momentum * self.buffers[name]
            moved[name] = weight - self.rate * direction
        return moved


def first_order(valid_loss: Loss, weights: Tensors, logits: Tensors) -> dict[str, Tensor]:
    """Return ``dL_val/da`` at the present weights.

    Args:
        valid_loss: Loss on validation examples.
        weights: Weights by name; constants here.
        logits: Logits by group.
    """
    _, logits = _constants(weights), _leaves(logits)
    return _gradient(valid_loss(_constants(weights), logits), logits)


def unrolled(
    train_loss: Loss,
    valid_loss: Loss,
    weights: Tensors,
    logits: Tensors,
    step: InnerStep,
    *,
    how: Literal["difference", "exact"] = "difference",
    radius: float = RADIUS,
) -> dict[str, Tensor]:
    """Return the gradient of ``L_val(w'(a), a)``, ``w'`` being one training step away.

    Args:
        train_loss: Loss on training examples, the same ones in every call.
        valid_loss: Loss on validation examples.
        weights: Weights by name, unchanged.
        logits: Logits by group, unchanged.
        step: The step from ``w`` to ``w'``.
        how: "difference" takes ``(dL_train/da(w + e v) - dL_train/da(w - e v)) / 2 e`` with ``v = dL_val/dw'`` and
            ``e = radius / |v|``: two passes more, no second derivatives, and the published method. "exact" is a second
            backward pass. On networks with ReLU or max pooling the two differ strongly, and rightly so: the difference
            crosses kinks that autograd does not see.
        radius: See ``how``.

    Raises:
        UserError: Unknown ``how``.
    """
    if how == "exact":
        return _unrolled_exactly(train_loss, valid_loss, weights, logits, step)
    if how != "difference":
        raise UserError("how", how, allowed="'difference' or 'exact'")
    fixed, leaves = _constants(weights), _leaves(weights)
    gradients = _gradient(train_loss(leaves, _constants(logits)), leaves)
    moved, choice = _leaves(step.taken(fixed, gradients)), _leaves(logits)
    both = _gradient(valid_loss(moved, choice), {**_prefixed("w", moved), **_prefixed("a", choice)})
    direction = {name: both[f"w.{name}"] for name in moved}
    result = {name: both[f"a.{name}"] for name in choice}
    length = float(torch.stack([tensor.double().square().sum() for tensor in direction.values()]).sum().sqrt())
    if length == 0.0 or step.rate == 0.0:
        return result
    epsilon = radius / length
    for sign in (1.0, -1.0):
        shifted = {name: weight + sign * epsilon * direction[name] for name, weight in fixed.items()}
        side = _gradient(train_loss(shifted, choice), choice)
        for name in result:
            result[name] = result[name] - step.rate * sign * side[name] / (2 * epsilon)
    return result


def _unrolled_exactly(
    train_loss: Loss, valid_loss: Loss, weights: Tensors, logits: Tensors, step: InnerStep
) -> dict[str, Tensor]:
    """Differentiate through the inner step."""
    leaves, choice = _leaves(weights), _leaves(logits)
    names = list(leaves)
    found = torch.autograd.grad(
        train_loss(leaves, choice), [leaves[name] for name in names], create_graph=True, allow_unused=True
    )
    gradients = {
        name: torch.zeros_like(leaves[name]) if gradient is None else gradient
        for name, gradient in zip(names, found, strict=True)
    }
    return _gradient(valid_loss(step.taken(leaves, gradients), choice), choice)


def _gradient(loss: Tensor, tensors: Tensors) -> dict[str, Tensor]:
    """Return the loss's gradient by name, zero where it does not depend on a tensor."""
    names = list(tensors)
    found = torch.autograd.grad(loss, [tensors[name] for name in names], allow_unused=True)
    return {
        name: torch.zeros_like(tensors[name]) if gradient is None else gradient
        for name, gradient in zip(names, found, strict=True)
    }


def _constants(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _leaves(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
