"""What a network looks like from outside: names and shapes of its tensors, as one short text.

Cuts, records and weight files say which network they fit by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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


def first_names(model: nn.Module) -> dict[str, str]:
    """Return by every name of a parameter or buffer the first name of the same tensor; tied tensors share it."""
    seen: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: seen.setdefault(id(tensor), name) for name, tensor in named}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that ``model.state_dict()`` holds, by qualified name."""
    return {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def fingerprint(model: nn.Module) -> str:
    """Return a text of 16 characters that is equal for networks of equal tensors.

    It counts the names, shapes and kinds (floating, complex, integer) of everything in ``model.state_dict()`` and
    which of them are tied. Precision, device, memory format and values do not count, nor do buffers that are not
    saved: these may be caches. Wrappers of ``torch.compile`` and DDP are looked through.
    """
    model = unwrap(model)
    return fingerprint_of_state(model.state_dict(keep_vars=True), first_names(model))


def fingerprint_of_state(state: Mapping[str, Tensor], ties: Mapping[str, str]) -> str:
    """Return the fingerprint of tensors by name; ``ties`` gives the first name of tied ones."""
    lines = [
        [name, list(tensor.shape), _kind(tensor), ties.get(name, name)]
        for name, tensor in sorted(state.items())
        if isinstance(tensor, Tensor)
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def _kind(tensor: Tensor) -> str:
    if tensor.dtype.is_complex:
        return "complex"
    return "floating" if tensor.dtype.is_floating_point else "integer"
