import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from archsmith.cost import activation_ranges, count_onnx, export_onnx, onnx_layers, quantise_onnx
from archsmith.cost.layer_times import CONVERSIONS, layer_times
from archsmith.space import LayerPolicy

IMAGE = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    return export_onnx(network, IMAGE)


def test_every_layer_has_its_time_in_fp32(file):
    rows = layer_times(file.SerializeToString(), IMAGE[:1])
    times = {row.layer: row for row in rows}
    assert [row.layer for row in rows][:3] == ["0.0", "1", "4"]
    assert not any(row.integer for row in rows)
    assert times["1"].latency_ms > 0 and "Conv" in times["1"].kernels


def test_of_a_mixed_policy_conversions_are_a_row_and_int8_layers_run_int8_kernels(file):
    layers = onnx_layers(file)
    policy = {"0.0": LayerPolicy("int8"), "4": LayerPolicy("int8", "per-tensor")}
    content = quantise_onnx(file, policy, activation_ranges(file, [IMAGE])).content
    rows = {
        row.layer: row for row in layer_times(content, IMAGE[:1], layers=[(each.name, each.node) for each in layers])
    }
    assert rows["0.0"].integer and rows["4"].integer and not rows["1"].integer
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(rows[CONVERSIONS].kernels)


def test_quantised_files_are_counted_like_float_ones(file):
    policy = {layer.name: LayerPolicy("int8") for layer in onnx_layers(file)}
    content = quantise_onnx(file, policy, activation_ranges(file, [IMAGE])).content
    plain, quantised = (count_onnx(each, ((1, 8, 16, 16),)) for each in (file.SerializeToString(), content))
    assert quantised.macs == plain.macs > 0
    assert quantised.params == plain.params
    assert not quantised.uncounted
