"""Where an ONNX file spends its time, layer by layer: kernels of the runtime's own profile, summed up.

After its fusions ONNX Runtime runs kernels, not layers; a kernel is called after the node or value that it came of.
Kernels that only convert (to and from int8, between memory layouts) are a row of their own: they are what a policy of
mixed precision costs beside its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsmith.cost.onnx_layers import load_onnx, onnx_layers
from archsmith.cost.profile import profile
from archsmith.graph import Inputs

CONVERSIONS = "(conversions)"
OTHERS = "(other kernels)"

_CONVERTING = (
    "DynamicQuantizeLinear",
    "QuantizeLinear",
    "DequantizeLinear",
    "ReorderInput",
    "ReorderOutput",
    "Transpose",
    "Cast",
)
_INTEGER = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
)


@dataclass(frozen=True)
class LayerTime:
    """One row.

    Args:
        layer: Name of the layer, or ``(conversions)`` or ``(other kernels)``.
        kernels: What ran: operators of the kernels, in order, each once.
        integer: Whether an int8 kernel did its products.
        latency_ms: Sum over its kernels of the median time of a call.
    """

    layer: str
    kernels: tuple[str, ...]
    integer: bool
    latency_ms: float


def layer_times(
    model: str | Path | bytes, inputs: Inputs, *, layers: Sequence[tuple[str, str]] | None = None, threads: int = 1
) -> list[LayerTime]:
    """Return the time of every layer with weights, of conversions, and of the rest.

    Args:
        model: Path or content of an ``.onnx`` file, float or quantised.
        inputs: One tensor or a tuple of arguments.
        layers: (layer, node) pairs, as of ``onnx_layers`` of the float file; needed for a quantised one, whose nodes no
            longer have float weights. None reads them from the file.
        threads: Threads inside operators.

    Raises:
        UserError: The file cannot be read or run with these inputs.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    pairs = [(each.name, each.node) for each in onnx_layers(model)] if layers is None else list(layers)
    makers = {output: node for node in load_onnx(model).graph.node for output in node.output}
    nodes = {node: name for name, node in pairs}
    order = dict.fromkeys(name for name, _ in pairs)
    kernels: dict[str, list[tuple[str, float]]] = {name: [] for name in (*order, CONVERSIONS, OTHERS)}
    for row in profile(model, inputs, threads=threads, block_ms=1.0).layers:
        if row.latency_ms is None:
            continue
        at = CONVERSIONS if row.kind in _CONVERTING else _layer_of(row.name, nodes, makers) or OTHERS
        kernels[at].append((row.kind, row.latency_ms))
    return [
        LayerTime(
            layer,
            tuple(dict.fromkeys(kind for kind, _ in found)),
            any(kind in _INTEGER for kind, _ in found),
            sum(time for _, time in found),
        )
        for layer, found in kernels.items()
        if found
    ]


def _layer_of(kernel: str, nodes: dict[str, str], makers: dict[str, Any]) -> str:
    """Return the layer whose node a kernel runs, or ""; see ``archsmith.cost.profile`` for how kernels are called."""
    if kernel in nodes:
        return nodes[kernel]
    maker = makers.get(kernel.removesuffix("_nchwc"))
    for _ in range(4):  # back over the activations that were fused behind the node
        if maker is None or maker.name in nodes:
            break
        maker = makers.get(next(iter(maker.input), ""))
    if kernel.endswith("_nchwc"):
        # A value behind another kind of kernel (a pooling in the blocked layout) is none of a layer's.
        return nodes.get(maker.name, "") if maker is not None and "Pool" not in kernel else ""
    # Dynamic quantisation names what it makes of a node after it; a fused kernel gets a token.
    marks = ("_token_", "_quant", "_MatMul_quant")
    return next((name for node, name in nodes.items() if kernel.startswith(tuple(node + mark for mark in marks))), "")
