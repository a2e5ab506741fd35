import numpy as np
import pytest
import torch
from flexibert_cases import cases, fill

from archsmith.core.errors import UserError
from archsmith.layers.natural import NaturalLinear, NaturalNetwork, natural_loss, natural_relu, natural_sigmoid
from archsmith.train.adahessian import AdaHessian
from archsmith.train.gobi import cosine_rate, optimise_inputs


@pytest.mark.parametrize("row", cases("npn_activations")[0]["expected"], ids=lambda row: str(row["mean"]))
def test_the_published_activations(row):
    mean, variance = torch.tensor([row["mean"]]).double(), torch.tensor([row["var"]]).double()
    assert [float(x) for x in natural_relu(mean, variance)] == pytest.approx(row["relu"], abs=1e-10)
    assert [float(x) for x in natural_sigmoid(mean, variance)] == pytest.approx(row["sigmoid"], abs=1e-10)


def test_the_published_network():
    (case,) = cases("npn_net_A")
    network = NaturalNetwork(6, (5, 4)).double()
    for number, layer in enumerate(network.layers):
        k = 1 + 4 * number
        with torch.no_grad():
            layer.weight.copy_(fill(k, 0.5, tuple(layer.weight.shape)))
            layer.weight_raw.copy_(fill(k + 1, 1, tuple(layer.weight.shape)) - 3)
            layer.bias.copy_(fill(k + 2, 0.2, tuple(layer.bias.shape)))
            layer.bias_raw.copy_(fill(k + 3, 1, tuple(layer.bias.shape)) - 4)
    x, expected = fill(0.4, 1, (1, 6)), case["expected"]
    first = [part.flatten().tolist() for part in network.layers[0](x)]
    assert first[0] == pytest.approx(expected["layer0"][0], abs=1e-10)
    assert first[1] == pytest.approx(expected["layer0"][1], abs=1e-10)
    mean, variance = network(x)
    assert (mean.item(), variance.item()) == pytest.approx((expected["mean"], expected["var"]), abs=1e-10)
    target = torch.tensor(case["input"]["target"], dtype=torch.float64)
    assert natural_loss(mean, variance, target).item() == pytest.approx(expected["loss"], abs=1e-10)


def test_without_variances_it_is_the_plain_network():
    torch.manual_seed(0)
    network = NaturalNetwork(4, (6,)).double()
    x = fill(1, 1, (5, 4))
    for layer in network.layers:
        torch.nn.init.constant_(layer.weight_raw, -60.0)
        torch.nn.init.constant_(layer.bias_raw, -60.0)
    first, last = network.layers
    plain = torch.sigmoid(torch.relu(x @ first.weight + first.bias) @ last.weight + last.bias)[:, 0]
    torch.testing.assert_close(network(x)[0], plain, rtol=1e-5, atol=1e-6)


def test_sampled_weights_have_the_computed_moments():
    torch.manual_seed(1)
    layer = NaturalLinear(5, 3).double()
    mean, variance = fill(2, 1, (1, 5)), fill(3, 0.3, (1, 5)).abs()
    torch.nn.init.constant_(layer.weight_raw, -1.0)
    with torch.no_grad():
        found, spread = layer(mean, variance)
        n = 40_000
        x = mean + variance.sqrt() * torch.randn(n, 1, 5).double()
        scale = torch.nn.functional.softplus(layer.weight_raw).sqrt()
        weights = layer.weight + scale * torch.randn(n, 5, 3).double()
        noise = torch.nn.functional.softplus(layer.bias_raw).sqrt() * torch.randn(n, 1, 3).double()
        sampled = (x @ weights + layer.bias + noise)[:, 0]
    assert (sampled.mean(0) - found[0]).abs().max() < 4 * (spread.max() / n) ** 0.5
    torch.testing.assert_close(sampled.var(0), spread[0], rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_the_published_steps():
    (case,) = cases("adahessian")
    a, b, start = (torch.tensor(case["input"][key], dtype=torch.float64) for key in ("a", "b", "x0"))
    x = start.clone().requires_grad_()
    optimiser = AdaHessian([x], lr=case["input"]["lr"])
    for expected in case["expected"]:
        optimiser.zero_grad()
        (0.5 * a * x**2 + b * x).sum().backward(create_graph=True)
        optimiser.step()
        assert x.tolist() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(UserError, match="create_graph=True"):
        x.grad = torch.zeros(2).double()
        optimiser.step()


def test_the_published_schedule():
    assert [cosine_rate(step) for step in range(6)] == pytest.approx(cases("gobi_lr")[0]["expected"], abs=1e-12)


@pytest.mark.parametrize(("summit", "end"), [([0.3, -0.4], [0.3, -0.4]), ([2.0, -0.4], [1.0, -0.4])])
def test_descent_ends_at_the_minimiser_or_at_the_bound(summit, end):
    curve, centre = torch.tensor([1.0, 1e4]).double(), torch.tensor(summit).double()
    starts = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (6, 2)))
    box = {"low": torch.tensor(-1.0).double(), "high": torch.tensor(1.0).double()}
    found = optimise_inputs(lambda x: (curve * (x - centre) ** 2).sum(1), starts, **box)
    assert (found.points - torch.tensor(end).double()).abs().max() < 2e-3
    near = optimise_inputs(lambda x: (curve * (x - centre) ** 2).sum(1), starts, **box, trust=0.1)
    assert (near.points - starts).abs().max() <= 0.2 + 1e-12


def test_starts_do_not_see_each_other():
    torch.manual_seed(0)
    network = NaturalNetwork(3).double()
    starts = torch.randn(4, 3).double()
    box = {"low": torch.tensor(-2.0).double(), "high": torch.tensor(2.0).double()}
    ones = torch.Generator().manual_seed(5)
    together = optimise_inputs(lambda x: network(x)[0] + 0.1 * (x**2).sum(1), starts, **box, generator=ones)
    assert (together.values <= network(starts)[0] + 0.1 * (starts**2).sum(1) + 1e-9).all()
    assert together.steps.max() > 6


def test_second_order_needs_fewer_steps_than_gradient_descent():
    curve = torch.tensor([1.0, 1e4]).double()
    start = torch.tensor([[0.9, 0.7]]).double()
    box = {"low": torch.tensor(-1.0).double(), "high": torch.tensor(1.0).double()}
    found = optimise_inputs(lambda x: (curve * x**2).sum(1), start, **box)
    x, steps = start.clone(), 0
    while (curve * x**2).sum() > max(found.values.item(), 1e-4) and steps < 100_000:
        x, steps = x - 0.9e-4 * 2 * curve * x / 2, steps + 1  # near the largest stable rate
    assert found.steps.item() < steps / 10
