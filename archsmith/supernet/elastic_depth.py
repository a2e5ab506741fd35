"""Residual blocks of any network, found in its graph: what can be left out because its output adds to its input.

A child of a container is a residual block when one input of it reaches its one output, at the same size, through
nothing but additions, normalisations and activations. Neighbours of one class and shape make a run; a depth is "the
first d blocks of a run".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from archsmith.atoms.propagate import LabelledGraph, shape
from archsmith.atoms.replay import IDENTITIES
from archsmith.atoms.rules.table import packet_name
from archsmith.atoms.trace import Forward, export
from archsmith.core.errors import UserError
from archsmith.supernet.elastic_slices import SlicedChildren, Slices

_ADDITIONS = frozenset({"add", "add_"})
_PASSING = frozenset(
    {
        "layer_norm", "rms_norm", "batch_norm", "group_norm", "native_layer_norm", "_fused_rms_norm",
        "relu", "relu_", "relu6", "relu6_", "hardtanh", "hardtanh_", "gelu", "silu", "silu_", "hardswish", "hardswish_",
        "leaky_relu", "leaky_relu_", "tanh", "sigmoid", "dropout", "dropout_", "feature_dropout", "contiguous", "clone",
        "alias", "detach", "to", "_to_copy",
    }
)  # fmt: skip

DEPTH_NAMES = (
    "num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "depths",
)  # fmt: skip
"""Attributes and configuration fields that say how many blocks there are."""


@dataclass(frozen=True)
class Run:
    """Blocks that can be left out from the last.

    Attributes:
        container: Qualified name of the ``nn.Sequential`` or ``nn.ModuleList``.
        positions: Where in it they lie, neighbours.
        children: How many it holds in all.
        blocks: Qualified names of the blocks.
    """

    container: str
    positions: tuple[int, ...]
    children: int
    blocks: tuple[str, ...]

    def kept(self, depth: int) -> list[int]:
        """Return the positions of all children that remain with ``depth`` blocks of the run."""
        gone = set(self.positions[depth:])
        return [position for position in range(self.children) if position not in gone]


def residual_runs(model: nn.Module, graph: LabelledGraph) -> list[Run]:
    """Return all runs of residual blocks, outer containers before inner ones.

    Args:
        model: The network.
        graph: Of the evaluation mode.
    """
    spans = _spans(graph)
    runs = []
    for path, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList) or len(container) < 1:
            continue
        base = f"{path}." if path else ""
        names = [f"{base}{name}" for name in container._modules]
        found = [_residual(spans.get(name, []), graph) for name in names]
        start = 0
        while start < len(names):
            end = start
            if found[start] is not None:
                end = start + 1
                while end < len(names) and _continues(container, found, end):
                    end += 1
            if end > start:
                runs.append(Run(path, tuple(range(start, end)), len(names), tuple(names[start:end])))
            start = max(end, start + 1)
    return [run for run in runs if len(run.positions) > 1 or run.children > 1]


def _spans(graph: LabelledGraph) -> dict[str, list[fx.Node]]:
    """Return the operators that each module issues, its submodules included."""
    spans: dict[str, list[fx.Node]] = {}
    for node in graph.operators():
        for path in {str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()}:
            spans.setdefault(path, []).append(node)
    return spans


def _residual(nodes: Sequence[fx.Node], graph: LabelledGraph) -> tuple[fx.Node, fx.Node] | None:
    """Return the input and the output of a residual block; None when it is none."""
    inside = set(nodes)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(outputs) != 1:
        return None
    output = outputs[0]
    seen: set[tuple[fx.Node, bool]] = set()
    stack = [(output, False)]
    while stack:
        node, added = stack.pop()
        if (node, added) in seen:
            continue
        seen.add((node, added))
        if node not in inside:
            if added and shape(node) == shape(output) and node.name not in graph.tensor_names:
                return node, output
            continue
        name = packet_name(node)
        if name in _ADDITIONS:
            stack.extend((source, True) for source in node.all_input_nodes)
        elif name in _PASSING and isinstance(node.args[0], fx.Node):
            stack.append((node.args[0], added))
    return None


def _continues(container: nn.Module, found: Sequence[tuple[fx.Node, fx.Node] | None], position: int) -> bool:
    """Whether the block at a position goes on where the one before ends, and is of the same class and shape."""
    before, here = found[position - 1], found[position]
    if before is None or here is None or here[0] is not before[1]:
        return False
    modules = list(container._modules.values())
    first, second = modules[position - 1], modules[position]
    assert first is not None and second is not None
    return type(first) is type(second) and _shapes(first) == _shapes(second)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def wrong_without(
    model: nn.Module,
    keeping: Mapping[str, Sequence[int]],
    graph: LabelledGraph,
    example_inputs: Any,
    forward: Forward | None,
) -> str:
    """Return why a network without some blocks is more than that: its code may count on a block. Empty when it is not.

    The network without them is exported; its operators must be those of the original that no removed block issues.

    Args:
        model: The network, left as it is.
        keeping: Positions that remain by qualified name of the container.
        graph: Of the whole network.
        example_inputs: As it was traced.
        forward: Likewise.
    """
    removed, parts = set(), []
    for path, kept in keeping.items():
        names = list(model.get_submodule(path)._modules)
        removed |= {f"{path}.{name}" if path else name for at, name in enumerate(names) if at not in set(kept)}
        parts.append(SlicedChildren(path, (), lambda kept=kept: kept))
    slices = Slices(model, parts)
    slices.choose({})
    with slices.active():
        try:
            program = export(model, example_inputs, forward)
        except UserError as error:
            return f"without them the network does not run: {error.given}"
    wanted = [
        str(node.target)
        for node in graph.operators()
        if not removed & {str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
    ]
    left = [str(node.target) for node in program.graph_module.graph.nodes if node.op == "call_function"]
    wanted, left = ([name for name in names if not _is_identity(name)] for names in (wanted, left))
    return "" if wanted == left else "without them other parts of the network compute something else"


def _is_identity(name: str) -> bool:
    return name.removeprefix("aten.").partition(".")[0] in IDENTITIES


def remove_blocks_(model: nn.Module, keeping: Mapping[str, Sequence[int]]) -> None:
    """Take blocks out of a network, and say so in the fields that count them (``num_hidden_layers``, ...).

    Args:
        model: Changed in place.
        keeping: Positions that remain by qualified name of the container; inner containers before outer ones are gone
            with their blocks.
    """
    for path in sorted(keeping, key=lambda name: -name.count(".") if name else 1):
        container = model.get_submodule(path)
        items = list(container._modules.items())
        kept = [items[position] for position in keeping[path]]
        numbered = all(name == str(number) for number, (name, _) in enumerate(items))
        container._modules.clear()
        for number, (position, (name, child)) in enumerate(zip(keeping[path], kept, strict=True)):
            container._modules[str(number) if numbered else name] = child
            if child is not None and position != number:
                _renumber(child, position, number)
        _recount(model, path, len(items), list(keeping[path]))


def _renumber(block: nn.Module, before: int, after: int) -> None:
    """Give the modules of a block their new number, where they know the old one (places in a cache of keys)."""
    for module in block.modules():
        if module.__dict__.get("layer_idx") == before:
            module.__dict__["layer_idx"] = after


def _recount(model: nn.Module, path: str, before: int, positions: Sequence[int]) -> None:
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    seen: set[int] = set()
    while True:
        module = model.get_submodule(path)
        for owner in (module, *(held for held in vars(module).values() if _is_configuration(held))):
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            fields = vars(owner)
            for name in DEPTH_NAMES:
                held = fields.get(name)
                word = next((word for word in ("encoder", "decoder") if word in name), "")
                if type(held) is int and held == before and (not word or word in path):
                    fields[name] = len(positions)
                elif isinstance(held, list) and numbers and numbers[-1] < len(held) and held[numbers[-1]] == before:
                    fields[name] = [len(positions) if i == numbers[-1] else n for i, n in enumerate(held)]
            kinds = fields.get("layer_types")
            if isinstance(kinds, list) and len(kinds) == before:
                fields["layer_types"] = [kinds[position] for position in positions]
        if not path:
            return
        path = path.rpartition(".")[0]


def _is_configuration(held: Any) -> bool:
    return hasattr(held, "__dict__") and not isinstance(held, nn.Module | type) and not callable(held)
