"""What of a model can be elastic, and what follows which size: how the dimensions of ``elastic`` are read.

Widths come from the atoms, depths from runs of residual blocks, kernels from convolutions, the resolution from the
inputs. What can not be left out or cut is found out here, before anything computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from archsmith.atoms.finding import FoundAtoms
from archsmith.atoms.fingerprint import named_tensors
from archsmith.atoms.plan import CutRefused, plan_cut
from archsmith.atoms.trace import Forward
from archsmith.atoms.units import IntArray, TensorCut, UnitGroup
from archsmith.core.errors import Shown, UserError
from archsmith.space import AllOf, Condition, Element, Given, Ordinal, ProductSpace, When
from archsmith.supernet.elastic_attributes import AttributeLaw, attribute_laws
from archsmith.supernet.elastic_depth import residual_runs, wrong_without
from archsmith.supernet.elastic_dims import Candidate, ElasticDim, nested, width_candidates
from archsmith.supernet.elastic_kernel import KernelTransform, has_elastic_kernel, kernel_parts, smallest_kernel
from archsmith.supernet.elastic_slices import Part, SlicedAttribute, SlicedAxis, SlicedChildren, SlicedTensor


def dimension_candidates(
    model: nn.Module, atoms: FoundAtoms, example_inputs: Any, *, resolution: bool
) -> list[Candidate]:
    """Return everything in a model that could be a dimension.

    Args:
        model: The model.
        atoms: What was found in it.
        example_inputs: What it is called with.
        resolution: Whether the side of its square images is one.
    """
    runs = residual_runs(model, atoms.labelled)
    found = width_candidates(atoms, runs)
    taken: set[str] = set()
    for run in runs:
        name = unique = f"{run.container}.depth" if run.container else "depth"
        number = 1
        while unique in taken:
            number += 1
            unique = f"{name}{number}"
        taken.add(unique)
        lowest = 0 if len(run.positions) < run.children else 1
        scope = run.container or "(model)"  # never inside a block of its own
        found.append(Candidate(unique, "depth", len(run.positions), lowest=lowest, run=run, scope=scope))
    for path, module in model.named_modules():
        if has_elastic_kernel(module):
            convolution = cast(nn.modules.conv._ConvNd, module)
            size, lowest = convolution.kernel_size[0], smallest_kernel(convolution)
            if lowest < size:
                found.append(Candidate(f"{path}.kernel", "kernel", size, lowest=lowest, module=path, scope=path))
    sides = {
        leaf.shape[-1]
        for leaf in tree_leaves(example_inputs)
        if isinstance(leaf, Tensor)
        and leaf.dim() == 4
        and leaf.is_floating_point()
        and leaf.shape[-1] == leaf.shape[-2]
    }
    if len(sides) == 1 and resolution:
        found.append(Candidate("resolution", "resolution", sides.pop()))
    return found


def removable(
    model: nn.Module,
    atoms: FoundAtoms,
    example_inputs: Any,
    forward: Forward | None,
    dims: list[ElasticDim],
    notes: list[str],
    *,
    automatic: bool,
) -> list[ElasticDim]:
    """Return the dimensions without depths that do more, or less, than leave out their blocks.

    Args:
        model: The model.
        atoms: What was found in it.
        example_inputs: What it is called with.
        forward: How it is called.
        dims: The dimensions.
        notes: What is left out is noted there.
        automatic: Whether nobody asked for these very ones.

    Raises:
        UserError: One that was asked for is none.
    """

    def wrong(keeping: Mapping[str, Sequence[int]]) -> str:
        return wrong_without(model, keeping, atoms.labelled, example_inputs, forward)

    depths = [dim for dim in dims if dim.run is not None and len(dim.choices) > 1]
    keeping = kept_blocks(depths, {dim.name: dim.choices[0] for dim in depths})
    if not depths or not wrong(keeping):
        return dims
    without = {}
    for dim in depths:
        reason = wrong(kept_blocks([dim], {dim.name: dim.choices[0]}))
        if reason:
            without[dim.name] = reason
            notes.append(f"'{dim.name}' is left out: {reason}")
    if not automatic or not without:
        name, reason = next(iter(without.items()), (depths[0].name, "these depths do not go together"))
        raise UserError(f"dims['{name}']", Shown(f"blocks that can not be left out ({reason})"), allowed="others")
    return nested([dim for dim in dims if dim.name not in without])


def kept_blocks(dims: Sequence[ElasticDim], values: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the positions that remain of every container that loses some."""
    keeping: dict[str, list[int]] = {}
    for dim in dims:
        if dim.run is not None and values[dim.name] < dim.whole:
            kept = dim.run.kept(values[dim.name])
            before = keeping.get(dim.run.container, kept)
            keeping[dim.run.container] = [position for position in before if position in set(kept)]
    return keeping


