"""Every score against its formula on networks that are small enough to work out by hand, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mobile_samples import small_family
from torch import nn

from archsmith.core.errors import UserError
from archsmith.evaluate.zero_cost import (
    SCORES,
    Batch,
    fisher,
    grad_norm,
    grasp,
    jacov,
    logsynflow,
    macs,
    naswot,
    nregions,
    ntk_condition,
    params,
    region_count,
    sensitivity,
    snip,
    synflow,
    zen,
)
from archsmith.evaluate.zero_cost.kernel import tangent_kernel
from archsmith.evaluate.zero_cost.regions import agreement_kernel
from archsmith.evaluate.zero_cost.sensitivity import JACOV_SHIFT, ZEN_STEP, zen_score
from archsmith.families.cells import NasBench201Family

B, D, H, K = 5, 4, 3, 3  # examples, inputs, hidden units, classes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def few_zen_draws(monkeypatch):
    monkeypatch.setattr(sensitivity, "ZEN_REPEATS", 2)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def layer_with(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight.data.copy_(weight)
    return layer


def linear(seed=1):
    """Flatten and one linear layer; returns it with its weight (K, D)."""
    weight = drawn(K, D, seed=seed)
    return nn.Sequential(nn.Flatten(), layer_with(weight)), weight


def two_layers():
    first, second = drawn(H, D, seed=1), drawn(K, H, seed=2)
    return nn.Sequential(nn.Flatten(), layer_with(first), layer_with(second)), first, second


def batch(seed=3):
    labels = torch.tensor([0, 2, 1, 1, 0])
    return Batch(drawn(B, 1, 2, 2, seed=seed), labels)


def residuals(weight, data):
    """Return inputs (B, D), softmax minus one-hot (B, K) and the probabilities of a linear classifier."""
    x = data.images.flatten(1)
    p = (x @ weight.T).softmax(1)
    return x, p - torch.eye(K, dtype=torch.float64)[data.labels], p


# ------------------------------------------------------------------------------------------ sizes


def test_sizes():
    network, _, _ = two_layers()
    assert params(network, batch(), generator()) == H * D + K * H
    assert macs(network, batch(), generator()) == H * D + K * H


# --------------------------------------------------------------------------------------- saliency


def test_synflow_of_linear_layers_is_one_flow_for_each():
    network, first, second = two_layers()
    flow = float((second.abs() @ first.abs()).sum())
    assert synflow(network, batch(), generator()) == pytest.approx(2 * flow, rel=1e-12)


def test_synflow_is_a_product_of_absolute_weights():
    network = nn.Sequential(
        nn.Flatten(), layer_with(torch.tensor([[-3.0]])), nn.ReLU(), layer_with(torch.tensor([[0.5]]))
    )
    one = Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long))
    assert synflow(network.float(), one, generator()) == 2 * 3.0 * 0.5


def test_synflow_passes_normalisations_by():
    weight = drawn(2, 1, 1, 1, seed=4)
    convolution = nn.Conv2d(1, 2, 1, bias=False).double()
    convolution.weight.data.copy_(weight)
    norm = nn.BatchNorm2d(2).double()
    norm.weight.data.fill_(-7.0)
    norm.running_var.fill_(9.0)
    network = nn.Sequential(convolution, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert synflow(network, batch(), generator()) == pytest.approx(float(weight.abs().sum()), rel=1e-12)


def test_synflow_does_not_overflow_in_float32():
    layers = [layer_with(torch.full((1, 1), 1e20)) for _ in range(10)]
    one = Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long))
    network = nn.Sequential(nn.Flatten(), *layers).float()
    assert synflow(network, one, generator()) == pytest.approx(10 * 1e200, rel=1e-5)


def test_logsynflow_of_two_layers():
    network, first, second = two_layers()
    by_first = second.abs().sum(0)[:, None].expand(H, D)
    by_second = first.abs().sum(1)[None, :].expand(K, H)
    expected = (first.abs() * (1 + by_first).log()).sum() + (second.abs() * (1 + by_second).log()).sum()
    assert logsynflow(network, batch(), generator()) == pytest.approx(float(expected), rel=1e-12)


def test_snip_and_grad_norm_of_a_linear_classifier():
    network, weight = linear()
    data = batch()
    x, r, _ = residuals(weight, data)
    gradient = r.T @ x / B
    assert snip(network, data, generator()) == pytest.approx(float((weight * gradient).abs().sum()), rel=1e-12)
    assert grad_norm(network, data, generator()) == pytest.approx(float(gradient.norm()), rel=1e-12)


def test_grad_norm_adds_the_norms_of_layers():
    network, first, second = two_layers()
    data = batch()
    hidden = data.images.flatten(1) @ first.T
    r = (hidden @ second.T).softmax(1) - torch.eye(K, dtype=torch.float64)[data.labels]
    by_first = (r @ second).T @ data.images.flatten(1) / B
    by_second = r.T @ hidden / B
    expected = float(by_first.norm() + by_second.norm())
    assert grad_norm(network, data, generator()) == pytest.approx(expected, rel=1e-12)


def test_grasp_of_a_linear_classifier():
    network, weight = linear()
    data = batch()
    x, r, p = residuals(weight, data)
    gradient = r.T @ x / B
    moved = x @ gradient.T  # (B, K): how the logits move along the gradient
    hessian_gradient = (p * moved - p * (p * moved).sum(1, keepdim=True)).T @ x / B
    assert grasp(network, data, generator()) == pytest.approx(-float((weight * hessian_gradient).sum()), rel=1e-10)


def test_fisher_of_a_linear_classifier():
    network, weight = linear()
    data = batch()
    x, r, _ = residuals(weight, data)
    expected = float(((x @ weight.T) * r).square().sum() / (2 * B))
    assert fisher(network, data, generator()) == pytest.approx(expected, rel=1e-12)


def test_fisher_sums_a_channel_over_its_map_first():
    scale, weight = drawn(H, seed=5), drawn(K, H, seed=6)
    convolution = nn.Conv2d(1, H, 1, bias=False).double()
    convolution.weight.data.copy_(scale.view(H, 1, 1, 1))
    network = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer_with(weight))
    data = batch()
    pooled = data.images.mean((1, 2, 3))[:, None] * scale  # (B, H)
    r = (pooled @ weight.T).softmax(1) - torch.eye(K, dtype=torch.float64)[data.labels]
    channels = (pooled * (r @ weight)).square().sum() / (2 * B)
    logits = ((pooled @ weight.T) * r).square().sum() / (2 * B)
    assert fisher(network, data, generator()) == pytest.approx(float(channels + logits), rel=1e-12)


# ---------------------------------------------------------------------------------------- regions

PATTERNS = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]).view(3, 3, 1, 1)
THREE = torch.zeros(3, dtype=torch.long)


def test_naswot_counts_agreeing_units():
    network = nn.Sequential(nn.ReLU(), nn.Flatten())
    kernel = torch.tensor([[3, 1, 2], [1, 3, 0], [2, 0, 3]], dtype=torch.float64)
    assert torch.equal(agreement_kernel(network, PATTERNS, norm="batch"), kernel)
    expected = math.log(float(np.linalg.det(kernel.numpy())))
    assert naswot(network, Batch(PATTERNS, THREE), generator()) == pytest.approx(expected, rel=1e-12)


def test_naswot_adds_layers():
    network = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Threshold(0.5, -1.0), nn.ReLU())  # the same pattern twice
    once = agreement_kernel(network[:1], PATTERNS, norm="batch")
    assert torch.equal(agreement_kernel(network, PATTERNS, norm="batch"), 2 * once)


def test_two_images_of_one_region_have_no_volume():
    network = nn.Sequential(nn.ReLU(), nn.Flatten())
    twice = PATTERNS[[0, 0, 1]]
    assert naswot(network, Batch(twice, THREE), generator()) == -math.inf
    assert region_count(network, Batch(twice, THREE), generator()) == 2
    assert region_count(network, Batch(PATTERNS, THREE), generator()) == 3


def test_nregions_normalises_by_running_statistics_and_naswot_by_the_batch():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    shifted = Batch(PATTERNS + 10, THREE)  # all positive unless the batch's mean is taken away
    assert nregions(network, shifted, generator()) == -math.inf
    assert math.isfinite(naswot(network, shifted, generator()))
    assert nregions(network, Batch(PATTERNS, THREE), generator()) == pytest.approx(
        naswot(nn.Sequential(nn.ReLU()), Batch(PATTERNS, THREE), generator()), rel=1e-12
    )


@pytest.mark.parametrize("score", [naswot, nregions, region_count])
def test_regions_need_relus(score):
    with pytest.raises(UserError, match=r"network: got a Sequential without nn.ReLU; allowed: a network with nn.ReLU"):
        score(nn.Sequential(nn.Flatten()), batch(), generator())


# ------------------------------------------------------------------------------------ sensitivity


class Square(nn.Module):
    """Its Jacobian is twice its input."""

    def forward(self, x):
        return x.flatten(1).square()


def shape_of(eigenvalues):
    shifted = np.asarray(eigenvalues) + JACOV_SHIFT
    return -float((np.log(shifted) + 1 / shifted).sum())


def test_jacov_is_a_function_of_the_jacobians_correlations():
    data = batch()
    correlations = np.corrcoef(data.images.flatten(1).numpy())
    # four inputs, five images: one eigenvalue at least is zero and, as 1 / 1e-5, sensitive to its last digit
    assert jacov(Square(), Batch(data.images[:3], data.labels[:3]), generator()) == pytest.approx(
        shape_of(np.linalg.eigvalsh(correlations[:3, :3])), rel=1e-9
    )


def test_jacov_of_a_linear_network_is_the_worst_there_is():
    network, _ = linear()
    assert jacov(network, batch(), generator()) == pytest.approx(shape_of([0.0] * (B - 1) + [B]), rel=1e-4)


def test_jacov_of_uncorrelated_jacobians_is_the_best_there_is():
    images = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]], dtype=torch.float64).view(2, 1, 2, 2)
    data = Batch(images, torch.zeros(2, dtype=torch.long))
    assert jacov(Square(), data, generator()) == pytest.approx(shape_of([1.0, 1.0]), rel=1e-9)


def convolution(out_channels, norm=False):
    layers = [nn.Conv2d(1, out_channels, 1, bias=False)] + ([nn.BatchNorm2d(out_channels)] if norm else [])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out_channels, 2))


def test_zen_of_a_linear_convolution_is_the_gain_of_its_weights():
    images = torch.zeros(4, 1, 3, 3, dtype=torch.float64)
    network = convolution(6).double()
    draws = generator(9)
    weight = torch.randn(6, 1, 1, 1, generator=draws).double()
    torch.randn(2, 6, generator=draws)  # the classifier's weights, which do not matter before the pooling
    torch.randn(4, 1, 3, 3, generator=draws)  # x, which a linear map forgets
    e = torch.randn(4, 1, 3, 3, generator=draws).double()
    expected = math.log(ZEN_STEP * float(weight.norm() * e.flatten(1).norm(dim=1).mean()))
    assert zen_score(network, images, generator(9), repeats=1) == pytest.approx(expected, rel=1e-9)


def test_zen_gives_back_what_normalisation_takes():
    # With one channel a normalisation divides by one number, s, and the score adds log s.
    images = torch.zeros(64, 1, 8, 8, dtype=torch.float64)
    plain = zen_score(convolution(1).double(), images, generator(2), repeats=3)
    normalised = zen_score(convolution(1, norm=True).double(), images, generator(2), repeats=3)
    assert normalised == pytest.approx(plain, abs=1e-2)


def test_zen_averages_its_draws():
    images = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    network, shared = convolution(2).double(), generator(4)
    single = [zen_score(network, images, shared, repeats=1) for _ in range(3)]
    assert zen_score(network, images, generator(4), repeats=3) == pytest.approx(sum(single) / 3, rel=1e-12)


# ----------------------------------------------------------------------------------------- kernel


def test_the_tangent_kernel_of_a_linear_network_is_that_of_its_inputs():
    network, _ = linear()
    images = batch().images[:3]
    x = images.flatten(1)
    assert torch.allclose(tangent_kernel(network, images), K * x @ x.T, rtol=1e-12)
    data = Batch(images, torch.zeros(3, dtype=torch.long))
    assert ntk_condition(network, data, generator()) == pytest.approx(float(torch.linalg.cond(x @ x.T)), rel=1e-9)


def test_a_bias_adds_one_to_the_tangent_kernel():
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(D, K).double()), batch().images.flatten(1)
    assert torch.allclose(tangent_kernel(network, batch().images), K * (x @ x.T + 1), rtol=1e-12)


def test_images_without_a_direction_of_their_own_have_an_infinite_condition():
    network, _ = linear()
    data = Batch(torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    assert ntk_condition(network, data, generator()) == math.inf


# ----------------------------------------------------------------------------------- what all keep

FAMILY = NasBench201Family(image=(3, 8, 8), num_classes=4, channels=4, cells=1)
IMAGES = Batch(torch.randn(6, 3, 8, 8, generator=generator(1)), torch.tensor([0, 1, 2, 3, 0, 1]))


def hooks_of(network):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("training", [True, False])
def test_a_score_leaves_the_network_alone(name, training):
    network = FAMILY.build(FAMILY.largest(), seed=0).train(training)
    network.stages[0].eval()
    modes = [module.training for module in network.modules()]
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = torch.random.get_rng_state()
    first = SCORES[name].function(network, IMAGES, generator(5))
    assert math.isfinite(first)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert hooks_of(network) == [0] * len(modes)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert SCORES[name].function(network, IMAGES, generator(5)) == first


@pytest.mark.parametrize("name", SCORES)
def test_a_score_does_not_depend_on_the_mode(name):
    network = FAMILY.build(FAMILY.largest(), seed=0)
    found = [SCORES[name].function(network.train(training), IMAGES, generator(5)) for training in (True, False)]
    assert found[0] == found[1]


def test_a_failing_score_puts_everything_back():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Broken()).train()
    with pytest.raises(RuntimeError, match="broken"):
        naswot(network, IMAGES, generator())
    assert all(module.training for module in network.modules())
    assert hooks_of(network) == [0] * 4
    assert int(network[0].num_batches_tracked) == 0


def test_scores_work_on_the_mobile_family_without_dropout():
    family = small_family(dropout=0.9)
    network = family.build(family.largest(), seed=0)
    data = Batch(torch.randn(6, *family.image, generator=generator(1)), torch.tensor([0, 1, 2, 0, 1, 2]))
    for name in SCORES:
        found = [SCORES[name].function(network, data, generator(seed)) for seed in (1, 1)]
        assert math.isfinite(found[0]) and found[0] == found[1], name


def test_a_cell_without_a_path_scores_as_low_as_it_can():
    cell = dict.fromkeys(FAMILY.smallest(), "none")
    network = FAMILY.build(cell, seed=0)
    for score in (naswot, nregions, jacov, zen):
        assert score(network, IMAGES, generator()) == -math.inf
    assert synflow(network, IMAGES, generator()) == 0.0
    assert ntk_condition(network, IMAGES, generator()) > 1e12


def test_every_score_states_where_it_comes_from():
    for name, score in SCORES.items():
        assert score.name == name == score.function.__name__
        assert score.arxiv in (score.function.__doc__ or "")
        assert bool(score.arxiv) == (name not in ("params", "macs"))
        assert score.higher_is_better == (name not in ("ntk_condition", "grasp"))


def test_a_batch_has_one_label_for_each_image():
    with pytest.raises(UserError, match=r"batch: got images \(2, 1, 2, 2\), labels \(3,\); allowed: at least one"):
        Batch(torch.zeros(2, 1, 2, 2), torch.zeros(3))
