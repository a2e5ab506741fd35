"""How the attributes of a user's modules (``num_heads``, fields of a configuration) follow several widths at once.

The atoms' search says for one cut which attributes change. An attribute counts living labels, so each removed unit of
a group takes the same number from it: one cut of everything gives the names, labels alone give the shares of the
groups, and no graph has to be exported for each width of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from archsmith.atoms.attributes import member
from archsmith.atoms.finding import FoundAtoms
from archsmith.atoms.search import Need, needs
from archsmith.atoms.units import IntArray
from archsmith.supernet.elastic_dims import ElasticDim

Removed = Callable[[Mapping[str, int]], dict[str, IntArray]]
"""Positions of the removed units by group, for sizes by dimension; dimensions left out are whole."""


@dataclass(frozen=True)
class AttributeLaw:
    """An attribute as a function of sizes: ``whole - sum over dims of share * (dim.whole - size)``.

    Attributes:
        path: Dotted path from the model.
        whole: Its value in the whole network.
        dims: Names of the dimensions.
        wholes: Their largest choices.
        shares: What one unit of each takes away.
    """

    path: str
    whole: int
    dims: tuple[str, ...]
    wholes: tuple[int, ...]
    shares: tuple[Fraction, ...]

    def __call__(self, *sizes: int) -> int:
        """Return the value for the sizes of ``dims``."""
        less = sum(
            (share * (whole - size) for share, whole, size in zip(self.shares, self.wholes, sizes, strict=True)),
            Fraction(0),
        )
        assert less.denominator == 1, (self, sizes)
        return self.whole - int(less)


def attribute_laws(found: FoundAtoms, dims: Sequence[ElasticDim], removed: Removed) -> list[AttributeLaw]:
    """Return the laws of all attributes that widths change; both checks of the atoms run on the smallest widths.

    Args:
        found: The atoms.
        dims: Dimensions with groups.
        removed: See ``Removed``.

    Raises:
        CutRefused: The smallest widths can not be cut; the message says why.
    """
    shrinking = [dim for dim in dims if dim.groups and len(dim.choices) > 1]
    if not shrinking:
        return []
    smallest = {dim.name: dim.choices[0] for dim in shrinking}
    cut = found.plan(removed(smallest))
    if not cut.attributes:
        return []
    graph = found.labelled
    together = needs(graph, graph.dead_units(cut.removed))
    alone = {
        dim.name: {
            (need.path, need.ordinal): need.new
            for need in needs(graph, graph.dead_units(removed({dim.name: dim.choices[0]})))
        }
        for dim in shrinking
    }
    laws = []
    for path, new in cut.attributes.items():
        old = _value(found.model, path)
        keys = _followed(found.model, path, old, int(new), together)
        shares = {}
        for dim in shrinking:
            gone = dim.whole - dim.choices[0]
            taken = {old - alone[dim.name].get(key, old) for key in keys}
            if len(taken) != 1:
                taken = {old - int(found.plan(removed({dim.name: dim.choices[0]})).attributes.get(path, old))}
            if share := Fraction(taken.pop(), gone):
                shares[dim] = share
        names, wholes = tuple(dim.name for dim in shares), tuple(dim.whole for dim in shares)
        laws.append(AttributeLaw(path, old, names, wholes, tuple(shares.values())))
    return laws


def _value(model: nn.Module, path: str) -> int:
    owner: Any = model
    for part in path.split("."):
        owner = member(owner, part, path)
    return int(owner)


def _followed(model: nn.Module, path: str, old: int, new: int, together: Sequence[Need]) -> list[tuple[str, Any]]:
    """Return the literal sizes that an attribute stands for: of its module and below, with its old and new value."""
    modules = dict(model.named_modules())
    owner = path
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    base = f"{owner}." if owner else ""
    return [
        (need.path, need.ordinal)
        for need in together
        if (need.old, need.new) == (old, new) and (need.path == owner or need.path.startswith(base))
    ]
