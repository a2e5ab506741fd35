"""Elastic networks made from atoms: any model in which units were found holds all of its smaller selves.

A width is "the first k units", a depth "the first d blocks", a kernel its centre. ``activate`` chooses, a call computes
with views of the weights (``elastic_slices``), ``extract`` cuts a copy by the atoms' own surgery. Outside a call the
model is what it was: optimisers, ``state_dict`` and the user's own calls see the whole network.

Sources: slimmable networks (arXiv 1812.08928), Once for all (1908.09791), BigNAS (2003.11142), InstaTune (2308.15609).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from archsmith.atoms.finding import FoundAtoms, find
from archsmith.atoms.fingerprint import fingerprint, named_tensors, unwrap
from archsmith.atoms.plan import plan_cut
from archsmith.atoms.records import ATTRIBUTE
from archsmith.atoms.trace import Forward, call_arguments
from archsmith.atoms.transaction import apply_
from archsmith.atoms.unit_scores import Scores, scale_places, scale_scores, weight_scores
from archsmith.atoms.units import Cut, IntArray, UnitGroup
from archsmith.core.errors import Shown, UserError
from archsmith.cost.counts import count
from archsmith.graph import evaluating
from archsmith.space import Architecture
from archsmith.supernet.elastic_costs import CostTable
from archsmith.supernet.elastic_depth import remove_blocks_
from archsmith.supernet.elastic_dims import Offered, chosen, unit_order
from archsmith.supernet.elastic_kernel import (
    KernelTransform,
    shrink_kernel_,
)
from archsmith.supernet.elastic_reading import (
    cuttable,
    dimension_candidates,
    is_active,
    kept_blocks,
    parts_of,
    removable,
    removed_units,
    space_of,
)
from archsmith.supernet.elastic_slices import (
    Slices,
    remaining,
)
from archsmith.supernet.elastic_sort import sort_units_

Importance = Literal["scale", "l1", "l2"] | Mapping[str, Any] | Callable[[nn.Module, Sequence[UnitGroup]], Scores]

TRANSFORMS = "elastic_transforms"
"""Prefix of the kernel matrices in the ``state_dict``; everything else is called as in the model."""


class Elastic(nn.Module):
    """A supernet of everything that a model can shrink to.

    Args:
        model: Any network that ``archsmith.atoms.find`` understands. It stays the user's: called by itself it is
            always the whole network.
        example_inputs: What it is called with: a tensor, a tuple of arguments or a mapping by name.
        dims: What is offered, by kind ("width", "heads", "ffn", "embedding", "columns", "depth", "kernel",
            "resolution"), by the name of a dimension, or by a pattern of names ("layer2.*"): numbers (int) or shares
            of the whole (float), the whole among them. None offers halves, three quarters and the whole of widths,
            heads and hidden units, and every depth from a half; what can not be cut is then left out, see ``notes``.
        forward: How to call the model, ``forward(model, *inputs)``; None for ``model(*inputs)``.
        divisor: Widths that come from shares are rounded to multiples of it.
        kernel_transform: Whether smaller kernels pass through learned matrices (``elastic_kernel``).
        constraints: As for ``archsmith.atoms.find``.
        found: The atoms, where they were found already.
        name: Name of the space.

    Attributes:
        space: One decision for each dimension; those inside blocks that a depth leaves out are not asked for.
        dims: The dimensions.
        notes: What was left out, and why.

    Raises:
        UserError: The model has no atoms, nothing could be chosen, or an option does not exist.
        CutRefused: What was asked for can not be cut.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> elastic = Elastic(net, torch.zeros(1, 4), dims={"width": [2, 4, 8]})
        >>> elastic.activate(elastic.smallest())
        >>> sum(p.numel() for p in elastic.extract(elastic.smallest()).parameters())
        16
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        dims: Offered | None = None,
        *,
        forward: Forward | None = None,
        divisor: int = 1,
        kernel_transform: bool = False,
        constraints: Mapping[str, Mapping[str, int]] | None = None,
        found: FoundAtoms | None = None,
        name: str = "elastic",
    ) -> None:
        super().__init__()
        self.model = unwrap(model)
        self.example_inputs = example_inputs
        self._forward = forward
        self.notes: list[str] = []
        self.atoms = found or find(self.model, example_inputs, forward=forward, constraints=constraints)
        candidates = dimension_candidates(self.model, self.atoms, example_inputs, resolution=dims is not None)
        if not candidates:
            raise UserError(
                "model",
                Shown(f"{type(self.model).__name__}, in which nothing can shrink"),
                allowed="a network with removable units or residual blocks",
                hint="print(archsmith.atoms.find(model, example_inputs).explain()) says what is pinned, and why.",
            )
        offered = removable(
            self.model,
            self.atoms,
            example_inputs,
            forward,
            chosen(candidates, dims, divisor),
            self.notes,
            automatic=dims is None,
        )
        self._groups = {group.name: group for group in self.atoms.groups}
        self._order = {group: unit_order(self._groups[group]) for dim in offered for group in dim.groups}
        offered, self._laws = cuttable(self.atoms, self._order, offered, self.notes, automatic=dims is None)
        if all(len(dim.choices) < 2 for dim in offered):
            raise UserError(
                "dims",
                Shown("a space of one point" if offered else "no dimension"),
                allowed="at least one dimension with two options",
                hint="Offer several, e.g. dims={'width': [0.5, 1.0]}.",
            )
        self.dims = tuple(offered)
        self.space = space_of(name, self.dims)
        self.elastic_transforms = nn.ModuleDict()
        self._kernels: dict[str, KernelTransform] = {}
        for number, dim in enumerate(dim for dim in self.dims if dim.kind == "kernel"):
            convolution = cast(nn.modules.conv._ConvNd, self.model.get_submodule(dim.module))
            spatial = convolution.weight.dim() - 2
            transform = KernelTransform(dim.choices, spatial, learned=kernel_transform, like=convolution.weight)
            self._kernels[dim.name] = transform
            if kernel_transform:
                self.elastic_transforms[str(number)] = transform
        self._cost_table: CostTable | None = None
        parts = parts_of(self.model, self.dims, self._groups, self._order, self._laws, self._kernels)
        self.slices = Slices(self.model, parts)
        self.slices.prepare({dim.name: dim.choices for dim in self.dims})
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]
        self._check_mixed()
        self._check_runs(self.smallest())
        self.activate(self.largest())

    def __deepcopy__(self, memo: dict[int, Any]) -> Elastic:
        """Return a copy with weights of its own; what was found in the graph is shared."""
        twin = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.atoms)] = twin, self.atoms
        twin.__dict__.update(copy.deepcopy({**self.__dict__, "_cost_table": None}, memo))
        twin.atoms = dataclasses.replace(self.atoms, model=twin.model)
        return twin

    # ------------------------------------------------------------------ choosing

    def largest(self) -> Architecture:
        """Return the architecture that is the whole network."""
        return self._made({dim.name: dim.choices[-1] for dim in self.dims})

    def smallest(self) -> Architecture:
        """Return the architecture with every first option."""
        return self._made({dim.name: dim.choices[0] for dim in self.dims})

    def canonical(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return a value for every dimension: those that are inactive have their first option.

        Raises:
            UserError: It is not of the space.
        """
        values = self._values(architecture)
        return {d.name: values[d.name] if is_active(d, values) else d.choices[0] for d in self.dims}

    def activate(self, architecture: Mapping[str, Any]) -> None:
        """Make this architecture the one that calls compute, until another is.

        Args:
            architecture: Of the space; values of inactive dimensions (see ``canonical``) may be there and do not count.

        Raises:
            UserError: A choice or a dimension does not exist, or one is missing.
        """
        values = self._values(architecture)
        self.slices.choose(values)
        self._current = values
        self._resolution = values.get("resolution")

    @property
    def active(self) -> Architecture:
        """The architecture that calls compute."""
        return self._made(self._current)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the active architecture in place; images are resized to its resolution."""
        if self._resolution is not None:
            args, kwargs = self.resized((args, kwargs), self._resolution)
        with self.slices.active():
            return self._call(self.model, *args, **kwargs)

    def resized(self, inputs: Any, resolution: int) -> Any:
        """Return inputs whose images (floating tensors with four axes) have ``resolution`` pixels a side, bicubic."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() != 4 or not leaf.is_floating_point():
                return leaf
            if leaf.shape[-2:] == (resolution, resolution):
                return leaf
            return F.interpolate(leaf, size=(resolution, resolution), mode="bicubic", align_corners=False)

        return tree_map(one, inputs)

    # ------------------------------------------------------------------ networks of their own

    def extract(self, architecture: Mapping[str, Any]) -> nn.Module:
        """Return a network of its own with a copy of the architecture's weights: the active path's function to 1e-5.

        Widths are cut by the atoms' surgery, so the network carries its record (``archsmith.atoms.record``); it begins
        with the network that has the fewer blocks and smaller kernels. A resolution is the caller's affair: the
        network takes images of any size. It is in the mode that the model is in.

        Raises:
            UserError: It is not of the space.
        """
        values = self._values(architecture)
        twin = copy.deepcopy(self.model)
        for dim in self.dims:
            if dim.kind == "kernel" and values[dim.name] != dim.whole:
                convolution = cast(nn.modules.conv._ConvNd, twin.get_submodule(dim.module))
                shrink_kernel_(convolution, values[dim.name], self._kernels[dim.name])
        keeping = kept_blocks(self.dims, values)
        if fingerprint(twin) != self.atoms.fingerprint or keeping:
            twin.__dict__.pop(ATTRIBUTE, None)  # a record of earlier cuts is one of other blocks and kernels
        cut = plan_cut(self.atoms.groups, self._removed(values), self.model, self._attributes(values))
        if keeping:
            renamed = _Renaming(self.model, keeping)
            remove_blocks_(twin, keeping)
            cut = renamed.cut(cut)
        if cut.tensors:
            apply_(twin, dataclasses.replace(cut, fingerprint=fingerprint(twin)))
        return twin

    def kept_blocks(self, architecture: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return the positions that remain of every container that loses blocks, by its qualified name.

        Raises:
            UserError: It is not of the space.
        """
        return kept_blocks(self.dims, self._values(architecture))

    def costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return ``macs`` and ``params`` of the extracted network, exact, for one example of its resolution.

        The first call counts the network once for each dimension; later ones seldom count at all (``CostTable``). The
        active architecture stays what it is.
        """
        values = self._values(architecture)
        before = self._current
        try:
            if self._cost_table is None:
                self._cost_table = CostTable(self._counted, {dim.name: dim.choices for dim in self.dims})
            return self._cost_table.of(values)
        finally:
            self.activate(before)

    def _counted(self, values: Mapping[str, int]) -> dict[int, tuple[int, int]]:
        """Count the modules of a subnet in place."""
        self.activate(values)
        inputs = self.example_inputs
        if self._resolution is not None:
            inputs = self.resized(inputs, self._resolution)
        args, kwargs = call_arguments(self.model, inputs)
        bound = _Bound(self.model, tuple(kwargs), self._call)
        with self.slices.active():
            counted = count(bound, (*args, *kwargs.values()))
            modules = dict(bound.named_modules())
            named = ((id(modules[layer.name]) if layer.name else 0, layer) for layer in counted.layers)
            return {key: (layer.macs, layer.params) for key, layer in named}  # 0: the way of calling the model

    # ------------------------------------------------------------------ before training

    def sort_(self, importance: Importance = "l2") -> dict[str, IntArray]:
        """Permute the units of every width so that the first are the most important; the function stays.

        Call it before training and before an optimiser has a state.

        Args:
            importance: "l1" or "l2" (norm over the weights of a unit), "scale" (magnitude of normalisation scales,
                "l2" where a group has none), scores by group name, or a function that gives them.

        Returns:
            The permutation of every group that was sorted: new position i holds the old unit ``permutation[i]``.

        Raises:
            UserError: Scores are missing or of another length.
        """
        groups = [self._groups[name] for dim in self.dims for name in dim.groups]
        tied = [dim.groups for dim in self.dims if dim.groups]
        scores = _scores(self.model, groups, importance)
        before = self._current
        self.activate(self.largest())
        try:
            return sort_units_(self.model, groups, tied, scores, self._outputs, self.notes)
        finally:
            self.activate(before)

    # ------------------------------------------------------------------ inside

    def _removed(self, values: Mapping[str, int]) -> dict[str, IntArray]:
        return removed_units(self.dims, self._order, values)

    def _attributes(self, values: Mapping[str, int]) -> dict[str, int]:
        found = {law.path: law(*(values[name] for name in law.dims)) for law in self._laws}
        whole = {law.path: law.whole for law in self._laws}
        return {path: value for path, value in found.items() if value != whole[path]}

    def _made(self, values: Mapping[str, int]) -> Architecture:
        active = {dim.name: values[dim.name] for dim in self.dims if is_active(dim, values)}
        return Architecture(active, space=self.space.name)

    def _values(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return a size for every dimension, the whole for inactive ones; the check is a few look-ups."""
        values: dict[str, int] = {}
        seen = 0
        if isinstance(architecture, Architecture) and architecture.space != self.space.name:
            raise UserError("architecture.space", architecture.space, allowed=f"{self.space.name!r}")
        for dim in self.dims:
            given = architecture.get(dim.name)
            if given is not None:
                seen += 1
                if given not in dim.choices or isinstance(given, bool | float):
                    raise UserError(dim.name, given, allowed=f"one of {list(dim.choices)}")
            if not is_active(dim, values):
                values[dim.name] = dim.whole
            elif given is None:
                raise UserError(dim.name, None, allowed=f"a choice for every active dimension, here of {dim.choices}")
            else:
                values[dim.name] = given
        if seen < len(architecture):
            unknown = [name for name in architecture if name not in values]
            raise UserError("architecture", unknown, allowed=f"dimensions of {self.space.name!r}: {self._some_names()}")
        return values

    def _some_names(self) -> str:
        names = [dim.name for dim in self.dims]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    def _check_mixed(self) -> None:
        """Let both checks of the atoms run on widths of different sizes, with the attributes as the laws say."""
        rng = np.random.default_rng(0)
        widths = [dim for dim in self.dims if dim.groups and len(dim.choices) > 1]
        if len(widths) > 1:
            sizes = {dim.name: int(rng.choice(dim.choices)) for dim in widths}
            values = {dim.name: sizes.get(dim.name, dim.whole) for dim in self.dims}
            removed = self._removed(values)
            if removed:
                self.atoms.plan(removed, attributes=self._attributes(values))

    def _check_runs(self, architecture: Architecture) -> None:
        self.activate(architecture)
        try:
            self._outputs()
        except Exception as error:
            raise UserError(
                "dims",
                Shown(f"a smallest network that does not run ({type(error).__name__}: {error})"),
                allowed="options with which the model runs on example_inputs",
            ) from error

    def _outputs(self) -> list[Tensor]:
        args, kwargs = call_arguments(self.model, self.example_inputs)
        with evaluating(self), torch.no_grad():
            leaves = tree_leaves(self(*args, **kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def _call(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs) if self._forward is None else self._forward(model, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under the model's own names; nothing is changed when they do not fit.

        Raises:
            UserError: A name is missing or unknown (with ``strict``), or a shape differs; the first are named.
        """
        own = {name: tuple(t.shape) for name, t in self.state_dict().items() if isinstance(t, Tensor)}
        given = {name: tuple(t.shape) for name, t in state_dict.items() if isinstance(t, Tensor)}
        wrong = [f"'{n}': {given[n]}, not {own[n]}" for n in given if n in own and given[n] != own[n]]
        if strict:
            wrong += [f"'{name}' is missing" for name in own if name not in given]
            wrong += [f"'{name}' is unknown" for name in given if name not in own]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise UserError("state_dict", Shown("; ".join(wrong[:4]) + more), allowed="weights of the whole network")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class _Renaming:
    """New names of tensors and attributes when blocks go."""

    def __init__(self, model: nn.Module, keeping: Mapping[str, Sequence[int]]) -> None:
        self.tensors = named_tensors(model)[0]
        self.containers: list[list[tuple[str, str | None]]] = []
        for path, kept in sorted(keeping.items(), key=lambda item: -item[0].count(".") if item[0] else 1):
            container = model.get_submodule(path)
            base = f"{path}." if path else ""
            new = {id(child): name for name, child in remaining(container, kept).items()}
            stay = set(kept)
            items = enumerate(container._modules.items())
            self.containers.append(
                [(f"{base}{n}.", f"{base}{new[id(child)]}." if at in stay else None) for at, (n, child) in items]
            )

    def name(self, name: str) -> str | None:
        """Return the new name of something in the model, None when it is gone; inner containers first."""
        for children in self.containers:
            for old, new in children:
                if name.startswith(old):
                    if new is None:
                        return None
                    name = new + name.removeprefix(old)
                    break
        return name

    def cut(self, cut: Cut) -> Cut:
        """Return a cut of the whole network as one of the network with fewer blocks."""
        tensors = {}
        for name, keeps in cut.tensors.items():
            same = [name, *(other for other, t in self.tensors.items() if t is self.tensors[name] and other != name)]
            new = next((found for other in same if (found := self.name(other)) is not None), None)
            if new is not None:
                tensors[new] = keeps
        attributes = {new: v for path, v in cut.attributes.items() if (new := self.name(path)) is not None}
        return dataclasses.replace(cut, tensors=tensors, attributes=attributes)


class _Bound(nn.Module):
    """A model that takes keyword arguments in a fixed order."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.names, self.call = model, names, call

    def forward(self, *values: Any) -> Any:
        """Call the model; the last values are those of the names."""
        split = len(values) - len(self.names)
        return self.call(self.model, *values[:split], **dict(zip(self.names, values[split:], strict=True)))


def _scores(model: nn.Module, groups: Sequence[UnitGroup], importance: Importance) -> Scores:
    if callable(importance):
        return importance(model, groups)
    if isinstance(importance, Mapping):
        missing = [group.name for group in groups if len(importance.get(group.name, ())) != group.size]
        if missing:
            raise UserError("importance", Shown(f"no scores that fit '{missing[0]}'"), allowed="one for every unit")
        return {name: np.asarray(values, dtype=np.float64) for name, values in importance.items()}
    if importance not in ("scale", "l1", "l2"):
        raise UserError("importance", importance, allowed="'scale', 'l1', 'l2', scores by group, or a function")
    if importance == "scale":
        places = scale_places(model, groups)
        scaled = [group for group in groups if places[group.name]]
        rest = [group for group in groups if not places[group.name]]
        return {**scale_scores(model, scaled), **weight_scores(model, rest)}
    return weight_scores(model, groups, p=int(importance[1]))


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Name the model's tensors in a ``state_dict`` as the model names them."""
    for name in list(state):
        if name.startswith(f"{prefix}model."):
            state[prefix + name.removeprefix(f"{prefix}model.")] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in list(state):
        if name.startswith(prefix) and not name.startswith(f"{prefix}{TRANSFORMS}."):
            state[f"{prefix}model.{name.removeprefix(prefix)}"] = state.pop(name)
