import math

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.supernet import GumbelSoftmax, MixedOp, RelaxedSupernet, Sigmoid, StraightThrough
from archsmith.supernet.relaxed import edge_normalised, entropy


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


def test_decided_edges_learn_no_longer_and_cost_nothing():
    net, x = supernet(), torch.rand(4, 3)
    net.fix_("chain", 0, "skip")
    ran = []
    for name, candidate in net.network.edges[0].candidates.items():
        candidate.register_forward_hook(lambda *_, name=name: ran.append(name))
    mixing = net.mixing()["chain"]
    assert mixing[0].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(mixing[1], net.logits["chain"][1].softmax(-1))
    output = net.functional(x, net.weights(), net.logits)
    torch.testing.assert_close(output, net.network(x, {"chain": mixing.detach()}))
    ran.clear()
    net(x).square().sum().backward()
    assert ran == ["skip"]
    assert net.logits["chain"].grad[0].eq(0).all() and net.logits["chain"].grad[1].ne(0).any()
    net.fix_("chain", 1, None)
    assert torch.equal(net(x), torch.zeros(4, 3))
    with pytest.raises(UserError, match="chain edge 0: got 'tanh'; allowed: skip, linear, norm"):
        net.fix_("chain", 0, "tanh")


def test_edge_weights_are_a_softmax_over_the_edges_of_one_node():
    net = RelaxedSupernet(Chain(), OPTIONS, edge_targets={"chain": (7, 7)})
    with torch.no_grad():
        net.logits["chain_edges"].copy_(torch.tensor([0.0, math.log(3.0)]))
    torch.testing.assert_close(net.mixing()["chain_edges"], torch.tensor([0.25, 0.75]))
    assert net.one_hot({"chain": ("skip", None)})["chain_edges"].tolist() == [1.0, 1.0]
    logits = torch.tensor([0.5, 1.0, -2.0, 4.0, 0.0], requires_grad=True)
    weights = edge_normalised(logits, (2, 2, 3, 3, 3))
    torch.testing.assert_close(weights, torch.cat([logits[:2].softmax(0), logits[2:].softmax(0)]))
    weights[0].backward()
    assert logits.grad[:2].ne(0).all() and logits.grad[2:].eq(0).all()
    with pytest.raises(UserError, match="the target of each edge"):
        RelaxedSupernet(Chain(), OPTIONS, edge_targets={"chain": (7,)})
    with pytest.raises(UserError, match="shapes"):
        net(torch.rand(4, 3), {"chain": torch.ones(2, 3)})


def test_probabilities_are_no_sample_and_hold_decided_rows():
    net = supernet(relaxation=GumbelSoftmax(hard=True))
    net.fix_("chain", 1, "norm")
    with torch.no_grad():
        net.logits["chain"].copy_(torch.tensor([[0.5, 1.0, -1.0], [9.0, 0.0, 0.0]]))
    found = net.probabilities()["chain"]
    torch.testing.assert_close(found[0], net.logits["chain"][0].softmax(-1))
    assert found[1].tolist() == [0.0, 0.0, 1.0]
    other = {"chain": torch.zeros(2, 3)}
    torch.testing.assert_close(net.probabilities(other)["chain"][0], torch.full((3,), 1 / 3))
    gates = supernet(relaxation=Sigmoid())
    assert torch.equal(gates.probabilities()["chain"], gates.mixing()["chain"])
