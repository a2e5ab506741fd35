import pytest
import torch
from darts_recipe import alpha, image, matches, weighted_
from sharp_recipe import case, cases

from archsmith.families.darts_space import DARTS_OPERATIONS
from archsmith.layers.darts import DenseLayers
from archsmith.layers.sharp import SharpPrimitives
from archsmith.supernet import GumbelSoftmax, MaxW, MixedOp, Sigmoid, Softmax

NAMES = DARTS_OPERATIONS


def sharp_edge():
    make = SharpPrimitives().operation
    return weighted_(MixedOp({name: make(name, 4, 1, False, DenseLayers(), True) for name in NAMES}))


def gradient_of_weights(relaxation, logits, outputs_O):
    """Return the gradient with which the relaxation's own weights meet outputs of the candidates."""
    logits = logits.clone().requires_grad_()
    relaxation.weights(logits).mul(outputs_O).sum().backward()
    return logits.grad


def test_the_published_weights():
    expected = case("max_w:weights")["expected"]
    logits = alpha(1, 8)
    assert MaxW().probabilities(logits)[0].tolist() == pytest.approx(expected["softmax"], abs=1e-7)
    assert MaxW().weights(logits)[0].tolist() == pytest.approx(expected["effective"], abs=1e-7)


@pytest.mark.parametrize("fact", cases("mixedop:"), ids=lambda fact: fact["name"])
def test_the_published_mixtures_and_gradients(fact):
    relaxation = MaxW() if fact["name"].endswith("max_w") else Softmax()
    logits, x = alpha(1, 8).requires_grad_(), image(2, 4, 8, 8)
    mixture = sharp_edge()(x, relaxation.weights(logits)[0])
    matches(mixture, fact["expected"]["out"], 1e-6)
    (mixture * x.cos()).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx(
        fact["expected"]["grad_alpha_of_sum_out_times_cosx"], rel=0, abs=1e-6
    )


def test_the_largest_weight_is_one_and_all_are_shifted_alike():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    shifted, plain = MaxW().weights(logits), Softmax().weights(logits)
    torch.testing.assert_close(shifted.amax(-1), torch.ones(5))
    difference = shifted - plain
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))
    assert torch.equal(shifted.argmax(-1), plain.argmax(-1))


def test_equal_weights_make_a_plain_sum_and_a_decided_row_stays():
    assert MaxW().weights(torch.zeros(2, 3)).tolist() == [[1.0, 1.0, 1.0]] * 2
    decided = torch.tensor([[0.0, 200.0, 0.0]])
    assert MaxW().weights(decided).tolist() == [[0.0, 1.0, 0.0]]
    absent = torch.tensor([[0.5, -torch.inf, 0.1]])
    assert MaxW().weights(absent)[0, 1] == 0
    assert MaxW().weights(absent)[0, 0] == 1


def test_the_gradient_through_the_maximum_and_past_it():
    """The winner's weight meets minus the sum of the others' outputs; where the maximum is detached, its own output."""
    logits = torch.tensor([[0.4, 1.3, -0.2]], dtype=torch.float64)
    outputs = torch.tensor([2.0, 5.0, -3.0], dtype=torch.float64)
    winner = 1
    through = outputs.clone()
    through[winner] = -(outputs.sum() - outputs[winner])
    for detached, of_weights in ((False, through), (True, outputs)):
        expected = gradient_of_weights(Softmax(), logits, of_weights)
        found = gradient_of_weights(MaxW(detached=detached), logits, outputs)
        torch.testing.assert_close(found, expected)


def test_it_shifts_the_weights_of_any_relaxation():
    logits = torch.tensor([[0.4, 1.3, -0.2]])
    gates = Sigmoid().weights(logits)
    torch.testing.assert_close(MaxW(Sigmoid()).weights(logits), 1 - gates.max() + gates)
    assert torch.equal(MaxW(Sigmoid()).probabilities(logits), gates)
    sampled = GumbelSoftmax(hard=True)
    drawn = [relaxation.weights(logits, torch.Generator().manual_seed(3)) for relaxation in (sampled, MaxW(sampled))]
    torch.testing.assert_close(*drawn)  # one candidate with weight 1: nothing to shift
    assert torch.equal(MaxW(sampled).probabilities(logits), logits.softmax(-1))
