"""The layers of an ONNX file that have weights: convolutions and matrix products, with their names in torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from archsmith.core.errors import MissingExtra, Shown, UserError

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FUSED_BEHIND = ("Relu", "Clip")
"""Activations that a quantised convolution does by itself: their range takes the place of its own."""


@dataclass(frozen=True)
class OnnxLayer:
    """A node with a weight.

    Args:
        name: Name of the module that it was, where the file still tells; else that of the node. Nodes of a module that
            is called twice share it.
        node: Name of the node.
        kind: Its operator.
        weight: Name of the weight's initialiser.
        shape: Shape of the weight.
        axis: Axis of the weight's output channels.
        inputs: Name of the value that the weight meets.
        outputs: Names of the value behind the node and, where an activation is fused to it, of that behind this one.
        fused: Name of the node of that activation, or "".
    """

    name: str
    node: str
    kind: str
    weight: str
    shape: tuple[int, ...]
    axis: int
    inputs: str
    outputs: tuple[str, ...]
    fused: str

    @property
    def elements(self) -> int:
        """Elements of the weight."""
        return prod(self.shape)

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the activations in front of and behind it."""
        return (self.inputs, *self.outputs)


def load_onnx(model: str | Path | bytes | Any) -> Any:
    """Return an ``onnx.ModelProto`` of one's own, every node named.

    Args:
        model: Path or content of an ``.onnx`` file, or a model, which is copied.

    Raises:
        MissingExtra: onnx is not installed.
        UserError: Not a readable ONNX model.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx", "onnx", "Quantising an ONNX file") from error
    if isinstance(model, onnx.ModelProto):
        own = onnx.ModelProto()
        own.CopyFrom(model)
    else:
        try:
            own = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(str(model))
        except Exception as error:
            shown = f"{len(model)} bytes" if isinstance(model, bytes) else str(model)
            raise UserError("model", Shown(f"{shown} ({type(error).__name__})"), allowed="an ONNX model") from error
    for position, node in enumerate(own.graph.node):
        node.name = node.name or f"{node.op_type}_{position}"
    _unalias(own)
    return own


def _unalias(model: Any) -> None:
    """Let nodes take a shared weight itself, not the Identity by which the exporter hands out the second copy."""
    weights = {tensor.name for tensor in model.graph.initializer}
    final = {value.name for value in model.graph.output}
    alias = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Identity" and node.input[0] in weights and node.output[0] not in final
    }
    for node in model.graph.node:
        for at, value in enumerate(node.input):
            node.input[at] = alias.get(value, value)
    kept = [node for node in model.graph.node if node.op_type != "Identity" or node.output[0] not in alias]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def onnx_layers(model: str | Path | bytes | Any) -> tuple[OnnxLayer, ...]:
    """Return the nodes with a float32 weight of two or more axes, in the order of the file.

    Raises:
        MissingExtra: onnx is not installed.
        UserError: Not a readable ONNX model.
    """
    graph = load_onnx(model).graph
    weights = {t.name: tuple(t.dims) for t in graph.initializer if t.data_type == 1 and len(t.dims) >= 2}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in node.input:
            users.setdefault(value, []).append(node)
    final = {value.name for value in graph.output}
    layers: list[OnnxLayer] = []
    taken: dict[str, str] = {}  # weight by layer name
    for node in graph.node:
        at = next((i for i in (1, 0) if i < len(node.input) and node.input[i] in weights), None)
        # A weight on the left of a matrix product is multiplied from the other side; leave such products alone.
        if node.op_type not in _WEIGHTED or at != 1:
            continue
        weight = node.input[1]
        behind = users.get(node.output[0], [])
        fused = len(behind) == 1 and behind[0].op_type in _FUSED_BEHIND and node.output[0] not in final
        name = _module_name(node, weight, shared=len(users[weight]) > 1)
        if taken.setdefault(name, weight) != weight:  # two products inside one module
            taken[name := node.name] = weight
        layers.append(
            OnnxLayer(
                name=name,
                node=node.name,
                kind=node.op_type,
                weight=weight,
                shape=weights[weight],
                axis=_channel_axis(node, len(weights[weight])),
                inputs=node.input[0],
                outputs=(node.output[0], behind[0].output[0]) if fused else (node.output[0],),
                fused=behind[0].name if fused else "",
            )
        )
    return tuple(layers)


def onnx_precision(model: str | Path | bytes) -> str:
    """Return in words in which precision an ONNX file keeps its weights; "fp32" where all are.

    Raises:
        MissingExtra: onnx is not installed.
        UserError: Not a readable ONNX model.
    """
    from onnx import TensorProto

    proto = load_onnx(model)
    names = {TensorProto.FLOAT: "fp32", TensorProto.BFLOAT16: "bf16", TensorProto.FLOAT16: "fp16"}
    names |= {TensorProto.INT8: "int8", TensorProto.UINT8: "int8"}
    count = Counter(
        names[tensor.data_type]
        for tensor in proto.graph.initializer
        if len(tensor.dims) > 1 and tensor.data_type in names
    )
    if set(count) <= {"fp32"}:
        return "fp32"
    kinds = {node.op_type for node in proto.graph.node}
    dynamic = "DynamicQuantizeLinear" in kinds
    whole = sum(count.values())
    parts = [f"{kind} {number}/{whole}" for kind, number in sorted(count.items())]
    return " + ".join(parts) + (" weights, activations dynamic" if dynamic else " weights")


def _channel_axis(node: Any, axes: int) -> int:
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
        case _:
            return axes - 1


def _module_name(node: Any, weight: str, *, shared: bool) -> str:
    """Return the module that a node came from.

    The weight says it, unless a normalisation was folded into it or several nodes use it; then the node's scope does,
    in which the tracing exporter repeats what an ``nn.Sequential`` is called ("/stem/stem.0/conv/Conv" is stem.0.conv).
    """
    if weight.endswith(".weight") and not shared:
        return weight.removesuffix(".weight")
    if not node.name.startswith("/"):
        return str(node.name)
    parts: list[str] = []
    for scope in node.name.strip("/").split("/")[:-1]:
        if parts and scope.startswith(parts[-1] + "."):
            parts[-1] = scope
        else:
            parts.append(scope)
    return ".".join(parts) or str(node.name)
