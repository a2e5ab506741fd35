"""A quantisation policy applied to an ONNX file, by ONNX Runtime's quantiser.

Static quantisation writes pairs of QuantizeLinear and DequantizeLinear nodes, which ONNX Runtime fuses into its int8
kernels when it loads the file. Scales and zero points are those of ``archsmith.cost.quantisers``: given to ONNX Runtime
tensor by tensor, so that file and simulation quantise alike. Layers outside the policy stay as they are, with explicit
dequantisation in between.

What the file then costs and how well it does is to be measured on it: int8 is not always faster, and layers in
different precisions convert at every border.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.cost.onnx_layers import OnnxLayer, load_onnx, onnx_layers
from archsmith.cost.quantisers import Quantiser, activation_quantiser, weight_quantiser
from archsmith.cost.ranges import Ranges
from archsmith.space.quantisation import FP32, LayerPolicy, Policy, Scheme, check_layers


@dataclass(frozen=True)
class QuantisedFile:
    """A quantised network.

    Args:
        content: The ONNX file.
        policy: What was done to every layer with weights, in the order of the file.
        file_bytes: Length of the file: with scales, zero points and the format's own, other than ``policy_bytes``.
        note: How it was quantised, in words.
    """

    content: bytes
    policy: dict[str, LayerPolicy]
    file_bytes: int
    note: str


def quantise_onnx(model: str | Path | bytes | Any, policy: Policy, ranges: Ranges | None) -> QuantisedFile:
    """Return the file under a policy: static int8, and weights in bf16.

    Args:
        model: Path or content of a float ONNX file, or a model.
        policy: Policy by layer, see ``onnx_layers``; layers that it does not name stay fp32.
        ranges: Of its activations (``activation_ranges``); only a policy without int8 can do without.

    ONNX Runtime has no bf16 kernels for the CPU: such weights are stored in two bytes and widened when the file is
    loaded, so that memory and accuracy change, and time does not.

    Raises:
        UserError: A layer that is not in the file, no ranges for an int8 layer, or a file that is quantised already.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    proto = load_onnx(model)
    layers = onnx_layers(proto)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node):
        raise UserError("model", Shown("a file that is quantised already"), allowed="a float ONNX file")
    by_name = {layer.name: layer for layer in layers}
    check_layers(policy, by_name)
    chosen = {layer.node: policy.get(layer.name, FP32) for layer in layers}
    _check_shared(layers, chosen)
    narrow = [layer for layer in layers if chosen[layer.node].precision == "int8"]
    if narrow:
        if ranges is None:
            raise UserError("ranges", None, allowed="what activation_ranges found", hint="Int8 layers need them.")
        proto = _with_pairs(proto, narrow, chosen, ranges)
        if left := {each.node for each in onnx_layers(proto)} & {each.node for each in narrow}:
            names = [each.name for each in narrow if each.node in left]
            raise UserError("policy", names[:4], allowed="layers that ONNX Runtime can quantise to int8")
    _halve(proto, [layer for layer in layers if chosen[layer.node].precision == "bf16"])
    content = bytes(proto.SerializeToString(deterministic=True))
    applied = {name: policy.get(name, FP32) for name in by_name}
    method = f", activations by {ranges.method} over {ranges.examples} examples" if narrow and ranges else ""
    return QuantisedFile(content, applied, len(content), _words(applied.values()) + method)


