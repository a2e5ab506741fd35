"""Binary gates against the facts of the published code (``tests/golden/proxylessnas.json``) and their identities."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.layers.cells import Zero
from archsmith.layers.mobile_chain import inverted_residual
from archsmith.supernet.gates import (
    BinaryGates,
    gate_gradient,
    involved,
    involved_probabilities,
    rescaled,
)
from archsmith.supernet.mixed import MixedOp

CASES = json.loads((Path(__file__).parent.parent / "golden" / "proxylessnas.json").read_text())["cases"]
GRADIENTS = [case for case in CASES if case["name"].startswith("gate_gradient/")]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pair_of(case):
    index = [case["input"]["active"], case["input"]["inactive"]]
    mask = torch.ones(len(case["input"]["alpha"]), dtype=torch.bool)
    return mask if None in index else torch.zeros_like(mask).index_fill(0, torch.tensor(index), True)


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case["name"])
def test_gradient_and_rescaling_are_the_published_ones(case):
    alpha, gates = torch.tensor(case["input"]["alpha"]), torch.tensor(case["input"]["gate_grad"])
    mask = pair_of(case)
    gradient = gate_gradient(alpha, gates, mask)
    assert gradient.tolist() == pytest.approx(case["expected"]["alpha_grad"], abs=1e-6)
    if (after := case["expected"].get("alpha_after_sgd_0p1_and_rescale")) is not None:
        assert rescaled(alpha - 0.1 * gradient, alpha, mask).tolist() == pytest.approx(after, abs=1e-6)


def test_identities_of_the_gradient():
    alpha, gates = torch.randn(5, 7, generator=seeded(0)).double(), torch.randn(5, 7, generator=seeded(1)).double()
    mask = torch.rand(5, 7, generator=seeded(2)) < 0.5
    mask[:, :2] = True
    gradient = gate_gradient(alpha, gates, mask)
    assert gradient.sum(dim=-1).abs().max() < 1e-15
    assert not gradient[~mask].any()
    assert gate_gradient(alpha, torch.full_like(gates, 3.0), mask).abs().max() < 1e-15
    torch.testing.assert_close(gate_gradient(alpha, gates + 5.0, mask), gradient)  # only differences count
    softmax = torch.autograd.functional.jacobian(lambda a: a.softmax(0), alpha[0])
    torch.testing.assert_close(gate_gradient(alpha, gates)[0], softmax @ gates[0])


def test_rescaling_keeps_the_mass_of_the_pair_and_all_other_logits():
    before, step = torch.randn(4, 6, generator=seeded(0)).double(), torch.randn(4, 6, generator=seeded(1)).double()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, [1, 4]] = True
    after = rescaled(before + step * mask, before, mask)
    assert torch.equal(after[~mask], before[~mask])
    assert (after.exp() * mask).sum(-1).tolist() == pytest.approx((before.exp() * mask).sum(-1).tolist(), rel=1e-12)
    others = after.softmax(-1)[~mask]
    torch.testing.assert_close(others, before.softmax(-1)[~mask], rtol=1e-12, atol=0)
    difference = (after - before - step)[:, [1, 4]]
    torch.testing.assert_close(difference[:, 0], difference[:, 1])  # both by the same offset
    assert torch.equal(rescaled(before, before, mask), before)  # nothing moved, nothing moves


@pytest.mark.parametrize("mode", ["full", "full_v2", "two"])
def test_samples_have_the_probabilities_of_the_softmax_or_of_pairs(mode):
    logits = torch.tensor([0.7, -0.4, 0.1, -torch.inf])
    p, draws = logits.softmax(0), 20_000
    gates = BinaryGates(mode).weights(logits.expand(draws, 4), seeded(3))
    assert torch.equal(gates.sum(-1), torch.ones(draws)) and not gates[:, 3].any()
    opened = p.clone()
    if mode == "two":
        opened = torch.zeros(4)
        for i, j in itertools.permutations(range(3), 2):
            pair = p[i] * p[j] / (1 - p[i])  # without replacement
            opened[i] += pair * p[i] / (p[i] + p[j])
            opened[j] += pair * p[j] / (p[i] + p[j])
        assert torch.equal(involved(gates).sum(-1), torch.full((draws,), 2))
    else:
        assert bool(involved(gates).all())
    error = (opened * (1 - opened) / draws).sqrt()
    assert bool(((gates.mean(0) - opened).abs() <= 4 * error + 1e-9).all())


def test_a_single_candidate_and_a_certain_one_are_sampled_in_every_mode():
    for mode in ("full", "full_v2", "two"):
        alone = BinaryGates(mode).weights(torch.tensor([[0.3, -torch.inf], [200.0, -200.0]]), seeded(0))
        assert torch.equal(alone, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(UserError, match="mode: got 'pair'; allowed: full, full_v2, two"):
        BinaryGates("pair")


def make_edge(mode, seed=0):
    torch.manual_seed(seed)
    names = ((3, 3), (3, 6), (5, 3), (7, 6))
    candidates = {f"k{k}e{e}": inverted_residual(4, 4, 1, k, e, shortcut=False) for k, e in names}
    return MixedOp({**candidates, "zero": Zero()}, BinaryGates(mode))


def run_edge(mode, sample, alpha):
    """Return everything that forward and backward of one sample give."""
    edge = make_edge(mode)
    x = torch.randn(3, 4, 6, 6, generator=seeded(9)).requires_grad_()
    logits = alpha.clone().requires_grad_()
    gates = edge.relaxation.weights(logits, seeded(sample))[0]
    y = edge(x, gates)
    (y * torch.randn(y.shape, generator=seeded(8))).sum().backward()
    weights = {name: p.grad for name, p in edge.named_parameters()}
    return gates, y, logits.grad, x.grad, weights, dict(edge.named_buffers())


ALPHA = torch.tensor([[0.3, -0.2, 0.1, 0.4, -0.1]])


@pytest.mark.parametrize("sample", range(4))
def test_recomputing_gives_what_keeping_gives(sample):
    kept, again = run_edge("full", sample, ALPHA), run_edge("full_v2", sample, ALPHA)
    for ours, theirs in zip(kept[:4], again[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    opened = list(make_edge("full").candidates)[int(kept[0].argmax())]
    for name, gradient in kept[4].items():
        other = again[4][name]
        assert (gradient is None) == (other is None) == (f".{opened}." not in f".{name}")
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-6)
    for name, tensor in kept[5].items():  # running statistics moved once, of every candidate
        torch.testing.assert_close(again[5][name], tensor)


@pytest.mark.parametrize("mode", ["full", "full_v2", "two"])
def test_the_gradient_of_the_logits_is_that_of_the_inner_products(mode):
    gates, _, of_logits, of_x, weights, _ = run_edge(mode, 5, ALPHA)
    x = torch.randn(3, 4, 6, 6, generator=seeded(9))
    upstream = torch.randn(3, 4, 6, 6, generator=seeded(8))
    edge = make_edge(mode)
    outputs = [candidate(x) for candidate in edge.candidates.values()]
    products = torch.stack([(upstream * output).sum() for output in outputs])
    expected = gate_gradient(ALPHA[0], products.detach(), involved(gates))
    torch.testing.assert_close(of_logits[0], expected, rtol=1e-5, atol=1e-5)
    opened = int(gates.argmax())
    alone = x.clone().requires_grad_()
    (list(make_edge(mode).candidates.values())[opened](alone) * upstream).sum().backward()
    torch.testing.assert_close(of_x, alone.grad, rtol=1e-5, atol=1e-6)
    names = list(edge.candidates)
    assert all(f".{names[opened]}." in f".{name}" for name, gradient in weights.items() if gradient is not None)


def saved_elements(function):
    """Return the elements kept for the backward pass, every storage once."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr(), tensor.shape] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(saved.values()), result


