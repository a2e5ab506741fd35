"""Writes that can be taken back, and slices that keep a tensor's memory format: what every surgery is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.atoms.units import TensorCut


class Edits:
    """A context in which every write is undone, in reverse order, when the block ends with an exception."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._undo.pop_all()  # reached the end: keep what was done
        else:
            self._undo.close()

    def on_undo(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)`` when the edits are taken back; to be registered before the write."""
        self._undo.callback(function, *args)

    def set_tensor(self, tensor: Tensor, data: Tensor, grad: Tensor | None = None) -> None:
        """Give a parameter or buffer other data and another gradient; the object stays the same."""
        self.on_undo(set_tensor, tensor, tensor.data, tensor.grad)
        set_tensor(tensor, data, grad)

    def set_item(self, mapping: Any, key: Any, value: Any) -> None:
        """Set an existing item of a dictionary or list."""
        self.on_undo(mapping.__setitem__, key, mapping[key])
        mapping[key] = value

    def set_attribute(self, owner: object, name: str, value: Any) -> None:
        """Set an existing attribute; one that refuses has nothing to undo."""
        before = getattr(owner, name)

        def restore() -> None:
            if getattr(owner, name) is not before:
                setattr(owner, name, before)

        self.on_undo(restore)
        setattr(owner, name, value)

    def restore_on_undo(self, mapping: MutableMapping[Any, Any]) -> None:
        """Bring the items of a dictionary back on undo, their order included."""
        before = dict(mapping)

        def restore() -> None:
            mapping.clear()
            mapping.update(before)

        self.on_undo(restore)


def set_tensor(tensor: Tensor, data: Tensor, grad: Tensor | None = None) -> None:
    """Replace the data and the gradient of a tensor in place.

    A loss that is still referenced keeps the gradient accumulator of its parameters alive, with their old shape; the
    detour over another type makes torch forget it, so that the next backward pass finds a fresh one. Autocast keeps
    casts of parameters by their object, so it has to forget, too.
    """
    tensor.grad = None  # a gradient must never have another shape than its parameter
    if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
        torch.clear_autocast_cache()
    tensor.data = data
    tensor.grad = grad


def kept(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Return the kept slices with the strides that a new tensor of that shape and memory format would have.

    Strides decide which kernel runs, so a network that was cut must not differ from one that was built or loaded.

    Args:
        tensor: Read only.
        axes: Indices to keep along each axis that is cut.
    """
    result = tensor.detach()
    for axis, index in axes.items():
        result = result.index_select(axis, index.to(tensor.device))
    return in_layout_of(tensor, result)


def take(tensor: Tensor, cut: TensorCut) -> Tensor:
    """Return what a cut keeps of a tensor (see ``kept``); jointly cut axes included.

    Args:
        tensor: Of the shape that the cut was planned for, read only.
        cut: What remains.
    """
    plain = {axis: torch.from_numpy(np.ascontiguousarray(index)) for axis, index in cut.axes.items()}
    if cut.joint is None:
        return kept(tensor, plain)
    (rows_axis, columns_axis), positions = cut.joint
    moved = tensor.detach().movedim((rows_axis, columns_axis), (0, 1))
    flat = torch.from_numpy(positions.reshape(-1).copy()).to(tensor.device)
    chosen = moved.reshape(-1, *moved.shape[2:]).index_select(0, flat)
    result = chosen.reshape(*positions.shape, *moved.shape[2:]).movedim((0, 1), (rows_axis, columns_axis))
    for axis, index in plain.items():
        result = result.index_select(axis, index.to(tensor.device))
    return in_layout_of(tensor, result)


def in_layout_of(model: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` in memory of its own, in the memory format of ``model``; copied only where it has to be."""
    layout = torch.contiguous_format
    if is_channels_last(model) and value.dim() == 4:
        layout = torch.channels_last
    elif model.dim() == 5 and not model.is_contiguous() and model.is_contiguous(memory_format=torch.channels_last_3d):
        layout = torch.channels_last_3d
    elif value.stride() == _strides(value.shape) and value.data_ptr() != model.data_ptr() and not value._is_view():
        return value
    return torch.empty_like(value, memory_format=layout).copy_(value)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a new tensor; axes of length zero count as one."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides are those of channels-last, also where axes of length one make both formats hold."""
    if tensor.dim() != 4:
        return False
    _, channels, height, width = tensor.shape
    return tensor.stride() == (channels * height * width, 1, width * channels, channels)
