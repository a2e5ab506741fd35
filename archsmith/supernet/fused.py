"""Nodes of a relaxed cell, computed at once: what their edges have in common is computed once.

A node is ``sum over edges and candidates of weight * candidate(state)``, and every state is read by several edges. The
candidates of cells have the same parts, so for each state the ReLU in front of convolutions, poolings with their
normalisation, and the image taken apart for dilated convolutions are computed once; the normalisation at the end of a
candidate is folded into the weighted sum; dilated and wide depthwise convolutions go where they are fast.

The modules, their parameters and their running statistics are the same as when every candidate is called by itself, and
so is the mathematics; sums come in another order. Nothing has to be switched on: cells ask ``fusible`` in every call
and otherwise call their edges. Candidates of other kinds are called as they are, in the midst of the others.
"""

# B batch, C channels, H height, W width, O candidates

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from archsmith.layers.cells import ReluConvNorm, Zero
from archsmith.layers.darts import ReluConvBn, Zeros
from archsmith.supernet.average_pool import average_pool
from archsmith.supernet.depthwise import FastDepthwise, depthwise, from_phases, to_phases
from archsmith.supernet.mixed import MixedOp, Relaxation, Weights
from archsmith.supernet.norm_sum import normalised_relu, normalised_sum
from archsmith.supernet.partial import PartialEdge, left_out

T = TypeVar("T")

Round = tuple[tuple[nn.Module, ...], nn.Module]
"""Convolutions behind a ReLU, and the normalisation behind them."""


def fusible(modules: Iterable[nn.Module], states: Sequence[Tensor]) -> bool:
    """Return whether nodes may be computed at once here: on the CPU, in float32 or float64, unobserved.

    Args:
        modules: What would not be called one by one any more; hooks on any part of them want them to be.
        states: Inputs of the cell.
    """
    return (
        all(type(x) is Tensor and x.device.type == "cpu" and x.dim() == 4 for x in states)
        and all(x.dtype in (torch.float32, torch.float64) for x in states)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and not torch_module._has_any_global_hook()
        and not any(_has_hooks(part) for module in modules for part in module.modules())
    )


