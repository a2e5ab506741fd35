import pytest
import torch
from darts_recipe import alpha, cases, image, matches, weighted_
from torch import nn

from archsmith.core.errors import UserError
from archsmith.families.darts_space import DARTS_OPERATIONS
from archsmith.layers.darts import DenseLayers, make_primitive
from archsmith.supernet import GumbelSoftmax, MixedOp, Sigmoid, Softmax, StraightThrough

ROWS = 4000


def affine(factor):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, factor)
    return layer


@pytest.mark.parametrize("case", cases("mixedop:"), ids=lambda case: case["name"])
def test_the_mixture_of_darts(case):
    stride, expected = case["input"]["stride"], case["expected"]
    names = DARTS_OPERATIONS
    mixed = MixedOp({name: make_primitive(name, 4, stride, False, DenseLayers(), True) for name in names})
    weights = Softmax().weights(alpha(1, 8))[0]
    assert weights.tolist() == pytest.approx(expected["softmax"], abs=1e-10)
    matches(weighted_(mixed)(image(2, 4, 8, 8), weights), expected["out"])


def test_given_weights_are_used_as_they_are():
    mixed = MixedOp({"one": affine(1.0), "two": affine(2.0), "four": affine(4.0)})
    x = torch.ones(1, 1)
    assert mixed(x, torch.tensor([0.5, 0.0, 0.25])).item() == 1.5  # not 1.5 / 0.75
    assert mixed(x, [0.5, 0.0, 0.25]).item() == 1.5
    assert mixed(x, [0.0, 0.0, 0.0]).item() == 0.0
    assert mixed(x, [1.0, 0.0, 0.0, 7.0]).item() == 1.0  # rows of edges with more candidates


def test_candidates_of_weight_zero_do_not_run_when_nothing_is_learned():
    mixed, ran = MixedOp({"one": affine(1.0), "two": affine(2.0)}), []
    for name, candidate in mixed.candidates.items():
        candidate.register_forward_hook(lambda *_, name=name: ran.append(name))
    mixed(torch.ones(1, 1), [0.0, 1.0])
    assert ran == ["two"]
    mixed(torch.ones(1, 1), torch.tensor([0.0, 1.0], requires_grad=True))
    assert ran == ["two", "one", "two"]


def test_the_gradient_of_a_weight_is_the_output_of_its_candidate():
    mixed, weights = MixedOp({"one": affine(3.0), "two": affine(5.0)}), torch.zeros(2, requires_grad=True)
    mixed(torch.ones(1, 1), weights).sum().backward()
    assert weights.grad.tolist() == [3.0, 5.0]


def test_relaxations():
    logits = torch.tensor([[0.3, -1.0, 0.8], [0.0, 2.0, -torch.inf]])
    soft, gates = Softmax().weights(logits), Sigmoid().weights(logits)
    assert torch.equal(soft, logits.softmax(-1)) and torch.equal(gates, logits.sigmoid())
    assert soft[1, 2] == gates[1, 2] == 0
    torch.testing.assert_close(Softmax().weights(logits[:1] + 5.0), soft[:1])


@pytest.mark.parametrize("relaxation", [StraightThrough(), GumbelSoftmax(0.7, hard=True)], ids=["softmax", "gumbel"])
def test_samples_are_one_hot_and_follow_the_softmax(relaxation):
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor([0.5, -0.5, 1.0]).repeat(ROWS, 1).requires_grad_()
    drawn = relaxation.weights(logits, generator)
    assert set(drawn.detach().unique().tolist()) <= {0.0, 1.0} and bool((drawn.sum(-1) == 1).all())
    expected = logits[0].detach().softmax(-1)
    error = (expected * (1 - expected) / ROWS).sqrt()
    assert bool(((drawn.detach().mean(0) - expected).abs() < 4 * error).all())
    (drawn[:, 0].sum()).backward()
    assert bool((logits.grad.abs().sum(-1) > 0).all())
    again = relaxation.weights(logits, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, again)


def test_the_gradient_of_a_straight_through_sample_is_that_of_the_softmax():
    logits = torch.tensor([[0.5, -0.5, 1.0]], requires_grad=True)
    costs = torch.tensor([1.0, 2.0, 10.0])
    sampled = torch.autograd.grad((StraightThrough().weights(logits) * costs).sum(), logits)[0]
    soft = torch.autograd.grad((Softmax().weights(logits) * costs).sum(), logits)[0]
    torch.testing.assert_close(sampled, soft)


def test_a_cold_gumbel_sample_is_nearly_one_candidate():
    generator, logits = torch.Generator().manual_seed(0), torch.zeros(100, 4)
    cold = GumbelSoftmax(0.01).weights(logits, generator)
    assert (cold.max(-1).values > 0.9).float().mean() > 0.9
    with pytest.raises(UserError, match="temperature: got 0; allowed: a number above 0"):
        GumbelSoftmax(0)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(UserError, match="at least one operation on every edge"):
        MixedOp({})
    mixed = MixedOp({"same": nn.Identity(), "wider": nn.Linear(2, 3)})
    with pytest.raises(UserError, match="mixing weights: got 1 numbers; allowed: one for each of same, wider"):
        mixed(torch.ones(1, 2), torch.ones(1))
    with pytest.raises(UserError, match=r"'wider': \(1, 3\).*all give the same shape"):
        mixed(torch.ones(1, 2), torch.ones(2))
