"""From the user's model to an exported graph, and from a failure to a message that names the line."""

from __future__ import annotations

import itertools
import operator
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from archsmith.core.errors import Shown, UserError
from archsmith.graph.export import as_inputs, attributes_kept, evaluating, quiet_tracing

Forward = Callable[..., Any]
PREFIX = "archsmith_model."


class Called(nn.Module):
    """A model called in the user's own way.

    Args:
        model: The model.
        forward: ``forward(model, *inputs)``.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.archsmith_model = model
        self.call = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.call(self.archsmith_model, *args, **kwargs)


class Program:
    """An exported model: its graph and what the graph's placeholders are.

    Attributes:
        graph_module: Graph of aten operators; parameters, buffers, constants and inputs are placeholders.
        tensor_names: Qualified name in the model by placeholder name.
        constants: Other tensors by placeholder name.
        input_names: Placeholders of the inputs, in order.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.graph_module: fx.GraphModule = program.graph_module
        enter_contexts(self.graph_module)
        self.tensor_names: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        inputs = []
        for spec in program.graph_signature.input_specs:
            name = str(getattr(spec.arg, "name", ""))
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.tensor_names[name] = str(spec.target).removeprefix(PREFIX)
            elif spec.kind == InputKind.USER_INPUT:
                inputs.append(name)
            else:
                self.constants[name] = program.constants.get(str(spec.target))
        self.input_names = tuple(inputs)
        for node in self.graph_module.graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack:
                node.meta["nn_module_stack"] = {
                    key: (str(path).removeprefix(PREFIX.rstrip(".")).removeprefix("."), kind)
                    for key, (path, kind) in stack.items()
                }


CONTEXTS = (
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
    "wrap_activation_checkpoint",
    "tag_activation_checkpoint",
)
"""Operators that run a sub-graph in some context and hand on what it returns."""


def enter_contexts(graph_module: fx.GraphModule) -> None:
    """Put the nodes of sub-graphs that only run in another context (autocast) in the place of the call."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) not in CONTEXTS:
            continue
        position = next((i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        if position is None:
            continue
        inner = getattr(graph_module, str(node.args[position].target), None)
        if not isinstance(inner, fx.GraphModule):
            continue
        enter_contexts(inner)
        operands = node.args[position + 1 :]
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        if len(operands) != len(placeholders) or any(n.op == "get_attr" for n in inner.graph.nodes):
            continue
        copies = dict(zip(placeholders, operands, strict=True))
        with graph.inserting_before(node):
            for one in inner.graph.nodes:
                if one.op == "call_function":
                    copies[one] = graph.node_copy(one, copies.__getitem__)
        (results,) = next(n for n in inner.graph.nodes if n.op == "output").args
        outputs = results if isinstance(results, list | tuple) else [results]
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(copies[outputs[user.args[1]]])
                graph.erase_node(user)
        if not isinstance(results, list | tuple):
            node.replace_all_uses_with(copies[results])
        if not node.users:
            graph.erase_node(node)


def call_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for example inputs: a tensor, a tuple or list, or a mapping by name."""
    if isinstance(example_inputs, Mapping):
        given = dict(example_inputs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(given)):
            raise UserError(
                "example_inputs", example_inputs, allowed="a tensor, a tuple of arguments or a mapping by name"
            )
        names, values = list(given), list(given.values())
        return (), dict(zip(names, as_inputs(model, tuple(values)), strict=True))
    if not isinstance(example_inputs, Tensor | tuple | list):
        raise UserError("example_inputs", example_inputs, allowed="a tensor, a tuple of arguments or a mapping by name")
    return as_inputs(model, example_inputs), {}


def export(model: nn.Module, example_inputs: Any, forward: Forward | None, *, training: bool = False) -> Program:
    """Export a model for inputs of these shapes.

    Args:
        model: On any device; its mode, parameters and buffers are left as they are.
        example_inputs: A tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        forward: How to call it, ``forward(model, *inputs)``; None for ``model(*inputs)``.
        training: Trace the training mode instead of the evaluation mode.

    Raises:
        UserError: The inputs do not fit the model, or its control flow depends on the data.
    """
    args, kwargs = call_arguments(model, example_inputs)
    module = model if forward is None else Called(model, forward)
    try:
        with (
            evaluating(module, training=training),
            attributes_kept(model),
            torch.no_grad(),
            quiet_tracing(),
            _without_stack_traces(),
        ):
            program = torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:
        line = where(error, model, forward)
        first = next((text for text in str(error).strip().splitlines() if text.strip()), "")
        data = (
            "data-dependent" in str(error).lower()
            or "DataDependent" in type(error).__name__
            or "guard" in first.lower()
        )
        raise UserError(
            "model" if data else "example_inputs",
            Shown(f"{type(model).__name__}, which can not be traced{line}: {type(error).__name__}: {first[:300]}"),
            allowed="a model whose control flow does not depend on the data, called with inputs that it accepts",
            hint="Pass forward=lambda model, *inputs: ... to trace a part or another way of calling it.",
        ) from error
    return Program(program)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Trace without the text of the call stack of every operator, which nothing here reads."""
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


def where(error: BaseException, model: nn.Module, forward: Forward | None) -> str:
    """Return " at file:line (code)" of the last line of the user's code that an error went through, or nothing."""
    files = set()
    for module in model.modules():
        for kind in type(module).__mro__:
            source = getattr(__import__("sys").modules.get(kind.__module__), "__file__", None)
            if source and "/torch/" not in source:
                files.add(source)
    if forward is not None:
        files.add(forward.__code__.co_filename)
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for one in chain:
        frames = [frame for frame in traceback.extract_tb(one.__traceback__) if frame.filename in files]
        if frames:
            last = frames[-1]
            return f" at {last.filename.rsplit('/', 1)[-1]}:{last.lineno} ({(last.line or '').strip()})"
    found = re.search(r'File "([^"]+)", line (\d+)', str(error))
    return f" at {found.group(1).rsplit('/', 1)[-1]}:{found.group(2)}" if found else ""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name, parameters first."""
    return dict(
        itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    )