@pytest.mark.parametrize("opened", range(4))
def test_what_is_kept_for_the_backward_pass(opened):
    """Mode "full_v2" keeps one path to the element; "two" and "full" keep the outputs of 2 and of all beside it."""
    x = torch.randn(3, 4, 6, 6, generator=seeded(9)).requires_grad_()
    edge = make_edge("full_v2")
    one, y = saved_elements(lambda: list(edge.candidates.values())[opened](x))
    alpha = torch.full((1, 5), -60.0).scatter(1, torch.tensor([[opened]]), 0.0)
    kept = {}
    for mode in ("full", "full_v2", "two"):
        edge = make_edge(mode)
        gates = edge.relaxation.weights(alpha.clone().requires_grad_(), seeded(0))[0]
        assert int(gates.argmax()) == opened
        kept[mode], _ = saved_elements(lambda edge=edge, gates=gates: edge(x, gates))
    assert kept["full_v2"] == one
    assert kept["two"] == one + 2 * y.numel()
    assert kept["full"] == one + 5 * y.numel()


def test_gates_without_gradient_run_one_candidate_and_touch_no_other():
    edge = make_edge("full")
    gates = edge.relaxation.weights(ALPHA, seeded(1))[0]
    opened = list(edge.candidates)[int(gates.argmax())]
    for name, candidate in edge.candidates.items():
        if name != opened:
            candidate.forward = None  # would raise
    edge(torch.randn(2, 4, 6, 6), gates).sum().backward()
    assert all((p.grad is None) == (opened not in name) for name, p in edge.named_parameters())


