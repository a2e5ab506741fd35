"""Parameters and multiply-accumulates (MACs) of an ONNX file, node by node, from its initialisers and static shapes.

The same conventions as ``counts.py``, read from another representation: on a network exported without rewriting both
must give the same MACs, which makes this an independent check. Normalisation folded into convolutions by an exporter
changes the parameters, not the MACs.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, get_args

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.cost.counts import Convention, Counts, LayerCount

_NORMALISATIONS = frozenset(
    {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"}
)
_POOLINGS = frozenset({"AveragePool", "GlobalAveragePool"})
_WITHOUT_RULE = frozenset({"Attention", "ConvInteger", "DeformConv", "Einsum", "If", "Loop", "MatMulInteger"})
_STANDARD_DOMAINS = frozenset({"", "ai.onnx"})

Shapes = dict[str, tuple[int, ...]]


def count_onnx(
    model: str | Path | bytes, input_shapes: tuple[tuple[int, ...], ...], *, convention: Convention = "standard"
) -> Counts:
    """Count the nodes of an ONNX model for inputs of these shapes.

    Args:
        model: Path or content of an ``.onnx`` file.
        input_shapes: Shapes in the order of the model's inputs; give batch 1 to count one example.
        convention: ``standard`` or ``paper``, see ``archsmith.cost.count``.

    Returns:
        Counts with one layer per node: its name (or ``<operator>_<position>``), operator, MACs, the parameters that it
        uses first, and the shape of its first output when that is static. ``uncounted`` names the operators without a
        rule, and the nodes whose shapes are not static.

    Raises:
        MissingExtra: onnx is not installed.
        UserError: Not a readable ONNX model, or the shapes do not fit it.
    """
    if convention not in get_args(Convention):
        raise UserError("convention", convention, allowed=" or ".join(get_args(Convention)))
    proto = _loaded(model)
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    parameters = _parameters(proto)
    shapes = _inferred_shapes(proto, weights, input_shapes)
    counted: set[str] = set()
    layers: list[LayerCount] = []
    uncounted: dict[str, None] = {}
    norm_params = 0
    for position, node in enumerate(proto.graph.node):
        macs = _node_macs(node, shapes, convention)
        if macs is None:
            uncounted[node.op_type] = None
        own = parameters.intersection(node.input) - counted
        counted |= own
        params = sum(prod(weights[name]) for name in own)
        norm_params += params if node.op_type in _NORMALISATIONS else 0
        name = node.name or f"{node.op_type}_{position}"
        layers.append(LayerCount(name, node.op_type, macs or 0, params, shapes.get(node.output[0])))
    total = sum(layer.params for layer in layers)
    return Counts(
        macs=sum(layer.macs for layer in layers),
        params=total,
        params_conv_linear=total - norm_params,
        convention=convention,
        layers=tuple(layers),
        uncounted=tuple(uncounted),
    )


def _loaded(model: str | Path | bytes) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx", "onnx", "Counting an ONNX file") from error
    try:
        return onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(str(model))
    except Exception as error:
        shown = f"{len(model)} bytes" if isinstance(model, bytes) else str(model)
        raise UserError(
            "target", Shown(f"{shown} ({type(error).__name__})"), allowed="an existing ONNX model"
        ) from error


def _inferred_shapes(proto: Any, weights: Shapes, input_shapes: tuple[tuple[int, ...], ...]) -> Shapes:
    """Return the static shape of every value after fixing the inputs to ``input_shapes``."""
    import onnx

    inputs = [value for value in proto.graph.input if value.name not in weights]
    expected = ", ".join(f"{value.name} {_declared(value)}" for value in inputs)
    if [len(shape) for shape in input_shapes] != [len(_declared(value)) for value in inputs]:
        raise UserError("inputs", list(input_shapes), allowed=expected)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    del fixed.graph.value_info[:]
    for value, shape in zip([v for v in fixed.graph.input if v.name not in weights], input_shapes, strict=True):
        for axis, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            if axis.HasField("dim_value") and axis.dim_value != size:
                raise UserError("inputs", list(input_shapes), allowed=expected)
            axis.dim_value = size
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = dict(weights)
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        declared = _declared(value)
        if all(isinstance(size, int) for size in declared) and value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(int(size) for size in declared)
    return shapes


def _declared(value: Any) -> list[int | str]:
    axes = value.type.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in axes]


def _parameters(proto: Any) -> set[str]:
    """Return the initialisers that are parameters: floating or dequantised tensors with axes, no running statistics."""
    floating = (1, 10, 11, 16)  # TensorProto: FLOAT, FLOAT16, DOUBLE, BFLOAT16
    stored = {node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    scales = {name for node in proto.graph.node if node.op_type.endswith("izeLinear") for name in node.input[1:]}
    statistics = {name for node in proto.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    found = {
        tensor.name
        for tensor in proto.graph.initializer
        if tensor.dims and (tensor.data_type in floating or tensor.name in stored)
    }
    return found - statistics - scales


def _node_macs(node: Any, shapes: Shapes, convention: Convention) -> int | None:
    """Return the MACs of a node, None when there is no rule or a shape is missing."""
    if node.domain not in _STANDARD_DOMAINS or node.op_type in _WITHOUT_RULE:
        return None
    try:
        match node.op_type:
            case "Conv":
                weight = shapes[node.input[1]]
                return prod(shapes[node.output[0]]) * prod(weight[1:])
            case "ConvTranspose":
                return prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])
            case "Gemm":
                transposed = any(a.name == "transA" and a.i for a in node.attribute)
                inner = shapes[node.input[0]][0 if transposed else 1]
                return prod(shapes[node.output[0]]) * inner
            case "MatMul":
                return prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
            case "LSTM" | "GRU" | "RNN":
                steps, batch, _ = shapes[node.input[0]]
                return steps * batch * (prod(shapes[node.input[1]]) + prod(shapes[node.input[2]]))
            case op if op in _POOLINGS and convention == "paper":
                return prod(shapes[node.input[0]])
            case _:
                return 0
    except KeyError:
        return None
