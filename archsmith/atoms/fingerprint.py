"""What a network looks like from outside: names and shapes of its tensors, as one short text.

Cuts, records and weight files say which network they fit by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from typing import cast

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module behind ``torch.compile``, DDP, ``DataParallel`` or an ``AveragedModel``."""
    while True:
        if isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        elif isinstance(
            model,
            nn.parallel.DistributedDataParallel | nn.DataParallel | torch.optim.swa_utils.AveragedModel,
        ):
            model = cast(nn.Module, model.module)
        else:
            return model


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Return parameters, then buffers by every qualified name, and which of the names ``state_dict`` has too.

    One walk over the modules: nested iterators cost more than the cut of a small network.
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    unsaved: set[str] = set()

    def walk(module: nn.Module, prefix: str) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameters[prefix + name] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers[prefix + name] = buffer
                if name in module._non_persistent_buffers_set:
                    unsaved.add(prefix + name)
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    parameters.update(buffers)
    return parameters, parameters.keys() - unsaved


def first_names(model: nn.Module) -> dict[str, str]:
    """Return by every name of a parameter or buffer the first name of the same tensor; tied tensors share it."""
    return first_of(named_tensors(model)[0])


def first_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the same for tensors by name."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that ``model.state_dict()`` holds, by qualified name."""
    tensors, saved = named_tensors(model)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in saved}


def fingerprint(model: nn.Module) -> str:
    """Return a text of 16 characters that is equal for networks of equal tensors.

    It counts the names, shapes and kinds (floating, complex, integer) of everything in ``model.state_dict()`` and
    which of them are tied. Precision, device, memory format and values do not count, nor do buffers that are not
    saved: these may be caches. Wrappers of ``torch.compile`` and DDP are looked through.
    """
    return fingerprint_of(*named_tensors(unwrap(model)))


def fingerprint_of(tensors: Mapping[str, Tensor], saved: Set[str]) -> str:
    """Return the fingerprint of what ``named_tensors`` returned."""
    first = first_of(tensors)
    lines = [[name, list(tensors[name].shape), _kind(tensors[name]), first[name]] for name in sorted(saved)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def _kind(tensor: Tensor) -> str:
    dtype = tensor.dtype
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else "integer"
