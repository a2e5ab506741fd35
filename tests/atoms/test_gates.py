import json
from pathlib import Path

import pytest
import torch
from torch import nn

from archsmith.atoms.gates import (
    GateOptions,
    LogisticGate,
    annealed_tau,
    any_alive,
    draw_noise,
    expected_soft_gate,
    first_alive,
    inference_gate,
    joined,
    logistic_noise,
    sampled_gate,
)
from archsmith.core.errors import UserError

CASES = json.loads((Path(__file__).parents[1] / "golden" / "figs.json").read_text())["cases"]


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", ["gate_sample_tau0.1", "gate_sample_tau1"])
def test_sampled_gates_and_their_derivatives(name):
    case = CASES[name]
    logits = doubles(case["input"]["logits"]).requires_grad_()
    noise = logistic_noise(doubles(case["input"]["uniform"]))
    torch.testing.assert_close(noise, doubles(case["expected"]["logistic_noise"]), rtol=0, atol=1e-9)
    soft = sampled_gate(logits, noise, case["input"]["tau"])
    torch.testing.assert_close(soft.detach(), doubles(case["expected"]["soft_mask"]), rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(soft.sum(), logits)
    torch.testing.assert_close(slope, doubles(case["expected"]["dsoft_dlogit"]), rtol=0, atol=1e-9)
    hard = sampled_gate(logits, noise, case["input"]["tau"], straight_through=True)
    torch.testing.assert_close(hard.detach(), doubles(case["expected"]["hard_mask"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(hard.sum(), logits)[0], slope)


def test_gates_of_inference():
    case = CASES["gate_inference"]
    logits = doubles(case["input"]["logits"])
    torch.testing.assert_close(inference_gate(logits), doubles(case["expected"]["soft"]), rtol=0, atol=1e-9)
    assert inference_gate(logits, hard=True).tolist() == case["expected"]["hard"]
    kept = CASES["gate_inference_keep_first"]
    mask = first_alive(inference_gate(doubles(kept["input"]["logits"])))
    torch.testing.assert_close(mask, doubles(kept["expected"]["soft"]), rtol=0, atol=1e-9)


def test_initial_keep_probability():
    gate = LogisticGate(3)
    expected = CASES["initial_keep_probability"]["expected"]
    assert torch.sigmoid(gate.logits.detach().double())[0].item() == pytest.approx(expected, abs=1e-12)


def test_expected_hard_gate():
    case = CASES["expected_hard_mask"]
    logits = doubles(case["input"]["logits"])
    torch.testing.assert_close(torch.sigmoid(logits), doubles(case["expected"]), rtol=0, atol=1e-12)
    noise = draw_noise((100_000, 3), torch.Generator().manual_seed(0), torch.float64)
    torch.testing.assert_close((logits + noise > 0).double().mean(0), doubles(case["expected"]), rtol=0, atol=0.005)


def test_expected_soft_gate():
    case = CASES["expected_soft_mask_tau1"]
    logits = doubles(case["input"]["logits"])
    torch.testing.assert_close(expected_soft_gate(logits), doubles(case["expected"]), rtol=0, atol=1e-9)
    noise = draw_noise((100_000, 3), torch.Generator().manual_seed(1), torch.float64)
    torch.testing.assert_close(sampled_gate(logits, noise, 1.0).mean(0), doubles(case["expected"]), rtol=0, atol=0.005)


def test_the_mean_derivative_is_that_of_the_mean():
    noise = draw_noise((400_000,), torch.Generator().manual_seed(2), torch.float64)

    def mean_gate(a, tau):
        return sampled_gate(torch.tensor(a, dtype=torch.float64), noise, tau).mean()

    def mean_slope(a, tau):
        logits = torch.full_like(noise, a).requires_grad_()
        return float(torch.autograd.grad(sampled_gate(logits, noise, tau).sum(), logits)[0].mean())

    difference = float(mean_gate(0.51, 0.1) - mean_gate(0.49, 0.1)) / 0.02
    assert mean_slope(0.5, 0.1) == pytest.approx(difference, rel=0.01)
    p = float(torch.sigmoid(torch.tensor(0.5)))
    assert mean_slope(0.5, 0.02) == pytest.approx(p * (1 - p), rel=0.03)


def test_channels_with_several_gates():
    case = CASES["group_probability"]
    members = [doubles(row) for row in case["input"]["members"]]
    expected = case["expected"]
    torch.testing.assert_close(joined(members), doubles(expected["regularization"]), rtol=0, atol=1e-9)
    alive = any_alive([torch.tensor(row, dtype=torch.bool) for row in case["input"]["alive"]])
    assert alive.int().tolist() == expected["alive"]


def test_annealing():
    case = CASES["temperature_annealing"]
    found = [annealed_tau(case["input"]["tau0"], case["input"]["annealing_rate"], s) for s in case["input"]["steps"]]
    assert found == pytest.approx(case["expected"], abs=1e-12)
    assert annealed_tau(0.2, None, 1000) == 0.2


def test_a_gate_layer_draws_one_number_for_each_channel():
    gate = LogisticGate(4, options=GateOptions(tau=1.0, keep_first=False))
    with torch.no_grad():
        gate.logits.fill_(0.0)
    y = gate(torch.ones(3, 4, 5, 5))
    assert torch.equal(y, y[:1, :, :1, :1].expand_as(y))
    assert len(set(y[0, :, 0, 0].tolist())) == 4
    assert not torch.equal(y, gate(torch.ones(3, 4, 5, 5)))
    gate.noise = torch.zeros(4)
    assert torch.equal(gate(torch.ones(1, 4)), torch.full((1, 4), 0.5))
    gate.eval()
    assert torch.equal(gate(torch.ones(1, 4)), torch.zeros(1, 4))


def test_the_axis_of_a_gate_layer():
    gate = LogisticGate(2, axis=-1, options=GateOptions(soft_inference=False)).eval()
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([1.0, -1.0]))
    assert gate(torch.ones(3, 5, 2))[0, 0].tolist() == [1.0, 0.0]


RELEVANT = (1, 4, 8, 13, 19)


def plant(runs, steps=1500):
    """Train gates on inputs of which five matter; one row of log odds for each (tau, strength, seed)."""
    grams, crosses, weights, generators = [], [], [], []
    for _, _, seed in runs:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(512, 20, generator=generator)
        y = x[:, RELEVANT].sum(1) + 0.1 * torch.randn(512, generator=generator)
        grams.append(x.t() @ x / 512)
        crosses.append(x.t() @ y / 512)
        weights.append(0.1 * torch.randn(20, generator=generator))
        generators.append(generator)
    gram, cross = torch.stack(grams), torch.stack(crosses)
    taus, strengths = (torch.tensor([[run[k]] for run in runs]) for k in (0, 1))
    w = torch.stack(weights).requires_grad_()
    logits = torch.full((len(runs), 20), 2.5, requires_grad=True)
    optimizer = torch.optim.Adam([w, logits], lr=0.05)
    noises = torch.stack([draw_noise((steps, 20), generator) for generator in generators], dim=1)
    for noise in noises:
        mask = torch.sigmoid((logits + noise) / taus)
        effective = mask * w
        loss = torch.einsum("ri,rij,rj->", effective, gram, effective) - 2 * (effective * cross).sum()
        optimizer.zero_grad()
        (loss + (strengths * mask).sum()).backward()
        optimizer.step()
    return logits.detach()


def test_planted_channels_are_recovered():
    """Five of twenty inputs matter; the gates find exactly these in at least five of six seeds of every setting."""
    settings = [(tau, strength) for tau in (1.0, 0.1, 0.01) for strength in (0.02, 0.1, 0.5)]
    runs = [(*setting, seed) for setting in settings for seed in range(6)]
    found = plant(runs)
    wanted = torch.zeros(20, dtype=torch.bool)
    wanted[list(RELEVANT)] = True
    exact = ((found > 0) == wanted).all(1).reshape(len(settings), 6).sum(1)
    assert (exact >= 5).all(), dict(zip(settings, exact.tolist(), strict=True))


def test_without_a_penalty_relevant_gates_stay_and_a_huge_one_closes_all():
    free, pressed = plant([(0.1, 0.0, 0), (0.1, 50.0, 0)], 600)
    assert (free[list(RELEVANT)] > 0).all()
    assert GateOptions(keep_first=True).alive(pressed).tolist() == [True] + 19 * [False]


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="tau: got 0"):
        GateOptions(tau=0)
    with pytest.raises(UserError, match="annealing: got -1"):
        GateOptions(annealing=-1)
    with pytest.raises(UserError, match="channels: got 0"):
        LogisticGate(0)
    assert "axis=1" in repr(nn.Sequential(LogisticGate(3)))
