import numpy as np
import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import measure_latency
from archsmith.cost.backends import onnx_session
from archsmith.cost.onnx_export import export_onnx
from archsmith.cost.onnx_layers import onnx_layers, onnx_precision
from archsmith.cost.quantise_onnx import quantise_onnx, quantise_onnx_dynamically
from archsmith.cost.quantise_torch import layer_elements, quantisable_layers, simulated
from archsmith.cost.quantisers import weight_quantiser
from archsmith.cost.ranges import activation_ranges
from archsmith.space.quantisation import LayerPolicy

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def make_network():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.Hardswish())
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        block,
        nn.Conv2d(16, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(3)
    return network.eval()


LAYERS = ["0.0", "1.0", "2", "5"]


@pytest.fixture(scope="module")
def network():
    return make_network()


@pytest.fixture(scope="module")
def images():
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def file(network, images):
    return export_onnx(network, images[:2])


@pytest.fixture(scope="module")
def ranges(file, images):
    return activation_ranges(file, images.split(32))


def outputs(content, images):
    return onnx_session(content, threads=1).run(None, {"input": images.numpy()})[0]


def test_layers_carry_the_names_of_their_modules_even_where_a_normalisation_was_folded(network, file):
    layers = onnx_layers(file)
    assert [layer.name for layer in layers] == LAYERS == list(quantisable_layers(network))
    assert {layer.name: layer.elements for layer in layers} == layer_elements(network)
    assert [bool(layer.fused) for layer in layers] == [True, False, False, False]


def test_weights_shared_by_layers_are_found_in_all_of_them():
    layer = nn.Linear(4, 4)
    found = onnx_layers(
        export_onnx(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 4), layer), torch.zeros(2, 4))
    )
    assert len(found) == 4
    assert len({each.weight for each in found}) == 3


def test_a_policy_of_fp32_changes_no_output(file, images):
    assert np.array_equal(
        outputs(quantise_onnx(file, {}, None).content, images), outputs(file.SerializeToString(), images)
    )


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_the_file_holds_the_integers_of_the_quantiser(file, ranges, granularity, scheme):
    policy = LayerPolicy("int8", granularity, scheme)
    result = quantise_onnx(file, dict.fromkeys(LAYERS, policy), ranges)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(result.content).graph.initializer}
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in file.graph.initializer}
    for layer in onnx_layers(file):
        quantiser = weight_quantiser(weights[layer.weight], policy, axis=layer.axis)
        assert np.array_equal(held[f"{layer.weight}_quantized"], quantiser.quantise(weights[layer.weight]))
        assert np.array_equal(held[f"{layer.weight}_scale"], quantiser.scale)
        assert np.array_equal(held[f"{layer.weight}_zero_point"], quantiser.zero_point)
    assert onnx_precision(result.content) == "int8 4/4 weights"
    assert result.file_bytes == len(result.content)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_file_and_simulation_round_alike(network, file, ranges, images, scheme):
    policy = dict.fromkeys(LAYERS, LayerPolicy("int8", "per-channel", scheme))
    exact = network(images).detach().numpy()
    real = outputs(quantise_onnx(file, policy, ranges).content, images)
    mimic = simulated(network, policy, images.split(32), outputs=True)(images).detach().numpy()
    spread = exact.std()
    assert 0 < np.abs(real - exact).max() < 0.2 * spread
    assert np.abs(real - mimic).mean() < 0.02 * spread
    assert (real.argmax(1) == exact.argmax(1)).mean() >= 0.95


def test_layers_outside_the_policy_stay_as_they_are(network, file, ranges, images):
    one = quantise_onnx(file, {"2": LayerPolicy("int8")}, ranges)
    kinds = [t.data_type for t in onnx.load_from_string(one.content).graph.initializer if len(t.dims) > 1]
    assert sorted(kinds) == [1, 1, 1, 3]
    assert onnx_precision(one.content) == "fp32 3/4 + int8 1/4 weights"
    assert [policy.precision for policy in one.policy.values()] == ["fp32", "fp32", "int8", "fp32"]
    all_of_them = quantise_onnx(file, dict.fromkeys(LAYERS, LayerPolicy("int8")), ranges)
    exact = network(images).detach().numpy()
    errors = [np.abs(outputs(each.content, images) - exact).mean() for each in (one, all_of_them)]
    assert 0 < errors[0] < errors[1]


def test_bf16_weights_take_two_bytes_and_change_the_outputs_a_little(network, file, images):
    result = quantise_onnx(file, dict.fromkeys(LAYERS, LayerPolicy("bf16")), None)
    assert onnx_precision(result.content) == "bf16 4/4 weights"
    # torch simulates it before the normalisations are folded, so the last layers agree only nearly
    mimic = simulated(network, dict.fromkeys(LAYERS, LayerPolicy("bf16")), [])(images).detach().numpy()
    exact = network(images).detach().numpy()
    real = outputs(result.content, images)
    assert 0 < np.abs(real - exact).max() < 0.02
    assert 0 < np.abs(mimic - exact).max() < 0.02


