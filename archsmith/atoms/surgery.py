"""Cutting atoms: one transaction over the model, its optimiser and every named table.

``cut_`` changes parameters in place (``param.data = slice``), so ties, optimisers and the user's references survive.
Everything is computed before the first change; if anything fails on the way, what was changed is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.atoms.attributes import refresh_attributes
from archsmith.atoms.edits import Edits
from archsmith.atoms.groups import AtomBlock, Atoms, activate, tensors_of
from archsmith.atoms.score import Keep
from archsmith.atoms.slices import kept
from archsmith.atoms.units import TensorCut


@dataclass(frozen=True)
class CutReport:
    """What a cut did.

    Attributes:
        removed: Units removed by group name (groups that lost none are left out).
        dead_groups: Groups that vanished with their last unit.
        dead_blocks: Blocks that turned into a constant for each channel.
        removed_cost: Summed cost of the removed units by cost name.
    """

    removed: Mapping[str, int]
    dead_groups: tuple[str, ...]
    dead_blocks: tuple[str, ...]
    removed_cost: Mapping[str, int]


Collapse = Callable[[nn.Module], None]
"""Turns the module of a block without units into one that adds its normalisation's bias, keeping that parameter."""


def absorb_constants(atoms: Atoms, keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the running means that keep the evaluation output when the units outside ``keep`` go.

    A dead unit emits ``act(shift_i)`` everywhere (exactly if its scale is zero), and the consumer turns it into
    ``p_i * act(shift_i)``. Subtracting the sum over dead units from the running mean behind the sum restores the
    output. With scales of magnitude up to 1e-3 the gap is at most
    ``|w_out| / sqrt(var_out + eps) * sum |p_i| |g_i| max|z_i|`` (z: normalised input of the scale).

    Args:
        atoms: The units.
        keep: Boolean mask (size,) by group name.
        tensors: Tensors by qualified name; read only. Model weights and their moving averages are two such tables.

    Returns:
        New value by name of the running mean; only those that change.
    """
    changed: dict[str, Tensor] = {}
    for group in atoms:
        dead = ~keep[group.name]
        path = group.constant
        if path is None or not bool(dead.any()) or path.running_mean not in tensors:
            continue
        weight = tensors[path.weight].detach()[:, dead].flatten(1)
        constant = weight @ activate(path.activation, tensors[path.shift].detach()[dead])
        changed[path.running_mean] = changed.get(path.running_mean, tensors[path.running_mean]) - constant
    return changed


def collapsed_constant(block: AtomBlock, tensors: Mapping[str, Tensor], running_mean: Tensor) -> Tensor:
    """Return the constant (channels,) that a block without units adds in evaluation mode.

    It is the normalisation of zero: ``bias - weight * running_mean / sqrt(running_var + eps)``, with the running mean
    after absorption.
    """
    weight, bias = tensors[f"{block.norm}.weight"].detach(), tensors[f"{block.norm}.bias"].detach()
    return bias - weight * running_mean * torch.rsqrt(tensors[f"{block.norm}.running_var"] + block.norm_eps)


@torch.no_grad()
def cut_(
    model: nn.Module,
    atoms: Atoms,
    keep: Keep,
    *,
    collapse: Collapse,
    optimizer: torch.optim.Optimizer | None = None,
    tables: Sequence[MutableMapping[str, Tensor]] = (),
    absorb: bool = True,
) -> CutReport:
    """Remove the units outside ``keep`` from the model, the optimiser and the tables, or change nothing at all.

    Args:
        model: Network, changed in place; parameters keep their identity.
        atoms: Its units; describe the new network with fresh ``Atoms`` afterwards.
        keep: Boolean mask (size,) by group name, every group present.
        collapse: Called with the module of a block that lost all its units. The normalisation's bias already holds
            the block's constant; the callback keeps that parameter and drops the rest.
        optimizer: Its state tensors of a parameter's shape are sliced alike; step counts stay. The order of parameters
            and their groups stays; parameters of vanished modules leave it.
        tables: Further tensors by qualified name (moving averages, masks), changed in place; names that the model loses
            leave them. Tables that hold a block's normalisation absorb the constants with their own values.
        absorb: Correct the running means, so that the evaluation output stays (see ``absorb_constants``).

    Returns:
        What was removed.

    Raises:
        ValueError: A mask is missing or has the wrong size, a tensor's axis does not fit its group, or a block would
            fall below its minimum. Nothing is changed then.
    """
    model_tensors = tensors_of(model)
    _check(atoms, keep, model_tensors)
    dead_groups = [group.name for group in atoms if not bool(keep[group.name].any())]
    dead_blocks = [block for block in atoms.blocks if block.groups and set(block.groups) <= set(dead_groups)]
    vanishing = [*dead_groups, *(block.name for block in dead_blocks)]
    selections = _selections(atoms, keep, vanishing, model_tensors)
    old_shapes = {name: model_tensors[name].shape for name in selections}
    new_model, *new_tables = (
        _new_values(atoms, keep, selections, dead_blocks, table, absorb) for table in (model_tensors, *tables)
    )
    new_state = _sliced_state(optimizer, model_tensors, selections, old_shapes)

    with Edits() as edits:
        _replace_model_tensors(model, new_model, selections, edits)
        _replace_state(optimizer, new_state, edits)
        for name in dead_groups:
            _delete_module(model, name, edits)
        for block in dead_blocks:
            module = model.get_submodule(block.name)
            edits.restore_on_undo(module._modules)
            collapse(module)
        _drop_parameters(optimizer, model, edits)
        names = set(tensors_of(model))
        for table, new in zip(tables, new_tables, strict=True):
            _replace_table(table, new, names, edits)
        _refresh_attributes(model, selections, edits)

    removed = {g.name: g.size - int(keep[g.name].sum()) for g in atoms}
    costs = sorted({cost for g in atoms for cost in g.cost})
    return CutReport(
        removed={name: count for name, count in removed.items() if count},
        dead_groups=tuple(dead_groups),
        dead_blocks=tuple(block.name for block in dead_blocks),
        removed_cost={cost: sum(g.cost[cost] * removed[g.name] for g in atoms) for cost in costs},
    )


def _check(atoms: Atoms, keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for group in atoms:
        mask = keep.get(group.name)
        if mask is None or mask.dtype != torch.bool or mask.shape != (group.size,):
            shape = None if mask is None else (tuple(mask.shape), mask.dtype)
            raise ValueError(f"keep['{group.name}'] must be a boolean tensor of shape ({group.size},), got {shape}.")
        for slot in group.slots:
            if tensors[slot.tensor].shape[slot.axis] < slot.offset + group.size * slot.rows:
                raise ValueError(
                    f"group '{group.name}' has {group.size} units of {slot.rows} rows, but axis {slot.axis} of "
                    f"'{slot.tensor}' has length {tensors[slot.tensor].shape[slot.axis]}; describe the present model."
                )
    for block in atoms.blocks:
        left = sum(int(keep[name].sum()) for name in block.groups)
        if left < block.minimum:
            raise ValueError(
                f"block '{block.name}' would keep {left} atoms, it needs at least {block.minimum}: it has no residual "
                "connection to carry the signal; use archsmith.atoms.score.protect on the mask first."
            )


Selection = dict[int, Tensor]
"""For one tensor: the rows to keep (indices, ascending) along each axis that is cut."""


def _selections(
    atoms: Atoms, keep: Mapping[str, Tensor], vanishing: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, Selection]:
    """Return what each tensor of the model keeps; tensors of vanishing modules are left out.

    Several groups may share an axis (a concatenation), so their dead rows are collected before anything is cut.
    """
    masks: dict[tuple[str, int], Tensor] = {}
    for group in atoms:
        dead = torch.nonzero(~keep[group.name]).flatten()
        if len(dead) == 0:
            continue
        for slot in group.slots:
            if slot.tensor.startswith(tuple(f"{name}." for name in vanishing)):
                continue
            length = tensors[slot.tensor].shape[slot.axis]
            mask = masks.setdefault((slot.tensor, slot.axis), torch.ones(length, dtype=torch.bool))
            rows = dead[:, None] * slot.rows + torch.arange(slot.rows) + slot.offset
            mask[rows.flatten()] = False
    selections: dict[str, Selection] = {}
    for (name, axis), mask in masks.items():
        selections.setdefault(name, {})[axis] = torch.nonzero(mask).flatten()
    return selections


def _new_values(
    atoms: Atoms,
    keep: Mapping[str, Tensor],
    selections: Mapping[str, Selection],
    dead_blocks: Sequence[AtomBlock],
    table: Mapping[str, Tensor],
    absorb: bool,
) -> dict[str, Tensor]:
    """Return the new value of every tensor of ``table`` that changes; nothing is modified."""
    new = absorb_constants(atoms, keep, table) if absorb else {}
    for block in dead_blocks:
        name = f"{block.norm}.running_mean"
        if name in table:
            new[f"{block.norm}.bias"] = collapsed_constant(block, table, new.get(name, table[name]))
    for name, selection in selections.items():
        if name in table:
            new[name] = kept(table[name], selection)
    return new


def _replace_model_tensors(
    model: nn.Module, new: Mapping[str, Tensor], selections: Mapping[str, Selection], edits: Edits
) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    for name, value in new.items():
        owner_name, _, leaf = name.rpartition(".")
        if name in parameters:
            parameter = parameters[name]
            if id(parameter) in done:  # a tied tensor is cut once
                continue
            done.add(id(parameter))
            grad = parameter.grad
            if grad is not None and name in selections:
                grad = kept(grad, selections[name])
            edits.set_tensor(parameter, value, grad)
        else:
            owner = model.get_submodule(owner_name)
            edits.set_item(owner._buffers, leaf, value)


def _sliced_state(
    optimizer: torch.optim.Optimizer | None,
    tensors: Mapping[str, Tensor],
    selections: Mapping[str, Selection],
    old_shapes: Mapping[str, torch.Size],
) -> dict[tuple[int, str], tuple[dict[str, Any], Tensor]]:
    """Return the new state tensors by (parameter id, key), with the state they belong to; scalars stay as they are."""
    sliced: dict[tuple[int, str], tuple[dict[str, Any], Tensor]] = {}
    for name, selection in selections.items():
        if optimizer is None or (parameter := tensors[name]) not in optimizer.state:
            continue
        state = optimizer.state[parameter]
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != old_shapes[name]:
                raise ValueError(
                    f"optimiser state '{key}' of '{name}' has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(old_shapes[name])}: factored states cannot be sliced; use SGD, Adam, AdamW or RMSprop."
                )
            sliced[id(parameter), key] = (state, kept(value, selection))
    return sliced


def _replace_state(
    optimizer: torch.optim.Optimizer | None,
    new: Mapping[tuple[int, str], tuple[dict[str, Any], Tensor]],
    edits: Edits,
) -> None:
    for (_, key), (state, value) in new.items():
        edits.set_item(state, key, value)


def _delete_module(model: nn.Module, name: str, edits: Edits) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    edits.restore_on_undo(parent._modules)
    del parent._modules[leaf]


def _drop_parameters(optimizer: torch.optim.Optimizer | None, model: nn.Module, edits: Edits) -> None:
    """Let parameters that are no longer in the model leave the optimiser; the order of the others stays."""
    if optimizer is None:
        return
    living = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        before = group["params"]
        after = [p for p in before if id(p) in living]
        if len(after) == len(before):
            continue
        edits.set_item(group, "params", after)
        for parameter in before:
            if id(parameter) not in living and parameter in optimizer.state:
                edits.on_undo(optimizer.state.__setitem__, parameter, optimizer.state[parameter])
                del optimizer.state[parameter]


def _replace_table(
    table: MutableMapping[str, Tensor], new: Mapping[str, Tensor], names: set[str], edits: Edits
) -> None:
    edits.restore_on_undo(table)
    table.update(new)
    for name in list(table):
        if name not in names:
            del table[name]


def _refresh_attributes(model: nn.Module, selections: Mapping[str, Selection], edits: Edits) -> None:
    """Make the attributes of torch's own layers agree with the shapes of their weights."""
    cuts = {name: TensorCut({axis: rows.numpy() for axis, rows in axes.items()}) for name, axes in selections.items()}
    refresh_attributes(model, cuts, edits)
