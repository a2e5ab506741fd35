"""Writes that can be taken back: what every surgery is made of."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


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