def quantise_onnx_dynamically(
    model: str | Path | bytes | Any, layers: Sequence[str] | None = None, *, per_channel: bool = False
) -> QuantisedFile:
    """Return the file with int8 weights whose activations are quantised anew in every call: no calibration.

    Args:
        model: Path or content of a float ONNX file, or a model.
        layers: Layers to quantise; all by default.
        per_channel: Whether every output channel has a scale of its own.

    The quantisers are ONNX Runtime's: symmetric int8 weights, or asymmetric uint8 as soon as there is a convolution
    (whose kernel takes no other, and one scale only); activations uint8 over the range of the call.

    Raises:
        UserError: A layer that is not in the file, or none.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    try:
        from onnxruntime.quantization.onnx_model import ONNXModel
        from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
        from onnxruntime.quantization.quant_utils import QuantizationMode, QuantType
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx", "Quantising an ONNX file") from error
    proto = load_onnx(model)
    found = {layer.name: layer for layer in onnx_layers(proto)}
    chosen = set(found if layers is None else layers)
    check_layers(dict.fromkeys(chosen, FP32), found)
    if not chosen:
        raise UserError("layers", [], allowed="at least one layer with weights")
    nodes = {layer.node for layer in onnx_layers(proto) if layer.name in chosen}
    # There is no dynamic kernel of Gemm; ONNX Runtime makes it a MatMul, called like it.
    ONNXModel(proto).replace_gemm_with_matmul()
    names = [node.name for node in proto.graph.node if node.name.removesuffix("_MatMul") in nodes]
    kinds = sorted({node.op_type for node in proto.graph.node if node.name in names})
    convolutions = "Conv" in kinds  # ConvInteger takes unsigned weights alone
    signed = QuantType.QUInt8 if convolutions else QuantType.QInt8
    quantizer = ONNXQuantizer(
        proto, per_channel, False, QuantizationMode.IntegerOps, False, signed, QuantType.QUInt8, None, names, [], kinds,
        {"MatMulConstBOnly": True},
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # pairs are appended at the end
    result = quantizer.model.model
    content = bytes(result.SerializeToString(deterministic=True))
    left = {each.node.removesuffix("_MatMul") for each in onnx_layers(result)}
    if unable := [name for name, layer in found.items() if name in chosen and layer.node in left]:
        if layers is not None:
            raise UserError("layers", unable[:4], allowed="layers with a dynamic int8 kernel: Conv, MatMul, Gemm")
        chosen -= set(unable)
    scheme: Scheme = "asymmetric" if convolutions else "symmetric"
    policy = {
        name: LayerPolicy("int8", "per-channel" if per_channel and layer.kind != "Conv" else "per-tensor", scheme)
        if name in chosen
        else FP32
        for name, layer in found.items()
    }
    return QuantisedFile(content, policy, len(content), _words(policy.values()) + ", activations dynamic")


def _words(policies: Iterable[LayerPolicy]) -> str:
    policies = list(policies)
    counts = Counter(
        f"int8 {each.granularity} {each.scheme}" if each.precision == "int8" else each.precision for each in policies
    )
    return ", ".join(f"{kind}: {number} of {len(policies)} layers" for kind, number in sorted(counts.items()))


def _check_shared(layers: Sequence[OnnxLayer], chosen: Mapping[str, LayerPolicy]) -> None:
    """Refuse two policies for one weight."""
    first: dict[str, OnnxLayer] = {}
    for layer in layers:
        other = first.setdefault(layer.weight, layer)
        if chosen[other.node] != chosen[layer.node]:
            raise UserError(
                f"policy[{layer.name!r}]", chosen[layer.node], allowed=f"that of {other.name!r}: they share a weight"
            )


def _with_pairs(proto: Any, layers: Sequence[OnnxLayer], chosen: Mapping[str, LayerPolicy], ranges: Ranges) -> Any:
    """Return the model with pairs around these layers, every scale given."""
    try:
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import QuantType
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx", "Quantising an ONNX file") from error
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        array = numpy_helper.to_array(weights[layer.weight])
        quantiser = weight_quantiser(array, chosen[layer.node], axis=layer.axis)
        overrides[layer.weight] = _override(quantiser, QuantType.QInt8)
    values = dict.fromkeys(value for layer in layers for value in layer.values)
    if missing := [value for value in values if value not in ranges.bounds]:
        raise UserError("ranges", Shown(f"none for {missing[0]!r}"), allowed="those of this very file")
    for value in values:
        overrides[value] = _override(activation_quantiser(*ranges.bounds[value]), QuantType.QUInt8)
    bounds = {
        name: (np.array(low, np.float32), np.array(high, np.float32)) for name, (low, high) in ranges.bounds.items()
    }
    kinds = sorted(
        {layer.kind for layer in layers} | ({"Relu", "Clip"} if any(each.fused for each in layers) else set())
    )
    quantizer = QDQQuantizer(
        proto,
        per_channel=False,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, bounds),
        nodes_to_quantize=[*(layer.node for layer in layers), *(layer.fused for layer in layers if layer.fused)],
        nodes_to_exclude=[],
        op_types_to_quantize=kinds,
        extra_options={"TensorQuantOverrides": overrides},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # pairs are appended at the end
    return quantizer.model.model


def _override(quantiser: Quantiser, kind: Any) -> list[dict[str, Any]]:
    whole = np.int8 if quantiser.low < 0 else np.uint8
    scales, zeros = np.atleast_1d(quantiser.scale), np.atleast_1d(quantiser.zero_point)
    rows: list[dict[str, Any]] = [
        {"quant_type": kind, "scale": np.array(scale, np.float32), "zero_point": np.array(zero, whole)}
        for scale, zero in zip(scales, zeros, strict=True)
    ]
    if quantiser.axis is not None:
        rows[0]["axis"] = quantiser.axis
    return rows


def _halve(proto: Any, layers: Sequence[OnnxLayer]) -> None:
    """Store the weights of these layers in bfloat16, with a Cast to float32 in front of their nodes."""
    if not layers:
        return
    import torch
    from onnx import TensorProto, helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    casts = []
    for name in dict.fromkeys(layer.weight for layer in layers):
        tensor = tensors[name]
        array = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(torch.bfloat16)
        stored = f"{name}_bf16"
        # Two bytes each, little-endian: what raw_data of bfloat16 is.
        raw = array.contiguous().view(torch.int16).numpy().tobytes()
        tensor.CopyFrom(helper.make_tensor(stored, TensorProto.BFLOAT16, tuple(array.shape), raw, raw=True))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{stored}_cast", to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]  # casts read initialisers alone
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