@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_quantisation_needs_no_calibration(network, file, images, per_channel):
    result = quantise_onnx_dynamically(file, per_channel=per_channel)
    exact = network(images).detach().numpy()
    assert 0 < np.abs(outputs(result.content, images) - exact).max() < 0.2 * exact.std()
    assert onnx_precision(result.content) == "int8 4/4 weights, activations dynamic"
    last = quantise_onnx_dynamically(file, ["5"], per_channel=per_channel)
    assert onnx_precision(last.content) == "fp32 3/4 + int8 1/4 weights, activations dynamic"
    assert last.policy["5"].granularity == ("per-channel" if per_channel else "per-tensor")


def test_layers_without_an_int8_kernel_are_not_said_to_be_quantised():
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 5, 1))
    images = torch.randn(2, 3, 4, 4)
    file = export_onnx(network, images)
    found = quantise_onnx_dynamically(file)
    assert [each.precision for each in found.policy.values()] == ["fp32", "int8"]
    assert onnx_precision(found.content) == "fp32 1/2 + int8 1/2 weights, activations dynamic"
    with pytest.raises(UserError, match=r"layers: got \['0'\]; allowed: layers with a dynamic int8 kernel"):
        quantise_onnx_dynamically(file, ["0"])
    policy = dict.fromkeys(("0", "2"), LayerPolicy("int8", scheme="asymmetric"))
    static = quantise_onnx(file, policy, activation_ranges(file, [images]))
    exact = network(images).detach().numpy()
    assert onnx_precision(static.content) == "int8 2/2 weights"
    assert np.abs(outputs(static.content, images) - exact).max() < 0.05 * np.abs(exact).max()


def test_a_latency_says_what_the_file_holds(file, ranges):
    content = quantise_onnx(file, {"5": LayerPolicy("int8")}, ranges).content
    latency = measure_latency(content, torch.zeros(1, 3, 16, 16), backend="onnxruntime", block_ms=0.1)
    assert latency.provenance.precision == "as stored: fp32 3/4 + int8 1/4 weights"
    assert latency.provenance.execution == "session" and latency.provenance.timer == "wall clock"


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_ranges_cover_every_layer_and_narrow_with_the_method(file, images, method, ranges):
    found = activation_ranges(file, images.split(24), method=method)  # the last batch is smaller
    assert found.examples == 64 and set(found.bounds) == set(ranges.bounds)
    assert ranges.bounds["input"] == pytest.approx((float(images.min()), float(images.max())))
    for name, (low, high) in found.bounds.items():
        assert low < high or (low, high) == (0.0, 0.0), name
    assert found.bounds["input"][1] <= ranges.bounds["input"][1] + 1e-6


def test_what_does_not_fit_is_refused(file, ranges, images):
    with pytest.raises(UserError, match=r"calibration: got an empty set.*training set"):
        activation_ranges(file, [])
    with pytest.raises(UserError, match=r"calibration: got an empty set"):
        simulated(make_network(), {"2": LayerPolicy("int8")}, [])
    with pytest.raises(UserError, match=r"policy: got '2.0'.*one of the 4 layers.*Nearest"):
        quantise_onnx(file, {"2.0": LayerPolicy("int8")}, ranges)
    with pytest.raises(UserError, match=r"policy: got 'head'"):
        simulated(make_network(), {"head": LayerPolicy("int8")}, [images])
    with pytest.raises(UserError, match=r"policy: got 'head'"):
        quantise_onnx_dynamically(file, ["head"])
    with pytest.raises(UserError, match=r"ranges: got None"):
        quantise_onnx(file, {"2": LayerPolicy("int8")}, None)
    with pytest.raises(UserError, match=r"quantised already"):
        quantise_onnx(quantise_onnx(file, {"2": LayerPolicy("int8")}, ranges).content, {}, None)
    with pytest.raises(UserError, match=r"method: got 'guess'"):
        activation_ranges(file, [images], method="guess")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"calibration: got"):
        activation_ranges(file, [torch.zeros(2, 5, 16, 16)])
    with pytest.raises(UserError, match=r"model: got 3 bytes"):
        onnx_layers(b"abc")


def test_an_operator_that_onnx_does_not_have_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(UserError, match=r"network: got a Odd that cannot be exported.*eigvals"):
        export_onnx(Odd(), torch.randn(2, 3, 3))


def test_a_cuda_graph_needs_a_gpu():
    with pytest.raises(UserError, match=r"cuda_graph: got True"):
        measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), cuda_graph=True)


@pytest.mark.gpu
def test_cuda_events_and_graphs():
    network, image = make_network(), torch.zeros(1, 3, 16, 16)
    eager = measure_latency(network, image, device="cuda")
    graph = measure_latency(network, image, device="cuda", cuda_graph=True)
    assert eager.provenance.timer == graph.provenance.timer == "cuda events"
    assert graph.provenance.execution == "cuda graph" and graph.median_ms < eager.median_ms
