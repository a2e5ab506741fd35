"""Contractions: matrix products, convolutions and attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from archsmith.atoms.labels import IntArray
from archsmith.atoms.propagate import Axes, Propagation, shape
from archsmith.atoms.rules.table import rule

KERNEL = "is a kernel position"
CONTRACTED = "is summed with an input of fixed width"


def _last(p: Propagation, node: object, back: int = 1) -> IntArray | None:
    return p.on(node, len(shape(node)) - back) if isinstance(node, fx.Node) else None


@rule("linear")
def linear(p: Propagation, node: fx.Node) -> Axes:
    """X (..., i), w (o, i), b (o): i meets i, o is new."""
    given = p.arguments(node)
    x, w, b = given["input"], given["weight"], given["bias"]
    rank = len(shape(x))
    p.meet(_last(p, x), p.on(w, len(shape(w)) - 1), CONTRACTED)
    found = {axis: labels for axis, labels in p.of(x).items() if axis != rank - 1}
    if len(shape(w)) == 2:
        out = p.on(w, 0)
        if b is not None and shape(b)[0] > 1:
            p.meet(out, p.on(b, 0))
        if out is not None:
            found[rank - 1] = out
    return found


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(p: Propagation, node: fx.Node) -> Axes:
    """A (..., i, j) times b (..., j, k): j meets j, the leading axes meet as in an element-wise operator."""
    given = list(p.arguments(node).values())
    return _product(p, given[0], given[1], shape(node))


@rule("addmm", "baddbmm", "addbmm", "addmv")
def addmm(p: Propagation, node: fx.Node) -> Axes:
    """Bias + a times b."""
    given = list(p.arguments(node).values())
    found = _product(p, given[1], given[2], shape(node))
    return meet_aligned(p, [(found, shape(node)), (p.of(given[0]), shape(given[0]))], shape(node))


def _product(p: Propagation, a: fx.Node, b: fx.Node, size: tuple[int, ...]) -> Axes:
    rank_a, rank_b = len(shape(a)), len(shape(b))
    p.meet(_last(p, a), _last(p, b, 2 if rank_b > 1 else 1), CONTRACTED)
    lead_a = {axis: labels for axis, labels in p.of(a).items() if axis < rank_a - 2}
    lead_b = {axis: labels for axis, labels in p.of(b).items() if axis < rank_b - 2}
    kept = (rank_a > 1) + (rank_b > 1)
    lead = size[: len(size) - kept]
    found = meet_aligned(p, [(lead_a, shape(a)[:-2]), (lead_b, shape(b)[:-2])], lead)
    rows, columns = _last(p, a, 2) if rank_a > 1 else None, _last(p, b) if rank_b > 1 else None
    if rows is not None:
        found[len(lead)] = rows
    if columns is not None:
        found[len(size) - 1] = columns
    return found


def meet_aligned(p: Propagation, operands: list[tuple[Axes, tuple[int, ...]]], size: tuple[int, ...]) -> Axes:
    """Let axes meet that are aligned from the right."""
    found: Axes = {}
    for axis, n in enumerate(size):
        if n == 1:
            continue
        aligned = []
        for axes, own in operands:
            at = axis - len(size) + len(own)
            if at >= 0 and own[at] == n:
                aligned.append(axes.get(at))
        for labels in aligned[1:]:
            p.meet(aligned[0], labels)
        if aligned and all(labels is not None for labels in aligned) and aligned[0] is not None:
            found[axis] = aligned[0]
    return found


@rule("einsum")
def einsum(p: Propagation, node: fx.Node) -> Axes:
    """Let all axes with the same letter meet."""
    given = p.arguments(node)
    equation = str(given["equation"]).replace(" ", "")
    operands = list(given["tensors"])
    left, arrow, right = equation.partition("->")
    if "..." in left or not arrow:
        return _einsum_with_ellipsis(p, node, operands, left, right if arrow else None)
    return _einsum(p, operands, left.split(","), right)


def _einsum_with_ellipsis(p: Propagation, node: fx.Node, operands: list[fx.Node], left: str, right: str | None) -> Axes:
    """Name the axes behind "..." with letters of their own, then go on as usual."""
    terms = left.split(",")
    free = [chr(code) for code in range(0x3B1, 0x3C9)]
    widths = [len(shape(x)) - len(term.replace("...", "")) for x, term in zip(operands, terms, strict=True)]
    letters = free[: max(widths)]
    named = []
    for term, width in zip(terms, widths, strict=True):
        named.append(term.replace("...", "".join(letters[len(letters) - width :])) if "..." in term else term)
    if right is None:
        every = "".join(term.replace("...", "") for term in terms)
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    return _einsum(p, operands, named, right.replace("...", "".join(letters)))


def _einsum(p: Propagation, operands: list[fx.Node], terms: list[str], right: str) -> Axes:
    by_letter: dict[str, list[IntArray | None]] = {}
    for operand, term in zip(operands, terms, strict=True):
        for axis, letter in enumerate(term):
            if shape(operand)[axis] > 1:
                by_letter.setdefault(letter, []).append(p.on(operand, axis))
    found: Axes = {}
    for letter, each in by_letter.items():
        for labels in each[1:]:
            p.meet(each[0], labels, CONTRACTED)
        if letter in right and each[0] is not None and all(labels is not None for labels in each):
            found[right.index(letter)] = each[0]
    return found


CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@rule(*CONVOLUTIONS, *TRANSPOSED, "convolution", "_convolution")
def convolution(p: Propagation, node: fx.Node) -> Axes:
    """X (b, c, ...), w (o, c / groups, ...): channels meet; groups factor both sides into (group, column)."""
    given = p.arguments(node)
    x = given["input"]
    w, b, groups = given["weight"], given["bias"], int(given["groups"])
    name = str(node.target)
    transposed = "transpose" in name or bool(given.get("transposed", False))
    batched = len(shape(x)) == len(shape(w))
    channel = 1 if batched else 0
    for axis in range(2, len(shape(w))):
        p.pin(p.on(w, axis), KERNEL)
    for axis, labels in p.of(x).items():
        if axis > channel:
            p.pin(labels, "is a spatial position")
    outer, inner = p.on(w, 0), p.on(w, 1)
    if groups == 1:
        incoming, out = (outer, inner) if transposed else (inner, outer)
        p.meet(p.on(x, channel), incoming, CONTRACTED)
    else:
        out = _grouped(p, p.on(x, channel), w, groups, transposed)
    if b is not None and shape(b)[0] > 1:
        p.meet(out, p.on(b, 0))
    found = {axis: labels for axis, labels in p.of(x).items() if axis < channel}
    if out is not None:
        found[channel] = out
    return found


def _grouped(p: Propagation, x: IntArray | None, w: fx.Node, groups: int, transposed: bool) -> IntArray | None:
    """Return the output channels' labels of a convolution in groups.

    Rows are the groups, shared by input and output. A depthwise convolution has one column on the input side: its
    rows are the channels themselves.
    """
    size = shape(w)
    first = p.on(w, 0)
    own_columns = p.on(w, 1)
    each_out = size[1] if transposed else size[0] // groups
    each_in = size[0] // groups if transposed else size[1]
    full, columns = (first, own_columns)
    wide, narrow = (each_in, each_out) if transposed else (each_out, each_in)
    if x is None:
        # The input is fixed, so groups and input columns stay; output columns alone may still go.
        p.pin(full if transposed else own_columns, CONTRACTED)
    # Weight axis 0 holds (group, column), axis 1 the columns of the other side, shared by all groups.
    if wide == 1:
        rows: IntArray | None = full
    else:
        assert full is not None
        rows, _ = p.labels.factor(full.reshape(groups, wide), p.cause("shares a group with a constant"))
    assert rows is not None
    other = _pair(p, rows, columns, narrow)
    if x is None:
        p.pin(rows, CONTRACTED)
    p.expect("groups", rows)
    if transposed:
        p.meet(x, full, CONTRACTED)
        return other
    p.meet(x, other, CONTRACTED)
    return full


def _pair(p: Propagation, rows: IntArray, columns: IntArray | None, width: int) -> IntArray:
    """Return the labels of (row, column) positions, flattened."""
    if width == 1 or columns is None:
        return np.repeat(rows, width)
    return p.labels.product([np.repeat(rows, width), np.tile(columns, len(rows))])


@rule("scaled_dot_product_attention")
def attention(p: Propagation, node: fx.Node) -> Axes:
    """Q (..., h, l, e), k (..., h, s, e), v (..., h, s, f): heads meet, e meets e; f is free.

    Without an explicit scale the operator divides by sqrt(e): e stays then, since a cut would change the constant.
    """
    given = p.arguments(node)
    q, k, v, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    rank = len(shape(q))
    p.meet(_last(p, q), _last(p, k), CONTRACTED)
    if given["scale"] is None:
        for tensor in (q, k):
            p.pin(_last(p, tensor), "the default attention scale follows its width")
    p.meet(_last(p, k, 2), _last(p, v, 2), CONTRACTED)
    p.change(_last(p, k, 2), "softmax")
    found: Axes = {}
    for axis in range(rank - 2):
        if shape(node)[axis] == 1:
            continue
        grouped = shape(k)[axis] != shape(q)[axis] and shape(k)[axis] > 1
        each: list[Any] = [p.on(q, axis)]
        for tensor in (k, v):
            own = p.on(tensor, axis)
            if shape(tensor)[axis] == 1:
                continue
            if grouped and own is not None:
                own = np.repeat(own, shape(q)[axis] // shape(tensor)[axis])
            each.append(own)
        at = axis - rank + len(shape(mask)) if mask is not None else -1
        if at >= 0 and shape(mask)[at] > 1:
            each.append(p.on(mask, at))
        for labels in each[1:]:
            p.meet(each[0], labels, "heads meet a tensor of fixed width")
        if all(labels is not None for labels in each):
            found[axis] = each[0]
    if mask is not None:
        for back, tensor in ((1, k), (2, q)):
            if len(shape(mask)) >= back and shape(mask)[-back] > 1:
                p.meet(_last(p, mask, back), _last(p, tensor, 2))
    rows, columns = _last(p, q, 2), _last(p, v)
    if rows is not None:
        found[rank - 2] = rows
    if columns is not None:
        found[rank - 1] = columns
    return found


@rule("bilinear")
def bilinear(p: Propagation, node: fx.Node) -> Axes:
    """A (..., i), b (..., j), w (o, i, j)."""
    given = p.arguments(node)
    a, b, w, bias = given["input1"], given["input2"], given["weight"], given["bias"]
    p.meet(_last(p, a), p.on(w, 1), CONTRACTED)
    p.meet(_last(p, b), p.on(w, 2), CONTRACTED)
    out = p.on(w, 0)
    if bias is not None:
        p.meet(out, p.on(bias, 0))
    rank = len(shape(node))
    lead = [({x: s for x, s in p.of(t).items() if x < rank - 1}, shape(t)[:-1]) for t in (a, b)]
    found = meet_aligned(p, lead, shape(node)[:-1])
    if out is not None:
        found[rank - 1] = out
    return found
