"""Growing is removal backwards: units are copied, and what reads them shares, so that the function stays (Net2Wider).

Where a unit lies in a tensor that makes it or passes it on, its slice is repeated; where a weight sums over it, the
slice is repeated and divided by the number of copies. Copies stand right behind their original in every tensor, hence
concatenations, chunks and flattened maps keep their order. Through a batch normalisation copies stay copies; through a
layer normalisation only if every unit is copied equally often.

Source: Chen, Goodfellow, Shlens, "Net2Net", arXiv 1511.05641; concatenations as in Cai et al., "Efficient Architecture
Search by Network Transformation", arXiv 1707.04873.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from archsmith.atoms.consumers import Axis, consuming_axes
from archsmith.atoms.doubles import in_double, widened
from archsmith.atoms.fingerprint import fingerprint, first_names, unwrap
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.morphisms import channel_statistics, identity_conv, identity_linear, identity_norm
from archsmith.atoms.numbers import double_twin, floating, randomised, relative
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.trace import Forward, call_arguments, export
from archsmith.atoms.transaction import CutOutcome, Shares, apply_
from archsmith.atoms.units import Cut, IntArray, Place, TensorCut, UnitGroup
from archsmith.core.errors import Shown, UserError
from archsmith.graph import evaluating

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Growth:
    """Units to add, planned and not yet added.

    Attributes:
        cut: For every tensor that changes the positions of the old one, repeated where they are copied.
        shares: What weights and their gradients are multiplied with.
        groups: All groups as they are afterwards.
    """

    cut: Cut
    shares: Shares
    groups: tuple[UnitGroup, ...]


def plan_growth(
    groups: Sequence[UnitGroup],
    copies: Mapping[str, Sequence[int]],
    model: nn.Module,
    consuming: Iterable[Axis],
    *,
    mixed: Iterable[Axis] = (),
    attributes: Mapping[str, Any] | None = None,
    blocks: bool = True,
) -> Growth:
    """Plan copies of units.

    Args:
        groups: All groups of the model.
        copies: By group name the units to copy, each as often as it is named: ``{"layer1": [3, 3, 7]}`` adds three.
        model: The network, read only.
        consuming: Axes that sum over units, see ``consumers.consuming_axes``.
        mixed: Those of them that also serve another purpose.
        attributes: New values of user attributes by dotted path.
        blocks: A unit's neighbouring positions are copied together (a head, a flattened map); False copies each
            position right behind itself.

    Raises:
        CutRefused: A group has jointly cut axes or no consumer, lies under a normalisation that would see other
            statistics, or an axis is both summed over and used as it is.
        UserError: A group or unit does not exist.
    """
    model = unwrap(model)
    known = {group.name: group for group in groups}
    consuming, mixed = set(consuming), set(mixed)
    first, tensors = first_names(model), tensors_of(model)
    source: dict[Axis, IntArray] = {}
    weight: dict[Axis, FloatArray] = {}
    gradient: dict[Axis, FloatArray] = {}
    for name, units in copies.items():
        if name not in known:
            raise UserError("copies", name, allowed="names of groups: " + ", ".join(list(known)[:8]))
        counts = _counts(known[name], units)
        _check(known[name], counts, consuming, mixed, first)
        chosen: dict[Axis, tuple[IntArray, IntArray]] = {}
        for place in known[name].places:
            axis = (first[place.tensor], place.axes[0])
            length = len(source[axis]) if axis in source else tensors[axis[0]].shape[axis[1]]
            if axis in chosen:
                raise CutRefused(name, f"it has two places on axis {axis[1]} of '{axis[0]}'")
            chosen[axis] = _repeated(place.index, counts, length, blocks)
        for axis, (order, times) in chosen.items():
            share = 1.0 / times[order]
            before = source.get(axis, np.arange(tensors[axis[0]].shape[axis[1]]))
            one = np.ones(len(before))
            source[axis] = before[order]
            weight[axis] = weight.get(axis, one)[order] * (share if axis in consuming else 1.0)
            gradient[axis] = gradient.get(axis, one)[order] * (1.0 if axis in consuming else share)
        known = {n: _moved(g, chosen, counts if n == name else None, first) for n, g in known.items()}
    by_tensor: dict[str, dict[int, IntArray]] = {}
    for (tensor, number), index in source.items():
        by_tensor.setdefault(tensor, {})[number] = index
    cut = Cut(
        removed={},
        tensors={tensor: TensorCut(axes=dict(sorted(axes.items()))) for tensor, axes in by_tensor.items()},
        attributes=dict(attributes or {}),
        fingerprint=fingerprint(model),
    )
    return Growth(cut, Shares(_factors(weight, tensors), _factors(gradient, tensors)), tuple(known.values()))


def _counts(group: UnitGroup, units: Sequence[int]) -> IntArray:
    counts = np.ones(group.size, dtype=np.int64)
    for unit in units:
        if not 0 <= unit < group.size:
            raise UserError(f"copies['{group.name}']", unit, allowed=f"units 0 to {group.size - 1}")
        counts[unit] += 1
    return counts


def _check(
    group: UnitGroup, counts: IntArray, consuming: set[Axis], mixed: set[Axis], first: Mapping[str, str]
) -> None:
    if group.frozen:
        raise CutRefused(group.name, f"it is frozen: {group.frozen}")
    if joint := [place.tensor for place in group.places if len(place.axes) > 1]:
        raise CutRefused(
            group.name, f"'{joint[0]}' holds its units along several axes at once: there is no growing yet"
        )
    axes = {(first[place.tensor], place.axes[0]) for place in group.places}
    if both := sorted(axes & mixed):
        raise CutRefused(
            group.name,
            f"axis {both[0][1]} of '{both[0][0]}' is summed over and also used as it is (tied weights): "
            "copies there can not be divided",
        )
    if not axes & consuming:
        raise CutRefused(group.name, "no weight sums over its units, so nothing can share between copies")
    if group.changes and len(set(counts.tolist())) > 1:
        raise CutRefused(
            group.name, f"{group.changes[0]} would see other statistics unless every unit is copied equally often"
        )
    sums = {sum(int(counts[unit]) for unit in part) for part in group.balance}
    if len(sums) > 1:
        raise CutRefused(group.name, f"its parts would have {sorted(sums)} units, they must have equally many")


def _repeated(index: IntArray, counts: IntArray, length: int, blocks: bool) -> tuple[IntArray, IntArray]:
    """Return the old position of each new one along an axis, and how often each old one is there."""
    times = np.ones(length, dtype=np.int64)
    run_of = np.arange(length)  # first position of the run that is copied as one
    for unit in np.flatnonzero(counts > 1):
        positions = np.sort(index[unit])
        times[positions] = counts[unit]
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1) if blocks else np.arange(len(positions))
        for run in np.split(positions, starts[1:]):
            run_of[run] = run[0]
    edges = np.flatnonzero(np.diff(run_of, prepend=-1))
    order = [np.tile(run, times[run[0]]) for run in np.split(np.arange(length), edges[1:])]
    return np.concatenate(order), times


def _moved(
    group: UnitGroup,
    chosen: Mapping[Axis, tuple[IntArray, IntArray]],
    counts: IntArray | None,
    first: Mapping[str, str],
) -> UnitGroup:
    """Return a group as it is after some axes grew; ``counts`` are those of the group itself, if it is the one."""
    places = []
    for place in group.places:
        found = chosen.get((first[place.tensor], place.axes[0])) if len(place.axes) == 1 else None
        index = place.index
        if found is not None:
            where = [np.flatnonzero(np.isin(found[0], row)) for row in index]
            if counts is not None:
                where = [part for w, n in zip(where, counts, strict=True) for part in _dealt(w, int(n), found[0])]
            if len({len(w) for w in where}) > 1:
                raise CutRefused(group.name, f"its units would get different widths in '{place.tensor}'")
            index = np.stack(where)
        places.append(Place(place.tensor, place.axes, index))
    if counts is None:
        return dataclasses.replace(group, places=tuple(places))
    ends = np.cumsum(counts)
    balance = tuple(tuple(int(j) for u in part for j in range(ends[u] - counts[u], ends[u])) for part in group.balance)
    return dataclasses.replace(group, size=int(counts.sum()), places=tuple(places), balance=balance)


def _dealt(where: IntArray, count: int, source: IntArray) -> list[IntArray]:
    """Return which of a unit's new positions belong to its first copy, its second and so on."""
    seen: dict[int, int] = {}
    number = []
    for position in where:
        old = int(source[position])
        number.append(seen.get(old, 0))
        seen[old] = number[-1] + 1
    return [where[np.asarray(number) == copy] for copy in range(count)]


