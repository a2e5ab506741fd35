"""Units switched off without a cut: the tensors of a network with the slices of absent units set to zero.

Everything that a unit owns is zero, its columns at the consumers too, so whatever its activation makes of zero goes no
further: the network computes what the cut one does. A mask is data, so many of them can be tried at once with
``torch.func.vmap``, and gradients reach the kept units only.
"""

# U units of a group

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from archsmith.atoms.groups import tensors_of
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import Shown, UserError


class UnitMasks:
    """Applies masks to a network's tensors.

    Args:
        model: The network; only looked at.
        groups: Its units.

    Raises:
        UserError: A group whose removal changes a reduction (``UnitGroup.changes``): a mask does not show that; or
            a group that does not fit the model's tensors.
    """

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        self.model = model
        self.groups = {group.name: group for group in groups}
        tensors = tensors_of(model)
        self._owners: dict[str, list[tuple[str, Tensor]]] = {}
        for group in groups:
            if group.changes:
                raise UserError(
                    f"groups['{group.name}']",
                    Shown(f"units whose removal changes {', '.join(group.changes)}"),
                    allowed="units that leave no trace once they are zero",
                )
            for place in group.places:
                if place.tensor not in tensors:
                    raise UserError("groups", place.tensor, allowed="names of the model's parameters and buffers")
                owner = _owners(place.axes, tensors[place.tensor].shape, torch.from_numpy(place.index), group)
                self._owners.setdefault(place.tensor, []).append((group.name, owner.to(tensors[place.tensor].device)))

    def tensors(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that change, masked; those of the model are left alone and receive the gradients.

        Args:
            masks: For every group (U,), 1 or True where a unit stays, on the model's device. Under ``vmap`` the masks
                are the batched ones.
        """
        own, found = tensors_of(self.model), {}
        always = {name: torch.cat([mask, torch.ones_like(mask[:1])]) for name, mask in masks.items()}
        for name, owners in self._owners.items():
            tensor = own[name]
            for group, owner in owners:
                tensor = tensor * always[group][owner].to(tensor.dtype)
            found[name] = tensor
        return found

    def call(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the output with ``tensors`` in place of the model's own, in the mode that the model is in."""
        output = functional_call(self.model, dict(tensors), (inputs,))
        assert isinstance(output, Tensor)
        return output

    def __call__(self, inputs: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the output of the masked network."""
        return self.call(inputs, self.tensors(masks))


def _owners(axes: tuple[int, ...], shape: torch.Size, index_Uk: Tensor, group: UnitGroup) -> Tensor:
    """Return for each position along ``axes`` its unit, or the number of units where it has none; broadcasts."""
    length = math.prod(shape[axis] for axis in axes)
    if len(index_Uk) != group.size or int(index_Uk.max()) >= length:
        raise UserError(
            f"groups['{group.name}']",
            Shown(f"{tuple(index_Uk.shape)} positions up to {int(index_Uk.max())}"),
            allowed=f"rows for {group.size} units, positions below {length}",
        )
    owner = torch.full((length,), group.size, dtype=torch.int64)
    owner[index_Uk] = torch.arange(group.size)[:, None].expand_as(index_Uk)
    order = sorted(range(len(axes)), key=lambda at: axes[at])
    owner = owner.reshape([shape[axis] for axis in axes]).permute(order)
    return owner.reshape([size if axis in axes else 1 for axis, size in enumerate(shape)])
