"""Multiply-accumulates (MACs) of single operators, exact integers read off the shapes.

A rule exists for every ATen operator that multiplies matrices or convolves below the level of composite operators:
``linear``, ``matmul``, ``einsum``, ``conv2d`` and the attention of any backend arrive here as the operators that they
consist of. Products with padding zeros, and scores that a causal mask throws away, are counted: they are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[tuple[Any, ...], Any], int]

aten = torch.ops.aten


def convolution_macs(inputs: Tensor, weight: Tensor, outputs: Tensor, transposed: bool) -> int:
    """Return the MACs of a convolution with any groups, stride and dilation, in any number of dimensions.

    Args:
        inputs: Shape ``(batch, in_channels, *spatial)``.
        weight: Shape ``(out, in / groups, *kernel)``, transposed ``(in, out / groups, *kernel)``.
        outputs: Shape ``(batch, out_channels, *spatial)``.
        transposed: Every input element (else every output element) meets the whole kernel of its group.
    """
    return (inputs if transposed else outputs).numel() * weight.shape[1] * prod(weight.shape[2:])


def matmul_macs(left: Tensor, right: Tensor) -> int:
    """Return the MACs of ``(..., m, k) @ (..., k, n)`` or ``(m, k) @ (k,)`` with equal leading axes."""
    return left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def attention_macs(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Return the MACs of scores and mixing: ``B * H * L * S * (E + Ev)``, ``H`` the number of query heads.

    Args:
        query: Shape ``(B, H, L, E)``.
        key: Shape ``(B, H or fewer, S, E)``: sharing keys between heads saves memory, not products.
        value: Shape ``(B, H or fewer, S, Ev)``.
    """
    return prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def recurrent_macs(steps: int, weights: list[Tensor]) -> int:
    """Return the MACs of a recurrent layer: all its weight matrices once per step of every example; gates are free."""
    return steps * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _convolution(args: tuple[Any, ...], out: Any) -> int:
    return convolution_macs(args[0], args[1], out, transposed=args[6])


def _product(args: tuple[Any, ...], out: Any) -> int:
    return matmul_macs(args[0], args[1])


def _added_product(args: tuple[Any, ...], out: Any) -> int:
    return matmul_macs(args[1], args[2])


def _attention(args: tuple[Any, ...], out: Any) -> int:
    return attention_macs(args[0], args[1], args[2])


def _onednn_rnn(args: tuple[Any, ...], out: Any) -> int:
    inputs, input_weight, hidden_weight = args[:3]
    return recurrent_macs(prod(inputs.shape[:-1]), [input_weight, hidden_weight])


def _cudnn_rnn(args: tuple[Any, ...], out: Any) -> int:
    # A packed input has shape (all steps of all examples, features), a padded one (steps, examples, features).
    return recurrent_macs(prod(args[0].shape[:-1]), args[1])


RULES: dict[Any, Rule] = {
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten.convolution_overrideable: _convolution,
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten.dot: _product,
    aten.vdot: _product,
    aten._int_mm: _product,
    aten._scaled_mm: _product,
    aten.addmm: _added_product,
    aten._addmm_activation: _added_product,
    aten.baddbmm: _added_product,
    aten.addbmm: _added_product,
    aten.addmv: _added_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mkldnn_rnn_layer: _onednn_rnn,
    aten._cudnn_rnn: _cudnn_rnn,
}

# Matrix products without a rule, and everything from outside ATen, are named in the result instead of counted as zero.
PRODUCTS_WITHOUT_RULE = frozenset({aten._trilinear, aten._grouped_mm})
WITHOUT_PRODUCTS = frozenset({"aten", "prim", "prims", "profiler"})


def operator_macs(operator: Any, args: tuple[Any, ...], out: Any) -> int | None:
    """Return the MACs of one call of an ATen operator, or None when archsmith can not know them.

    Args:
        operator: The overload that ran, for example ``torch.ops.aten.mm.default``.
        args: Its positional arguments.
        out: Its result.
    """
    packet = operator.overloadpacket
    if rule := RULES.get(packet):
        return rule(args, out)
    if operator.namespace not in WITHOUT_PRODUCTS or packet in PRODUCTS_WITHOUT_RULE:
        return None
    return 0
