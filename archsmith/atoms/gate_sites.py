"""Where a gate can act on a unit of any model: at the inputs of the layers that read it.

A unit that is multiplied by zero wherever it is read is gone: the network computes what the cut one computes, for
every activation function and behind every normalisation with running statistics. So a gate sits in a pre-forward hook
of each consumer and scales the positions of its input that belong to the unit. Units that no layer reads (query and key
columns meet in a product of activations) are gated at the outputs of the layers that make them instead.

Gates are no part of the model: its ``state_dict`` never changes. ``fold_`` multiplies them into the weights behind them
(the columns of a consumer, the rows and the bias of a producer), which leaves the network's function as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from archsmith.atoms.units import IntArray, Place, UnitGroup
from archsmith.core.errors import Shown, UserError


@dataclass(frozen=True, eq=False)
class Site:
    """One place where the gates of a group act.

    Attributes:
        module: Qualified name of the layer.
        side: Whether its input or its output is scaled.
        axis: Axis of that activation, negative: counted from the end.
        length: Positions along it.
        index: Positions (units, k) of every unit.
        fold: ``(tensor, place)`` pairs that take up the factor: positions of weights (and of a bias).
    """

    module: str
    side: Literal["input", "output"]
    axis: int
    length: int
    index: IntArray
    fold: tuple[Place, ...]


@dataclass(frozen=True)
class _Roles:
    """Axes of a layer's weight, and the axis of its activations that they run along."""

    outputs: int
    inputs: int
    activation: int


def _roles(module: nn.Module) -> _Roles | None:
    if isinstance(module, nn.Linear):
        return _Roles(0, 1, -1)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return _Roles(1, 0, -1 - len(module.kernel_size)) if module.groups == 1 else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return _Roles(0, 1, -1 - len(module.kernel_size))
    if type(module).__name__ == "Conv1D" and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
        return _Roles(1, 0, -1)  # a linear layer whose weight is (inputs, outputs), as GPT-2 has it
    return None


