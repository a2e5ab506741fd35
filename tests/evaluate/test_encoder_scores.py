"""Scores of text encoders: which tensors each counts, by hand and by the published table, and hand-made values."""

from __future__ import annotations

import math

import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.evaluate.zero_cost import TEXT_SCORES, Batch
from archsmith.evaluate.zero_cost import encoder as scores
from archsmith.evaluate.zero_cost.correlation import spectrum
from archsmith.layers.flexibert import FlexiClassifier, FlexiEncoder

ENCODER = [name for name, score in TEXT_SCORES.items() if score.function.__module__.endswith("encoder")]
# The first two networks of the published benchmark, with the sizes they were scored at (hidden 256).
PUBLISHED = (
    [("sa", "wma", 4, 3), ("l", "dct", 2, 3), ("sa", "sdp", 4, 3), ("sa", "sdp", 4, 1)],
    [("l", "dft", 4, 3), ("sa", "sdp", 2, 1), ("c", 9, 4, 3), ("c", 5, 2, 1)],
)
COUNTS = (  # score divided by normalised score in the published table
    {
        "synaptic_diversity": 14,
        "encoder_saliency": 14,
        "head_importance": 11,
        "head_confidence": 11,
        "softmax_confidence": 4,
    },
    {
        "synaptic_diversity": 17,
        "encoder_saliency": 12,
        "head_importance": 12,
        "head_confidence": 10,
        "softmax_confidence": 4,
    },
)


def encoder(rows=PUBLISHED[1], hidden=12, positions=7, seed=0):
    torch.manual_seed(seed)
    layers = [(operation, parameter, hidden, heads, (9,) * count) for operation, parameter, heads, count in rows]
    return FlexiEncoder(20, positions, 8, layers)


def text(samples=3, steps=7):
    tokens = torch.randint(1, 20, (samples, steps), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, torch.zeros(samples, dtype=torch.int64))


def rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("rows", "counts"), list(zip(PUBLISHED, COUNTS, strict=True)))
def test_sums_are_over_as_many_tensors_as_the_published_ones(rows, counts):
    network, batch = encoder(rows, hidden=256), text(samples=1)
    assert {name: getattr(scores, f"{name}_parts")(network, batch).count for name in counts} == counts


@pytest.mark.parametrize("name", ENCODER)
def test_scores_repeat_ignore_labels_and_leave_the_network_alone(name):
    network, batch = encoder(hidden=128).train(), text()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    first = TEXT_SCORES[name].function(network, batch, rng())
    assert first == TEXT_SCORES[name].function(network, Batch(batch.images, batch.labels + 1), rng())
    assert math.isfinite(first)
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", [name for name in ENCODER if name.endswith("_normalised")])
def test_normalised_forms_divide(name):
    network, batch = encoder(hidden=128), text()
    plain = TEXT_SCORES[name.removesuffix("_normalised")].function(network, batch, rng())
    count = getattr(scores, name.removesuffix("_normalised") + "_parts")(network, batch).count
    assert TEXT_SCORES[name].function(network, batch, rng()) == pytest.approx(plain / count)


def test_gradients_are_those_of_the_summed_hidden_states():
    network, batch = encoder().eval(), text()
    expected = 0.0
    network(batch.images).sum().backward()
    for layer in network.layers:
        linears = [*layer.feed_forward.layers, layer.feed_forward.output]
        expected += sum(float((each.weight * each.weight.grad).abs().sum()) for each in linears)
    table = network.embeddings.positions.weight.grad.clone()
    network.zero_grad(set_to_none=True)
    assert scores.encoder_saliency_parts(network, batch).total == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(scores.position_jacobian(network, batch), table.T)


def test_diversity_takes_nuclear_norms():
    network, batch = encoder([("l", "dft", 2, 1)]).eval(), text()
    network(batch.images).sum().backward()
    linear = network.layers[0].operator.input
    expected = torch.linalg.svdvals(linear.weight).sum() * torch.linalg.svdvals(linear.weight.grad).sum()
    network.zero_grad(set_to_none=True)
    assert scores.synaptic_diversity_parts(network, batch).total == pytest.approx(float(expected.detach()), rel=1e-4)


def test_confidences_of_attention_that_sees_nothing():
    """With zero queries every weight is 1 / T: over heads, and over positions."""
    network, batch = encoder([("sa", "sdp", 2, 1), ("l", "dct", 2, 1)]), text()
    with torch.no_grad():
        network.layers[0].operator.query.weight.zero_()
        network.layers[0].operator.query.bias.zero_()
    assert scores.softmax_confidence_parts(network, batch).total == pytest.approx(1 / 7)
    assert scores.softmax_confidence_parts(network, batch).mean == pytest.approx(1 / 14)
    assert scores.attention_confidence_parts(network, batch).total == pytest.approx(1 / 7)
    seen = []
    handle = network.layers[1].operator.input.register_forward_hook(lambda _m, _x, y: seen.append(y))
    alone = [network.layers[0].operator.key, network.layers[0].operator.value]
    handles = [each.register_forward_hook(lambda _m, _x, y: seen.append(y)) for each in alone]
    network.eval()(batch.images)
    for each in (handle, *handles):
        each.remove()
    expected = sum(float(y.max(dim=1).values.mean()) for y in seen)  # the zero query has the confidence zero
    assert scores.head_confidence_parts(network, batch).total == pytest.approx(expected, rel=1e-5)


def test_heads_that_differ_have_the_larger_weight_counted():
    network, batch = encoder([("sa", "sdp", 2, 1)]), text()
    over_heads = scores.softmax_confidence_parts(network, batch).total
    over_positions = scores.attention_confidence_parts(network, batch).total
    assert 1 / 7 < over_heads < over_positions < 1


def test_position_jacobians_lose_one_eigenvalue_to_the_normalisation():
    network = encoder(hidden=8, positions=40)
    found = spectrum(scores.position_jacobian(network, text(steps=40)))
    assert found.variables == 8
    assert found.singular == 1
    assert -1.01e5 < found.score < -0.9e5


def test_tokens_of_the_first_sample_alone_are_compared():
    network, batch = encoder(), text()
    alone = Batch(batch.images[:1], batch.labels[:1])
    found = scores.token_agreement_parts(network, batch)
    assert found.total == scores.token_agreement_parts(network, alone).total
    assert found.count == 8
    assert 7 * 8 * 9 < found.total <= 7 * 7 * 8 * 9


def test_classifiers_are_scored_by_their_encoder():
    torch.manual_seed(0)
    network = FlexiClassifier(20, 7, 8, [("sa", "sdp", 12, 2, (9,))], 3)
    batch = text()
    shaped = Batch(batch.images.float()[:, None, None], batch.labels)
    for name in ("encoder_saliency", "head_confidence", "position_jacobian_cosine"):
        own = TEXT_SCORES[name].function(network.encoder, batch, rng())
        assert TEXT_SCORES[name].function(network, shaped, rng()) == pytest.approx(own, rel=1e-6)


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="one FlexiEncoder"):
        scores.encoder_saliency_parts(torch.nn.Linear(2, 2), text())
