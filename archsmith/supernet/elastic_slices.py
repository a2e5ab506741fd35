"""Views of a network's parameters in place of the parameters, while it computes: what every elastic network is made of.

A *part* says which piece of the network follows which genes: positions along one axis of a tensor, an attribute, the
children of a container. ``choose`` looks up what a choice keeps, inside ``active()`` the modules hold views of that,
and outside they hold the whole parameters. So optimisers, ``state_dict``, gradient clipping and copies never meet a
view, and the network called by itself is always the whole one. Gradients flow through the views: what is not active
receives exactly zero.

Nothing here knows where parts come from: atoms (``elastic.py``), or a family that writes them down.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.atoms.attributes import attributes_of, member
from archsmith.atoms.fingerprint import named_tensors
from archsmith.atoms.units import IntArray, TensorCut
from archsmith.core.errors import Shown, UserError

Kept = int | slice | IntArray | Sequence[int]
"""What remains of an axis: the first so many positions, a slice with step 1, or ascending positions."""


@dataclass(frozen=True, eq=False)
class SlicedAxis:
    """One axis of one tensor. Several parts may name the same axis: a position stays while all of them keep it.

    Args:
        tensor: Qualified name of a parameter or buffer; a tied one under any of its names.
        axis: Axis, from 0.
        genes: Names of the genes that decide.
        kept: Called with their values, returns what remains; a pure function, its results are kept.
    """

    tensor: str
    axis: int
    genes: tuple[str, ...]
    kept: Callable[..., Kept]


@dataclass(frozen=True, eq=False)
class SlicedTensor:
    """One tensor with axes that are cut jointly (grouped convolutions); no other part may name it.

    Args:
        tensor: Qualified name.
        genes: Names of the genes that decide.
        kept: Called with their values, returns the cut; None for the whole tensor.
    """

    tensor: str
    genes: tuple[str, ...]
    kept: Callable[..., TensorCut | None]


@dataclass(frozen=True, eq=False)
class MappedTensor:
    """A function of what the other parts left of a tensor (a learned transform of its kernel).

    Args:
        tensor: Qualified name.
        genes: Names of the genes that decide.
        function: Called with the tensor and their values in every forward pass; None from ``when`` leaves it out.
        when: Called with the values; False where the function would change nothing.
    """

    tensor: str
    genes: tuple[str, ...]
    function: Callable[..., Tensor]
    when: Callable[..., bool]


@dataclass(frozen=True, eq=False)
class SlicedAttribute:
    """An attribute, by dotted path through modules, objects, dictionaries and lists.

    Those that torch's own modules derive from their weights (``groups``, ``num_features``, ``normalized_shape``, ...)
    follow by themselves and need no part.

    Args:
        path: E.g. ``"layer.0.attention.num_heads"``.
        genes: Names of the genes that decide.
        value: Called with their values, returns the attribute's.
    """

    path: str
    genes: tuple[str, ...]
    value: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class SlicedChildren:
    """The children of an ``nn.Sequential`` or ``nn.ModuleList`` that remain, in their order.

    Args:
        container: Qualified name; empty for the model itself.
        genes: Names of the genes that decide.
        kept: Called with their values, returns the positions of the children that remain.
    """

    container: str
    genes: tuple[str, ...]
    kept: Callable[..., Sequence[int]]


Part = SlicedAxis | SlicedTensor | MappedTensor | SlicedAttribute | SlicedChildren


@dataclass(frozen=True, eq=False)
class _Narrow:
    """A run of positions: a view."""

    axis: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.axis, self.start, self.length)


@dataclass(eq=False)
class _Gather:
    """Scattered positions: a copy, through which gradients flow."""

    axis: int
    index: Tensor
    _there: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self.index
        if device not in self._there:
            self._there[device] = self.index.to(device)
        return self._there[device]

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.axis, self.on(tensor.device))


@dataclass(eq=False)
class _Joint:
    """Rows that keep different columns of two flattened axes."""

    axes: tuple[int, ...]
    positions: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        moved = tensor.movedim(self.axes, (0, 1))
        flat = moved.reshape(-1, *moved.shape[2:])
        chosen = flat.index_select(0, self.positions.reshape(-1).to(tensor.device))
        return chosen.reshape(*self.positions.shape, *moved.shape[2:]).movedim((0, 1), self.axes)


Pick = _Narrow | _Gather | _Joint


@dataclass(eq=False)
class _Sliced:
    """A tensor that some genes shrink."""

    name: str
    shape: tuple[int, ...]
    slots: list[tuple[dict[str, Any], str, nn.Module]]
    axes: dict[int, list[SlicedAxis]] = field(default_factory=dict)
    whole: SlicedTensor | None = None
    maps: list[MappedTensor] = field(default_factory=list)
    known: dict[tuple[int, tuple[Any, ...]], tuple[Pick | None, IntArray | None]] = field(default_factory=dict)
    cuts: dict[tuple[Any, ...], tuple[list[Pick], TensorCut | None]] = field(default_factory=dict)
    axis_genes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    genes: tuple[str, ...] = ()


Choices = Mapping[str, Any]


class Slices:
    """A network of which only a choice takes part in the computation.

    Args:
        model: The network. It is never changed outside ``active()``.
        parts: What follows which genes.

    Raises:
        UserError: A part names a tensor, axis, attribute or container that does not exist.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> slices = Slices(net, [
        ...     SlicedAxis("0.weight", 0, ("width",), lambda width: width),
        ...     SlicedAxis("0.bias", 0, ("width",), lambda width: width),
        ...     SlicedAxis("2.weight", 1, ("width",), lambda width: width),
        ... ])
        >>> slices.choose({"width": 5})
        >>> with slices.active():
        ...     net[0].weight.shape, net[0].out_features
        (torch.Size([5, 4]), 5)
        >>> net[0].weight.shape
        torch.Size([8, 4])
    """

    def __init__(self, model: nn.Module, parts: Sequence[Part]) -> None:
        self.model = model
        self.parts = tuple(parts)
        self.genes = tuple(dict.fromkeys(gene for part in parts for gene in part.genes))
        self.choices: dict[str, Any] | None = None
        self._depth = 0
        tensors, _ = named_tensors(model)
        slots = _slots(model)
        sliced: dict[int, _Sliced] = {}
        for part in parts:
            if isinstance(part, SlicedAxis | SlicedTensor | MappedTensor):
                if part.tensor not in tensors:
                    raise UserError(
                        "parts", part.tensor, allowed="qualified names of parameters and buffers of the model"
                    )
                tensor = tensors[part.tensor]
                fresh = _Sliced(part.tensor, tuple(tensor.shape), slots[id(tensor)])
                one = sliced.setdefault(id(tensor), fresh)
                _enter(one, part)
        self._tensors = list(sliced.values())
        for one in self._tensors:
            one.axis_genes = {axis: _genes_of(each) for axis, each in one.axes.items()}
            one.genes = _genes_of(
                [*(p for each in one.axes.values() for p in each), *([one.whole] if one.whole else [])]
            )
        self._attributes = [(p, *_owner(model, p.path)) for p in parts if isinstance(p, SlicedAttribute)]
        self._children = [(p, _container(model, p.container)) for p in parts if isinstance(p, SlicedChildren)]
        self._modules = _modules_of(model, self._tensors)
        self._derived: dict[tuple[int, tuple[Any, ...]], list[tuple[str, Any]]] = {}
        self._fill: list[tuple[_Sliced, Sequence[Any]]] = []
        self._set: list[tuple[Any, str | int, Any]] = []
        self._kept_children: list[tuple[nn.Module, dict[str, nn.Module]]] = []
        self._recurrent = [m for _, m, _, _ in self._modules if isinstance(m, nn.RNNBase)]

    def choose(self, choices: Choices) -> None:
        """Make this choice the one that ``active()`` puts in place.

        Args:
            choices: Value of every gene.

        Raises:
            UserError: A gene has no value, or what would remain is empty or makes no module any more.
        """
        missing = [gene for gene in self.genes if gene not in choices]
        if missing:
            raise UserError(
                "choices", dict(choices), allowed=f"a value of every gene; missing: {', '.join(missing[:6])}"
            )
        assert not self._depth, "the choice changes while it is active"
        fill: list[tuple[_Sliced, Sequence[Any]]] = []
        for one in self._tensors:
            picks = self._picks(one, choices)
            if picks:
                fill.append((one, picks))
        children = []
        for part, container in self._children:
            kept = part.kept(*(choices[gene] for gene in part.genes))
            if len(kept) < len(container._modules):
                children.append((container, remaining(container, kept)))
        derived: list[tuple[Any, str | int, Any]] = []
        for number, (_, module, genes, _) in enumerate(self._modules):
            key = (number, tuple(choices[gene] for gene in genes))
            found = self._derived.get(key)
            if found is None:
                found = self._derive(number, choices)
            derived.extend((module, name, value) for name, value in found)
        for attribute, owner, leaf in self._attributes:
            value = attribute.value(*(choices[gene] for gene in attribute.genes))
            derived.append((owner, leaf, value))
        self._fill, self._kept_children, self._set = fill, children, derived
        self.choices = dict(choices)

    def prepare(self, options: Mapping[str, Sequence[Any]], limit: int = 64) -> None:
        """Work out beforehand what choices need, so that the first use of each is as fast as the second.

        Args:
            options: Values of every gene.
            limit: Tensors and modules with more combinations than this are left to their first use.
        """
        for one in self._tensors:
            for axis, genes in one.axis_genes.items():
                for choices in _combinations(genes, options, limit):
                    self._axis(one, axis, choices)
        for number, (_, _, genes, _) in enumerate(self._modules):
            for choices in _combinations(genes, options, limit):
                self._derive(number, choices)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Let the modules hold what was chosen last, for the block; the whole network before a choice was made.

        Blocks may be nested. Buffers that a forward pass writes to (running statistics) keep what was written.
        """
        if self._depth:
            self._depth += 1
            try:
                yield self.model
            finally:
                self._depth -= 1
            return
        undo: list[tuple[Any, Any, Any]] = []
        copies: list[tuple[Tensor, Sequence[Any], Tensor]] = []
        recurrent: list[tuple[nn.RNNBase, Any]] = []
        self._depth = 1
        try:
            for one, picks in self._fill:
                items, leaf, owner = one.slots[0]
                whole = view = items[leaf]
                for pick in picks:
                    view = pick.of(view)
                for items, leaf, _ in one.slots:
                    undo.append((items, leaf, whole))
                    items[leaf] = view
                if not isinstance(whole, nn.Parameter) and owner.training and not view._is_view():
                    copies.append((whole, picks, view))
            for module in self._recurrent:
                recurrent.append((module, module._flat_weights))
                module.__dict__["_flat_weights"] = [getattr(module, name) for name in module._flat_weights_names]
            for owned, name, value in self._set:
                is_list = isinstance(owned, list)
                holder: Any = owned if is_list or isinstance(owned, dict) else owned.__dict__
                if is_list or name in holder:
                    undo.append((holder, name, holder[name]))
                    holder[name] = value
                else:  # a property, or a field without a dictionary
                    undo.append((owned, name, getattr(owned, str(name))))
                    setattr(owned, str(name), value)
            for container, modules in self._kept_children:
                undo.append((container.__dict__, "_modules", container._modules))
                container.__dict__["_modules"] = modules
            yield self.model
        finally:
            self._depth = 0
            for module, weights in recurrent:
                module.__dict__["_flat_weights"] = weights
            for owner, name, value in reversed(undo):
                if isinstance(owner, dict | list):
                    owner[name] = value
                else:
                    setattr(owner, name, value)
            for whole, picks, copied in copies:
                _write_back(whole, picks, copied)

    def genes_by_module(self) -> dict[str, tuple[str, ...]]:
        """Return the genes that decide about the own tensors and attributes of each module, by qualified name.

        Genes that only decide which children a container has are left out.
        """
        paths = {id(m): path for path, m in self.model.named_modules()}
        found: dict[str, list[str]] = {}
        for one in self._tensors:
            genes = [*one.genes, *(gene for part in one.maps for gene in part.genes)]
            for _, _, owning in one.slots:
                found.setdefault(paths[id(owning)], []).extend(genes)
        modules = set(paths.values())
        for part, _, _ in self._attributes:
            owner = part.path
            while owner not in modules:
                owner = owner.rpartition(".")[0]
            found.setdefault(owner, []).extend(part.genes)
        return {path: tuple(dict.fromkeys(genes)) for path, genes in found.items()}

    def cuts(self, choices: Choices) -> dict[str, TensorCut]:
        """Return what a choice keeps of every tensor that shrinks, by qualified name (the first that a part gave)."""
        found = {}
        for one in self._tensors:
            cut = self._cut(one, choices)
            if cut is not None:
                found[one.name] = cut
        return found

    def _picks(self, one: _Sliced, choices: Choices) -> list[Any]:
        picks: list[Any] = []
        if one.whole is not None:
            picks.extend(self._whole(one, choices)[0])
        for axis in one.axes:
            pick = self._axis(one, axis, choices)[0]
            if pick is not None:
                picks.append(pick)
        for part in one.maps:
            values = tuple(choices[gene] for gene in part.genes)
            if part.when(*values):
                picks.append(_Map(part.function, values))
        return picks

    def _axis(self, one: _Sliced, axis: int, choices: Choices) -> tuple[Pick | None, IntArray | None]:
        key = (axis, tuple(choices[gene] for gene in one.axis_genes[axis]))
        known = one.known.get(key)
        if known is None:
            kept = np.ones(one.shape[axis], dtype=bool)
            for part in one.axes[axis]:
                own = part.kept(*(choices[gene] for gene in part.genes))
                kept &= _flags(own, one.shape[axis], part)
            index = np.flatnonzero(kept)
            if not len(index):
                raise UserError("choices", dict(choices), allowed=f"some of axis {axis} of '{one.name}'")
            whole = len(index) == one.shape[axis]
            known = one.known[key] = (None, None) if whole else (_pick(axis, index), index)
        return known

    def _whole(self, one: _Sliced, choices: Choices) -> tuple[list[Pick], TensorCut | None]:
        assert one.whole is not None
        key = tuple(choices[gene] for gene in one.whole.genes)
        if key not in one.cuts:
            cut = one.whole.kept(*key)
            picks: list[Pick] = []
            if cut is not None and cut.joint is not None:
                picks.append(_Joint(cut.joint[0], torch.from_numpy(np.ascontiguousarray(cut.joint[1]))))
            if cut is not None:
                picks.extend(_pick(axis, index) for axis, index in cut.axes.items())
            one.cuts[key] = (picks, cut)
        return one.cuts[key]

    def _cut(self, one: _Sliced, choices: Choices) -> TensorCut | None:
        if one.whole is not None:
            return self._whole(one, choices)[1]
        kept = {axis: index for axis in one.axes if (index := self._axis(one, axis, choices)[1]) is not None}
        return TensorCut(axes=kept) if kept else None

    def _derive(self, number: int, choices: Choices) -> list[tuple[str, Any]]:
        """Work out the attributes of one of torch's own modules, on a stand-in with tensors without numbers."""
        path, module, genes, own = self._modules[number]
        stand_in = copy.copy(module)
        cuts: dict[str, TensorCut] = {}
        for kind in ("_parameters", "_buffers"):
            items = dict(module.__dict__[kind])
            for leaf, tensor in items.items():
                kept = self._cut(own[leaf], choices) if leaf in own else None
                if kept is not None:
                    cuts[leaf] = kept
                    items[leaf] = torch.empty(_shape(tuple(tensor.shape), kept), device="meta")
            stand_in.__dict__[kind] = items
        found = list(attributes_of(path, stand_in, cuts).items())
        self._derived[number, tuple(choices[gene] for gene in genes)] = found
        return found


