"""Replay: is the cut model the original without the removed positions, operator by operator?

A copy is cut and exported. Both graphs are walked in step: same operators on the same operands; every tensor has as
many positions as live in the original; data movement, run on the numbers of the positions, takes the living ones to
where the original takes them; literals that count something count the living, all other literals are unchanged. By
induction every element of the cut network stands for one known element of the original. Moved chunk boundaries and
stale head counts are found even where all shapes fit.

Where the replay fails, integer attributes of the user's modules that hold an old size are tried (``search``).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from archsmith.atoms.attributes import refresh_attributes, set_attributes
from archsmith.atoms.edits import Edits
from archsmith.atoms.fingerprint import first_names
from archsmith.atoms.labels import BoolArray
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.propagate import Expected, LabelledGraph, arguments, module_name, shape, values_of
from archsmith.atoms.rules.creation import UNIFORM
from archsmith.atoms.rules.movement import GATHERS, MOVEMENTS, apply_to
from archsmith.atoms.rules.table import packet_name
from archsmith.atoms.slices import take
from archsmith.atoms.trace import Forward, Program, export, named_tensors
from archsmith.atoms.units import Cut
from archsmith.core.errors import UserError

SMALL = 1 << 16
"""Tensors with more elements than this are not copied for a replay: their values can not decide the graph."""


@dataclass(frozen=True)
class Mismatch:
    """Where a replay failed.

    Attributes:
        module: Qualified name of the module; None where it is not known.
        reason: What differs.
    """

    module: str | None
    reason: str


def cut_copy(model: nn.Module, cut: Cut, *, values: bool = False) -> nn.Module:
    """Return a cut copy of a model; the model stays as it is.

    Args:
        model: The model.
        cut: What remains; attributes are set as it says.
        values: True fills the copy's cut tensors with the values that remain; False leaves large ones unset and shares
            what is not cut with the model, for a copy whose graph is all that is wanted.

    Raises:
        CutRefused: An attribute of one of torch's own modules can not follow, or the model can not be copied.
    """
    memo: dict[int, Any] = {}
    names = dict.fromkeys(named_tensors(model))
    tensors = named_tensors(model)
    for name in names:
        tensor = tensors[name]
        if id(tensor) in memo:
            continue
        remains = cut.tensors.get(name)
        if remains is None:
            data = tensor.detach().clone() if values else tensor.detach()
        elif values or tensor.numel() <= SMALL or not tensor.is_floating_point():
            data = take(tensor, remains)
        else:
            size = list(tensor.shape)
            for axis, kept in remains.axes.items():
                size[axis] = len(kept)
            if remains.joint is not None:
                for axis, n in zip(remains.joint[0], remains.joint[1].shape, strict=True):
                    size[axis] = n
            data = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
        fresh = nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        memo[id(tensor)] = fresh
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise CutRefused(next(iter(cut.removed)), f"the model can not be copied for the checks: {error}") from error
    with Edits() as edits:
        refresh_attributes(twin, cut.tensors, edits)
        set_attributes(twin, cut.attributes, edits)
    return twin


class Replay:
    """Replays cuts of one model; graphs of cut models are kept, since cuts to the same widths have the same.

    Args:
        graph: Of the original.
        model: The original.
        example_inputs: As it was traced.
        forward: Likewise.
    """

    KEPT = 32
    """Graphs that are kept."""

    def __init__(self, graph: LabelledGraph, model: nn.Module, example_inputs: Any, forward: Forward | None) -> None:
        self.graph, self.model, self.example_inputs, self.forward = graph, model, example_inputs, forward
        self._programs: dict[Any, Program | Mismatch] = {}

    def __call__(self, cut: Cut, dead: BoolArray) -> Mismatch | None:
        """Compare a cut copy with the labelled original; None when it stands for the living part exactly.

        Args:
            cut: What remains, and the attributes to try.
            dead: Classes of labels that are removed (``LabelledGraph.dead_units``).
        """
        key = self.kind(cut)
        program = self._programs.get(key)
        if program is None:
            twin = cut_copy(self.model, cut)
            try:
                program = export(twin, self.example_inputs, self.forward)
            except UserError as error:
                program = Mismatch(_failed_module(error, twin), f"the cut model does not run: {error.given}")
            if len(self._programs) >= self.KEPT:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = program
        return program if isinstance(program, Mismatch) else compare(self.graph, program, dead)

    def kind(self, cut: Cut) -> Any:
        """Return what the graph of a cut model depends on: widths, attributes, and how many rows fall on which part.

        The attribute ``groups`` of a convolution follows from which rows are kept, not only from how many.
        """
        widths = []
        for name, remains in sorted(cut.tensors.items()):
            size = self.graph.shapes[name]
            kept = tuple(sorted((axis, len(index)) for axis, index in remains.axes.items()))
            parts: tuple[int, ...] = ()
            for count in self._parts.get(name, ()):
                index = remains.axes.get(0, np.arange(size[0]))
                parts += (len(np.unique(index // (size[0] // count))),)
            widths.append((name, kept, None if remains.joint is None else remains.joint[1].shape, parts))
        return tuple(widths), tuple(sorted((name, repr(value)) for name, value in cut.attributes.items()))

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[int, ...]]:
        """Numbers of parts into which the rows of tensors fall by an attribute of torch's own modules."""
        first = first_names(self.model)
        found: dict[str, tuple[int, ...]] = {}
        for path, module in self.model.named_modules():
            for attribute in ("groups", "num_groups", "num_heads"):
                count = getattr(module, attribute, None)
                for leaf, tensor in module.named_parameters(recurse=False):
                    name = first[f"{path}.{leaf}" if path else leaf]
                    if type(count) is int and count > 1 and tensor.dim() and tensor.shape[0] % count == 0:
                        found[name] = (*found.get(name, ()), count)
        return found


