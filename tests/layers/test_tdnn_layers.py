import pytest
import torch
from st_nas_cases import cases, fill
from torch import nn

from archsmith.layers.tdnn import TdnnNetwork, TimeDelay, context_and_dilation
from archsmith.supernet import MixedOp, StraightThrough
from archsmith.supernet.mixed import straight_through

NAMES = ("C1D1", "C1D2", "C2D1", "C2D2")


def node(dim):
    candidates = {}
    for number, name in enumerate(NAMES):
        layer = TimeDelay(dim, dim, *context_and_dilation(name), 0.0).double()
        with torch.no_grad():
            layer.conv.weight.copy_(fill(0.3, 2 * number + 1, tuple(layer.conv.weight.shape)))
            layer.conv.bias.copy_(fill(0.3, 2 * number + 2, tuple(layer.conv.bias.shape)))
        candidates[name] = layer
    return MixedOp(candidates, StraightThrough())


@pytest.mark.parametrize("case", cases("st/node"), ids=lambda case: case["name"])
def test_the_published_node(case):
    given, expected, tolerance = case["input"], case["expected"], case["tolerance"]
    shape = (given["B"], given["T"], given["dim"])
    mixed, x, u = node(given["dim"]), fill(1.0, 0, shape), fill(1.0, 9, shape)
    logits = torch.tensor(given["alpha"], dtype=torch.float64, requires_grad=True)
    row = straight_through(torch.tensor([given["sampled"]]), logits.softmax(-1).unsqueeze(0))[0]
    y = mixed(x, row)
    loss = 0.5 * (y**2 * (1 + u)).mean()
    loss.backward()
    drawn = list(mixed.candidates.values())[given["sampled"]]
    assert torch.equal(y, drawn(x))
    assert loss.item() == pytest.approx(expected["loss"], abs=tolerance)
    assert logits.grad.tolist() == pytest.approx(expected["grad_alpha"], abs=tolerance)
    norm = drawn.conv.weight.grad.norm().item()
    assert norm == pytest.approx(expected["sampled_conv_weight_grad_norm"], abs=tolerance)
    others = [layer for layer in mixed.candidates.values() if layer is not drawn]
    assert all(parameter.grad is None for layer in others for parameter in layer.parameters())
    if "y_first4" in expected:
        assert y.flatten()[:4].tolist() == pytest.approx(expected["y_first4"], abs=tolerance)
        upstream = (y * (1 + u) / y.numel()).detach()
        products = [(upstream * layer(x)).sum().item() for layer in mixed.candidates.values()]
        assert products == pytest.approx(expected["inner_products_s_k"], abs=tolerance)


def test_the_layer_is_convolution_relu_norm_and_keeps_the_time():
    torch.manual_seed(0)
    layer, x = TimeDelay(3, 5, 2, 2, 0.0), torch.randn(2, 9, 3)
    plain = torch.nn.functional.conv1d(x.mT, layer.conv.weight, layer.conv.bias, padding=4, dilation=2).mT.relu()
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(plain, (5,)))
    assert layer(x).shape == (2, 9, 5)


@pytest.mark.parametrize("stride_after", [0, 1, 2])
def test_the_frame_rate_falls_to_a_third_where_it_is_told_to(stride_after):
    network = TdnnNetwork(6, 4, 8, ("C1D1", "C2D2"), stride_after, 0.0)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    y = network(torch.randn(2, 3, 2, 31))
    assert y.shape == (2, 11, 4) and seen == [31 if number < stride_after else 11 for number in range(2)]
    torch.testing.assert_close(y.exp().sum(-1), torch.ones(2, 11))


def test_planes_and_bands_are_the_features_and_time_stays_in_order():
    """A frame changes the output near itself alone."""
    torch.manual_seed(0)
    network = TdnnNetwork(6, 4, 8, ("C1D1",), 1, 0.0)
    x = torch.randn(1, 3, 2, 30)
    changed = x.clone()
    changed[..., 15] += 1.0
    moved = (network(x) - network(changed)).abs().amax((0, 2)) > 1e-7
    assert moved.tolist() == [number in (5,) for number in range(10)]  # 15 is frame 5's centre, and reaches no other


def test_names():
    assert [context_and_dilation(name) for name in NAMES] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    with pytest.raises(ValueError, match="block: got 'C1'; allowed"):
        context_and_dilation("C1")
