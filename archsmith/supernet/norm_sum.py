"""Batch normalisation without scale and shift, computed together with what follows it, for mixtures of operations.

``normalised_relu`` is ``relu(norm(y))``; ``normalised_sum`` is ``sum_k w_k norm(y_k) + sum_j w_j z_j``, where a weight
and a normalisation are one multiplication for each channel, so neither the normalised maps nor the weighted ones are
ever stored. For every map three of five passes over memory go, and of what backward needs, two maps of three.

Both have derivatives of every order: a backward pass that is itself to be differentiated goes through torch's own
normalisation instead.
"""

# B batch, C channels, H height, W width, K normalised maps, J other maps

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def normalised_relu(y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``relu(norm(y))``, and mean and biased variance (C,) of the batch, which get no gradient.

    Args:
        y: (B, C, H, W), channels-last.
        eps: Added to the variance.
    """
    z, mean_C, var_C = _NormalisedRelu.apply(y, eps)  # type: ignore[no-untyped-call]
    return z, mean_C, var_C


def normalised_sum(
    weights: Tensor, maps: Sequence[Tensor], eps: Sequence[float], others: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``sum_k weights[k] * norm(maps[k]) + sum_j weights[K + j] * others[j]``, and the statistics of the maps.

    Args:
        weights: (K + J,), at least one.
        maps: K maps (B, C, H, W), channels-last.
        eps: Added to the variance of each.
        others: J maps of the same shape, taken as they are.

    Returns:
        The sum, and means and biased variances (K, C), which get no gradient.
    """
    total, mean_KC, var_KC = _NormalisedSum.apply(weights, tuple(eps), *maps, *others)  # type: ignore[no-untyped-call]
    return total, mean_KC, var_KC


class _NormalisedRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean_C, var_C = _moments(y)
        scale_C = (var_C + eps).rsqrt()
        z = torch.addcmul(_on_maps(-mean_C * scale_C), y, _on_maps(scale_C)).relu_()
        ctx.save_for_backward(y, z, mean_C, scale_C)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean_C, var_C)
        ctx.set_materialize_grads(False)
        return z, mean_C, var_C

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        y, z, mean_C, scale_C = ctx.saved_tensors
        if gradient is None:
            return None, None
        if torch.is_grad_enabled():
            (result,) = torch.autograd.grad(_normalised(y, ctx.eps).relu(), y, gradient, create_graph=True)
            return result, None
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        passed = torch.ops.aten.threshold_backward(gradient, z, 0.0)
        # Where the gradient passes, z is the normalised map.
        return _input_gradient(y, passed, mean_C, scale_C, scale_C, _sums(passed), _sums(gradient * z) / scale_C), None