def cuttable(
    atoms: FoundAtoms, order: Mapping[str, IntArray], dims: list[ElasticDim], notes: list[str], *, automatic: bool
) -> tuple[list[ElasticDim], list[AttributeLaw]]:
    """Return the dimensions that can be cut, and how attributes follow them.

    Args:
        atoms: What was found in the model.
        order: Units of every group, the first that goes last.
        dims: The dimensions.
        notes: What is left out is noted there.
        automatic: Whether nobody asked for these very ones.

    Raises:
        CutRefused: One that was asked for can not be cut.
    """

    def removed(sizes: Mapping[str, int]) -> dict[str, IntArray]:
        return removed_units(dims, order, sizes)

    try:
        return dims, attribute_laws(atoms, dims, removed)
    except CutRefused:
        if not automatic:
            raise
    fitting = []
    for dim in dims:
        try:
            if dim.groups:
                atoms.plan(removed({dim.name: dim.choices[0]}))
        except CutRefused as error:
            notes.append(f"'{dim.name}' is left out: {error.reason}")
        else:
            fitting.append(dim)
    return fitting, attribute_laws(atoms, fitting, removed)


def removed_units(
    dims: Sequence[ElasticDim], order: Mapping[str, IntArray], sizes: Mapping[str, int]
) -> dict[str, IntArray]:
    """Return the units of every group that sizes leave out."""
    return {
        group: order[group][sizes[dim.name] :]
        for dim in dims
        if dim.groups and dim.name in sizes and sizes[dim.name] < dim.whole
        for group in dim.groups
    }


def space_of(name: str, dims: Sequence[ElasticDim]) -> ProductSpace:
    """Return the space of dimensions: those inside blocks that a depth leaves out are not asked for."""
    elements: dict[str, Element] = {}
    by_name = {dim.name: dim for dim in dims}
    for dim in dims:
        element: Element = Ordinal(dim.choices, group=dim.kind)
        conditions: list[Condition] = []
        for depth, position in dim.inside:
            enough = tuple(n for n in by_name[depth].choices if n > position)
            if len(enough) < len(by_name[depth].choices):
                conditions.append(When(depth, enough))
        if conditions:
            element = Given(conditions[0] if len(conditions) == 1 else AllOf(tuple(conditions)), element)
        elements[dim.name] = element
    return ProductSpace(name, elements)


