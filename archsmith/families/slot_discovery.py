"""Finding the sub-blocks of a residual model by running it once, without knowing any name.

A pre-norm layer computes ``y = x + f(norm(x)) + g(norm(x + f))``. So of all modules inside a layer, the sub-blocks are
those whose outputs add up to ``y - x``: that sum is checked on numbers, and nothing is taken on trust. A normalisation
belongs to the sub-block that reads the very tensor it returned.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.families.slot_layout import (
    ATTENTION,
    FFN,
    SubBlock,
    adds_itself,
    looked_for,
    module_at,
    roles_of,
    two_projections,
)

MOST = 10
"""Modules of a layer among which the sum is looked for."""


@dataclass
class _Seen:
    """What one module was given and returned."""

    first: Tensor | None = None
    output: Tensor | None = None
    returns_tuple: bool = False
    calls: int = 0
    order: int = 0


@dataclass
class _Watch:
    seen: dict[int, _Seen] = field(default_factory=dict)
    count: int = 0

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        row = self.seen.setdefault(id(module), _Seen())
        row.calls, row.order, self.count = row.calls + 1, self.count, self.count + 1
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        row.first = tensors[0] if tensors else None
        row.returns_tuple = isinstance(output, tuple)
        output = output[0] if isinstance(output, tuple) and output else output
        row.output = output if isinstance(output, Tensor) else None


def run_watched(model: nn.Module, batch: Any) -> dict[int, _Seen]:
    """Run a model once and return by id of every module its last call."""
    watch = _Watch()
    handles = [module.register_forward_hook(watch.hook, with_kwargs=True) for module in model.modules()]
    uncached = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                model(**{**batch, **uncached})
            else:
                model(*batch if isinstance(batch, (tuple, list)) else (batch,), **uncached)
    finally:
        for handle in handles:
            handle.remove()
    return watch.seen


def discover(
    model: nn.Module, batch: Any, *, layers: str | None = None
) -> tuple[tuple[str, ...], tuple[tuple[SubBlock, ...], ...]]:
    """Return the path of every layer and its sub-blocks, found on numbers.

    Args:
        model: A residual model in evaluation mode; pre-norm, or without norms.
        batch: Arguments of the model; random inputs will do, zeros will not.
        layers: Path of the list of layers; found when absent.

    Raises:
        UserError: In no list of layers the outputs of some modules add up to what the layer adds to its input.
    """
    seen = run_watched(model, batch)
    found: dict[str, list[tuple[SubBlock, ...]]] = {}
    for name, module in model.named_modules():
        wanted = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and layers in (None, name)
        if wanted:
            rows = [_added(layer, seen) for layer in module.children()]
            if all(rows):
                found[name] = rows
    if not found:
        raise UserError(
            "model",
            Shown(f"{type(model).__name__}, run once"),
            allowed="a model with a list of layers in which the outputs of some modules add up to output minus input; "
            f"or, by names, {looked_for()}",
            hint="Name the parts yourself: layers='path.of.the.list', sub_blocks=[SubBlock(part=..., core=...), ...].",
        )
    best = max(found, key=lambda path: (len(found[path]), -len(path)))
    return tuple(f"{best}.{index}" if best else str(index) for index in range(len(found[best]))), tuple(found[best])


def _added(layer: nn.Module, seen: Mapping[int, _Seen]) -> tuple[SubBlock, ...]:
    """Return the sub-blocks of one layer, in the order in which they ran; empty if nothing adds up."""
    whole = seen.get(id(layer))
    if whole is None or whole.calls != 1 or whole.first is None or whole.output is None:
        return ()
    if whole.first.shape != whole.output.shape:
        return ()
    gap = whole.output - whole.first
    candidates = []
    for name, module in layer.named_children():
        row = seen.get(id(module))
        fits = row is not None and row.calls == 1 and row.output is not None and row.output.shape == gap.shape
        if fits and any(True for _ in module.parameters()) and not adds_itself(module):
            candidates.append((name, module, row))
    tolerance = 1e-5 * max(1.0, float(whole.output.abs().max()))
    for size in range(len(candidates[:MOST]), 0, -1):
        for chosen in itertools.combinations(candidates[:MOST], size):
            outputs = [row.output for _, _, row in chosen if row is not None and row.output is not None]
            if float((gap - sum(outputs)).abs().max()) <= tolerance:
                ordered = sorted(chosen, key=lambda item: item[2].order if item[2] is not None else 0)
                return _described(layer, [(name, module) for name, module, _ in ordered], seen)
    return ()


def _described(
    layer: nn.Module, cores: Sequence[tuple[str, nn.Module]], seen: Mapping[int, _Seen]
) -> tuple[SubBlock, ...]:
    blocks: list[SubBlock] = []
    for name, module in cores:
        part = _part(name, module)
        if any(block.part == part for block in blocks):
            part = name
        roles = (roles_of(module, part, name) if part in (ATTENTION, FFN) else None) or {}
        if part == FFN and not roles:
            roles = two_projections(module, name)
        norms = tuple(
            child
            for child, norm in layer.named_children()
            if _feeds(norm, module, seen)
            and not any(_feeds(norm, other, seen) for _, other in cores if other is not module)
        )
        tuples = seen[id(module)].returns_tuple
        blocks.append(SubBlock(part, name, roles, norms, returns_tuple=tuples))
    return tuple(blocks)


def _part(name: str, module: nn.Module) -> str:
    text = f"{name} {type(module).__name__}".lower()
    if "att" in text:
        return ATTENTION
    known = any(word in text for word in ("mlp", "ffn", "feed", "ff"))
    return FFN if known or two_projections(module, name) else name


def _feeds(norm: nn.Module, core: nn.Module, seen: Mapping[int, _Seen]) -> bool:
    given, read = seen.get(id(norm)), seen.get(id(core))
    weights = [tensor for tensor in norm.parameters() if tensor.dim() > 1]
    return (
        given is not None
        and read is not None
        and given.output is not None
        and given.output is read.first
        and not weights
        and any(True for _ in norm.parameters())
    )


def observed(
    model: nn.Module, paths: Sequence[str], blocks: Sequence[Sequence[SubBlock]], batch: Any
) -> tuple[tuple[SubBlock, ...], ...]:
    """Return the sub-blocks with what a run shows of them: whether their cores return tuples.

    Raises:
        UserError: A core did not run.
    """
    seen = run_watched(model, batch)
    rows = []
    for path, row in zip(paths, blocks, strict=True):
        found = []
        for block in row:
            core = seen.get(id(module_at(model, f"{path}.{block.core}")))
            if core is None:
                raise UserError(f"{path}.{block.core}", Shown("a module that did not run"), allowed="one that runs")
            found.append(replace(block, returns_tuple=core.returns_tuple))
        rows.append(tuple(found))
    return tuple(rows)
