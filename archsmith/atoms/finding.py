"""Find the removable units of any network: export it, follow labels through the graph, group what comes out.

The sources of labels are the axes of parameters and buffers (tied weights are one tensor). What must stay is pinned,
with the operator that pins it; ``FoundAtoms.explain`` prints both. Before the first cut of a kind two checks run on a
copy: the replay (``replay.py``) and the comparison of numbers with the masked original (``masked.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from archsmith.atoms.fingerprint import fingerprint, first_names, unwrap
from archsmith.atoms.grouping import grouped
from archsmith.atoms.labels import Cause, Labels
from archsmith.atoms.numbers import check_numbers
from archsmith.atoms.plan import CutRefused, plan_cut
from archsmith.atoms.propagate import Axes, LabelledGraph, Propagation
from archsmith.atoms.replay import Replay, compare, cut_copy
from archsmith.atoms.rules import rule_for
from archsmith.atoms.search import attributes_for, link_shared_sizes
from archsmith.atoms.trace import Forward, Program, export, named_tensors
from archsmith.atoms.units import Cut, IntArray, Pinned, UnitGroup, with_constraints
from archsmith.core.errors import Shown, UserError


def find(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward: Forward | None = None,
    frozen: Iterable[str] = (),
    constraints: Mapping[str, Mapping[str, int]] | None = None,
) -> FoundAtoms:
    """Find the units of a model that can be removed without touching anything else.

    Args:
        model: Any network that ``torch.export`` can trace; left as it is. Wrappers of ``torch.compile`` and DDP are
            looked through.
        example_inputs: What it is called with: a tensor, a tuple or list of arguments, or a mapping of keyword
            arguments. Small is fine: only shapes and types matter.
        forward: How to call it, ``forward(model, *inputs)``, when ``model(*inputs)`` is not the way, e.g. to leave out
            outputs (everything that is returned keeps its width).
        frozen: Qualified names of parameters or modules that must stay as they are.
        constraints: ``minimum`` and ``divisor`` by group name or a prefix of it, see ``units.with_constraints``.

    Returns:
        The groups of units, what is pinned and why, and the means to plan cuts.

    Raises:
        UserError: The model can not be traced (reason and line are named), the inputs do not fit, or a name in
            ``frozen`` does not exist.
    """
    model = unwrap(model)
    names = first_names(model)
    program = export(model, example_inputs, forward)
    labels = Labels()
    sources = _sources(model, names, labels)
    _freeze(model, names, list(frozen), sources, labels)
    propagation = _propagate(program, names, sources, labels)
    used = {names[program.tensor_names[node.name]] for node in _state(program) if node.users}
    training: tuple[Program, Propagation] | None = None
    if branches_on_training(model) or _unused(model, names, sources, used):
        training = _follow_training(model, example_inputs, forward, names, sources, labels)
    if training is not None:
        used |= {names[training[0].tensor_names[node.name]] for node in _state(training[0]) if node.users}
        propagation.changes.extend(training[1].changes)
        propagation.splits.extend(training[1].splits)
    for name in sorted(set(names.values()) - used):
        for axis in sources[name].values():
            labels.pin(
                axis, Cause("unused", name.rpartition(".")[0], "it takes no part in this way of calling the model")
            )
    _pin_unread(program, propagation)
    link_shared_sizes(model, propagation)
    _couple_attention(model, names, sources, labels)
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    graph = _labelled(program, propagation, names, sources, shapes)
    grouping = grouped(graph)
    graph.units = grouping.units
    return FoundAtoms(
        model=model,
        groups=tuple(with_constraints(grouping.groups, constraints or {})),
        pinned=tuple(grouping.pinned),
        fingerprint=fingerprint(model),
        labelled=graph,
        example_inputs=example_inputs,
        forward=forward,
        training=None if training is None else _labelled(*training, names, sources, shapes),
    )


def _labelled(
    program: Program,
    propagation: Propagation,
    names: Mapping[str, str],
    sources: dict[str, Axes],
    shapes: dict[str, tuple[int, ...]],
) -> LabelledGraph:
    return LabelledGraph(
        graph_module=program.graph_module,
        tensor_names={key: names[name] for key, name in program.tensor_names.items()},
        constants=program.constants,
        input_names=program.input_names,
        propagation=propagation,
        sources=sources,
        shapes=shapes,
    )


@dataclasses.dataclass(eq=False)
class FoundAtoms:
    """The removable units of one model.

    Attributes:
        model: The model.
        groups: Its units.
        pinned: What must stay, and why.
        fingerprint: Of the model that was looked at; a plan for a model that changed is refused.
        labelled: The exported graph with labels on every tensor.
        example_inputs: As given to ``find``.
        forward: As given to ``find``.
        training: The graph of the training mode, where that has code or tensors of its own and can be traced.
    """

    model: nn.Module
    groups: tuple[UnitGroup, ...]
    pinned: tuple[Pinned, ...]
    fingerprint: str
    labelled: LabelledGraph
    example_inputs: Any = None
    forward: Forward | None = None
    training: LabelledGraph | None = dataclasses.field(default=None, repr=False)
    _attributes: dict[Any, tuple[Mapping[str, Any], ...]] = dataclasses.field(default_factory=dict, repr=False)
    _compared: set[Any] = dataclasses.field(default_factory=set, repr=False)

    def group(self, name: str) -> UnitGroup:
        """Return a group by its name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise UserError(
            "group", name, allowed=", ".join(g.name for g in self.groups[:8]) or "none: nothing is removable"
        )

    def plan(
        self,
        removed: Mapping[str, Sequence[int] | IntArray],
        *,
        attributes: Mapping[str, Any] | None = None,
        check: bool = True,
    ) -> Cut:
        """Plan a removal: what remains of every tensor, and which attributes change with it.

        The first time for widths and attributes like these, both checks run on a copy; nothing of the model changes.

        Args:
            removed: Positions of the units to remove by group name.
            attributes: New values of module attributes by dotted path, where the search for them is not wanted.
            check: False leaves out the checks (for a cut that was checked in another process).

        Returns:
            The cut.

        Raises:
            CutRefused: A constraint forbids it, or a check failed; the group and the reason are named.
            UserError: A group or position does not exist, or the model is another one by now.
        """
        now = fingerprint(self.model)
        if now != self.fingerprint:
            raise UserError(
                "model",
                Shown(f"a network with the fingerprint {now}"),
                allowed=f"the network that was looked at, {self.fingerprint}",
                hint="Call archsmith.atoms.find again after a cut.",
            )
        cut = plan_cut(self.groups, removed, self.model, attributes)
        if not cut.tensors:
            return cut
        self._check_splits(cut)
        if not check:
            return cut
        replay = self._replay
        kind = replay.kind(cut)
        hints = self._attributes.get(kind, ())
        done = attributes_for(replay, cut, search=attributes is None, hints=hints)
        self._attributes[kind] = (done.attributes,)
        pattern = replay.kind(done)
        if pattern not in self._compared:
            check_numbers(self.labelled, self.model, done, self.example_inputs, self.forward)
            self._check_training(done)
            self._compared.add(pattern)
        return done

    @functools.cached_property
    def _replay(self) -> Replay:
        return Replay(self.labelled, self.model, self.example_inputs, self.forward)

    def _check_training(self, cut: Cut) -> None:
        """Replay the training mode, where it has code of its own."""
        if self.training is None:
            return
        group = next(iter(cut.removed))
        try:
            program = export(cut_copy(self.model, cut), self.example_inputs, self.forward, training=True)
        except UserError as error:
            raise CutRefused(group, f"the cut model does not run in training mode: {error.given}") from error
        mismatch = compare(self.training, program, self.labelled.dead_units(cut.removed))
        if mismatch is not None:
            raise CutRefused(group, f"in training mode: {mismatch.reason}")

    def _check_splits(self, cut: Cut) -> None:
        dead = self.labelled.dead_units(cut.removed)
        labels = self.labelled.labels
        for split in self.labelled.propagation.splits:
            counts = [int((~labels.dead(piece, dead)).sum()) for piece in split.pieces]
            if len(set(counts)) > 1:
                raise CutRefused(
                    next(iter(cut.removed)),
                    f"{split.cause.operator} in '{split.cause.module}' {split.cause.reason}: "
                    f"they would be {', '.join(map(str, counts))}",
                )

    def explain(self) -> str:
        """Return what can be removed and what can not, and why, as text."""
        total = sum(p.numel() for p in self.model.parameters())
        lines = [f"{type(self.model).__name__}: {total} parameters, {len(self.groups)} groups of units"]
        for group in self.groups:
            notes = []
            if group.changes:
                notes.append(
                    "function-changing: " + ", ".join(group.changes[:3]) + (" ..." if len(group.changes) > 3 else "")
                )
            if group.balance:
                notes.append(f"balanced over {len(group.balance)} parts")
            if group.divisor > 1 or group.minimum > 1:
                notes.append(f"at least {group.minimum}, a multiple of {group.divisor}")
            if group.frozen:
                notes.append(f"frozen: {group.frozen}")
            places = ", ".join(
                f"{p.tensor}[{','.join(map(str, p.axes))}] x{p.index.shape[1]}" for p in group.places[:4]
            )
            more = f" and {len(group.places) - 4} more" if len(group.places) > 4 else ""
            lines.append(
                f"  {group.name}: {group.size} units in {places}{more}" + (f"  ({'; '.join(notes)})" if notes else "")
            )
        lines.append("pinned:" if self.pinned else "pinned: nothing")
        for pinned in self.pinned:
            shown = ", ".join(pinned.tensors[:4]) + (
                f" and {len(pinned.tensors) - 4} more" if len(pinned.tensors) > 4 else ""
            )
            at = f" in '{pinned.module}'" if pinned.module else ""
            lines.append(f"  {shown}: {pinned.reason} ({pinned.operator}{at})")
        return "\n".join(lines)