def gate_sites(model: nn.Module, groups: Sequence[UnitGroup]) -> tuple[dict[str, tuple[Site, ...]], dict[str, str]]:
    """Return where the gates of each group act, and why some groups cannot have any.

    Args:
        model: The network, read only.
        groups: The groups.

    Returns:
        Sites by group name, and the reasons of the others by group name.
    """
    owners: dict[str, list[tuple[str, nn.Module, str]]] = {}
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(names[id(parameter)], []).append((path, module, leaf))
    inside_attention = {
        f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    found: dict[str, tuple[Site, ...]] = {}
    refused: dict[str, str] = {}
    for group in groups:
        if group.frozen:
            refused[group.name] = f"it is frozen: {group.frozen}"
            continue
        consumers: list[Site] = []
        producers: list[Site] = []
        reason = "no layer that makes or reads it is a linear layer or a convolution"
        for place in group.places:
            for path, module, leaf in owners.get(place.tensor, []):
                site = None if path in inside_attention else _site(path, module, leaf, place)
                if site is not None:
                    (consumers if site.side == "input" else producers).append(site)
                elif _may_read(module, leaf, place) or path in inside_attention:
                    reason = f"'{path}' ({type(module).__name__}) reads it where no hook reaches"
                    consumers, producers = [], []
                    break
            else:
                continue
            break
        sites = consumers or producers
        if sites:
            found[group.name] = tuple(_with_folds(site, group) for site in sites)
        else:
            refused[group.name] = reason
    return found, refused


def _may_read(module: nn.Module, leaf: str, place: Place) -> bool:
    """Whether a layer of which nothing is known here may read the units of a place: it has them in a matrix.

    Of torch's own layers that no hook reaches, the rows of their weights are outputs.
    """
    parameter: Tensor = getattr(module, leaf)
    if parameter.dim() < 2 or isinstance(module, nn.Embedding):
        return False
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return place.axes != (0,)
    return _roles(module) is None


def _site(path: str, module: nn.Module, leaf: str, place: Place) -> Site | None:
    roles = _roles(module)
    if roles is None or leaf != "weight":
        return None
    weight: Tensor = getattr(module, leaf)
    shape = tuple(weight.shape)
    parts = int(getattr(module, "groups", 1))
    along = partial(Site, path, fold=(place,), axis=roles.activation)
    if place.axes == (roles.inputs,):  # the same column of every part of a grouped convolution
        channels = (place.index[:, None] + np.arange(parts)[:, None] * shape[roles.inputs]).reshape(
            len(place.index), -1
        )
        return along(side="input", length=parts * shape[roles.inputs], index=channels)
    if place.axes == (0, 1) and parts > 1:
        rows, columns = np.divmod(place.index, shape[1])
        channels = rows // (shape[0] // parts) * shape[1] + columns
        return along(side="input", length=parts * shape[1], index=np.array([np.unique(row) for row in channels]))
    if place.axes == (roles.outputs,) and not (parts > 1 and shape[1] == 1):
        return along(side="output", length=shape[roles.outputs], index=place.index)
    return None


def _with_folds(site: Site, group: UnitGroup) -> Site:
    """Let the bias of a producer take up its factor too."""
    if site.side == "input":
        return site
    bias = f"{site.module}.bias" if site.module else "bias"
    return replace(site, fold=(*site.fold, *(place for place in group.places if place.tensor == bias)))


Multiplier = Callable[[str], Tensor | None]
"""Returns the factors (units,) of a group for this forward pass, or None for no gate."""


class SiteHooks:
    """Forward hooks that scale activations at sites.

    Args:
        model: The network that is hooked.
        sites: By group name.
        multiplier: Asked at every forward pass.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Sequence[Site]], multiplier: Multiplier) -> None:
        self._handles: list[RemovableHandle] = []
        by_module: dict[tuple[str, str], list[tuple[str, Site]]] = {}
        for name, each in sites.items():
            for site in each:
                by_module.setdefault((site.module, site.side), []).append((name, site))
        for (path, side), members in by_module.items():
            module = model.get_submodule(path)
            scale = _Scale(members, multiplier)
            if side == "input":
                self._handles.append(module.register_forward_pre_hook(scale.inputs))
            else:
                self._handles.append(module.register_forward_hook(scale.outputs))

    def remove(self) -> None:
        """Take the hooks off; the model is as before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Scale:
    """The factors of one activation: those of several groups where it is a concatenation."""

    def __init__(self, members: Sequence[tuple[str, Site]], multiplier: Multiplier) -> None:
        self._members = [
            (name, torch.from_numpy(site.index.reshape(-1).copy()), site.index.shape[1]) for name, site in members
        ]
        self._axis, self._length = members[0][1].axis, members[0][1].length
        self._multiplier = multiplier

    def __call__(self, x: Tensor) -> Tensor:
        factors: Tensor | None = None
        for name, positions, repeats in self._members:
            gate = self._multiplier(name)
            if gate is None:
                continue
            if factors is None:
                factors = torch.ones(self._length, device=gate.device, dtype=gate.dtype)
            positions = positions.to(gate.device)
            wide = gate.repeat_interleave(repeats)
            factors = factors.index_put((positions,), factors[positions] * wide)
        if factors is None:
            return x
        return x * factors.to(x.dtype).reshape(-1, *[1] * (-1 - self._axis))

    def inputs(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])

    def outputs(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self(out)


@torch.no_grad()
def fold_(model: nn.Module, sites: Mapping[str, Sequence[Site]], factors: Mapping[str, Tensor]) -> None:
    """Multiply factors into the weights behind the sites, in place; the network with gates of 1 is then the same.

    Args:
        model: Its parameters change.
        sites: By group name.
        factors: (units,) by group name; groups that are left out stay.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, each in sites.items():
        if name not in factors:
            continue
        done: set[tuple[int, tuple[int, ...]]] = set()
        for site in each:
            for place in site.fold:
                parameter = parameters[place.tensor]
                if (id(parameter), place.axes) in done:  # one weight that several layers share
                    continue
                done.add((id(parameter), place.axes))
                _scale_place(parameter, place, factors[name])


def _scale_place(parameter: Tensor, place: Place, factors: Tensor) -> None:
    wide = factors.detach().to(parameter.device, parameter.dtype)[:, None].expand(-1, place.index.shape[1]).reshape(-1)
    sizes = [parameter.shape[axis] for axis in place.axes]
    vector = torch.ones(int(np.prod(sizes)), device=parameter.device, dtype=parameter.dtype)
    vector[torch.from_numpy(place.index.reshape(-1).copy()).to(parameter.device)] = wide
    shape = [parameter.shape[axis] if axis in place.axes else 1 for axis in range(parameter.dim())]
    parameter.mul_(vector.reshape(shape))


def require_sites(found: Mapping[str, object], refused: Mapping[str, str], what: str) -> None:
    """Refuse when no group at all can be gated.

    Raises:
        UserError: So it is; the reasons are in the text.
    """
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise UserError(what, Shown("a model none of whose units can have a gate"), allowed="gates", hint=reasons)
