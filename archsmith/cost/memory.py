"""Memory of a network: the activations that must be alive at once, and the weights."""

from __future__ import annotations

from torch import nn

from archsmith.graph import Inputs, export_graph, peak_activation


def peak_activation_bytes(module: nn.Module, inputs: Inputs) -> int:
    """Return the most bytes that activations need at once during one forward pass in evaluation mode.

    Counted are inputs, intermediate results and outputs while they are alive, for the whole batch given; not weights,
    buffers, scratch memory inside operators, or what a backward pass would keep.

    Args:
        module: Network on any device, the meta device included; left as it is.
        inputs: One tensor or a tuple of arguments; only shapes and types matter.

    Raises:
        UserError: The module can not be exported, see ``archsmith.graph.export_graph``.

    Example:
        >>> peak_activation_bytes(nn.Linear(3, 2), torch.zeros(1, 3))
        20
    """
    return peak_activation(export_graph(module, inputs)).bytes


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of ``module`` in their own precision, shared tensors once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