class _NormalisedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, eps: tuple[float, ...], *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = len(eps)
        maps, others = given[:count], given[count:]
        statistics = [_moments(y) for y in maps]
        channels = given[0].shape[1]
        mean_KC = torch.stack([mean for mean, _ in statistics]) if maps else weights.new_zeros(0, channels)
        var_KC = torch.stack([var for _, var in statistics]) if maps else weights.new_zeros(0, channels)
        scale_KC = (var_KC + weights.new_tensor(eps).unsqueeze(1)).rsqrt()
        factor_KC = weights[:count].unsqueeze(1) * scale_KC
        numbers = weights[count:].tolist()
        if maps:
            total = torch.addcmul(_on_maps(-(factor_KC * mean_KC).sum(0)), maps[0], _on_maps(factor_KC[0]))
        else:
            total = others[0] * numbers[0]
        for y, factor_C in zip(maps[1:], factor_KC[1:], strict=True):
            total.addcmul_(y, _on_maps(factor_C))
        for z, number in list(zip(others, numbers, strict=True))[0 if maps else 1 :]:
            total.add_(z, alpha=number)
        ctx.eps = eps
        # The other maps are needed for the gradient of their weights alone.
        ctx.save_for_backward(weights, mean_KC, scale_KC, *maps, *(others if weights.requires_grad else ()))
        ctx.mark_non_differentiable(mean_KC, var_KC)
        ctx.set_materialize_grads(False)
        return total, mean_KC, var_KC

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        weights, mean_KC, scale_KC, *saved = ctx.saved_tensors
        count = len(ctx.eps)
        maps, others = saved[:count], saved[count:]
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return _differentiable(ctx, gradient, weights, maps, others)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        numbers = weights[count:].tolist()
        results: list[Tensor | None] = [None] * len(wanted)
        of_weights: list[Tensor] = []
        if maps:
            sums_C = _sums(gradient)
            scratch = torch.empty_like(gradient)
            products_KC = torch.stack([_sums(torch.mul(gradient, y, out=scratch)) for y in maps]) - mean_KC * sums_C
            for k, y in enumerate(maps):
                if wanted[k]:
                    factor_C = weights[k] * scale_KC[k]
                    results[k] = _input_gradient(y, gradient, mean_KC[k], scale_KC[k], factor_C, sums_C, products_KC[k])
            of_weights.extend((products_KC * scale_KC).sum(1).unbind())
        for j, number in enumerate(numbers):
            if wanted[count + j]:
                results[count + j] = gradient if number == 1.0 else gradient * number
            if ctx.needs_input_grad[0]:
                of_weights.append(torch.dot(_flat(gradient), _flat(others[j])))
        return torch.stack(of_weights) if ctx.needs_input_grad[0] else None, None, *results


def _differentiable(
    ctx: Any, gradient: Tensor, weights: Tensor, maps: list[Tensor], others: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a sum by operations that can be differentiated again."""
    wanted, count = ctx.needs_input_grad[2:], len(maps)
    results: list[Tensor | None] = [None] * len(wanted)
    of_weights = []
    for k, (y, eps) in enumerate(zip(maps, ctx.eps, strict=True)):
        normalised = _normalised(y, eps)
        if wanted[k]:
            (results[k],) = torch.autograd.grad(normalised, y, weights[k] * gradient, create_graph=True)
        of_weights.append((normalised * gradient).sum())
    for j in range(len(wanted) - count):
        if wanted[count + j]:
            results[count + j] = weights[count + j] * gradient
        if ctx.needs_input_grad[0]:
            of_weights.append((others[j] * gradient).sum())
    return torch.stack(of_weights) if ctx.needs_input_grad[0] else None, None, *results


def _normalised(y: Tensor, eps: float) -> Tensor:
    return functional.batch_norm(y, None, None, None, None, True, 0.0, eps)


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel."""
    mean_C, var_C = torch.ops.aten.batch_norm_update_stats(y, None, None, 0.0)
    return mean_C, var_C


def _input_gradient(
    y: Tensor, gradient: Tensor, mean_C: Tensor, scale_C: Tensor, factor_C: Tensor, sums_C: Tensor, products_C: Tensor
) -> Tensor:
    """Return ``factor * (gradient - sums / n - (y - mean) * scale^2 * products / n)``, the gradient of y.

    Args:
        y: What was normalised, (B, C, H, W).
        gradient: Of the normalised map, but for a factor.
        mean_C: Of y.
        scale_C: One over the standard deviation of y.
        factor_C: ``scale_C`` times what the normalised map was multiplied with.
        sums_C: Sum of ``gradient`` over all but channels.
        products_C: Sum of ``gradient * (y - mean)``.
    """
    number = y.numel() // y.shape[1]
    slope_C = factor_C * scale_C.square() * products_C / -number
    shift_C = factor_C * sums_C / -number - slope_C * mean_C
    return torch.addcmul(_on_maps(shift_C), gradient, _on_maps(factor_C)).addcmul_(y, _on_maps(slope_C))


def _sums(x: Tensor) -> Tensor:
    """Return the sum of every channel; the shape that sums fastest."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).sum(0)


def _flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1)


def _on_maps(x_C: Tensor) -> Tensor:
    return x_C.view(1, -1, 1, 1)
