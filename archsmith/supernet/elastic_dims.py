"""The dimensions of an elastic network: which of its atoms are chosen by number, and from which numbers.

A dimension stands for a width ("the first k units of a group"), a depth ("the first d blocks of a run"), a kernel (its
centre) or the resolution of the input. What there is, is read off the atoms and their graph; what is offered, the
caller says by kind, by name or by a pattern of names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, cast, get_args

import numpy as np

from archsmith.atoms.finding import FoundAtoms
from archsmith.atoms.propagate import module_name
from archsmith.atoms.rules.table import packet_name
from archsmith.atoms.units import IntArray, UnitGroup
from archsmith.core.errors import Shown, UserError
from archsmith.supernet.elastic_depth import Run

DimKind = Literal["width", "heads", "ffn", "embedding", "columns", "depth", "kernel", "resolution"]
"""``heads``: attention heads whole, or groups of query heads with their key and value head. ``ffn``: hidden units of a
residual block's matrices. ``embedding``: the stream that layer normalisations read. ``columns``: features inside heads.
``width``: every other group of units."""

BY_DEFAULT: tuple[DimKind, ...] = ("width", "heads", "ffn", "depth")
SHARES = (0.5, 0.75, 1.0)

Offered = Mapping[str, Sequence[int | float]]
"""Options by kind, name or pattern of names: numbers (int), or shares of the whole (float)."""


@dataclass(frozen=True)
class ElasticDim:
    """One thing that can be chosen.

    Attributes:
        name: Path of the decision.
        kind: See ``DimKind``.
        choices: Options, ascending; the last is the whole.
        groups: Groups of atoms that keep the first so many units, for the kinds of widths; several shrink together.
        run: For depths: container and positions of the blocks.
        module: For kernels: qualified name of the convolution.
        scope: Qualified name of the innermost module that holds all of it; empty for the model.
        inside: Names of the depth dimensions in whose blocks it lies, with the position of the block in its run: it
            is active while more blocks than that are kept.
    """

    name: str
    kind: DimKind
    choices: tuple[int, ...]
    groups: tuple[str, ...] = ()
    run: Run | None = None
    module: str = ""
    scope: str = ""
    inside: tuple[tuple[str, int], ...] = ()

    @property
    def whole(self) -> int:
        """The largest choice."""
        return self.choices[-1]


@dataclass(frozen=True)
class Candidate:
    """Something that could be a dimension: ``ElasticDim`` without choices."""

    name: str
    kind: DimKind
    whole: int
    step: int = 1
    lowest: int = 1
    groups: tuple[str, ...] = ()
    run: Run | None = None
    module: str = ""
    scope: str = ""


def width_candidates(found: FoundAtoms, runs: Sequence[Run]) -> list[Candidate]:
    """Return the groups of atoms that can shrink by number; those that must shrink together are one candidate."""
    blocks = [block for run in runs for block in run.blocks]
    attention = {
        module_name(node)
        for node in found.labelled.operators()
        if packet_name(node) in ("scaled_dot_product_attention", "softmax", "_softmax", "multi_head_attention_forward")
    }
    made = []
    for tied in _tied(found):
        groups = [found.group(name) for name in tied]
        if any(group.frozen or group.size < 2 for group in groups) or len({group.size for group in groups}) > 1:
            continue
        step = math.lcm(*(max(len(group.balance), 1) for group in groups))
        step = math.lcm(step, *(g.divisor for g in groups if g.size % g.divisor == 0))
        lowest = max(group.minimum for group in groups)
        kind = _kind(groups[0], blocks, attention)
        made.append(
            Candidate(
                tied[0],
                kind,
                groups[0].size,
                step=step,
                lowest=-(-max(lowest, 1) // step) * step,
                groups=tied,
                scope=_scope([place.tensor for group in groups for place in group.places]),
            )
        )
    return made


def unit_order(group: UnitGroup) -> IntArray:
    """Return the positions of units in the order in which they are kept: one of each balanced part in turn."""
    if not group.balance:
        return np.arange(group.size)
    inside = list(chain.from_iterable(zip(*group.balance, strict=True)))
    rest = sorted(set(range(group.size)) - set(inside))
    return np.array(inside + rest)


def chosen(candidates: Sequence[Candidate], offered: Offered | None, divisor: int) -> list[ElasticDim]:
    """Return the dimensions with what is offered for them.

    Args:
        candidates: What there is.
        offered: None for ``SHARES`` of every candidate of a kind in ``BY_DEFAULT``.
        divisor: Shares of widths are rounded to a multiple of it.

    Raises:
        UserError: A key fits nothing, an option does not exist, or the whole is not among the options.
    """
    dims = []
    used: set[str] = set()
    for one in candidates:
        if offered is None:
            if one.kind not in BY_DEFAULT:
                continue
            given: Sequence[int | float] = _default(one)
        else:
            key = _key(one, offered)
            if key is None:
                continue
            used.add(key)
            given = offered[key]
        choices = _choices(one, given, divisor)
        if offered is None and len(choices) < 2:
            continue
        dims.append(ElasticDim(one.name, one.kind, choices, one.groups, one.run, one.module, one.scope))
    unused = [key for key in offered or {} if key not in used]
    if unused:
        kinds = sorted({one.kind for one in candidates})
        raise UserError(
            "dims",
            unused[0],
            allowed=f"a kind that the network has ({', '.join(kinds)}), or a name or pattern of: {_some(candidates)}",
        )
    return nested(dims)


def _kind(group: UnitGroup, blocks: Sequence[str], attention: set[str]) -> DimKind:
    if any("layer_norm" in text or "rms" in text or "mean" in text for text in group.changes):
        return "embedding"
    of_attention = [
        place
        for place in group.places
        if place.tensor.endswith("weight") and place.tensor.rpartition(".")[0].rpartition(".")[0] in attention
    ]
    several = [place for place in of_attention if place.index.shape[1] > 1]
    if several and len(several) == len(of_attention):
        runs = all(bool((np.diff(np.sort(place.index[0])) == 1).mean() >= 0.5) for place in several)
        return "heads" if runs else "columns"
    inside = [b for b in blocks if all(place.tensor.startswith(f"{b}.") for place in group.places)]
    convolution = any(len(place.axes) > 1 for place in group.places)
    return "ffn" if inside and not convolution and group.size > 1 and _matrices(group) else "width"


def _matrices(group: UnitGroup) -> bool:
    return not any("conv" in place.tensor.lower() for place in group.places)


def _tied(found: FoundAtoms) -> list[tuple[str, ...]]:
    """Return the names of the groups, those together that a split into equal pieces makes equally wide."""
    labels = found.labelled.labels
    of_unit = {int(unit): name for name, units in found.labelled.units.items() for unit in units}
    parent = {group.name: group.name for group in found.groups}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for split in found.labelled.propagation.splits:
        names: list[set[str]] = []
        for piece in split.pieces:
            leaves = {leaf for label in labels.roots(piece).tolist() for leaf in labels.leaves(label)}
            names.append({of_unit[leaf] for leaf in leaves if leaf in of_unit})
        if len({frozenset(each) for each in names}) > 1:
            together = sorted(set().union(*names))
            for other in together[1:]:
                parent[root(other)] = root(together[0])
    order = {group.name: number for number, group in enumerate(found.groups)}
    sets: dict[str, list[str]] = {}
    for name in order:
        sets.setdefault(root(name), []).append(name)
    return [tuple(names) for names in sets.values()]


def _default(one: Candidate) -> Sequence[int | float]:
    if one.kind == "depth":
        return range(max(one.lowest, -(-one.whole // 2)), one.whole + 1) if one.whole > 1 else range(one.lowest, 2)
    return SHARES


def _key(one: Candidate, offered: Offered) -> str | None:
    if one.name in offered:
        return one.name
    patterns = [key for key in offered if key not in get_args(DimKind) and fnmatch.fnmatchcase(one.name, key)]
    return max(patterns, key=len) if patterns else one.kind if one.kind in offered else None


def _choices(one: Candidate, given: Sequence[int | float], divisor: int) -> tuple[int, ...]:
    step = math.lcm(one.step, divisor) if one.kind in ("width", "ffn", "embedding") else one.step
    step = step if one.whole % step == 0 else one.step
    made = set()
    for option in given:
        if isinstance(option, float):
            if not 0 < option <= 1:
                raise UserError(f"dims['{one.name}']", option, allowed="shares above 0 and at most 1, or numbers (int)")
            number = max(round(option * one.whole / step) * step, step)
        elif isinstance(option, bool) or not isinstance(option, int | np.integer):
            raise UserError(f"dims['{one.name}']", option, allowed="integers, or shares (float) of the whole")
        else:
            number = int(option)
        odd = one.kind == "kernel" and number % 2 == 0
        if not one.lowest <= number <= one.whole or number % one.step or odd:
            what = "an odd number" if one.kind == "kernel" else "a number"
            multiple = f", a multiple of {one.step}" if one.step > 1 else ""
            raise UserError(f"dims['{one.name}']", option, allowed=f"{what} from {one.lowest} to {one.whole}{multiple}")
        made.add(number)
    if not made:
        raise UserError(f"dims['{one.name}']", Shown("no option"), allowed="at least the whole")
    if max(made) != one.whole:
        raise UserError(
            f"dims['{one.name}']",
            Shown(f"{sorted(made)}"),
            allowed=f"options with {one.whole} among them: the largest subnet is the network as it is",
        )
    return tuple(sorted(made))


def nested(dims: Sequence[ElasticDim]) -> list[ElasticDim]:
    """Say of every dimension in which blocks of which runs it lies; depths first, the outer before the inner."""
    depths = [dim for dim in dims if dim.run is not None]
    depths.sort(key=lambda dim: cast(Run, dim.run).container.count("."))
    result = []
    for dim in [*depths, *(dim for dim in dims if dim.run is None)]:
        inside = []
        for depth in depths:
            assert depth.run is not None
            for number, block in enumerate(depth.run.blocks):
                if depth is not dim and _lies_in(dim, block):
                    inside.append((depth.name, number))
        result.append(dataclasses.replace(dim, inside=tuple(inside)))
    return result


def _lies_in(dim: ElasticDim, block: str) -> bool:
    return dim.scope == block or dim.scope.startswith(f"{block}.")


def _scope(names: Sequence[str]) -> str:
    """Return the common beginning of qualified names of tensors, in whole parts."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)


def _some(candidates: Sequence[Candidate], limit: int = 8) -> str:
    names = [one.name for one in candidates]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