def _factors(shares: Mapping[Axis, FloatArray], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one factor for each tensor that broadcasts to its new shape; tensors without any are left out."""
    found: dict[str, Tensor] = {}
    for (name, axis), share in shares.items():
        if (share == 1).all():
            continue
        shape = [-1 if i == axis else 1 for i in range(tensors[name].dim())]
        own = torch.from_numpy(share).reshape(shape)
        found[name] = found[name] * own if name in found else own
    return found


def grow_(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    copies: Mapping[str, Sequence[int]],
    example_inputs: Any,
    *,
    forward: Forward | None = None,
    optimizers: Iterable[Any] = (),
    averages: Iterable[nn.Module] = (),
    tables: Iterable[MutableMapping[str, Tensor]] = (),
    attributes: Mapping[str, Any] | None = None,
    elementwise: Iterable[str] = (),
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-5,
) -> tuple[CutOutcome, tuple[UnitGroup, ...]]:
    """Copy units of a model in place without changing its function.

    A copy of the model with random numbers on top of its weights is grown first, in float64; if its outputs are not
    those of the original to ``tolerance``, nothing is changed.

    Args:
        model: Network, changed in place; parameters keep their identity.
        groups: Its groups, found or hand-declared.
        copies: By group name the units to copy, each as often as it is named.
        example_inputs: A tensor, a tuple of arguments or a mapping by name.
        forward: How to call the model, see the finder.
        optimizers: Their states are copied too; first moments of copies are those of the shared gradient, second
            moments its square.
        averages: Modules with averaged weights, grown alike.
        tables: Tensors by qualified name, grown alike.
        attributes: New values of user attributes by dotted path (``num_heads``, ...).
        elementwise: See ``apply_``; such states are copied as they are.
        noise: Standard deviation of random numbers on the copies in the parameters that are not divided, relative to
            each parameter's own: without any, copies have equal gradients and stay copies. The function then changes a
            little.
        generator: Source of the noise.
        tolerance: Largest relative difference of the outputs before noise.

    Returns:
        What was done, and all groups as they are now: growing may go on with them.

    Raises:
        CutRefused: The function would not be preserved, or see ``plan_growth``.
    """
    inner = unwrap(model)
    program = export(inner, example_inputs, forward)
    first = first_names(inner)
    consuming, mixed = consuming_axes(program.graph_module, {key: first[n] for key, n in program.tensor_names.items()})
    refused: CutRefused | None = None
    for blocks in (True, False):
        growth = plan_growth(groups, copies, inner, consuming, mixed=mixed, attributes=attributes, blocks=blocks)
        try:
            _check_function(inner, growth, next(iter(copies), ""), example_inputs, forward, tolerance)
            break
        except CutRefused as error:
            refused = refused or error
    else:
        assert refused is not None
        raise refused
    done = apply_(
        model,
        growth.cut,
        optimizers=optimizers,
        averages=averages,
        tables=tables,
        elementwise=elementwise,
        shares=growth.shares,
        verify=(lambda grown: _disturb(grown, growth, noise, generator)) if noise else None,
    )
    return done, growth.groups


def _check_function(
    model: nn.Module, growth: Growth, group: str, example_inputs: Any, forward: Forward | None, tolerance: float
) -> None:
    """Raise unless a grown copy with random weights computes what the model with these weights does."""
    values = randomised(model, 0)
    whole = double_twin(model, Cut({}, {}), values)
    grown = double_twin(model, Cut({}, {}), values)
    args, kwargs = tree_map(widened, call_arguments(model, example_inputs))
    results = []
    try:
        apply_(grown, growth.cut, shares=growth.shares)
        for network in (whole, grown):
            with in_double(), torch.no_grad(), evaluating(network):
                result = network(*args, **kwargs) if forward is None else forward(network, *args, **kwargs)
            results.append(floating(tree_leaves(result)))
    except CutRefused:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CutRefused(group, f"the grown model does not run: {type(error).__name__}: {reason}") from error
    if [r.shape for r in results[0]] != [r.shape for r in results[1]]:
        raise CutRefused(group, "the outputs would change their shape")
    gap = max((relative(b, a) for a, b in zip(*results, strict=True)), default=0.0)
    if not gap <= tolerance:
        raise CutRefused(group, f"the function would change by {gap:.1e} (relative)")


def _disturb(model: nn.Module, growth: Growth, noise: float, generator: torch.Generator | None) -> None:
    """Add noise to the copies in parameters that are not divided."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for name, cut in growth.cut.tensors.items():
            value = tensors[name]
            if not isinstance(value, nn.Parameter) or name in growth.shares.weights:
                continue
            copied = torch.zeros((1,) * value.dim(), dtype=torch.bool)
            for axis, index in cut.axes.items():
                repeat = np.ones(len(index), dtype=bool)
                repeat[np.unique(index, return_index=True)[1]] = False
                copied = copied | torch.from_numpy(repeat).reshape([-1 if i == axis else 1 for i in range(value.dim())])
            extra = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
            value.add_(noise * value.std(correction=0) * extra * copied.to(value))


# --------------------------------------------------------------------- deeper


def deeper_layer(like: nn.Module, x: Tensor, *, norm: bool = False, kernel: int | None = None) -> nn.Module:
    """Return a layer to put behind another one without changing the function (Net2Deeper).

    Args:
        like: The layer or activation behind which it goes, for type and device (its first parameter); a ``Conv2d`` also
            gives the kernel.
        x: What the new layer will see: (batch, channels, height, width) for a convolution, (..., features) for a linear
            layer. With ``norm`` a batch of real data: its statistics make the normalisation an identity on it, in
            training mode too.
        norm: Add a batch normalisation (and no bias in the layer).
        kernel: Odd side of the convolution's kernel; None takes that of ``like``, or 3.

    Returns:
        ``Conv2d`` or ``Linear``, or ``Sequential`` of it and a batch normalisation. It may be followed by a ReLU where
        ``x`` is the output of one; other activations change the function.

    Raises:
        UserError: An even kernel, or an ``x`` of neither shape.
    """
    near = next(like.parameters(), x)
    dtype, device = near.dtype, near.device
    layer: nn.Conv2d | nn.Linear
    if x.dim() == 4:
        channels = x.shape[1]
        side = kernel or (like.kernel_size[0] if isinstance(like, nn.Conv2d) else 3)
        weight = identity_conv(channels, side)
        layer = nn.Conv2d(channels, channels, side, padding=side // 2, bias=not norm, dtype=dtype, device=device)
    elif x.dim() in (2, 3):
        weight = identity_linear(x.shape[-1])
        layer = nn.Linear(x.shape[-1], x.shape[-1], bias=not norm, dtype=dtype, device=device)
    else:
        raise UserError("x", Shown(f"a tensor of shape {tuple(x.shape)}"), allowed="images or feature vectors")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.zero_()
        if not norm:
            return layer
        kind: type[nn.BatchNorm1d | nn.BatchNorm2d]
        kind = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
        behind = kind(weight.shape[0], dtype=dtype, device=device)
        mean, variance = channel_statistics(x.detach(), axis=1 if x.dim() == 4 else x.dim() - 1)
        for name, value in identity_norm(mean, variance, eps=behind.eps).items():
            getattr(behind, name).copy_(value)
    return nn.Sequential(layer, behind)
