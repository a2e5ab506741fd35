"""What a shrinker checks before it starts, and how it follows a source of units over its cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from archsmith.atoms.declared import DeclaredAtoms, UnitSource
from archsmith.atoms.fingerprint import shapes_of
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.unit_budget import Removed
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import Shown, UserError


def checked_optimizers(
    given: torch.optim.Optimizer | Iterable[torch.optim.Optimizer], model: nn.Module, groups: Sequence[UnitGroup]
) -> list[torch.optim.Optimizer]:
    """Return the optimisers after checking that there is something to cut and that they train it.

    Raises:
        UserError: No group may be cut, something is no optimiser, or none of the parameters is trained by them.
    """
    if not groups or all(group.frozen for group in groups):
        raise UserError(
            "atoms",
            Shown(f"{len(groups)} groups, none of which may be cut"),
            allowed="a model with removable units",
            hint="atoms.explain() says what is pinned, and by which operator.",
        )
    several = isinstance(given, Iterable) and not isinstance(given, str)
    found = [given] if isinstance(given, torch.optim.Optimizer) else list(given) if several else []
    if not found or not all(isinstance(each, torch.optim.Optimizer) for each in found):
        raise UserError("optimizer", given, allowed="a torch.optim.Optimizer, or several")
    held = {id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    touched = {place.tensor for group in groups if not group.frozen for place in group.places}
    trained = [name for name in touched if name in parameters and parameters[name].requires_grad]
    if trained and not any(id(parameters[name]) in held for name in trained):
        raise UserError(
            "optimizer",
            Shown("one that holds none of the parameters that would be cut"),
            allowed="the optimiser of this very model",
            hint=f"It must be built on model.parameters() of the same object, '{sorted(trained)[0]}' for instance.",
        )
    return found


def all_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer, those that are not saved included."""
    return {**{name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}, **shapes_of(model)}


def found_anew(atoms: UnitSource, groups: Sequence[UnitGroup]) -> UnitSource:
    """Return a source of units for the network after a cut; a model that is traced is traced again."""
    if isinstance(atoms, DeclaredAtoms):
        return dataclasses.replace(atoms, groups=groups)
    from archsmith.atoms.finding import find

    again: UnitSource = find(atoms.model, atoms.example_inputs, forward=atoms.forward)
    return again


def translated(removed: Removed, groups: Sequence[UnitGroup], atoms: UnitSource) -> dict[str, list[int]]:
    """Return units in the names and positions of a source that may have found and named them anew.

    Args:
        removed: Positions by group name in ``groups``.
        groups: Groups as the shrinker has carried them over its cuts.
        atoms: The source; it owns the same positions of the same tensors.
    """
    if isinstance(atoms, DeclaredAtoms) or tuple(atoms.groups) == tuple(groups):
        return {name: units.tolist() for name, units in removed.items()}
    where = {}
    for group in atoms.groups:
        for place in group.places:
            for unit, row in enumerate(place.index):
                where[place.tensor, place.axes, tuple(row.tolist())] = (group.name, unit)
    found: dict[str, list[int]] = {}
    by_name = {group.name: group for group in groups}
    for name, units in removed.items():
        place = by_name[name].places[0]
        for unit in units.tolist():
            their_name, their_unit = where[place.tensor, place.axes, tuple(place.index[unit].tolist())]
            found.setdefault(their_name, []).append(their_unit)
    return found


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """Return the state of a generator as texts: its numbers are larger than what tensors and JSON hold."""
    state = rng.bit_generator.state
    return {"name": state["bit_generator"], **{key: str(value) for key, value in state["state"].items()}}


def set_rng_state(rng: np.random.Generator, saved: Mapping[str, Any]) -> None:
    """Put a generator into a state of ``rng_state``."""
    state: Any = rng.bit_generator.state
    state["state"] = {key: int(value) for key, value in saved.items() if key != "name"}
    rng.bit_generator.state = state
