"""From an ``nn.Module`` to a ``Graph`` by ``torch.export``: symbolic tensors only, nothing is computed.

Operators stay as the module calls them: ``conv2d``, ``relu_`` and ``scaled_dot_product_attention`` are one step each.
Which tensors share memory is read from the storages of the traced tensors, so it covers every operator, also those that
are sometimes a view and sometimes a copy (``reshape``, ``contiguous``, ``dropout``).
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from archsmith.core.errors import Shown, UserError
from archsmith.graph.ir import Graph, Kind, Node, Value

Inputs = Tensor | tuple[Any, ...] | list[Any]


@contextmanager
def evaluating(module: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Hold ``module`` in evaluation mode (or training mode); each submodule gets its own flag back afterwards.

    The flags are set directly, so that a class with its own ``train`` method has no side effects here.
    """
    flags = [(m, m.training) for m in module.modules()]
    for submodule, _ in flags:
        submodule.training = training
    try:
        yield
    finally:
        for submodule, flag in flags:
            submodule.training = flag


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Undo what a forward pass stores in the attributes of its modules (caches, counters, symbolic tensors, hooks)."""
    saved = [(m, dict(m.__dict__)) for m in module.modules()]
    # Hooks that a module puts on itself at its first call: the flag that says so is undone, so the hooks must go, too.
    hooks = [
        (held, dict(held)) for _, a in saved for name, held in a.items() if "hooks" in name and isinstance(held, dict)
    ]
    try:
        yield
    finally:
        for submodule, attributes in saved:
            submodule.__dict__.clear()
            submodule.__dict__.update(attributes)
        for held, before in hooks:
            held.clear()
            held.update(before)


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Keep torch's tracers from logging and printing a failure: the caller turns it into an error of its own."""
    loggers = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental", "export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        # A failed export prints its whole graph to the standard error.
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            # Attributes that a forward pass assigns are put back by ``attributes_kept``.
            warnings.filterwarnings("ignore", message="The tensor attribute")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def as_inputs(module: nn.Module, inputs: Inputs) -> tuple[Any, ...]:
    """Return the positional arguments of ``module`` as a tuple, on the meta device when the module is there.

    Args:
        module: Network that will take them.
        inputs: One tensor, or a tuple or list of arguments with at least one tensor somewhere inside.

    Raises:
        UserError: There is no tensor in ``inputs``.
    """
    arguments = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments)):
        raise UserError("inputs", inputs, allowed="a tensor or a tuple of arguments that holds one")
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        arguments = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments)
    return arguments


def export_graph(module: nn.Module, inputs: Inputs, *, training: bool = False) -> Graph:
    """Export ``module`` for inputs of exactly these shapes.

    Args:
        module: Network on any device, the meta device included; its mode, parameters and buffers are left as they are.
        inputs: Positional arguments: one tensor, or a tuple; only shapes and types matter.
        training: Trace the training mode instead of the evaluation mode.

    Returns:
        Graph for these shapes, without the backward pass.

    Raises:
        UserError: ``torch.export`` can not trace the module (its control flow or its shapes depend on the data).
    """
    arguments = as_inputs(module, inputs)
    try:
        with evaluating(module, training=training), attributes_kept(module), torch.no_grad(), quiet_tracing():
            program = torch.export.export(module, arguments, strict=False)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            "module",
            Shown(f"{type(module).__name__}, which torch.export refuses ({type(error).__name__}: {first_line})"),
            allowed="a module whose control flow and shapes do not depend on the data",
            hint="Run torch.export.export(module, inputs, strict=False) to see the whole report.",
        ) from error
    return _translate(program.graph, set(program.graph_signature.user_inputs))


def _translate(graph: fx.Graph, user_inputs: set[Any]) -> Graph:
    storages = _Storages()
    for node in graph.nodes:
        storages.note(node)
    # Unpacking takes every result, also those that nobody reads: they are free once the operator is done.
    taken = [node for node in graph.nodes if node.users or node.target is not operator.getitem]
    nodes = [_node(node, user_inputs, storages) for node in taken]
    return Graph(tuple(nodes), tuple(storages.sizes))


def _node(node: fx.Node, user_inputs: set[Any], storages: _Storages) -> Node:
    values = () if node.op == "output" else storages.values(node)
    if node.target is operator.getitem:
        # Taking one result of several does not touch the others: they may be free already.
        reads = tuple(dict.fromkeys(value.storage for value in values))
    else:
        reads = tuple(dict.fromkeys(v.storage for source in node.all_input_nodes for v in storages.values(source)))
    return Node(
        name=node.name,
        kind=_kind(node, user_inputs),
        operator=_operator_name(node) if node.op == "call_function" else "",
        module=_module_name(node),
        inputs=tuple(source.name for source in node.all_input_nodes),
        reads=reads,
        values=values,
    )


def _kind(node: fx.Node, user_inputs: set[Any]) -> Kind:
    match node.op:
        case "output":
            return "output"
        case "placeholder":
            return "input" if node.name in user_inputs else "state"
        case "get_attr":
            return "state"
        case _:
            return "call"


def _operator_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.target is operator.getitem else str(node.target)


def _module_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(name) for name, _ in reversed(stack.values())), "")


def _hands_on(_: object, probability: object, training: object) -> bool:
    """Whether a dropout with these arguments does nothing."""
    return not training or probability == 0


class _Storages:
    """Numbers the storages of traced tensors in the order of their first appearance."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._index: dict[int, int] = {}

    def note(self, node: fx.Node) -> None:
        """Number the storages of ``node``, which come after those of its inputs."""
        if node.target == torch.ops.aten.dropout.default and _hands_on(*node.args):
            # Traced as a copy; the operator itself returns the tensor that it was given.
            given, returned = node.args[0], node.meta["val"]
            assert isinstance(given, fx.Node)
            self._index[returned.untyped_storage()._cdata] = self._index[given.meta["val"].untyped_storage()._cdata]
        self.values(node)

    def values(self, node: fx.Node) -> tuple[Value, ...]:
        tensors = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
        return tuple(self._value(node, tensor) for tensor in tensors)

    def _value(self, node: fx.Node, tensor: Tensor) -> Value:
        try:
            shape = tuple(_constant(size) for size in tensor.shape)
            storage = tensor.untyped_storage()
            # The traced tensors of a program live as long as the program, so addresses are not reused.
            index = self._index.setdefault(storage._cdata, len(self.sizes))
            if index == len(self.sizes):
                self.sizes.append(_constant(storage.nbytes()))
        except (TypeError, NotImplementedError, RuntimeError) as error:
            raise UserError(
                "module",
                Shown(f"the operator {node.target}, whose result has no fixed dense size"),
                allowed="dense tensors whose shapes follow from the shapes of the inputs",
            ) from error
        return Value(shape, str(tensor.dtype).removeprefix("torch."), index)


def _constant(size: object) -> int:
    if not isinstance(size, int):
        raise TypeError(f"{size} is symbolic")
    return size