class NodeSums:
    """The nodes of a cell during one call of it: ask for them in order, then ``finish_``.

    Args:
        edges: All edges of the cell.
        inputs: Its first states.
    """

    def __init__(self, edges: Iterable[nn.Module], inputs: Sequence[Tensor]) -> None:
        self.fused = fusible(edges, inputs)
        self._made: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}
        self._seen: list[tuple[nn.BatchNorm2d, Tensor, Tensor, int]] = []

    def __call__(
        self,
        states: Sequence[Tensor],
        edges: Sequence[nn.Module],
        weights: Sequence[Weights],
        edge_weights: Sequence[Tensor | float] | None = None,
    ) -> Tensor:
        """Return ``sum_e edge_weights[e] * edges[e](states[e], weights[e])``.

        Args:
            states: Input of each edge.
            edges: One or more. Those that are no ``MixedOp``, or mix in a way of their own, are called.
            weights: Mixing weights of each edge.
            edge_weights: One for each edge; ones if None.
        """
        if self.fused and _same_part(edges):
            return self._partial(states, cast(Sequence[PartialEdge], edges), weights, edge_weights)
        terms = _Terms()
        if self.fused:
            for number, (x, edge, row) in enumerate(zip(states, edges, weights, strict=True)):
                self._add_edge(terms, x, edge, row, None if edge_weights is None else edge_weights[number])
        if not terms:  # not here, or nothing but zeros, which still have a shape
            return _one_by_one(states, edges, weights, edge_weights)
        try:
            return terms.total()
        except RuntimeError as error:
            for x, edge in zip(states, edges, strict=True):
                if isinstance(edge, MixedOp):
                    edge.explain_shapes(x, error)
            raise

    def _partial(
        self,
        states: Sequence[Tensor],
        edges: Sequence[PartialEdge],
        weights: Sequence[Weights],
        edge_weights: Sequence[Tensor | float] | None,
    ) -> Tensor:
        """Return a node whose edges take the same part of the channels: what passes is summed, and joined once."""
        given = [1.0] * len(edges) if edge_weights is None else edge_weights
        kept = [entry for entry in zip(states, edges, weights, given, strict=True) if not left_out(entry[2])]
        if not kept:
            return _one_by_one(states, edges, weights, edge_weights)
        inner = self(
            [self._once(x, ("taken",), partial(_of_last, edge.taken, x)) for x, edge, *_ in kept],
            [edge.inner for _, edge, *_ in kept],
            [row for *_, row, _ in kept],
            None if edge_weights is None else [weight for *_, weight in kept],
        )
        past: Tensor | None = None
        for x, edge, _, weight in kept:
            # A view where the resolution stays, so that edges of one state keep it once for the gradient.
            passed = self._once(x, ("past", edge.stride), partial(_of_last, edge.past, x))
            term = passed if edge_weights is None else passed * weight
            past = term if past is None else past + term
        assert past is not None
        return kept[0][1].joined(inner, past)

    def finish_(self) -> None:
        """Move the running statistics of all normalisations that were folded away."""
        moved = [seen for seen in self._seen if seen[0].training and seen[0].track_running_stats]
        for norm, mean_C, var_C, number in moved:
            if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
                continue
            norm.num_batches_tracked.add_(1)
            momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean_C, momentum)
            norm.running_var.lerp_(var_C * (number / (number - 1)), momentum)
        self._seen.clear()
        self._made.clear()

    def _add_edge(
        self, terms: _Terms, x: Tensor, edge: nn.Module, weights: Weights, edge_weight: Tensor | float | None
    ) -> None:
        """Add all candidates of an edge to the terms of a node."""
        if type(edge) is not MixedOp or type(edge.relaxation).mix is not Relaxation.mix:
            terms.others.append((edge(x, weights), 1.0 if edge_weight is None else edge_weight))
            return
        row = edge.row(weights)
        numbers: Sequence[Tensor | float] = row.unbind() if isinstance(row, Tensor) else row
        for weight, candidate in zip(numbers, edge.candidates.values(), strict=True):
            out = not isinstance(weight, Tensor) and weight == 0.0
            if not out and type(candidate) not in (Zero, Zeros):
                self._add(terms, x, candidate, weight if edge_weight is None else weight * edge_weight)

    def _once(self, x: Tensor, what: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return what was made of ``x`` before under this name, or make it."""
        key = (id(x), *what)
        if key not in self._made:
            self._made[key] = (x, make())  # x is kept, so that its id stays its own
        found: T = self._made[key][1]
        return found

    def _rectified(self, x: Tensor) -> Tensor:
        return self._once(x, ("relu",), lambda: _channels_last(x).relu())

    def _add(self, terms: _Terms, x: Tensor, candidate: nn.Module, weight: Tensor | float) -> None:
        """Add a candidate of ``x`` to the terms of a node."""
        if type(candidate) is nn.Identity:
            terms.others.append((_channels_last(x), weight))
            return
        pool, norm = _pooling(candidate)
        if pool is not None:
            terms.others.append((self._pooled(x, pool, norm), weight))
            return
        rounds = _rounds(candidate)
        if not rounds:
            terms.others.append((candidate(x), weight))
            return
        y, apart = self._convolved(x, rounds[0][0])
        for (_, norm), (convolutions, _) in pairwise(rounds):
            y = from_phases(y) if apart else y
            apart = False
            y = self._normalised_relu(y, norm)
            for convolution in convolutions:
                y = _convolve(convolution, y)
        self._end(terms, y, rounds[-1][1], weight, apart)

    def _end(self, terms: _Terms, y: Tensor, norm: nn.Module, weight: Tensor | float, apart: bool) -> None:
        """Add the normalisation of ``y`` to the terms of a node."""
        if not _foldable(norm, y):
            y = norm(y)
            terms.others.append((from_phases(y) if apart else y, weight))
            return
        number = y.numel() // y.shape[1]
        (terms.apart if apart else terms.whole).append(
            (_channels_last(y), weight, norm.eps, lambda mean, var: self._seen.append((norm, mean, var, number)))
        )

    def _convolved(self, x: Tensor, convolutions: tuple[nn.Module, ...]) -> tuple[Tensor, bool]:
        """Return a round's convolutions of the rectified state, and whether the result is taken apart in phases."""
        first, *rest = convolutions
        if not _dilated_depthwise(first):
            y, apart = _convolve(first, self._rectified(x)), False
        elif first.stride == (2, 2):
            # Only every second pixel is read: of these it is an ordinary convolution.
            few = self._once(x, ("few",), lambda: _channels_last(self._rectified(x)[:, :, ::2, ::2]))
            y, apart = depthwise(few, first.weight), False
        elif x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 and all(map(_pointwise, rest)):
            phases = self._once(x, ("phases",), lambda: to_phases(self._rectified(x)))
            y, apart = depthwise(phases, first.weight), True
        else:
            y, apart = first(self._rectified(x)), False
        for convolution in rest:
            y = _convolve(convolution, y)
        return y, apart

    def _normalised_relu(self, y: Tensor, norm: nn.Module) -> Tensor:
        if not _foldable(norm, y):
            return F.relu(norm(y))
        z, mean_C, var_C = normalised_relu(_channels_last(y), norm.eps)
        self._seen.append((norm, mean_C, var_C, y.numel() // y.shape[1]))
        return z

    def _pooled(self, x: Tensor, pool: nn.Module, norm: nn.Module | None) -> Tensor:
        """Return a pooling, and its normalisation if any; every pooling of its kind gives the same."""
        form: tuple[object, ...] = (type(pool), pool.kernel_size, pool.stride, pool.padding)
        average = form == (nn.AvgPool2d, 3, 1, 1)
        pooled: Tensor = self._once(x, form, lambda: (average_pool if average else pool)(_channels_last(x)))
        if norm is None:
            return pooled
        if not _foldable(norm, pooled):
            normalised: Tensor = norm(pooled)
            return normalised

        def make() -> tuple[Tensor, Tensor, Tensor]:
            mean_C, var_C = pooled.new_zeros(pooled.shape[1]), pooled.new_ones(pooled.shape[1])
            # With momentum 1 the "running" statistics are those of this batch.
            return F.batch_norm(pooled, mean_C, var_C, None, None, True, 1.0, norm.eps), mean_C, var_C

        result, mean_C, var_C = self._once(x, (*form, norm.eps), make)
        number = pooled.numel() // pooled.shape[1]
        self._seen.append((norm, mean_C, var_C * ((number - 1) / number), number))
        return result


class _Terms:
    """What a node is the sum of: maps to be normalised, whole or in phases, and others; each with its weight."""

    def __init__(self) -> None:
        self.whole: list[tuple[Tensor, Tensor | float, float, Callable[[Tensor, Tensor], None]]] = []
        self.apart: list[tuple[Tensor, Tensor | float, float, Callable[[Tensor, Tensor], None]]] = []
        self.others: list[tuple[Tensor, Tensor | float]] = []

    def __bool__(self) -> bool:
        return bool(self.whole or self.apart or self.others)

    def total(self) -> Tensor:
        """Return the sum."""
        if self.apart:
            self.others.append((from_phases(_weighted(self.apart, [])), 1.0))
        if not self.whole and len(self.others) == 1 and not isinstance(self.others[0][1], Tensor):
            ((z, weight),) = self.others
            return z if weight == 1.0 else z * weight
        return _weighted(self.whole, self.others)


def _same_part(edges: Sequence[nn.Module]) -> bool:
    """Return whether all edges let the same channels past and join them in the same way."""
    partial_edges = [edge for edge in edges if isinstance(edge, PartialEdge)]
    forms = {(edge.divisor, edge.mixing) for edge in partial_edges}
    return len(partial_edges) == len(edges) and len(forms) == 1 and partial_edges[0].mixing != "random"


def _of_last(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(_channels_last(x))


def _one_by_one(
    states: Sequence[Tensor],
    edges: Sequence[nn.Module],
    weights: Sequence[Weights],
    edge_weights: Sequence[Tensor | float] | None,
) -> Tensor:
    """Return a node by calling its edges."""
    total: Tensor | None = None
    for number, (x, edge, row) in enumerate(zip(states, edges, weights, strict=True)):
        term: Tensor = edge(x, row)
        term = term if edge_weights is None else edge_weights[number] * term
        total = term if total is None else total + term
    assert total is not None
    return total


def _weighted(maps: list[Any], others: list[tuple[Tensor, Tensor | float]]) -> Tensor:
    example = maps[0][0] if maps else others[0][0]
    weights = [weight for _, weight, *_ in (*maps, *others)]
    # Stacked from single numbers: some may have a gradient, others are plain.
    row = torch.stack([w.to(example.dtype) if isinstance(w, Tensor) else example.new_tensor(w) for w in weights])
    total, mean_KC, var_KC = normalised_sum(
        row, [y for y, *_ in maps], [eps for _, _, eps, _ in maps], [_channels_last(z) for z, _ in others]
    )
    for (_, _, _, seen), mean_C, var_C in zip(maps, mean_KC, var_KC, strict=True):
        seen(mean_C, var_C)
    return total


def _rounds(candidate: nn.Module) -> tuple[Round, ...]:
    """Return a candidate as rounds of ReLU, convolutions, normalisation; nothing if it is something else."""
    if type(candidate) is ReluConvNorm and type(candidate.relu) is nn.ReLU:
        return (((candidate.conv,), candidate.norm),)
    if type(candidate) is ReluConvBn and type(candidate.relu) is nn.ReLU:
        return ((tuple(candidate.convs), candidate.norm),)
    if type(candidate) is nn.Sequential:
        parts = [_rounds(part) for part in candidate]
        return tuple(round_ for rounds in parts for round_ in rounds) if all(parts) else ()
    return ()


def _pooling(candidate: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the pooling that a candidate is, and the normalisation behind it; None for what is not there."""
    pool, norm = candidate, None
    if type(candidate) is nn.Sequential and len(candidate) == 2:
        pool, norm = candidate
    if type(pool) is nn.MaxPool2d and pool.dilation == 1 and not pool.ceil_mode and not pool.return_indices:
        return pool, norm
    if type(pool) is nn.AvgPool2d and not (pool.count_include_pad or pool.ceil_mode or pool.divisor_override):
        return pool, norm
    return None, None


def _foldable(norm: nn.Module | None, y: Tensor) -> TypeGuard[nn.BatchNorm2d]:
    """Return whether a normalisation is by the statistics of this batch alone."""
    return (
        type(norm) is nn.BatchNorm2d
        and not norm.affine
        and (norm.training or norm.running_mean is None)
        and y.numel() > y.shape[1]
    )


def _convolve(convolution: nn.Module, x: Tensor) -> Tensor:
    """Return a convolution, a wide depthwise one with the fast gradient."""
    if _depthwise(convolution) and convolution.dilation == (1, 1):
        size = convolution.kernel_size[0]
        if convolution.padding == (size // 2, size // 2):
            return depthwise(x, convolution.weight, convolution.stride[0])
    y: Tensor = convolution(x)
    return y


def _depthwise(convolution: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(convolution, nn.Conv2d)
        and type(convolution) in (nn.Conv2d, FastDepthwise)
        and convolution.groups == convolution.in_channels == convolution.out_channels
        and convolution.kernel_size[0] == convolution.kernel_size[1]
        and convolution.kernel_size[0] % 2 == 1
        and convolution.stride[0] == convolution.stride[1]
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
    )


def _dilated_depthwise(convolution: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether it is a depthwise convolution of dilation 2 that keeps the image's size, but for its stride."""
    return (
        _depthwise(convolution)
        and convolution.dilation == (2, 2)
        and convolution.stride[0] <= 2
        and convolution.padding == (convolution.kernel_size[0] - 1,) * 2
    )


def _pointwise(convolution: nn.Module) -> bool:
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride == (1, 1)
        and convolution.padding == (0, 0)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
