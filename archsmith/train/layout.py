"""Memory formats of a network's weights."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def use_memory_format_(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out every four-dimensional parameter and buffer in ``memory_format``, in place.

    Unlike ``Module.to(memory_format=...)`` this also sets the strides where both formats hold the same bytes (axes of
    length one), so a network that was built, cut or loaded has the same strides and runs the same kernels bit for bit.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = torch.empty_like(tensor, memory_format=memory_format).copy_(tensor)