def test_probabilities_are_mixed_as_they_are():
    edge, x = make_edge("full").eval(), torch.randn(2, 4, 6, 6)
    p = ALPHA.softmax(-1)[0].requires_grad_()
    expected = sum(weight * candidate(x) for weight, candidate in zip(p, edge.candidates.values(), strict=True))
    torch.testing.assert_close(edge(x, p), expected)
    torch.testing.assert_close(edge(x, p.tolist()), expected)


def test_the_expected_gradient_of_a_linear_loss_is_exact():
    """All gates enumerated: the mean of the gradient is that of ``sum_j p_j L_j``."""
    alpha, upstream = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64), torch.randn(4, generator=seeded(0)).double()
    outputs = torch.randn(3, 4, generator=seeded(1)).double()
    leaf = alpha.clone().requires_grad_()
    ((leaf.softmax(0) * (outputs @ upstream)).sum()).backward()
    mean = sum(p * gate_gradient(alpha, outputs @ upstream) for p in alpha.softmax(0))
    torch.testing.assert_close(mean, leaf.grad, rtol=1e-14, atol=1e-14)


class Masked(nn.Module):
    """A linear map with a pattern of zeros."""

    def __init__(self, mask, generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator) / 2)
        self.mask = mask

    def forward(self, x):
        return x @ (self.weight * self.mask)


def toy(mode, seed, factor):
    """Return the candidate that the published toy problem ends with."""
    generator = seeded(seed)
    ones, costs = torch.ones(4, 4), torch.tensor([1.0, 2.0, 10.0])
    patterns = {"diagonal": torch.eye(4), "triangular": ones.triu(), "full": ones}
    edge = MixedOp({name: Masked(mask, generator) for name, mask in patterns.items()}, BinaryGates(mode))
    target = torch.randn(4, 4, generator=generator) / 2
    alpha = (1e-3 * torch.randn(1, 3, generator=generator)).requires_grad_()
    weights = torch.optim.SGD(edge.parameters(), 0.1)
    logits = torch.optim.Adam([alpha], 0.02, betas=(0.0, 0.999))
    for step in range(400):
        x = torch.randn(32, 4, generator=generator)
        weights.zero_grad(set_to_none=True)
        gates = edge.relaxation.weights(alpha.detach(), generator)[0]
        (edge(x, gates) - x @ target).square().mean().backward()
        weights.step()
        if step >= 50:
            x = torch.randn(32, 4, generator=generator).requires_grad_()
            gates = edge.relaxation.weights(alpha, generator)
            loss = (edge(x, gates[0]) - x @ target).square().mean()
            loss = loss + factor * (involved_probabilities(alpha, gates) * costs).sum()
            before = alpha.detach().clone()
            (alpha.grad,) = torch.autograd.grad(loss, [alpha])
            logits.step()
            edge.relaxation.settle_(alpha, before, gates)
    return list(patterns)[int(alpha.argmax())]


@pytest.mark.parametrize("mode", ["full", "full_v2", "two"])
@pytest.mark.parametrize(("factor", "found"), [(0.0, "full"), (1.0, "diagonal")])
def test_the_toy_problem_ends_where_the_published_block_ends(mode, factor, found):
    assert toy(mode, 0, factor) == found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "full_v2", "two"])
@pytest.mark.parametrize(("factor", "found"), [(0.0, "full"), (1.0, "diagonal")])
def test_the_toy_problem_in_ten_of_ten_seeds(mode, factor, found):
    assert [toy(mode, seed, factor) for seed in range(10)] == [found] * 10