def _combinations(genes: Sequence[str], options: Mapping[str, Sequence[Any]], limit: int) -> Iterator[dict[str, Any]]:
    """Yield all combinations of some genes' values; none where there are more than ``limit``."""
    if math.prod(len(options[gene]) for gene in genes) <= limit:
        for values in itertools.product(*(options[gene] for gene in genes)):
            yield dict(zip(genes, values, strict=True))


def _shape(shape: tuple[int, ...], cut: TensorCut) -> tuple[int, ...]:
    size = list(shape)
    for axis, index in cut.axes.items():
        size[axis] = len(index)
    if cut.joint is not None:
        for axis, count in zip(cut.joint[0], cut.joint[1].shape, strict=True):
            size[axis] = count
    return tuple(size)


@dataclass(frozen=True, eq=False)
class _Map:
    function: Callable[..., Tensor]
    values: tuple[Any, ...]

    def of(self, tensor: Tensor) -> Tensor:
        return self.function(tensor, *self.values)


def remaining(container: nn.Module, kept: Sequence[int]) -> dict[str, nn.Module]:
    """Return the children of a container at some positions, numbered anew where they were numbered.

    Args:
        container: An ``nn.Sequential`` or ``nn.ModuleList``.
        kept: Positions, ascending.
    """
    items = list(container._modules.items())
    numbered = all(name == str(number) for number, (name, _) in enumerate(items))
    chosen = [items[position] for position in kept]
    return {str(number) if numbered else name: child for number, (name, child) in enumerate(chosen)}  # type: ignore[misc]


