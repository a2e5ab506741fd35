"""What can be removed: groups of equal units, declared as slices of named tensors.

Nothing here knows a network family. A group says: "unit ``i`` owns these rows of these tensors"; a block says which
groups feed one normalisation, and how few of their units may remain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from archsmith.atoms.fingerprint import named_tensors


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor along which the units of a group lie.

    Attributes:
        tensor: Qualified name of a parameter or buffer.
        axis: Axis of that tensor.
        rows: Rows of the axis that each unit owns; unit ``i`` owns ``offset + i * rows .. offset + (i + 1) * rows - 1``
            (one row for a channel, ``head_dim`` rows for an attention head).
        offset: First row of unit 0.
    """

    tensor: str
    axis: int
    rows: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Constant:
    """How a dead unit still speaks in evaluation mode, and where that constant can be absorbed.

    A unit whose scale is zero emits ``activation(shift_i)`` everywhere, so its consumer receives ``weight[:, i] *
    activation(shift_i)``: a constant for each output channel, which the next normalisation's running mean takes up
    exactly, as long as the consumer is a 1x1 convolution (or a linear layer) without padding.

    Attributes:
        shift: Name of the vector (units,) added after the scale.
        activation: "relu", "relu6" or "swish", applied to it.
        weight: Name of the consumer's weight (outputs, units, ...), trailing axes of size one.
        running_mean: Name of the buffer (outputs,) that absorbs the constant.
    """

    shift: str
    activation: str
    weight: str
    running_mean: str


@dataclass(frozen=True)
class AtomGroup:
    """Units of one kind in one place, all with the same cost.

    Attributes:
        name: Name of the group: the qualified name of the module that vanishes when its last unit dies.
        block: Name of the block whose sum it feeds.
        size: Number of units.
        scale: Name of the vector (size,) whose entries are the gates.
        slots: Every slice that a unit owns; ``scale`` is among them.
        cost: Exact cost of one unit, by cost name ("macs", "params"); integers.
        constant: Where the evaluation-mode constant of a dead unit goes, or None when units leave no constant.
    """

    name: str
    block: str
    size: int
    scale: str
    slots: tuple[Slot, ...]
    cost: Mapping[str, int]
    constant: Constant | None = None


@dataclass(frozen=True)
class AtomBlock:
    """Groups that feed one sum, and what must remain of them.

    Attributes:
        name: Qualified name of the block's module.
        groups: Names of its groups.
        minimum: Units that must stay alive over all groups together: 0 where a residual connection carries the signal.
        norm: Name of the normalisation behind the sum; when the block dies it turns into a constant for each channel.
        norm_eps: Its epsilon.
        cost: What disappears beyond its units when the whole block dies ("macs", "params").
    """

    name: str
    groups: tuple[str, ...]
    minimum: int
    norm: str
    norm_eps: float
    cost: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Atoms:
    """All removable units of one model, in a fixed order.

    Args:
        groups: The groups; names are unique.
        blocks: The blocks; every group belongs to exactly one.
    """

    groups: tuple[AtomGroup, ...]
    blocks: tuple[AtomBlock, ...]

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        owned = [name for block in self.blocks for name in block.groups]
        if sorted(names) != sorted(owned) or len(set(names)) != len(names):
            raise ValueError(f"every group must belong to exactly one block, got groups {names} and blocks of {owned}.")
        for block in self.blocks:
            units = sum(self.group(name).size for name in block.groups)
            if units < block.minimum:
                raise ValueError(f"block '{block.name}' has {units} units, fewer than its minimum of {block.minimum}.")

    def __iter__(self) -> Iterator[AtomGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        """Return the number of units, all groups together."""
        return sum(group.size for group in self.groups)

    def group(self, name: str) -> AtomGroup:
        """Return the group called ``name``; KeyError when there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no atom group {name!r}; there are {[g.name for g in self.groups]}")

    def cost(self, name: str) -> int:
        """Return the summed cost of all units ("macs" or "params"), what blocks add themselves left out."""
        return sum(group.cost[name] * group.size for group in self.groups)

    def scales(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scale vector of every group, looked up in ``tensors`` by name (not copied)."""
        return {group.name: tensors[group.scale].detach() for group in self.groups}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of ``model`` by qualified name; shared tensors appear under each name."""
    return named_tensors(model)[0]


def activate(name: str, x: Tensor) -> Tensor:
    """Return the activation called ``name`` of ``x``: "relu", "relu6" or "swish"."""
    if name == "relu":
        return torch.relu(x)
    if name == "relu6":
        return x.clamp(0, 6)
    if name == "swish":
        return x * torch.sigmoid(x)
    raise ValueError(f"activation: got {name!r}; allowed: 'relu', 'relu6', 'swish'.")
