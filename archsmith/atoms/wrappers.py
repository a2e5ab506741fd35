"""Wrappers of distributed training around a network whose shapes have changed."""

from __future__ import annotations

import gc
import hashlib
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from archsmith.atoms.edits import Edits, set_tensor
from archsmith.atoms.fingerprint import unwrap
from archsmith.atoms.record import record
from archsmith.core.errors import ArchsmithError, Shown, UserError


def forbid_wrappers(model: nn.Module, edits: Edits) -> list[str]:
    """Make every DDP wrapper of ``model`` raise from now on instead of training without exchanging gradients.

    Its buckets have the old sizes and its hooks sit on the old accumulators, so it could only go wrong, and not always
    loudly.

    Args:
        model: The module inside, cut already.
        edits: Allows the wrappers again on failure.

    Returns:
        A note for each wrapper found.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    notes = []
    for wrapper in _wrappers_of(model):
        handle = wrapper.register_forward_pre_hook(_refuse)
        edits.on_undo(handle.remove)
        notes.append("a DistributedDataParallel wrapper must be renewed: model = rewrap(model)")
    return notes


def _wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    objects = (o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel))
    return [wrapper for wrapper in objects if unwrap(wrapper) is model]


def _refuse(wrapper: nn.Module, inputs: Any) -> NoReturn:
    raise UserError(
        "model",
        Shown("a DistributedDataParallel wrapper older than the last cut"),
        allowed="a wrapper made after it",
        hint="Use model = archsmith.atoms.wrappers.rewrap(model) after every cut, in all processes.",
    )


def rewrap(wrapper: nn.Module) -> nn.Module:
    """Return a new DDP wrapper with the settings of an old one; other modules are returned as they are.

    To be called by all processes after a cut, in the same order. A module from ``torch.compile`` needs no new wrapper,
    it compiles again by itself.

    Raises:
        ArchsmithError: The processes did not make the same cuts.
        UserError: DDP is inside a ``torch.compile`` wrapper, whose settings are unknown.
    """
    if not isinstance(wrapper, DistributedDataParallel):
        if isinstance(wrapper._modules.get("_orig_mod"), DistributedDataParallel):
            raise UserError("model", Shown("torch.compile around DDP"), allowed="DDP, whose settings can be read")
        return wrapper
    model = wrapper.module
    check_same_cuts(model, wrapper.process_group)
    for parameter in model.parameters():  # the old wrapper's hooks go with the old gradient accumulators
        if parameter.requires_grad:
            set_tensor(parameter, parameter.data, parameter.grad)
    renewed = DistributedDataParallel(
        model,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        dim=wrapper.dim,
        broadcast_buffers=wrapper.broadcast_buffers,
        process_group=wrapper.process_group,
        bucket_cap_mb=wrapper.bucket_bytes_cap / 2**20,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
        mixed_precision=wrapper.mixed_precision,
    )
    for hook, state in wrapper._comm_hooks:
        renewed.register_comm_hook(state, hook)
    return renewed


def check_same_cuts(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compare the records of all processes; a collective call.

    Raises:
        ArchsmithError: They differ. DDP itself compares shapes only: other channels of equal number would go unnoticed.
    """
    digest = hashlib.sha256(record(model).to_json().encode()).digest()[:8]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    others = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    if others:
        raise ArchsmithError(
            f"processes {others} cut other units than process 0: every process must make the same cuts; compute the "
            "scores from synchronised numbers, or decide in one process and broadcast the decision."
        )
