"""Units of plain chains of layers, declared by hand: multi-layer perceptrons and small convolutional networks.

In a chain the rule is short: a hidden unit owns its row of the layer that makes it, its entries of the normalisation
behind, and its columns of the next layer. Networks with branches need more than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.atoms.units import Place, UnitGroup
from archsmith.core.errors import Shown, UserError

_CHANNEL_BY_CHANNEL = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
"""Modules through which every unit goes by itself."""


def chain_groups(network: nn.Sequential) -> list[UnitGroup]:
    """Return the hidden units of a chain, one group for each layer but the last.

    Args:
        network: A chain of linear layers, ungrouped 2d convolutions, batch normalisations, and modules that treat every
            channel alike (activations, dropout, pooling, flatten); chains within chains are allowed. Inputs and outputs
            of the chain are no units.

    Returns:
        Groups in the order of the chain, named by the layer that makes the units. Flattening makes a channel own as
        many columns of the next layer as it has positions.

    Raises:
        UserError: Another module, a layer used twice, or a layer that does not take what the one before makes.
    """
    groups: list[UnitGroup] = []
    maker, size, places = "", 0, list[Place]()
    seen: set[int] = set()
    for name, module in _leaves(network):
        if any(True for _ in module.parameters()):
            if id(module) in seen:
                raise UserError(f"network.{name}", Shown("a layer used twice"), allowed="layers used once")
            seen.add(id(module))
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            outputs, inputs = module.weight.shape[:2]
            if maker:
                if inputs % size or (inputs != size and isinstance(module, nn.Conv2d)):
                    raise UserError(f"network.{name}", Shown(f"{inputs} inputs"), allowed=f"the {size} of '{maker}'")
                columns = np.arange(inputs).reshape(size, inputs // size)
                groups.append(UnitGroup(maker, size, (*places, Place(f"{name}.weight", (1,), columns))))
            maker, size, places = name, outputs, [_rows(f"{name}.weight", outputs)]
            places += [_rows(f"{name}.bias", outputs)] if module.bias is not None else []
        elif isinstance(module, _BatchNorm):
            if maker and module.num_features != size:
                raise UserError(f"network.{name}", Shown(f"{module.num_features} features"), allowed=f"{size}")
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                if maker and getattr(module, leaf) is not None:
                    places.append(_rows(f"{name}.{leaf}", size))
        elif not isinstance(module, _CHANNEL_BY_CHANNEL):
            raise UserError(
                f"network.{name}",
                Shown(f"a {type(module).__name__}"),
                allowed="linear layers, ungrouped 2d convolutions, batch normalisations, activations, pooling, flatten",
            )
    return groups


def _leaves(network: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in network._modules.items():
        assert module is not None
        if isinstance(module, nn.Sequential):
            yield from _leaves(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def _rows(tensor: str, size: int) -> Place:
    return Place(tensor, (0,), np.arange(size)[:, None])
