"""The reference network: a small fixed convolutional network against which every latency is measured.

Its weights come from a formula, its input is 1x3x64x64, and it never changes: the ratio of a latency to its latency can
be compared between days and, with care, between machines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import MissingExtra

REFERENCE_NAME = "reference-1"


def reference_network() -> nn.Module:
    """Return the reference network (5.5 million MACs): a stem, two separable convolutions, pooling, a classifier."""
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=64),
        nn.Conv2d(64, 128, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    with torch.no_grad():
        for parameter in network.parameters():
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) + 1)
            parameter.copy_((wave / max(1, parameter[0].numel()) ** 0.5).reshape(parameter.shape))
    return network.eval()


def reference_inputs() -> Tensor:
    """Return the input of the reference network, shape (1, 3, 64, 64), float32."""
    return torch.cos(torch.arange(3 * 64 * 64, dtype=torch.float64)).float().reshape(1, 3, 64, 64)


def reference_onnx() -> bytes:
    """Return the reference network as an ONNX model with the same weights.

    Raises:
        MissingExtra: onnx is not installed.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise MissingExtra("onnx", "onnx", "The reference network of ONNX Runtime measurements") from error
    nodes: list[Any] = []
    weights: list[Any] = []
    value = "input"
    for index, layer in enumerate(reference_network().children()):
        attributes: dict[str, Any] = {}
        inputs = [value]
        for suffix, parameter in layer.named_parameters():
            inputs.append(f"{index}.{suffix}")
            weights.append(numpy_helper.from_array(parameter.detach().numpy(), inputs[-1]))
        if isinstance(layer, nn.Conv2d):
            pads = [*layer.padding, *layer.padding]
            attributes = {"group": layer.groups, "strides": list(layer.stride), "pads": pads}
        elif isinstance(layer, nn.Linear):
            attributes = {"transB": 1}
        value = f"value_{index}"
        nodes.append(helper.make_node(_ONNX_NAMES[type(layer)], inputs, [value], name=f"node_{index}", **attributes))
    graph = helper.make_graph(
        nodes,
        REFERENCE_NAME,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, 10])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


_ONNX_NAMES: dict[type[nn.Module], str] = {
    nn.Conv2d: "Conv",
    nn.ReLU: "Relu",
    nn.AdaptiveAvgPool2d: "GlobalAveragePool",
    nn.Flatten: "Flatten",
    nn.Linear: "Gemm",
}
