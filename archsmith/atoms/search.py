"""Which attributes of the user's modules must change with a cut: candidates, and the smallest set whose replay passes.

A candidate is an integer attribute (or a field of a configuration) of a module on the path of an operator whose literal
sizes change, that holds the old size and is mentioned in the code of the module. Instances of one class change alike.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from torch import fx, nn

from archsmith.atoms.labels import BoolArray, Cause, IntArray
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.propagate import LabelledGraph, Propagation, arguments, shape, values_of
from archsmith.atoms.replay import Mismatch, Replay
from archsmith.atoms.rules.creation import UNIFORM
from archsmith.atoms.rules.movement import MOVEMENTS
from archsmith.atoms.rules.table import packet_name
from archsmith.atoms.units import Cut

TRIALS = 48
"""Exports that a search may take."""

Assignment = tuple[tuple[str, int], ...]
"""New values by dotted path, sorted."""


@dataclasses.dataclass(frozen=True)
class Need:
    """A literal size that changes.

    Attributes:
        path: Qualified name of the module that issued the operator.
        ordinal: Position of the operator among those of the module, and which of its sizes it is.
        old: Old size.
        new: New size.
    """

    path: str
    ordinal: tuple[int, str]
    old: int
    new: int


def needs(graph: LabelledGraph, dead: BoolArray) -> list[Need]:
    """Return the literal sizes of the original graph that a cut changes."""
    found: list[Need] = []
    counts: dict[str, int] = {}
    expected: dict[fx.Node, list[Any]] = {}
    for one in graph.propagation.expected:
        expected.setdefault(one.node, []).append(one)
    for node in graph.operators():
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        number = counts[path] = counts.get(path, -1) + 1
        sizes = _changed_sizes(graph, node, dead, expected.get(node, []))
        found.extend(Need(path, (number, slot), old, new) for slot, old, new in sizes)
    return found


def _changed_sizes(
    graph: LabelledGraph, node: fx.Node, dead: BoolArray, expected: list[Any]
) -> Iterator[tuple[str, int, int]]:
    """Yield what is counted (the same text in every module of one class), the old and the new size."""
    name = packet_name(node)
    for one in expected:
        living = int((~graph.labels.dead(one.labels, dead)).sum())
        if living != len(one.labels):
            yield f"{one.argument} {one.position}", len(one.labels), living
    if name not in MOVEMENTS and name not in UNIFORM:
        return
    gone = graph.dead_axes(node, dead)
    for index, (value, axes) in enumerate(zip(values_of(node), gone, strict=False)):
        for axis, flags in axes.items():
            yield f"size {index} {axis}", int(value.shape[axis]), int((~flags).sum())
    if name in ("slice", "narrow"):
        given = arguments(node)
        source = node.all_input_nodes[0]
        axis = given["dim"] % len(shape(source))
        before = graph.dead_axes(source, dead)
        source_flags = before[0].get(axis) if before else None
        for key in ("start", "end", "length"):
            bound = given.get(key)
            if source_flags is not None and isinstance(bound, int) and 0 < abs(bound) < len(source_flags):
                part = source_flags[:bound] if bound > 0 else source_flags[bound:]
                yield key, abs(bound), int((~part).sum())


def link_shared_sizes(model: nn.Module, propagation: Propagation) -> None:
    """Unite what views of one module give one axis of one written size: it comes from one attribute or variable.

    Queries and values that are both split by ``head_dim`` can only lose columns together, since the attribute is one.
    In the outermost module, where code of many layers may stand, an attribute must hold the size.
    """
    modules = dict(model.named_modules())
    first: dict[tuple[str, int, int], IntArray] = {}
    for one in propagation.literals:
        key = (one.module, one.axis, len(one.labels))
        earlier = first.setdefault(key, one.labels)
        if earlier is one.labels or np.array_equal(
            propagation.labels.roots(earlier), propagation.labels.roots(one.labels)
        ):
            continue
        held = any(path in modules and any(_holding(modules[path], len(one.labels))) for path in _upwards(one.module))
        if held or one.module:
            cause = Cause("view", one.module, f"is split by the same attribute ({len(one.labels)}) as what is pinned")
            propagation.labels.join(earlier, one.labels, cause)


def candidates(model: nn.Module, wanted: list[Need]) -> dict[Assignment, tuple[str, ...]]:
    """Return the assignments that may be tried, with the paths of the modules that each concerns.

    Args:
        model: The original.
        wanted: The literal sizes that change.
    """
    modules = dict(model.named_modules())
    families: dict[tuple[str, str, tuple[int, str], int], dict[str, int]] = {}
    clash: set[tuple[str, str, tuple[int, str], int]] = set()
    for need in wanted:
        for level, path in enumerate(_upwards(need.path)):
            module = modules.get(path)
            if module is None or type(module).__module__.startswith("torch.nn"):
                continue
            for name in _holding(module, need.old):
                full = f"{path}.{name}" if path else name
                key = (f"{type(module).__module__}.{type(module).__qualname__}", name, need.ordinal, level)
                family = families.setdefault(key, {})
                if family.setdefault(full, need.new) != need.new:
                    clash.add(key)
    found: dict[Assignment, tuple[str, ...]] = {}
    for key, family in families.items():
        if key not in clash:
            owners = tuple(full[: -len(key[1]) - 1] if full != key[1] else "" for full in family)
            found.setdefault(tuple(sorted(family.items())), owners)
    return found


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _holding(module: nn.Module, value: int) -> Iterator[str]:
    """Yield the names of attributes, and of fields of configurations, that hold a value and that the code mentions."""
    mentioned = _mentioned(cast(Hashable, type(module)))
    for name, held in vars(module).items():
        if name.startswith("_") and name not in ("_modules",) and not _is(mentioned, name):
            continue
        if name in ("_modules", "_parameters", "_buffers", "training"):
            continue
        if type(held) is int and held == value and _is(mentioned, name):
            yield name
        elif isinstance(held, list):
            for index, item in enumerate(held):
                if type(item) is int and item == value and _is(mentioned, name):
                    yield f"{name}.{index}"
        elif hasattr(held, "__dict__") and not isinstance(held, nn.Module | type) and not callable(held):
            for field, item in vars(held).items():
                if type(item) is int and item == value and _is(mentioned, field):
                    yield f"{name}.{field}"


def _is(mentioned: frozenset[str] | None, name: str) -> bool:
    return mentioned is None or name in mentioned


@functools.cache
def _mentioned(kind: Hashable) -> frozenset[str] | None:
    """Return the attribute names that the methods of a class mention (not ``__init__``), None without its source."""
    names: set[str] = set()
    assert isinstance(kind, type)
    for cls in kind.__mro__:
        if cls in (nn.Module, object):
            continue
        for key, member in vars(cls).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if key == "__init__" or not inspect.isfunction(function):
                continue
            try:
                names.update(re.findall(r"\.(\w+)", inspect.getsource(inspect.unwrap(function))))
            except (OSError, TypeError):
                return None
    return frozenset(names)


def attributes_for(replay: Replay, cut: Cut, *, search: bool, hints: Iterable[Mapping[str, Any]] = ()) -> Cut:
    """Return the cut with the attributes that its replay needs.

    Args:
        replay: Of the model.
        cut: The cut as planned.
        search: Whether other attributes than those of the cut may be tried.
        hints: Attributes to try first, those that cuts to the same widths needed.

    Raises:
        CutRefused: No set of candidates passes the replay.
    """
    graph, model = replay.graph, replay.model
    dead = graph.dead_units(cut.removed)
    group = next(iter(cut.removed))

    def attempt(extra: Mapping[str, Any]) -> Mismatch | None:
        return replay(dataclasses.replace(cut, attributes={**cut.attributes, **extra}), dead)

    for hint in hints:
        if attempt(hint) is None:
            return dataclasses.replace(cut, attributes={**cut.attributes, **hint})
    first = attempt({})
    if first is None:
        return cut
    if not search:
        raise CutRefused(group, f"the replay fails with the given attributes: {first.reason}")
    options = candidates(model, needs(graph, dead))
    queue: list[tuple[Assignment, Mismatch]] = [((), first)]
    seen: set[Assignment] = {()}
    trials = 0
    while queue and trials < TRIALS:
        chosen, failure = queue.pop(0)
        for option in _relevant(options, failure):
            extended = dict(chosen)
            if any(extended.get(path, value) != value for path, value in option):
                continue
            extended.update(option)
            key = tuple(sorted(extended.items()))
            if key in seen:
                continue
            seen.add(key)
            trials += 1
            result = attempt(dict(key))
            if result is None:
                return dataclasses.replace(cut, attributes={**cut.attributes, **dict(key)})
            if not (result.module == failure.module and result.reason == failure.reason):
                queue.append((key, result))
            if trials >= TRIALS:
                break
    tried = sorted({f"{path}={value}" for option in options for path, value in option})
    shown = ", ".join(tried[:8]) + (f" and {len(tried) - 8} more" if len(tried) > 8 else "")
    raise CutRefused(
        group,
        f"{first.reason}; "
        + (f"no set of these attributes helps: {shown}" if tried else "no attribute holds the old size")
        + "; give them with attributes={...}",
    )


def _relevant(options: dict[Assignment, tuple[str, ...]], failure: Mismatch) -> list[Assignment]:
    """Return the options of the module that failed and of those it is in, the nearest first; all if none."""
    if failure.module is None:
        return list(options)
    near = set(_upwards(failure.module))
    inside = f"{failure.module}." if failure.module else ""
    close = {
        option: max((len(owner) + 1 for owner in owners if owner in near or owner.startswith(inside)), default=0)
        for option, owners in options.items()
    }
    return sorted((option for option in options if close[option]), key=lambda option: -close[option]) or list(options)
