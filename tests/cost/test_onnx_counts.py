"""Counts of ONNX models against closed forms, and against the counts of the module that they were made from."""

import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.cost import count, count_onnx, measure_latency, reference_inputs, reference_network
from archsmith.cost.reference import reference_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper  # noqa: E402


def model(nodes, inputs, weights, outputs):
    """Build a model from literal nodes; ``inputs``, ``weights`` and ``outputs`` are name to shape."""
    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, name=name, **attributes) for name, op, ins, outs, attributes in nodes],
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            helper.make_tensor(name, TensorProto.FLOAT, shape, [0.5] * torch.Size(shape).numel())
            for name, shape in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_reference_network_counts_and_computes_the_same_in_both_forms():
    shape = tuple(reference_inputs().shape)
    for convention in ("standard", "paper"):
        module = count(reference_network(), reference_inputs(), convention=convention)
        file = count_onnx(reference_onnx(), (shape,), convention=convention)
        assert (file.macs, file.params, file.uncounted) == (module.macs, module.params, ())
        assert [layer.macs for layer in file.layers] == [layer.macs for layer in module.layers]
        assert [layer.output_shape for layer in file.layers] == [layer.output_shape for layer in module.layers]
    session = onnxruntime.InferenceSession(reference_onnx(), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"input": reference_inputs().numpy()})
    with torch.inference_mode():
        expected = reference_network()(reference_inputs())
    torch.testing.assert_close(torch.from_numpy(outputs), expected, rtol=1e-4, atol=1e-6)


def test_each_operator():
    content = model(
        [
            ("conv", "Conv", ["x", "w"], ["a"], {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
            ("bn", "BatchNormalization", ["a", "s", "b", "m", "v"], ["n"], {}),
            ("up", "ConvTranspose", ["n", "t"], ["u"], {"strides": [2, 2]}),
            ("pool", "GlobalAveragePool", ["u"], ["p"], {}),
            ("flat", "Flatten", ["p"], ["f"], {}),
            ("gemm", "Gemm", ["f", "g"], ["o"], {"transB": 1}),
            ("again", "MatMul", ["o", "q"], ["z"], {}),
        ],
        {"x": ["N", 4, 8, 8]},
        {"w": [6, 2, 3, 3], "s": [6], "b": [6], "m": [6], "v": [6], "t": [6, 5, 2, 2], "g": [7, 5], "q": [7, 3]},
        ["z"],
    )
    counts = count_onnx(content, ((1, 4, 8, 8),), convention="paper")
    table = {layer.name: (layer.macs, layer.params, layer.output_shape) for layer in counts.layers}
    assert table == {
        "conv": (6 * 16 * 2 * 9, 6 * 2 * 9, (1, 6, 4, 4)),
        "bn": (0, 12, (1, 6, 4, 4)),
        "up": (6 * 16 * 5 * 4, 6 * 5 * 4, (1, 5, 8, 8)),
        "pool": (5 * 64, 0, (1, 5, 1, 1)),
        "flat": (0, 0, (1, 5)),
        "gemm": (35, 35, (1, 7)),
        "again": (21, 21, (1, 3)),
    }
    assert counts.params_conv_linear == counts.params - 12
    assert count_onnx(content, ((1, 4, 8, 8),)).macs == counts.macs - 5 * 64


def test_attention_products_recurrence_and_shared_weights():
    content = model(
        [
            ("scores", "MatMul", ["q", "k"], ["s"], {}),
            ("", "LSTM", ["x", "w", "r"], ["", "h"], {"hidden_size": 4}),
            ("one", "MatMul", ["y", "v"], ["y1"], {}),
            ("two", "MatMul", ["y1", "v"], ["y2"], {}),
        ],
        {"q": [1, 2, 5, 8], "k": [1, 2, 8, 5], "x": [7, 1, 3], "y": [1, 6]},
        {"w": [1, 16, 3], "r": [1, 16, 4], "v": [6, 6]},
        ["s", "h", "y2"],
    )
    counts = count_onnx(content, ((1, 2, 5, 8), (1, 2, 8, 5), (7, 1, 3), (1, 6)))
    assert [layer.macs for layer in counts.layers] == [2 * 5 * 5 * 8, 7 * 16 * 7, 36, 36]
    assert [layer.params for layer in counts.layers] == [0, 16 * 7, 36, 0]
    assert counts.layers[1].name == "LSTM_1"


def test_what_can_not_be_counted_is_named():
    einsum = model([("e", "Einsum", ["x", "x"], ["y"], {"equation": "ij,kj->ik"})], {"x": [2, 3]}, {}, ["y"])
    assert count_onnx(einsum, ((2, 3),)).uncounted == ("Einsum",)
    nodes = [("nz", "NonZero", ["x"], ["i"], {}), ("c", "Cast", ["i"], ["f"], {"to": 1})]
    dynamic = model([*nodes, ("m", "MatMul", ["g", "f"], ["y"], {})], {"x": [2, 3]}, {"g": [4, 2]}, ["y"])
    assert count_onnx(dynamic, ((2, 3),)).uncounted == ("MatMul",)


def test_errors(tmp_path):
    content = reference_onnx()
    with pytest.raises(UserError, match=r"inputs: got \[\(1, 3\)\]; allowed: input \[1, 3, 64, 64\]"):
        count_onnx(content, ((1, 3),))
    with pytest.raises(UserError, match=r"inputs: got \[\(1, 3, 32, 32\)\]"):
        count_onnx(content, ((1, 3, 32, 32),))
    with pytest.raises(UserError, match=r"target: got .*missing.onnx \(FileNotFoundError\)"):
        count_onnx(tmp_path / "missing.onnx", ((1,),))
    with pytest.raises(UserError, match=r"target: got 4 bytes \(DecodeError\); allowed: an existing ONNX model"):
        count_onnx(b"onnx", ((1,),))
    with pytest.raises(UserError, match=r"convention: got 'all'"):
        count_onnx(content, ((1, 3, 64, 64),), convention="all")


def test_latency_of_a_file_and_its_errors(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(reference_onnx())
    options = {"backend": "onnxruntime", "block_ms": 0.1, "warmup": 1}
    latency = measure_latency(path, reference_inputs(), **options)
    assert len(latency.samples_ms) == 10 and min(latency.samples_ms) > 0
    assert latency.provenance.onnxruntime == onnxruntime.__version__
    assert latency.provenance.precision == "as stored"
    with pytest.raises(UserError, match=r"inputs: got \[\(1, 3, 32, 32\)\]; allowed: input \[1, 3, 64, 64\]"):
        measure_latency(path, torch.zeros(1, 3, 32, 32), **options)
    with pytest.raises(UserError, match=r"target: got '.*other.onnx'; allowed: an existing .onnx file"):
        measure_latency(tmp_path / "other.onnx", reference_inputs(), **options)
    with pytest.raises(UserError, match=r"4 bytes, which ONNX Runtime refuses"):
        measure_latency(b"onnx", reference_inputs(), **options)
