"""Check of numbers: a cut network computes what the masked original computes, forward and backward.

Both run in float64 on copies whose parameters and buffers carry random numbers on top of their values: vectors of ones
or zeros (fresh normalisations, zero-initialised branches) would hide a wrong correspondence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from archsmith.atoms.attributes import refresh_attributes, set_attributes
from archsmith.atoms.doubles import in_double, widened
from archsmith.atoms.edits import Edits
from archsmith.atoms.fingerprint import first_names
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.masked import masked_interpreter
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.propagate import LabelledGraph
from archsmith.atoms.slices import empty, take
from archsmith.atoms.trace import Forward, call_arguments
from archsmith.atoms.units import Cut
from archsmith.graph import evaluating

BLOCK = 1 << 17
"""Elements that are compared at a time: a block stays in the cache."""

NOISE = 0.1
"""Size of the numbers on top, relative to the root mean square of each tensor."""


@dataclass(frozen=True)
class Gaps:
    """How far a cut network is from the masked original.

    Attributes:
        outputs: Largest difference of any output, relative to the largest number of that output.
        gradients: Largest difference of any surviving parameter's gradient, relative to the largest number of that
            gradient (of all gradients times 1e-6 where it is smaller).
        worst: Name of the parameter with that gradient.
    """

    outputs: float
    gradients: float
    worst: str


def check_numbers(
    graph: LabelledGraph,
    model: nn.Module,
    cut: Cut,
    example_inputs: Any,
    forward: Forward | None = None,
    *,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Gaps:
    """Compare the cut network with the masked original.

    Args:
        graph: Of the original, from the finder.
        model: The original; not changed.
        cut: The planned cut.
        example_inputs: A tensor, a tuple of arguments or a mapping, as given to the finder.
        forward: How the model is called, likewise.
        tolerance: Largest relative difference.
        seed: Of the numbers on top and of the weights of the outputs in the sum that is differentiated.

    Returns:
        The differences.

    Raises:
        CutRefused: They are larger than ``tolerance``, the cut network does not run, or there is nothing to compare.
    """
    group = next(iter(cut.removed), "")
    values = randomised(model, seed)
    try:
        twin = double_twin(model, cut, values)
    except CutRefused:
        raise
    except Exception as error:
        raise CutRefused(group, f"the model can not be copied for the check of numbers: {error}") from error
    args, kwargs = call_arguments(model, example_inputs)
    args, kwargs = tree_map(widened, args), tree_map(widened, kwargs)
    try:
        interpreter = masked_interpreter(graph, cut.removed, values)
        with in_double(), torch.enable_grad():
            expected = floating(interpreter.run_on(_in_order(graph, args, kwargs)))
    except NotImplementedError as error:
        raise CutRefused(group, str(error)) from error
    try:
        with in_double(), torch.enable_grad(), evaluating(twin):
            result = twin(*args, **kwargs) if forward is None else forward(twin, *args, **kwargs)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CutRefused(group, f"the cut model does not run: {type(error).__name__}: {reason}") from error
    found = floating(tree_leaves(result))
    expected = expected[len(expected) - len(found) :]  # outputs that are changed buffers come first
    if not found or [f.shape for f in found] != [e.shape for e in expected]:
        shapes = [tuple(e.shape) for e in expected], [tuple(f.shape) for f in found]
        raise CutRefused(
            group, f"the outputs to compare have the shapes {shapes[0]} in the original, {shapes[1]} when cut"
        )
    gaps = _gaps(found, expected, twin, values, cut, seed)
    if not gaps.outputs <= tolerance:
        raise CutRefused(
            group, f"the cut model's output differs from the masked original by {gaps.outputs:.1e} (relative)"
        )
    if not gaps.gradients <= tolerance:
        raise CutRefused(
            group, f"the gradient of '{gaps.worst}' differs from the masked original by {gaps.gradients:.1e} (relative)"
        )
    return gaps


def _gaps(
    found: list[Tensor], expected: list[Tensor], twin: nn.Module, values: Mapping[str, Tensor], cut: Cut, seed: int
) -> Gaps:
    outputs = max(relative(f.detach(), e.detach()) for f, e in zip(found, expected, strict=True))
    leaves = {n: t for n, t in values.items() if t.requires_grad}
    mine = tensors_of(twin)
    if not leaves or not any(e.requires_grad for e in expected):
        return Gaps(outputs, 0.0, "")
    try:
        theirs = _gradients(expected, list(leaves.values()), seed)
    except RuntimeError:
        # The original itself has no backward pass (it overwrites what that would need): there is nothing to compare,
        # unless the cut model has one.
        try:
            _gradients(found, [mine[name] for name in leaves], seed)
        except RuntimeError:
            return Gaps(outputs, 0.0, "")
        return Gaps(outputs, float("inf"), "the model (only the cut one has a backward pass)")
    try:
        ours = _gradients(found, [mine[name] for name in leaves], seed)
    except RuntimeError:
        return Gaps(outputs, float("inf"), "the model (only the original has a backward pass)")
    largest = max((_largest(g) for g in theirs if g is not None and g.numel()), default=0.0)
    worst, where = 0.0, ""
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        if b is not None and name in cut.tensors:
            b = take(b, cut.tensors[name])
        if a is None and b is None:
            continue
        a = torch.zeros_like(mine[name]) if a is None else a
        gap = relative(a, torch.zeros_like(a) if b is None else b, floor=1e-6 * largest)
        if not gap <= worst:
            worst, where = gap, name
    return Gaps(outputs, worst, where)


def _gradients(outputs: list[Tensor], parameters: list[Tensor], seed: int) -> tuple[Tensor | None, ...]:
    generator = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outputs]
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not pairs:
        return (None,) * len(parameters)
    with in_double():
        return torch.autograd.grad([o for o, _ in pairs], parameters, [w for _, w in pairs], allow_unused=True)


def relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the largest difference, relative to the largest finite number expected (or ``floor``); inf for NaN.

    Infinite numbers must agree exactly.
    """
    if not expected.numel():
        return 0.0
    scale = max(_largest(expected), floor)
    gap = _difference(found, expected)
    if math.isfinite(scale) and math.isfinite(gap):
        return gap / scale if scale else gap
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(
        found[~finite].nan_to_num(), expected[~finite].nan_to_num()
    ):
        return float("inf")
    found, expected = found[finite], expected[finite]
    return relative(found, expected, floor)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest magnitude of the difference, NaN if there is one; large tensors by blocks, without a copy."""
    plain = found.dtype == expected.dtype and found.is_contiguous() and expected.is_contiguous()
    if not plain or found.shape != expected.shape or found.numel() <= BLOCK:
        return _largest(found - expected)
    space, worst = torch.empty(BLOCK, dtype=found.dtype, device=found.device), 0.0
    for one, other in zip(found.detach().view(-1).split(BLOCK), expected.detach().view(-1).split(BLOCK), strict=True):
        largest = _largest(torch.sub(one, other, out=space[: len(one)]))
        if math.isnan(largest):
            return largest
        worst = max(worst, largest)
    return worst


def _largest(value: Tensor) -> float:
    """Return the largest magnitude, NaN if there is one."""
    low, high = torch.aminmax(torch.view_as_real(value) if value.is_complex() else value)
    return max(abs(float(low)), abs(float(high))) if float(high) == float(high) else math.nan


def floating(outputs: list[Any]) -> list[Tensor]:
    """Return the outputs that are floating point tensors."""
    return [o for o in outputs if isinstance(o, Tensor) and (o.is_floating_point() or o.is_complex())]


@torch.no_grad()
def randomised(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return float64 copies of all parameters and buffers with numbers on top, by first name; integers stay.

    Parameters require gradients. What is positive in a buffer (a variance) stays positive.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first, result = first_names(model), {}
    for name, tensor in tensors_of(model).items():
        if first[name] == name:
            value = _noisy(tensor.detach(), generator, name in parameters)
            result[name] = value.requires_grad_(name in parameters and value.is_floating_point())
    return result


def _noisy(value: Tensor, generator: torch.Generator, parameter: bool) -> Tensor:
    if not value.is_floating_point() or not value.numel():
        return value.clone()
    wide = empty(value.shape, value, torch.float64).copy_(value)
    rows = wide.view(wide.shape[0], -1) if wide.dim() > 1 else wide.view(1, -1)
    size = NOISE * (_size(wide) or 1.0)
    left, right = (torch.randn(n, generator=generator, dtype=torch.float64).to(wide.device) for n in rows.shape)
    if not parameter:  # a variance stays positive
        left, right = left.abs(), right.abs()
    rows.addr_(left if wide.dim() > 1 else torch.ones_like(left), right, alpha=size)
    return wide


def _size(value: Tensor) -> float:
    """Return the root mean square; of the finite numbers where there are others."""
    size = float(torch.linalg.vector_norm(value)) / math.sqrt(value.numel())
    if not math.isfinite(size):
        finite = value[value.isfinite()]
        size = float(torch.linalg.vector_norm(finite)) / math.sqrt(max(finite.numel(), 1))
    return size


def double_twin(model: nn.Module, cut: Cut, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a cut copy of a model that holds ``values`` (by first name) in place of its own tensors."""
    first = first_names(model)
    memo: dict[int, Any] = {}
    for name, tensor in tensors_of(model).items():
        if id(tensor) in memo:
            continue
        value = values[first[name]].detach()
        if name in cut.tensors:
            value = take(value, cut.tensors[name])
        elif not isinstance(tensor, nn.Parameter):
            value = value.clone()  # a forward pass may write into buffers
        memo[id(tensor)] = (
            nn.Parameter(value, requires_grad=value.is_floating_point()) if isinstance(tensor, nn.Parameter) else value
        )
    twin = copy.deepcopy(model, memo)
    with Edits() as edits:
        set_attributes(twin, cut.attributes, edits)
        refresh_attributes(twin, cut.tensors, edits)
    return twin


def _in_order(graph: LabelledGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the inputs in the order of the graph's placeholders."""
    if kwargs and not args and set(graph.input_names) <= set(kwargs):
        return [kwargs[name] for name in graph.input_names]
    return list(tree_leaves((args, dict(kwargs))))
