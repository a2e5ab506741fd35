"""Units written down by hand, with the network they belong to: what ``find`` returns for networks it can trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from archsmith.atoms.fingerprint import unwrap
from archsmith.atoms.plan import plan_cut
from archsmith.atoms.units import Cut, IntArray, UnitGroup


class UnitSource(Protocol):
    """What a shrinker needs to know about a network: ``FoundAtoms`` and ``DeclaredAtoms`` are such."""

    @property
    def model(self) -> nn.Module:
        """The network."""

    @property
    def groups(self) -> Sequence[UnitGroup]:
        """Its units."""

    @property
    def example_inputs(self) -> Any:
        """What it is called with."""

    @property
    def forward(self) -> Callable[..., Any] | None:
        """How to call it where ``model(*inputs)`` is not the way."""

    def plan(self, removed: Mapping[str, Any]) -> Cut:
        """Plan a removal; refuses what would not be a network."""


@dataclass(frozen=True, eq=False)
class DeclaredAtoms:
    """Hand-declared units of a network.

    Attributes:
        model: The network.
        example_inputs: Arguments of one call; only shapes and types matter.
        groups: Its units.
        forward: ``forward(model, *inputs)`` where ``model(*inputs)`` is not the way.
        attributes: New values of the user's module attributes after a removal, by dotted path, from the numbers of kept
            units by group name.
    """

    model: nn.Module
    example_inputs: Any
    groups: Sequence[UnitGroup]
    forward: Callable[..., Any] | None = None
    attributes: Callable[[Mapping[str, int]], Mapping[str, Any]] | None = None

    def plan(self, removed: Mapping[str, Iterable[int]]) -> Cut:
        """Plan a removal; see ``archsmith.atoms.plan.plan_cut``."""
        gone = {name: len(set(map(int, units))) for name, units in removed.items()}
        kept = {group.name: group.size - gone.get(group.name, 0) for group in self.groups}
        return plan_cut(self.groups, removed, self.model, self.attributes(kept) if self.attributes else None)


def copy_without(
    atoms: UnitSource, removed: Mapping[str, IntArray], *, numbers: bool = True, cut: Cut | None = None
) -> nn.Module:
    """Return a copy of the network without some units.

    Args:
        atoms: The network and its units, read only.
        removed: Positions by group name.
        numbers: Copy the values too; False leaves tensors without numbers on the meta device, which is enough to count.
        cut: The plan, where it was made already.

    Raises:
        CutRefused: The removal is not possible.
    """
    from archsmith.atoms.transaction import apply_

    model = unwrap(atoms.model)
    memo: dict[int, Any] = {}
    if not numbers:
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    twin = copy.deepcopy(model, memo)
    apply_(twin, cut or atoms.plan(removed))
    return twin