def parts_of(
    model: nn.Module,
    dims: Sequence[ElasticDim],
    by_name: Mapping[str, UnitGroup],
    order: Mapping[str, IntArray],
    laws: Sequence[AttributeLaw],
    kernels: Mapping[str, KernelTransform],
) -> list[Part]:
    """Return what follows which dimension: the positions that surgery would keep, and what else it would change.

    Args:
        model: The model.
        dims: The dimensions.
        by_name: Groups of units.
        order: Units of every group, the first that goes last.
        laws: Attributes that follow sizes.
        kernels: Transforms of the kernels, by dimension.
    """
    parts: list[Part] = []
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model)[0].items()}
    of_group = {group: dim for dim in dims for group in dim.groups}
    joint = {p.tensor for name in of_group for p in by_name[name].places if len(p.axes) > 1}
    for name, dim in of_group.items():
        known: dict[int, dict[int, IntArray]] = {}  # by array: most places of one width share one
        for place in by_name[name].places:
            if place.tensor in joint:
                continue
            length = shapes[place.tensor][place.axes[0]]
            key = id(place.index) * 2**20 + length
            if key not in known:
                known[key] = {k: _kept(place.index, order[name][k:], length) for k in dim.choices}
            parts.append(SlicedAxis(place.tensor, place.axes[0], (dim.name,), known[key].__getitem__))
    for tensor in sorted(joint):
        groups = [
            dataclasses.replace(group, places=tuple(p for p in group.places if p.tensor == tensor))
            for group in (by_name[name] for name in of_group)
            if any(p.tensor == tensor for p in group.places)
        ]
        genes = tuple(dict.fromkeys(of_group[group.name].name for group in groups))
        parts.append(SlicedTensor(tensor, genes, _JointCut(model, tensor, groups, genes, of_group, order)))
    parts += [SlicedAttribute(law.path, law.dims, law) for law in laws]
    containers: dict[str, list[ElasticDim]] = {}
    for dim in dims:
        if dim.run is not None:
            containers.setdefault(dim.run.container, []).append(dim)
        if dim.kind == "kernel":
            convolution = cast(nn.modules.conv._ConvNd, model.get_submodule(dim.module))
            parts += kernel_parts(dim.module, convolution, dim.name, kernels[dim.name])
    for container, depths in containers.items():
        parts.append(SlicedChildren(container, tuple(dim.name for dim in depths), _Children(depths)))
    return parts


def is_active(dim: ElasticDim, values: Mapping[str, int]) -> bool:
    """Return whether a dimension is inside blocks that remain."""
    return all(values[depth] > position for depth, position in dim.inside)


def _kept(index: IntArray, gone: IntArray, length: int) -> IntArray:
    flags = np.ones(length, dtype=bool)
    flags[index[gone]] = False
    return np.flatnonzero(flags)


class _JointCut:
    """What remains of a tensor whose axes are cut jointly, by the atoms' own plan."""

    def __init__(
        self,
        model: nn.Module,
        tensor: str,
        groups: Sequence[UnitGroup],
        genes: Sequence[str],
        dims: Mapping[str, ElasticDim],
        order: Mapping[str, IntArray],
    ) -> None:
        self.groups, self.genes, self.tensor = groups, genes, tensor
        self.shape = tuple(named_tensors(model)[0][tensor].shape)
        self.gene_of = {group.name: dims[group.name].name for group in groups}
        self.order = order

    def __call__(self, *sizes: int) -> TensorCut | None:
        by_gene = dict(zip(self.genes, sizes, strict=True))
        removed = {g.name: self.order[g.name][by_gene[self.gene_of[g.name]] :] for g in self.groups}
        cut = plan_cut(self.groups, removed, _holding(self.tensor, self.shape))
        return cut.tensors.get(self.tensor)


def _holding(tensor: str, shape: tuple[int, ...]) -> nn.Module:
    """Return a network with nothing but one tensor, without numbers."""
    root = nn.Module()
    *parents, leaf = tensor.split(".")
    owner = root
    for parent in parents:
        child = nn.Module()
        owner.add_module(parent, child)
        owner = child
    owner.register_buffer(leaf, torch.empty(shape, device="meta"))
    return root


class _Children:
    """The children of a container that remain, by the depths of its runs."""

    def __init__(self, depths: Sequence[ElasticDim]) -> None:
        self.runs = [dim.run for dim in depths if dim.run is not None]

    def __call__(self, *sizes: int) -> list[int]:
        kept = [set(run.kept(size)) for run, size in zip(self.runs, sizes, strict=True)]
        return sorted(set.intersection(*kept))
