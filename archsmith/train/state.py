"""Optimiser state as named tensors, so that checkpoints need no pickles and no parameter order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_PREFIX = "optimizer."
_SEPARATOR = "::"


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state tensors as ``optimizer.<parameter>::<key>``.

    Raises:
        TypeError: A state value is not a tensor (none of torch's standard optimisers has such).
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimiser state '{key}' of '{name}' is a {type(value).__name__}, not a tensor.")
            tensors[f"{_PREFIX}{name}{_SEPARATOR}{key}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put state tensors back, in the memory layout of their parameters; what the optimiser had is dropped."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in tensors.items():
        if not name.startswith(_PREFIX):
            continue
        parameter_name, key = name.removeprefix(_PREFIX).split(_SEPARATOR)
        parameter = parameters[parameter_name]
        same = value.shape == parameter.shape
        target = torch.empty_like(parameter, memory_format=torch.preserve_format) if same else torch.empty_like(value)
        optimizer.state[parameter][key] = target.copy_(value).detach()
