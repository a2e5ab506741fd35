"""An independent check of cuts: the cut model against the slow masked original, and random removals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from references.masked_graph import masked_outputs
from torch import Tensor
from torch.utils._pytree import tree_leaves

from archsmith.atoms.find import FoundAtoms
from archsmith.atoms.replay import cut_copy
from archsmith.atoms.units import Cut, UnitGroup


def gap(
    found: FoundAtoms, cut: Cut, inputs: Sequence[Tensor] | Mapping[str, Tensor], call: Callable[..., Any]
) -> float:
    """Return the largest relative difference between the cut model and the masked original, in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        twin = cut_copy(found.model, cut, values=True).double()
        values = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
        doubles = [x.double() if x.is_floating_point() else x for x in values]
        with torch.no_grad():
            named = isinstance(inputs, Mapping)
            result = call(twin, **dict(zip(inputs, doubles, strict=True))) if named else call(twin, *doubles)
        outputs = [o for o in tree_leaves(result) if isinstance(o, Tensor)]
        masked = masked_outputs(found, cut.removed, doubles)
    finally:
        torch.set_default_dtype(torch.float32)
    masked = masked[len(masked) - len(outputs) :]
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(outputs, masked, strict=True)
    )


def single_and_pairs(found: FoundAtoms, limit: int) -> list[dict[str, list[int]]]:
    """Return every unit alone and every pair of units, or ``limit`` of them drawn with a fixed seed."""
    units = [(group.name, i) for group in found.groups for i in range(group.size)]
    removals = [{name: [i]} for name, i in units]
    for (a, i), (b, j) in itertools.combinations(units, 2):
        removals.append({a: [i, j]} if a == b else {a: [i], b: [j]})
    if len(removals) > limit:
        chosen = np.random.default_rng(0).choice(len(removals), limit, replace=False)
        removals = [removals[i] for i in sorted(chosen)]
    return removals


def random_removal(found: FoundAtoms, rng: np.random.Generator) -> dict[str, list[int]]:
    """Return up to half of the units of one to three groups; a balanced group loses as many in each part."""
    removed: dict[str, list[int]] = {}
    for at in rng.choice(len(found.groups), min(len(found.groups), int(rng.integers(1, 4))), replace=False):
        group = found.groups[at]
        parts = group.balance or (tuple(range(group.size)),)
        count = int(rng.integers(1, max(2, len(parts[0]) // 2 + 1)))
        removed[group.name] = sorted(int(i) for part in parts for i in rng.choice(part, count, replace=False))
    return removed


def removable_share(found: FoundAtoms, groups: Sequence[UnitGroup]) -> float:
    """Return the share of the parameters that belong to a unit of some group."""
    owned: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        for place in group.places:
            owned.setdefault(place.tensor, {}).setdefault(place.axes[0], set()).update(place.index.ravel().tolist())
    total = owned_elements = 0.0
    for name, tensor in found.model.named_parameters():
        stays = float(tensor.numel())
        for axis, positions in owned.get(name, {}).items():
            stays *= 1 - len(positions) / tensor.shape[axis]
        total += tensor.numel()
        owned_elements += tensor.numel() - stays
    return owned_elements / total
