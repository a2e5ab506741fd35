"""Scores of recurrent networks: closed-form states, identities of the two correlations, and what a score may not do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.evaluate.zero_cost import TEXT_SCORES, Batch, cosine, hidden_spectrum, hidden_states, spectral, spectrum
from archsmith.evaluate.zero_cost.correlation import SHIFT, agreement, log_determinant
from archsmith.evaluate.zero_cost.hidden import embedding_jacobian
from archsmith.layers.recurrent_cells import RecurrentLanguageModel

CASES = json.loads((Path(__file__).parents[1] / "golden" / "training-free-rnn-transformer.json").read_text())["cases"]
RECURRENT = [name for name, score in TEXT_SCORES.items() if score.function.__module__.endswith("hidden")]
GRU = (
    ("r", "linear", ("x", "h_prev_0")),
    ("r_act", "activation_sigm", ("r",)),
    ("z", "linear", ("x", "h_prev_0")),
    ("z_act", "activation_sigm", ("z",)),
    ("rh", "elementwise_prod", ("r_act", "h_prev_0")),
    ("t", "linear", ("x", "rh")),
    ("t_act", "activation_tanh", ("t",)),
    ("h_new_0", "blend", ("z_act", "h_prev_0", "t_act")),
)


def fill(k, s, *shape):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (s * torch.sin(0.7 * i + 0.013 * i * i + k)).reshape(shape)


class Wrapped(nn.Module):
    """Gives the output of a recurrent module alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def golden_network(case, kind, ks):
    rows = case["hidden"] * (4 if kind is nn.LSTM else 1)
    layer = kind(case["input_size"], case["hidden"], dtype=torch.float64)
    weights = (
        fill(ks[0], 0.8, rows, case["input_size"]),
        fill(ks[1], 0.6, rows, case["hidden"]),
        fill(ks[2], 0.1, rows),
    )
    with torch.no_grad():
        for parameter, value in zip((layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0), weights, strict=True):
            parameter.copy_(value)
        layer.bias_hh_l0.zero_()
    return Wrapped(layer), fill(ks[3], 1.0, case["T"], case["B"], case["input_size"])


def model(seed=0, **sizes):
    torch.manual_seed(seed)
    return RecurrentLanguageModel(
        **{"vocabulary": 30, "embedding": 5, "hidden": 6, "layers": 3, "recipe": GRU, **sizes}
    )


def text(seed=0, samples=6, steps=8):
    tokens = torch.randint(0, 30, (samples, steps), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.zeros(samples, dtype=torch.int64))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "kind", "ks"),
    [
        ("hidden_cov_elman_A", nn.RNN, (1, 2, 3, 4)),
        ("hidden_cov_elman_B", nn.RNN, (0.5, 1.5, 2.5, 3.5)),
        ("hidden_cov_lstm_A", nn.LSTM, (1, 2, 3, 4)),
    ],
)
def test_hidden_covariance_of_closed_form_networks(name, kind, ks):
    expected = CASES[name]["expected"]
    network, x = golden_network(CASES[name]["input"], kind, ks)
    assert hidden_spectrum(network, x, states="fed").score == pytest.approx(expected["score_prev"], rel=1e-6)
    assert hidden_spectrum(network, x, states="made").score == pytest.approx(expected["score_post"], rel=1e-6)
    (made,) = hidden_states(network, x, states="made")
    assert made[-1, 0, :3].tolist() == pytest.approx(expected["h_last_first3"], abs=1e-9)


@pytest.mark.parametrize("name", ["covariance_and_cosine_M1", "covariance_and_cosine_M2"])
def test_correlations_of_golden_matrices(name):
    case = CASES[name]
    rows = fill(int(name[-1]), 1.0, *case["input"]["shape"])
    assert spectral(rows) == pytest.approx(case["expected"]["covariance_score"], rel=1e-8)
    # The facts have the identity taken from the cosines, which left one or two units in the last place on the diagonal:
    # 1e-16 ** (1 / 20) = 0.16 each. The definition has zeros there.
    left = {"covariance_and_cosine_M1": 2 * 2**-2.6, "covariance_and_cosine_M2": 2 * 2**-2.6 + 2 * 2**-2.65}[name]
    count = len(rows)
    expected = case["expected"]["cosine_score"] + 0.5 * left / (count**2 - count)
    assert cosine(rows) == pytest.approx(expected, rel=1e-8)


def test_limits_of_the_spectral_score():
    expected = CASES["covariance_score_limits"]["expected"]
    angles = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    rows = torch.stack([angles.sin(), angles.cos(), (2 * angles).sin()])
    assert spectral(rows) / 3 == pytest.approx(expected["identity_correlation_per_variable"], abs=1e-9)
    assert expected["identity_correlation_per_variable"] == pytest.approx(-(math.log1p(SHIFT) + 1 / (1 + SHIFT)))
    assert spectral(rows[[0, 0]]) == pytest.approx(expected["two_identical_rows"], rel=1e-3)


def test_the_spectral_score_ignores_scale_shift_and_order_and_is_best_uncorrelated():
    rows = torch.randn(5, 40, generator=rng(1), dtype=torch.float64)
    other = rows * torch.tensor([1.0, -3.0, 0.1, 7.0, 2.0])[:, None] + torch.arange(5.0)[:, None]
    assert spectral(other) == pytest.approx(spectral(rows), rel=1e-9)
    assert spectral(rows.flip(0)) == pytest.approx(spectral(rows), rel=1e-9)
    orthogonal = torch.linalg.qr((rows - rows.mean(1, keepdim=True)).T).Q.T
    assert spectral(orthogonal) > spectral(rows)