def compare(graph: LabelledGraph, program: Program, dead: BoolArray) -> Mismatch | None:
    """Walk both graphs in step; return the first difference that the cut does not explain."""
    twins: dict[fx.Node, fx.Node] = {}
    walk = _Walk(graph, dead, twins)
    originals, same = _essential(graph.graph_module)
    others, other_same = _essential(program.graph_module)
    walk.same, walk.other_same = same, other_same
    for index, node in enumerate(originals):
        if index >= len(others):
            return Mismatch(module_name(node), "the cut model has fewer operators")
        other = others[index]
        twins[node] = other
        if node.op != other.op or (node.op != "placeholder" and str(node.target) != str(other.target)):
            return Mismatch(module_name(node), f"{_what(node)} of the original meets {_what(other)} of the cut model")
        if node.op == "placeholder":
            reason = _placeholder(graph, program, node, other)
        elif node.op == "get_attr":
            a, b = getattr(graph.graph_module, str(node.target)), getattr(program.graph_module, str(other.target))
            reason = "" if str(getattr(a, "graph", "")) == str(getattr(b, "graph", "")) else "a sub-graph changes"
        else:
            reason = walk.step(node, other)
        if reason:
            return Mismatch(module_name(node), f"{_what(node)}: {reason}")
    if len(others) > len(originals):
        return Mismatch(module_name(others[len(originals)]), "the cut model has more operators")
    return None


IDENTITIES = frozenset(
    {"contiguous", "alias", "detach", "clone", "lift_fresh", "lift_fresh_copy", "_assert_tensor_metadata"}
)
"""Operators that hand on what they get; tracing leaves some of them out for some shapes."""


def _essential(graph_module: fx.GraphModule) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
    """Return the nodes without identities, and what every identity stands for."""
    kept: list[fx.Node] = []
    same: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and packet_name(node) in IDENTITIES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            same[node] = same.get(source, source)
        else:
            kept.append(node)
    return kept, same


def _what(node: fx.Node) -> str:
    return f"{node.target} ('{module_name(node)}')" if node.op == "call_function" else node.op


def _placeholder(graph: LabelledGraph, program: Program, node: fx.Node, other: fx.Node) -> str:
    if node.name in graph.constants:
        a, b = graph.constants[node.name], program.constants.get(other.name)
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
        if not same and (isinstance(a, Tensor) or isinstance(b, Tensor)):
            return "a constant tensor changes with the width"
    return ""


