"""Weights with which the cheaper versions of attention and FFN begin: computed from the parent, no training.

Source: "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs", arXiv 2411.19146, section on initialisation.
"""

# E residual width, H query heads, K key-value heads, D head width, I intermediate width; all weights are (out, in)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archsmith.core.errors import UserError


def pool_heads(weight: Tensor, heads: int, to_heads: int) -> Tensor:
    """Return key or value rows with adjacent heads averaged: child head j is the mean of heads j g .. (j + 1) g - 1.

    Args:
        weight: Weight (heads D, E) or bias (heads D).
        heads: Heads now.
        to_heads: Heads wanted; g = heads / to_heads.

    Raises:
        UserError: ``to_heads`` does not divide ``heads``.
    """
    check_heads(heads, to_heads)
    if to_heads == heads:
        return weight.clone()
    grouped = weight.unflatten(0, (to_heads, heads // to_heads, -1))
    return _as(grouped.double().mean(1).flatten(0, 1), weight)


def check_heads(heads: int, to_heads: int) -> None:
    """Refuse a number of key-value heads that does not divide the present one.

    Raises:
        UserError: It does not.
    """
    if to_heads < 1 or heads % to_heads:
        allowed = [count for count in range(1, heads + 1) if heads % count == 0]
        raise UserError("kv_heads", to_heads, allowed=f"a divisor of the {heads} heads there are: {allowed}")


def kept_groups(scores: Tensor, to_heads: int) -> tuple[list[int], list[int]]:
    """Return which key-value heads stay and the new order of all query groups.

    The heads with the highest scores stay, in their old order. Each leads a group of query groups: its own first, then
    an equal share of those that lost their head.

    Args:
        scores: One number (K) for each key-value head, higher is better.
        to_heads: How many stay.
    """
    heads = len(scores)
    check_heads(heads, to_heads)
    kept = sorted(torch.argsort(scores, descending=True, stable=True)[:to_heads].tolist())
    lost = [head for head in range(heads) if head not in kept]
    share = heads // to_heads - 1
    order = [group for at, head in enumerate(kept) for group in (head, *lost[at * share : (at + 1) * share])]
    return kept, order


def rows_of_heads(heads: Sequence[int], width: int) -> Tensor:
    """Return the row numbers of ``heads``, each ``width`` rows high, in that order."""
    return (torch.tensor(list(heads))[:, None] * width + torch.arange(width)).flatten()


def linear_from_attention(
    w_value: Tensor,
    w_output: Tensor,
    *,
    heads: int,
    kv_heads: int,
    b_value: Tensor | None = None,
    b_output: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return weight (E, E) and bias (E) of attention in which every token attends to itself: W_o W_v.

    The value rows are repeated for the query heads of their group. On sequences of one token it equals the attention.

    Args:
        w_value: (K D, E).
        w_output: (E, H D).
        heads: H.
        kv_heads: K.
        b_value: (K D), or None.
        b_output: (E), or None.
    """
    check_heads(heads, kv_heads)

    def repeated(rows: Tensor) -> Tensor:
        return rows.double().unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 0).flatten(0, 1)

    weight = w_output.double() @ repeated(w_value)
    return _with_bias(weight, w_output, None if b_value is None else repeated(b_value), b_output)


def linear_from_ffn(
    w_up: Tensor, w_down: Tensor, *, b_up: Tensor | None = None, b_down: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return weight (E, E) and bias (E) of an FFN without its activation, and without its gate: W_down W_up.

    Args:
        w_up: (I, E).
        w_down: (E, I).
        b_up: (I), or None.
        b_down: (E), or None.
    """
    return _with_bias(w_down.double() @ w_up.double(), w_down, b_up, b_down)


def _with_bias(
    weight: Tensor, outer: Tensor, b_inner: Tensor | None, b_outer: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the product's weight and what the two biases come to, both of the outer weight's type."""
    bias = None if b_inner is None else outer.double() @ b_inner.double()
    if b_outer is not None:
        bias = b_outer.double() if bias is None else bias + b_outer.double()
    return _as(weight, outer), None if bias is None else _as(bias, outer)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype).contiguous()