def _sources(model: nn.Module, names: Mapping[str, str], labels: Labels) -> dict[str, Axes]:
    """Give every axis of every parameter and buffer labels, by the first name of each tensor."""
    sources: dict[str, Axes] = {}
    tensors = named_tensors(model)
    for name in dict.fromkeys(names.values()):
        sources[name] = {axis: labels.fresh(n) for axis, n in enumerate(tensors[name].shape) if n > 1}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name in sources:
        tensor = tensors[name]
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        start = int(tensor.storage_offset())
        last = start + sum((int(n) - 1) * abs(int(s)) for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        spans.setdefault(tensor.untyped_storage().data_ptr(), []).append((start, last, name))
    for each in spans.values():
        each.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(each):
            if start < end:
                for name in (first, second):
                    for axis in sources[name].values():
                        labels.pin(
                            axis,
                            Cause("memory", name.rpartition(".")[0], f"'{first}' and '{second}' overlap in memory"),
                        )
    return sources


def _freeze(
    model: nn.Module, names: Mapping[str, str], frozen: Sequence[str], sources: Mapping[str, Axes], labels: Labels
) -> None:
    for given in frozen:
        fitting = [name for name in names if name == given or name.startswith(f"{given}.") or not given]
        if not fitting and given not in dict(model.named_modules()):
            raise UserError("frozen", given, allowed="qualified names of parameters or modules of the model")
        for name in fitting:
            for axis in sources[names[name]].values():
                labels.pin(axis, Cause("frozen", given, "it is named in frozen"))


def _couple_attention(model: nn.Module, names: Mapping[str, str], sources: Mapping[str, Axes], labels: Labels) -> None:
    """Unite what torch's own attention can only lose together: its width is that of its input and output.

    A head goes with as many features of the residual stream.
    """
    for path, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or module.in_proj_weight is None:
            continue
        base = f"{path}." if path else ""
        packed = sources[names[f"{base}in_proj_weight"]]
        wide, inputs = packed.get(0), packed.get(1)
        outputs = sources[names[f"{base}out_proj.weight"]].get(0)
        cause = Cause("attention", path, "torch.nn.MultiheadAttention is as wide as its input, which stays")
        if wide is None or inputs is None or outputs is None:
            continue
        for other in (outputs, *wide.reshape(3, -1)):
            labels.join(inputs, other, cause)


def _state(program: Program) -> list[fx.Node]:
    return [node for node in program.graph_module.graph.nodes if node.name in program.tensor_names]


def _propagate(program: Program, names: Mapping[str, str], sources: Mapping[str, Axes], labels: Labels) -> Propagation:
    propagation = Propagation(labels)
    operators = []
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            name = program.tensor_names.get(node.name)
            propagation.axes[node] = {} if name is None else sources[names[name]]
        elif node.op == "call_function":
            operators.append(node)
    propagation.run(operators, rule_for)
    for node in program.graph_module.graph.nodes:
        if node.op == "output":
            propagation.node = node
            for source in node.all_input_nodes:
                for axis in propagation.of(source).values():
                    labels.pin(axis, Cause("output", "", "the model returns it"))
    return propagation


def branches_on_training(model: nn.Module) -> bool:
    """Whether the code of one of the user's modules asks in an ``if`` whether it is training."""
    kinds = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.nn")}
    for kind in kinds:
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):
            return True
        if re.search(r"\bif\b[^\n]*\.training\b", source):
            return True
    return False


