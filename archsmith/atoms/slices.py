"""What a cut keeps of one tensor, in memory of its own: every large tensor is read and written once.

Selecting from large matrices waits for memory, not for arithmetic. Rows are gathered in blocks that fit into the cache
and columns taken out of the block, so that nothing of intermediate size is ever written; runs of positions are copied
as they lie; and large results ask the system for large pages, which are a tenth of the cost of the small ones here.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from archsmith.atoms.units import IntArray, TensorCut

BLOCK = 1 << 21
"""Bytes of the rows that are gathered at a time."""

LARGE = 1 << 22
"""Results of at least this many bytes ask for large pages."""


@dataclass(frozen=True, eq=False)
class _Selection:
    """Positions along one axis; ``first`` is that of a run of neighbours, -1 where they are none."""

    index: Tensor
    first: int

    @classmethod
    def of(cls, index: IntArray) -> _Selection:
        count = len(index)
        run = count > 0 and int(index[-1]) - int(index[0]) == count - 1 and bool((index[1:] > index[:-1]).all())
        return cls(torch.from_numpy(np.ascontiguousarray(index)), int(index[0]) if run else -1)


Selections = dict[int, tuple[IntArray, _Selection]]
"""What is known of the arrays of one cut, by their identity: most tensors of one width share one array."""


def take(tensor: Tensor, cut: TensorCut, known: Selections | None = None) -> Tensor:
    """Return what a cut keeps of a tensor, with the strides that a new one of that shape and format would have.

    Strides decide which kernel runs, so a network that was cut must not differ from one that was built or loaded.

    Args:
        tensor: Of the shape that the cut was planned for, read only.
        cut: What remains.
        known: Kept between the tensors of one cut; filled here.
    """
    known = {} if known is None else known
    axes = {axis: _known(index, known) for axis, index in cut.axes.items()}
    if cut.joint is None:
        return _kept(tensor, axes)
    (rows_axis, columns_axis), positions = cut.joint
    moved = tensor.detach().movedim((rows_axis, columns_axis), (0, 1))
    flat = torch.from_numpy(positions.reshape(-1).copy()).to(tensor.device)
    chosen = moved.reshape(-1, *moved.shape[2:]).index_select(0, flat)
    result = chosen.reshape(*positions.shape, *moved.shape[2:]).movedim((0, 1), (rows_axis, columns_axis))
    for axis, selection in axes.items():
        result = result.index_select(axis, selection.index.to(tensor.device))
    return in_layout_of(tensor, result)


def _known(index: IntArray, known: Selections) -> _Selection:
    found = known.get(id(index))
    if found is None:
        found = known[id(index)] = (index, _Selection.of(index))
    return found[1]


def kept(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Return the kept slices, as ``take`` does.

    Args:
        tensor: Read only.
        axes: Indices to keep along each axis that is cut.
    """
    return _kept(tensor, {axis: _Selection(index, -1) for axis, index in axes.items()})


def _kept(tensor: Tensor, axes: Mapping[int, _Selection]) -> Tensor:
    result = tensor.detach()
    scattered: list[tuple[int, Tensor]] = []
    for axis, selection in axes.items():
        if selection.first >= 0:
            result = result.narrow(axis, selection.first, len(selection.index))
        else:
            scattered.append((axis, selection.index))
    if tensor.device.type == "cpu" and scattered and tensor.is_contiguous():
        if len(scattered) == len(axes) == tensor.dim() == 1:
            return result.index_select(*scattered[0])
        scattered.sort(key=lambda item: item[0])
        return in_layout_of(tensor, _selected(result, scattered))
    for axis, index in scattered:
        result = result.index_select(axis, index.to(tensor.device))
    return in_layout_of(tensor, result)


def _selected(tensor: Tensor, axes: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return the positions along each of ``axes`` (ascending) of a tensor in main memory."""
    size = list(tensor.shape)
    for axis, index in axes:
        size[axis] = len(index)
    if math.prod(size) * tensor.element_size() < LARGE:
        for axis, index in axes:
            tensor = tensor.index_select(axis, index)
        return tensor
    result = empty(size, tensor)
    if axes[0][0] or len(axes) != 2:
        for axis, index in axes[:-1]:
            tensor = tensor.index_select(axis, index)
        axis, index = axes[-1]
        return torch.index_select(tensor, axis, index, out=result)
    (_, index), (axis, columns) = axes
    step = max(BLOCK * tensor.shape[0] // (tensor.numel() * tensor.element_size()), 1)
    block = tensor.new_empty([min(step, len(index)), *tensor.shape[1:]])
    for start in range(0, len(index), step):
        rows = index[start : start + step]
        part = torch.index_select(tensor, 0, rows, out=block[: len(rows)])
        torch.index_select(part, axis, columns, out=result[start : start + step])
    return result


def in_layout_of(model: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` in memory of its own, in the memory format of ``model``; copied only where it has to be."""
    layout = torch.contiguous_format
    if is_channels_last(model) and value.dim() == 4:
        layout = torch.channels_last
    elif model.dim() == 5 and not model.is_contiguous() and model.is_contiguous(memory_format=torch.channels_last_3d):
        layout = torch.channels_last_3d
    elif value.stride() == _strides(value.shape) and not value._is_view() and _own_memory(value, model):
        return value
    if layout == torch.contiguous_format:
        return empty(value.shape, value).copy_(value)
    return torch.empty_like(value, memory_format=layout).copy_(value)


def _own_memory(value: Tensor, model: Tensor) -> bool:
    return bool(value.untyped_storage()._cdata != model.untyped_storage()._cdata)


def _strides(shape: Iterable[int]) -> tuple[int, ...]:
    """Return the strides of a new tensor; axes of length zero count as one."""
    strides, step = [], 1
    for size in reversed(list(shape)):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides are those of channels-last, also where axes of length one make both formats hold."""
    if tensor.dim() != 4:
        return False
    _, channels, height, width = tensor.shape
    return tensor.stride() == (channels * height * width, 1, width * channels, channels)


def empty(size: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new tensor without numbers, in large pages where it is large.

    Args:
        size: Its shape.
        like: Gives the device and the type.
        dtype: Another type.
    """
    return large_pages(torch.empty(size, dtype=dtype or like.dtype, device=like.device))


def large_pages(tensor: Tensor) -> Tensor:
    """Ask the system to back a large tensor that was not written yet by large pages; advice only, where it is known."""
    if tensor.device.type == "cpu" and (total := tensor.untyped_storage().nbytes()) >= LARGE:
        advise = _advice()
        if advise is not None:
            page = mmap.PAGESIZE
            start = -(-tensor.untyped_storage().data_ptr() // page) * page
            end = (tensor.untyped_storage().data_ptr() + total) // page * page
            advise(start, end - start, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _advice() -> Callable[[int, int, int], int] | None:
    """Return the system's ``madvise``; None where there is none, or none for large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