class _Walk:
    """Compares one operator after the other."""

    def __init__(self, graph: LabelledGraph, dead: BoolArray, twins: dict[fx.Node, fx.Node]) -> None:
        self.graph, self.dead, self.twins = graph, dead, twins
        self.same: dict[fx.Node, fx.Node] = {}
        self.other_same: dict[fx.Node, fx.Node] = {}
        self.gone: dict[fx.Node, list[dict[int, BoolArray]]] = {}
        self.expected: dict[fx.Node, list[Expected]] = {}
        for one in graph.propagation.expected:
            self.expected.setdefault(one.node, []).append(one)

    def dead_of(self, node: fx.Node) -> list[dict[int, BoolArray]]:
        found = self.gone.get(node)
        if found is None:
            found = self.gone[node] = self.graph.dead_axes(node, self.dead)
        return found

    def step(self, node: fx.Node, other: fx.Node) -> str:
        """Return what is wrong with ``other`` as the twin of ``node``; nothing when it is right."""
        literals: list[tuple[str, int | None, Any, Any]] = []
        if isinstance(node.target, torch._ops.OpOverload):
            given, mine = arguments(node), arguments(other)
            pairs = [(name, given[name], mine[name]) for name in given]
        else:
            pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(node.args, other.args, strict=False))]
        for name, a, b in pairs:
            if not self._same_operands(name, None, a, b, literals):
                return f"argument '{name}' comes from elsewhere"
        changed = self._sizes(node, other)
        if changed:
            return changed
        movement = packet_name(node) in MOVEMENTS if node.op == "call_function" else False
        if not movement and node.op == "call_function":
            wrong = self._literals(node, other, literals)
            if wrong:
                return wrong
        touched = any(any(each) for source in node.all_input_nodes for each in self.dead_of(source))
        if movement and (touched or literals):
            return self._moves(node, other)
        return ""

    def _same_operands(
        self, name: str, position: int | None, a: Any, b: Any, literals: list[tuple[str, int | None, Any, Any]]
    ) -> bool:
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
                return False
            return self.twins.get(self.same.get(a, a)) is self.other_same.get(b, b)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            if len(a) != len(b):
                return False
            return all(
                self._same_operands(name, i if position is None else position, x, y, literals)
                for i, (x, y) in enumerate(zip(a, b, strict=True))
            )
        same = a == b or (isinstance(a, float) and isinstance(b, float) and np.isnan(a) and np.isnan(b))
        if not same:
            literals.append((name, position, a, b))
        return True

    def _sizes(self, node: fx.Node, other: fx.Node) -> str:
        gone = self.dead_of(node)
        for index, (value, twin) in enumerate(zip(values_of(node), values_of(other), strict=False)):
            wanted = [int(n) for n in value.shape]
            for axis, flags in (gone[index] if index < len(gone) else {}).items():
                wanted[axis] -= int(flags.sum())
            if wanted != [int(n) for n in twin.shape]:
                return f"its result has the shape {list(twin.shape)}, {wanted} live"
        return ""

    def _literals(self, node: fx.Node, other: fx.Node, literals: list[tuple[str, int | None, Any, Any]]) -> str:
        counted = {(one.argument, one.position): one for one in self.expected.get(node, ())}
        for (name, position), one in counted.items():
            value = arguments(other)[name]
            value = value if position is None else value[position]
            living = int((~self.graph.labels.dead(one.labels, self.dead)).sum())
            if value != living:
                return f"'{name}' is {value}, {living} live"
        for name, position, a, b in literals:
            if (name, position) not in counted and not (packet_name(node) in UNIFORM and name == "size"):
                return f"'{name}' would be {b} in place of {a}: a constant follows the width"
        return ""

    def _moves(self, node: fx.Node, other: fx.Node) -> str:
        """Run the movement on the numbers of the positions, in both graphs."""
        numbers, living = {}, {}
        operands = dict(zip(node.all_input_nodes, other.all_input_nodes, strict=False))
        start = 1  # 0 is the value of fills
        for source in node.all_input_nodes:
            size = shape(source)
            count = int(np.prod(size))
            if packet_name(node) in GATHERS and source is not node.args[0]:
                whole = torch.zeros(size, dtype=source.meta["val"].dtype)
            else:
                whole = torch.arange(start, start + count).view(size)
                start += count
            gone = self.dead_of(source)
            numbers[source] = whole
            twin = operands.get(source)
            if twin is not None:
                living[twin] = _living(whole, gone[0] if gone else {})
        try:
            before, after = apply_to(node, numbers), apply_to(other, living)
        except (RuntimeError, IndexError, ValueError) as error:
            return f"does not fit the living positions ({error})"
        before, after = [list(x) if isinstance(x, list | tuple) else [x] for x in (before, after)]
        gone = self.dead_of(node)
        if len(before) != len(after):
            return f"makes {len(after)} pieces in place of {len(before)}"
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            wanted = _living(old, gone[index] if index < len(gone) else {})
            if wanted.shape != new.shape or not bool((wanted == new).all()):
                return "living positions end up elsewhere than in the original"
        return ""


def _living(tensor: Tensor, gone: Mapping[int, BoolArray]) -> Tensor:
    for axis, flags in gone.items():
        tensor = tensor.index_select(axis, torch.from_numpy(np.flatnonzero(~flags)))
    return tensor


def _failed_module(error: BaseException, twin: nn.Module) -> str | None:
    """Return the innermost module of the user's that an error went through."""
    names = {id(module): name for name, module in twin.named_modules()}
    found: str | None = None
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        trace = current.__traceback__
        inner: str | None = None
        while trace is not None:
            for local in (trace.tb_frame.f_locals.get("self"), trace.tb_frame.f_locals.get("module")):
                own = isinstance(local, nn.Module) and id(local) in names
                if own and not type(local).__module__.startswith("torch.nn"):
                    inner = names[id(local)]
            trace = trace.tb_next
        found = inner if inner is not None else found
        current = current.__cause__ or current.__context__
    return found