def _enter(one: _Sliced, part: SlicedAxis | SlicedTensor | MappedTensor) -> None:
    if isinstance(part, MappedTensor):
        one.maps.append(part)
        return
    if isinstance(part, SlicedTensor):
        if one.whole is not None or one.axes:
            raise UserError("parts", Shown(f"two parts for '{part.tensor}'"), allowed="one, where axes are cut jointly")
        one.whole = part
        return
    if one.whole is not None:
        raise UserError("parts", Shown(f"two parts for '{part.tensor}'"), allowed="one, where axes are cut jointly")
    if not 0 <= part.axis < len(one.shape):
        raise UserError("parts", Shown(f"axis {part.axis} of '{part.tensor}'"), allowed=f"an axis of {one.shape}")
    one.axes.setdefault(part.axis, []).append(part)


def _genes_of(parts: Sequence[SlicedAxis | SlicedTensor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(gene for part in parts for gene in part.genes))


def _slots(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str, nn.Module]]]:
    """Return where a tensor is held, in which modules, by its identity; tied ones are in several places."""
    found: dict[int, list[tuple[dict[str, Any], str, nn.Module]]] = {}
    for module in model.modules():
        for items in (module._parameters, module._buffers):
            for leaf, tensor in items.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((items, leaf, module))
    return found