def _pin_unread(program: Program, propagation: Propagation) -> None:
    """Pin the positions of saved tensors that a slice leaves out: longer inputs than the examples may read them.

    What is computed from saved tensors alone (a sum of two tables) counts as saved.
    """
    of_inputs: set[fx.Node] = set()
    for node in program.graph_module.graph.nodes:
        given = (
            node.op == "placeholder" and node.name not in program.tensor_names and node.name not in program.constants
        )
        if given or any(source in of_inputs for source in node.all_input_nodes):
            of_inputs.add(node)
        elif node.target is torch.ops.aten.slice.Tensor:
            table = node.args[0]
            axis = (node.args[1] if len(node.args) > 1 else 0) % table.meta["val"].dim()
            axes = propagation.axes.get(table)
            own = axes.get(axis) if isinstance(axes, dict) else None
            if own is None:
                continue
            unread = np.ones(len(own), dtype=bool)
            unread[slice(*(*node.args[2:5], None, None, None)[:3])] = False
            if unread.any():
                reason = "a slice takes a part that may depend on the size of the input"
                propagation.labels.pin(own[unread], Cause("aten.slice.Tensor", "", reason))


def _unused(model: nn.Module, names: Mapping[str, str], sources: Mapping[str, Axes], used: set[str]) -> bool:
    """Whether a saved tensor with a width takes no part in the evaluation mode."""
    saved = model.state_dict(keep_vars=True)
    return any(sources[names[n]] and names[n] not in used for n, t in saved.items() if t.is_floating_point())


def _follow_training(
    model: nn.Module,
    example_inputs: Any,
    forward: Forward | None,
    names: Mapping[str, str],
    sources: Mapping[str, Axes],
    labels: Labels,
) -> tuple[Program, Propagation] | None:
    """Follow the labels through the training mode as well: branches that only it has must fit after a cut, too."""
    try:
        program = export(model, example_inputs, forward, training=True)
    except UserError:
        return None
    return program, _propagate(program, names, sources, labels)
