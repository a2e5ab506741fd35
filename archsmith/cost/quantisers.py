"""Quantisers: from a range of values to a scale, a zero point and integers, and back.

Weights become int8 in [-128, 127], per output channel or per tensor; activations uint8 in [0, 255], per tensor.

- symmetric: ``s = max|w| / 127.5``, ``z = 0``
- asymmetric: ``s = (max - min) / 255`` with zero inside the range, ``z = low - round(min / s)``, clamped
- ``q = clamp(round(x / s) + z, low, high)``, ``x' = (q - z) * s``

These are the min-max observers of torch (127.5, where other toolkits take 127), with which SimQ-NAS (arXiv 2312.13301)
quantises. The same numbers go into the simulation and into the ONNX file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from archsmith.core.errors import Shown, UserError
from archsmith.space.quantisation import LayerPolicy

SMALLEST_SCALE = float(np.finfo(np.float32).eps)
"""Of torch's observers: a range without extent must not divide by zero."""

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class Quantiser:
    """Scale and zero point of a tensor or of its channels.

    Args:
        scale: Float32, shape () or (channels,).
        zero_point: Integers of the same shape.
        low: Smallest integer.
        high: Largest integer.
        axis: Axis of the channels; None for one scale.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    low: int
    high: int
    axis: int | None = None

    def quantise(self, values: Array) -> Array:
        """Return the integers of ``values``, in the type of ``values``."""
        scale, zero = self._like(values)
        if isinstance(values, Tensor):
            return torch.clamp(torch.round(values / scale) + zero, self.low, self.high)
        return cast(Array, np.clip(np.round(values / scale) + zero, self.low, self.high))

    def dequantise(self, integers: Array) -> Array:
        """Return the values that integers stand for."""
        scale, zero = self._like(integers)
        return (integers - zero) * scale

    def fake(self, values: Array) -> Array:
        """Return what is left of ``values`` after quantising and dequantising."""
        return self.dequantise(self.quantise(values))

    def _like(self, values: Any) -> tuple[Any, Any]:
        """Return scale and zero point in the kind, and broadcast to the axes, of ``values``."""
        shape = [1] * values.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        scale = self.scale.reshape(shape if self.axis is not None else ())
        zero = self.zero_point.reshape(scale.shape).astype(np.float32)
        if isinstance(values, Tensor):
            return (
                torch.from_numpy(np.ascontiguousarray(scale)).to(values.device, values.dtype),
                torch.from_numpy(np.ascontiguousarray(zero)).to(values.device, values.dtype),
            )
        return scale, zero


def weight_quantiser(weight: np.ndarray, policy: LayerPolicy, *, axis: int = 0) -> Quantiser:
    """Return the int8 quantiser of a weight, by its minimum and maximum.

    Args:
        weight: Float32 of any shape, finite.
        policy: Granularity and scheme; its precision is not looked at.
        axis: Axis of the output channels.

    Raises:
        UserError: A weight that is empty or not finite.
    """
    if not weight.size or not np.isfinite(weight).all():
        raise UserError("weight", Shown(f"shape {weight.shape}"), allowed="finite numbers, at least one")
    per_channel = policy.granularity == "per-channel" and weight.ndim > 0
    over = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim) if per_channel else None
    low, high = weight.min(axis=over), weight.max(axis=over)
    scale, zero = _scale(np.atleast_1d(low), np.atleast_1d(high), policy.scheme == "symmetric", -128, 127)
    if per_channel:
        return Quantiser(scale, zero, -128, 127, axis % weight.ndim)
    return Quantiser(scale[0], zero[0], -128, 127)


def activation_quantiser(low: float, high: float) -> Quantiser:
    """Return the uint8 quantiser of activations between ``low`` and ``high``, zero included."""
    scale, zero = _scale(np.array([low], np.float32), np.array([high], np.float32), False, 0, 255)
    return Quantiser(scale[0], zero[0], 0, 255)


def _scale(
    low: np.ndarray, high: np.ndarray, symmetric: bool, smallest: int, largest: int
) -> tuple[np.ndarray, np.ndarray]:
    low = np.minimum(low.astype(np.float32), np.float32(0))
    high = np.maximum(high.astype(np.float32), np.float32(0))
    eps = np.float32(SMALLEST_SCALE)
    if symmetric:
        scale = np.maximum(np.maximum(-low, high) / np.float32((largest - smallest) / 2), eps)
        return scale, np.zeros(scale.shape, np.int32)
    scale = np.maximum((high - low) / np.float32(largest - smallest), eps)
    zero = np.clip(smallest - np.round(low / scale), smallest, largest)
    return scale, zero.astype(np.int32)