def _modules_of(
    model: nn.Module, sliced: Sequence[_Sliced]
) -> list[tuple[str, nn.Module, tuple[str, ...], dict[str, _Sliced]]]:
    """Return the modules of which tensors are sliced, with the genes that decide and the tensors by attribute name."""
    own: dict[int, dict[str, _Sliced]] = {}
    for one in sliced:
        for _, leaf, module in one.slots:
            own.setdefault(id(module), {})[leaf] = one
    found = []
    for path, module in model.named_modules():
        if tensors := own.get(id(module)):
            genes = tuple(dict.fromkeys(gene for one in tensors.values() for gene in one.genes))
            found.append((path, module, genes, tensors))
    return found


def _owner(model: nn.Module, path: str) -> tuple[Any, str | int]:
    """Return what holds an attribute, and its name or number there."""
    *parents, leaf = path.split(".")
    owner: Any = model
    for parent in parents:
        owner = member(owner, parent, path)
    member(owner, leaf, path)
    return (owner, int(leaf)) if isinstance(owner, list) else (owner, leaf)


def _container(model: nn.Module, path: str) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise UserError("parts", path, allowed="the qualified name of a container of the model") from None
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        raise UserError("parts", Shown(f"'{path}', a {type(module).__name__}"), allowed="a Sequential or a ModuleList")
    return module


