"""The sub-networks of one parent: cut out along its nodes, with the parent's weights.

The parent is any network whose units are known. A point of the space says which of them stay; ``build`` copies the
parent and cuts the others away, so nothing is initialised anew and the small network starts where the parent stands.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.atoms.plan import plan_cut
from archsmith.atoms.transaction import apply_
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import seed_of
from archsmith.space.node_subsets import NodeSubsetSpace, kept_nodes


class SubnetworkFamily:
    """Cuts the sub-networks that a node-subset space describes out of a parent.

    Args:
        parent: Network whose weights are kept; never changed.
        groups: Its removable units, of which frozen ones stay whole.
        sparsity: Share of the units that go.
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes.
        over: "layer": every group loses that share. "network": all of them together do, and every group keeps a unit.

    A family satisfies what evaluators ask of one, so a sub-network can be scored untrained (all zero-cost scores) or
    trained like any other architecture.

    Raises:
        UserError: No group that may lose units, groups with a divisor or a balance, which a free subset does not keep,
            or a sparsity out of its range.
    """

    def __init__(
        self,
        parent: nn.Module,
        groups: Sequence[UnitGroup],
        *,
        sparsity: float,
        image: tuple[int, int, int],
        num_classes: int,
        over: str = "layer",
    ) -> None:
        free = [group for group in groups if not group.frozen]
        if bound := [group.name for group in free if group.divisor > 1 or group.balance]:
            raise UserError("groups", bound, allowed="groups of which any subset may stay (no divisor, no balance)")
        if not free:
            raise UserError("groups", [group.name for group in groups], allowed="at least one that is not frozen")
        if over not in ("layer", "network"):
            raise UserError("over", over, allowed="'layer' or 'network'")
        if over == "network" and (bound := [group.name for group in free if group.minimum > 1]):
            raise UserError("groups", bound, allowed="groups with a minimum of 1, since over='network' keeps just that")
        self.parent, self.groups = parent, tuple(free)
        self.image, self.num_classes = image, num_classes
        nodes = {group.name: group.size for group in free}
        kept = {name: max(free[at].minimum, n) for at, (name, n) in enumerate(kept_nodes(nodes, sparsity).items())}
        total = max(len(nodes), round(sum(nodes.values()) * (1 - sparsity)))
        self.space = NodeSubsetSpace(nodes, kept if over == "layer" else total)

    def masks(self, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return by group one bool for each unit: whether it stays."""
        return {name: torch.from_numpy(mask) for name, mask in self.space.masks(architecture).items()}

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
        """Return the sub-network with the parent's weights, in training mode and on the parent's device.

        Under ``torch.device("meta")`` it is a network of that shape without weights, to be counted.

        Args:
            architecture: A point of the space.
            seed: Not used: nothing is drawn.
        """
        wanted = torch.get_default_device()
        network = copy.deepcopy(self.parent)
        masks = self.space.masks(self.space.validate(architecture))
        removed = {name: np.flatnonzero(~mask).tolist() for name, mask in masks.items()}
        with next(network.parameters()).device:  # the cut works on the parent's values
            if any(removed.values()):
                apply_(network, plan_cut(self.groups, removed, network))
        return network.to(wanted).train() if wanted.type == "meta" else network.train()

    def fresh(self, architecture: Mapping[str, Any], *, seed: int) -> nn.Module:
        """Return a network of the same shape with new weights: what the choice of nodes is to be told apart from.

        Args:
            architecture: A point of the space.
            seed: Seed of the weights.

        Raises:
            UserError: A module of the parent has parameters of its own and no ``reset_parameters``.
        """
        network = self.build(architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "weights"))
            for name, module in network.named_modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                elif next(module.parameters(recurse=False), None) is not None:
                    raise UserError(
                        f"parent.{name}", Shown(type(module).__name__), allowed="modules with reset_parameters()"
                    )
        return network
