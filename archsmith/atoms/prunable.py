"""Which convolutions of a network weights may be pruned in, and why the others may not.

Names are those of the bare network: the wrappers of ``DistributedDataParallel`` and ``torch.compile`` are looked
through, so what was chosen in one of them fits the other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from archsmith.core.errors import Shown, UserError

SHORTCUT_NAMES = ("shortcut", "downsample", "skip")
"""A convolution with one of these in its qualified name is taken for a shortcut (projection of a residual)."""

_WRAPPERS = ("module", "_orig_mod")


@dataclass(frozen=True)
class Convolution:
    """One convolution of a network.

    Attributes:
        name: Qualified name of its module.
        module: The module.
        kept: Why it is not to be pruned; empty when it is.
        forbidden: Whether ``kept`` is a reason that asking for it by name does not overcome.
    """

    name: str
    module: nn.Conv2d
    kept: str = ""
    forbidden: bool = False


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of data parallelism and compilation."""
    while type(model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        model = next(inner for name in _WRAPPERS if isinstance(inner := getattr(model, name, None), nn.Module))
    return model


def convolutions(model: nn.Module) -> list[Convolution]:
    """Return every ``Conv2d`` in the order of registration, with the reason when its weights stay whole.

    Left whole unless asked for by name: the first convolution of the network, and shortcuts, which are recognised by
    their names (``SHORTCUT_NAMES``). Never pruned: depthwise convolutions, whose kernels are their channels (cut
    channels instead, ``archsmith.atoms.surgery``), frozen and reparametrised weights. A weight that several modules
    share appears once.
    """
    found: list[Convolution] = []
    seen: set[int] = set()
    for name, module in unwrapped(model).named_modules():
        if not isinstance(module, nn.Conv2d) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        reason, forbidden = _reason(name, module, first=not found)
        found.append(Convolution(name, module, reason, forbidden))
    return found


def _reason(name: str, module: nn.Conv2d, *, first: bool) -> tuple[str, bool]:
    if module.groups > 1 and module.weight.shape[1] == 1:
        return "depthwise: removing a kernel removes a channel, which is the surgery's work", True
    if parametrize.is_parametrized(module, "weight") or "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is computed from other parameters", True
    if not module.weight.requires_grad:
        return "its weight is frozen", True
    if first:
        return "the first convolution", False
    if any(part in name.lower() for part in SHORTCUT_NAMES):
        return "a shortcut by its name", False
    return "", False


def chosen_convolutions(
    model: nn.Module, *, names: Collection[str] | None = None, exclude: Collection[str] = ()
) -> list[Convolution]:
    """Return the convolutions to prune.

    Args:
        model: The network, wrapped or not.
        names: Exactly these; those that ``convolutions`` does not leave whole when None.
        exclude: Names that stay whole in any case.

    Raises:
        UserError: A name that no convolution has, one that must not be pruned, or nothing is left.
    """
    every = {convolution.name: convolution for convolution in convolutions(model)}
    for name in (*(names or ()), *exclude):
        if name not in every:
            raise UserError("layer", name, allowed=", ".join(every) or "nothing: the network has no Conv2d")
    if names is not None:
        for name in names:
            if every[name].forbidden:
                raise UserError("layer", Shown(f"{name} ({every[name].kept})"), allowed="other convolutions")
        chosen = [every[name] for name in every if name in names and name not in exclude]
    else:
        chosen = [one for one in every.values() if not one.kept and one.name not in exclude]
    if not chosen:
        reasons = "; ".join(f"{one.name}: {one.kept or 'excluded'}" for one in every.values())
        raise UserError(
            "model", Shown(f"no convolution to prune ({reasons or 'it has no Conv2d'})"), allowed="one at least"
        )
    return chosen


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """Return the weight of the convolution ``name`` of a network, wrapped or not."""
    return cast(nn.Parameter, unwrapped(model).get_submodule(name).weight)