def test_constant_units_are_reported():
    rows = torch.randn(4, 9, generator=rng(2), dtype=torch.float64)
    rows[2] = 0.3
    found = spectrum(rows)
    assert math.isnan(found.score)
    assert found.constant == (2,)
    assert "1 of 4 variables are constant" in found.notes[0]
    assert spectral(rows, constant="drop") == pytest.approx(spectral(rows[[0, 1, 3]]))


def test_more_units_than_states_are_reported():
    found = hidden_spectrum(model(hidden=40), text(samples=2, steps=4).images, layer=1)
    assert found.variables == 40
    assert found.observations == 8
    assert found.score < -3e6  # 32 zero eigenvalues at least, 1e5 each
    assert found.singular >= 32
    assert "equally many observations" in found.notes[0]


def test_activation_distance_of_golden_activations():
    case = CASES["activation_distance_1"]
    layers = [fill(*each["F"], *each["shape"]) for each in case["input"]["pre_activations"]]
    kernel = agreement(layers)
    assert kernel.tolist() == case["expected"]["K"]
    assert log_determinant(kernel) == pytest.approx(case["expected"]["score"], rel=1e-9)


@pytest.mark.parametrize("name", RECURRENT)
def test_scores_repeat_ignore_labels_and_leave_the_network_alone(name):
    network, batch = model().train(), text()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    first = TEXT_SCORES[name].function(network, batch, rng())
    again = TEXT_SCORES[name].function(network, Batch(batch.images, batch.labels + 1), rng())
    assert first == again
    assert math.isfinite(first)
    assert torch.equal(state, torch.random.get_rng_state())
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert TEXT_SCORES[name].function(model(seed=1), batch, rng()) != first


def test_fed_states_begin_with_zeros_and_lag_by_one():
    network, tokens = model(), text().images
    fed, made = (hidden_states(network, tokens, states=s) for s in ("fed", "made"))
    assert [tuple(states.shape) for states in fed] == [(8, 6, 6), (8, 6, 6), (8, 6, 5)]
    assert not fed[0][0].any()
    assert torch.equal(fed[1][1:], made[1][:-1])


def test_the_jacobian_is_that_of_finite_differences():
    network, tokens = model().double().eval(), text(samples=3, steps=4).images
    jacobian = embedding_jacobian(network, tokens).reshape(3, 4, 5)
    base = network.embedding(tokens).detach()

    def total(values):
        handle = network.embedding.register_forward_hook(lambda *_: values)
        try:
            return float(network(tokens).sum().detach())
        finally:
            handle.remove()

    for place in ((0, 0, 0), (2, 3, 4), (1, 2, 3)):
        up, down = base.clone(), base.clone()
        up[place] += 1e-5
        down[place] -= 1e-5
        assert float(jacobian[place]) == pytest.approx((total(up) - total(down)) / 2e-5, rel=1e-5)


def test_jacobian_rows_are_samples():
    assert embedding_jacobian(model(), text(samples=6, steps=8).images).shape == (6, 8 * 5)


def test_hidden_saliency_includes_the_way_through_later_steps():
    """On a linear one-unit cell h' = w x + u h + b, two steps, output h: |h_1 (y_1 + u y_2)| of y = y is exact."""
    recipe = (("h_new_0", "linear", ("x", "h_prev_0")),)
    network = model(recipe=recipe, vocabulary=3, embedding=1, hidden=1, layers=1).double()
    tokens = torch.tensor([[1, 2]])
    weight, bias = network.layers[0].cell.nodes[0].weight[0], network.layers[0].cell.nodes[0].bias[0]
    e = network.embedding.weight[:, 0]
    h1 = weight[0] * e[1] + bias
    h2 = weight[0] * e[2] + weight[1] * h1 + bias
    g1, g2 = (e * (e * h + network.decoder.bias) for h in (h1, h2))
    expected = float((h1 * (g1.sum() + weight[1] * g2.sum())).abs().detach())
    found = TEXT_SCORES["hidden_saliency"].function(network, Batch(tokens, torch.zeros(1)), rng())
    assert found == pytest.approx(expected, rel=1e-9)


def test_large_and_more_noise_are_made_of_the_jacobian_scores():
    network, batch = model(), text()
    plain = TEXT_SCORES["jacobian_cosine"].function(network, batch, rng())
    noised = cosine(embedding_jacobian(network, batch.images, noise=10.0, generator=rng()))
    assert TEXT_SCORES["large_noise_jacobian_cosine"].function(network, batch, rng()) == 1 - abs(plain - noised)
    product = plain
    source = rng()
    for a in (0.1, 10.0, 100.0):
        product *= cosine(embedding_jacobian(network, batch.images, noise=a, generator=source))
    assert TEXT_SCORES["more_noised_jacobian_cosine"].function(network, batch, rng()) == pytest.approx(product)


def test_errors_say_what_is_missing():
    plain = nn.Linear(4, 2)
    with pytest.raises(UserError, match="recurrent layers"):
        hidden_states(plain, torch.zeros(1, 4))
    with pytest.raises(UserError, match="1 to 3"):
        hidden_spectrum(model(), text().images, layer=4)
    with pytest.raises(UserError, match=r"nn\.Embedding"):
        embedding_jacobian(plain, torch.zeros(1, 4))
    with pytest.raises(UserError, match="at least two"):
        embedding_jacobian(model(), text(samples=1).images, noise=0.1)
    with pytest.raises(UserError, match="at least two rows"):
        cosine(torch.ones(1, 3))
