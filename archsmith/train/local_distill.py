"""Distances of a child from its parent, block by block and end to end: what local and global distillation minimise.

Every mean runs over tokens: where a mask (B, T) is given, over the tokens that it marks, so that padding teaches
nothing. Source: Puzzle, arXiv 2411.19146, Sec. 3 (block-wise local distillation) and Sec. 5 (global distillation).
"""

# B batch, T tokens, E width, V vocabulary, L layers

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from archsmith.core.errors import UserError

EPSILON = 1e-6
"""What the parent's output is compared with in the denominator of ``normalised_mse``, in place of 0."""


def normalised_mse(child: Tensor, parent: Tensor, *, mask: Tensor | None = None, epsilon: float = EPSILON) -> Tensor:
    """Return ``MSE(child, parent) / MSE(parent, epsilon)``: 0 for an equal block, about 1 for one that gives zeros.

    Args:
        child: Output of the child's block, (B, ...) or (B, T, E); the gradient goes here.
        parent: Output of the parent's, a constant of the same shape.
        mask: Tokens (B, T) that count; all of them when None.
        epsilon: See ``EPSILON``.

    Raises:
        UserError: Different shapes.
    """
    _require_same(child, parent)
    parent = parent.detach()
    difference, size = (child - parent) ** 2, (parent - epsilon) ** 2
    if mask is None:
        return difference.mean() / size.mean()
    return _token_mean(difference.mean(-1), mask) / _token_mean(size.mean(-1), mask)


def token_kl(parent_logits: Tensor, child_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return ``KL(parent || child)`` in nats for each token, averaged over tokens (not over the vocabulary).

    Args:
        parent_logits: (..., V), constants.
        child_logits: (..., V); the gradient goes here.
        mask: Tokens (...) that count; all of them when None.

    Raises:
        UserError: Different shapes.
    """
    _require_same(child_logits, parent_logits)
    own, wanted = child_logits.log_softmax(-1), parent_logits.detach().log_softmax(-1)
    divergence = functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)
    return _token_mean(divergence, mask)


def lm_loss(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy in nats of ``targets`` (...) under ``logits`` (..., V); no shift is made here."""
    losses = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return _token_mean(losses.view(targets.shape), mask)


def cosine_distance(child: Tensor, parent: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return ``1 - cos(child, parent)`` over the last axis, averaged over tokens.

    Args:
        child: (..., E); the gradient goes here.
        parent: (..., E), constants.
        mask: Tokens (...) that count; all of them when None.

    Raises:
        UserError: Different shapes.
    """
    _require_same(child, parent)
    return _token_mean(1 - functional.cosine_similarity(child, parent.detach(), dim=-1), mask)


def gkd_loss(
    child_hidden: Sequence[Tensor],
    parent_hidden: Sequence[Tensor],
    child_logits: Tensor | None = None,
    parent_logits: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the loss of the global distillation: ``sum_layers (1 - cos(h_c, h_p)) + KL(p_parent || p_child)``.

    The language-model loss takes no part: in the paper it makes the child worse.

    Args:
        child_hidden: Output (B, T, E) of each layer of the child.
        parent_hidden: The same of the parent, constants.
        child_logits: (B, T, V), or None for models without a head (encoders): then the cosines are all.
        parent_logits: The same of the parent.
        mask: Tokens (B, T) that count; all of them when None.

    Raises:
        UserError: Different numbers of layers, or different shapes.
    """
    if len(child_hidden) != len(parent_hidden):
        raise UserError(
            "hidden states", len(child_hidden), allowed=f"as many layers as the parent, {len(parent_hidden)}"
        )
    pairs = zip(child_hidden, parent_hidden, strict=True)
    loss = torch.stack([cosine_distance(own, wanted, mask=mask) for own, wanted in pairs]).sum()
    if child_logits is None or parent_logits is None:
        return loss
    return loss + token_kl(parent_logits, child_logits, mask=mask)


def pooled(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean (B, E) of hidden states (B, T, E) over the tokens that count."""
    if mask is None:
        return hidden.mean(1)
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise UserError("mask", tuple(mask.shape), allowed=f"one number for each token, {tuple(values.shape)}")
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def _require_same(child: Tensor, parent: Tensor) -> None:
    if child.shape != parent.shape:
        raise UserError("child", tuple(child.shape), allowed=f"the parent's shape {tuple(parent.shape)}")