def _flags(kept: Kept, length: int, part: SlicedAxis) -> Any:
    flags = np.zeros(length, dtype=bool)
    if isinstance(kept, slice):
        flags[kept] = True
        fits = kept.step in (None, 1) and (kept.start or 0) >= 0 and (kept.stop is None or kept.stop <= length)
    elif isinstance(kept, int | np.integer):
        flags[: operator.index(kept)] = True
        fits = 0 <= kept <= length
    else:
        index = np.asarray(kept, dtype=np.int64)
        fits = not len(index) or (index.min() >= 0 and index.max() < length and bool((np.diff(index) > 0).all()))
        if fits:
            flags[index] = True
    if not fits:
        raise UserError(
            f"what is kept of axis {part.axis} of '{part.tensor}'",
            Shown(str(kept)),
            allowed=f"a number up to {length}, a slice, or ascending positions below {length}",
        )
    return flags


def _pick(axis: int, index: IntArray) -> Pick:
    if int(index[-1]) - int(index[0]) == len(index) - 1:
        return _Narrow(axis, int(index[0]), len(index))
    return _Gather(axis, torch.from_numpy(np.ascontiguousarray(index)))


@torch.no_grad()
def _write_back(whole: Tensor, picks: Sequence[Any], copied: Tensor) -> None:
    """Bring what was written to a copy of some positions of a buffer back to these positions."""
    positions = torch.arange(whole.numel(), device=whole.device).reshape(whole.shape)
    for pick in picks:
        positions = pick.of(positions)
    whole.view(-1)[positions.reshape(-1)] = copied.reshape(-1)
