import math

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.supernet import MixedOp, RelaxedSupernet, Sigmoid, StraightThrough
from archsmith.supernet.relaxed import entropy


class Chain(nn.Module):
    """Two mixed edges in a row, one group of logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.edges = nn.ModuleList(
            MixedOp({"skip": nn.Identity(), "linear": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3, affine=False)})
            for _ in range(2)
        )

    def forward(self, x, mixing):
        for edge, weights in zip(self.edges, mixing["chain"], strict=True):
            x = edge(x, weights)
        return x


OPTIONS = {"chain": (("skip", "linear", "norm"),) * 2}


def supernet(**changes):
    return RelaxedSupernet(Chain(), OPTIONS, **changes)


def test_logits_are_no_weights():
    net = supernet()
    assert set(net.weights()) == {f"edges.{i}.candidates.linear.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}
    assert net.logits["chain"].abs().max() < 0.01
    net.network.edges[0].candidates["linear"].weight.requires_grad_(False)
    assert len(net.weights()) == 3
    assert torch.equal(supernet(seed=3).logits["chain"], supernet(seed=3).logits["chain"])


def test_a_call_may_bring_its_own_weights_logits_and_mixing():
    net, x = supernet(), torch.rand(4, 3)
    weights = {name: torch.zeros_like(weight) for name, weight in net.weights().items()}
    logits = {"chain": torch.tensor([[9.0, 0.0, -9.0], [0.0, 9.0, 0.0]])}
    before = {name: weight.clone() for name, weight in net.weights().items()}
    expected = net.network(x, {"chain": logits["chain"].softmax(-1)})
    torch.testing.assert_close(net.functional(x, net.weights(), logits), expected)
    skip = net.one_hot({"chain": ("skip", None)})
    assert torch.equal(net.functional(x, weights, mixing=skip), torch.zeros(4, 3))
    assert torch.equal(net(x, net.one_hot({"chain": ("skip", "skip")})), x)
    assert all(torch.equal(weight, before[name]) for name, weight in net.weights().items())
    torch.testing.assert_close(net.functional(x, net.weights(), net.logits), net(x))


def test_gradients_reach_what_was_given():
    net, x = supernet(), torch.rand(4, 3)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in net.weights().items()}
    logits = {"chain": torch.zeros(2, 3, requires_grad=True)}
    net.functional(x, weights, logits).square().sum().backward()
    assert all(weight.grad is not None for weight in weights.values()) and logits["chain"].grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in net.parameters())


def test_mixing_is_never_normalised():
    net, x = supernet(), torch.rand(4, 3)
    doubled = {"chain": torch.tensor([[2.0, 0.0, 0.0], [3.0, 0.0, 0.0]])}
    torch.testing.assert_close(net(x, doubled), 6 * x)


def test_other_relaxations():
    net = supernet(relaxation=Sigmoid())
    assert torch.equal(net.mixing()["chain"], net.logits["chain"].sigmoid())
    sampled = supernet(relaxation=StraightThrough())
    one, again = (sampled.mixing(generator=torch.Generator().manual_seed(1))["chain"] for _ in range(2))
    assert torch.equal(one, again) and one.sum() == 2


def test_entropy():
    assert entropy(torch.full((3, 4), 0.25)).item() == pytest.approx(math.log(4))
    assert entropy(torch.eye(4)).item() == 0.0


def test_what_does_not_fit_is_refused():
    net = supernet()
    with pytest.raises(UserError, match=r"mixing: got shapes \{'chain': \(2, 2\)\}; allowed: shapes"):
        net(torch.rand(1, 3), {"chain": torch.ones(2, 2)})
    with pytest.raises(UserError, match="chain edge 1: got 'conv'; allowed: skip, linear, norm"):
        net.one_hot({"chain": ("skip", "conv")})
    with pytest.raises(UserError, match="at least one candidate for every edge"):
        RelaxedSupernet(Chain(), {"chain": (("skip",), ())})
