import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.train.noise import AnnealedNoise, GradientNoise, noise_or_none
from archsmith.train.schedules import PolynomialDecay

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gradient-noise.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}


def noisy(optimizer, *, eta=0.3, seed=0, gamma=0.55, **options):
    return GradientNoise(optimizer, AnnealedNoise(seed=seed, eta=eta, gamma=gamma), **options)


def zero_gradient(count, dtype=torch.float32):
    parameter = nn.Parameter(torch.zeros(count, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("sigma/")])
def test_the_standard_deviation_is_the_published_one(name):
    case = CASES[name]
    noise = AnnealedNoise(seed=0, eta=case["input"]["eta"], gamma=case["input"]["gamma"])
    for step, expected in zip(case["input"]["t"], case["expected"], strict=True):
        assert noise.sigma(step) == pytest.approx(expected, abs=1e-12)


def test_the_energy_adds_up():
    variance = AnnealedNoise(seed=0, eta=0.3).variance
    for steps, expected in zip((10, 100, 1000), CASES["cumulative_noise_energy"]["expected"], strict=True):
        assert math.fsum(variance(step) for step in range(steps)) == pytest.approx(expected, abs=1e-9)
    assert PolynomialDecay(2.0, 0.0)(7) == 2.0


@pytest.mark.parametrize("step", [0, 10, 1000])
def test_the_noise_has_this_standard_deviation_and_mean_zero(step):
    noise, parameter = AnnealedNoise(seed=3, eta=0.3), zero_gradient(10**6)
    noise.add_([parameter], step)
    sigma = noise.sigma(step)
    assert float(parameter.grad.std()) == pytest.approx(sigma, rel=5e-3)
    assert abs(float(parameter.grad.double().mean())) < 4 * sigma / 1000


def test_second_moments_of_a_quadratic_follow_the_recursion():
    case = CASES["quadratic_second_moment"]
    for (lr, eta, gamma, steps, curve), expected in zip(case["input"]["cases"], case["expected"], strict=True):
        noise = AnnealedNoise(seed=1, eta=eta, gamma=gamma)
        moment = 1.0
        for step in range(steps):
            moment = (1 - lr * curve) ** 2 * moment + lr**2 * noise.variance(step)
        assert moment == pytest.approx(expected, abs=1e-12)
        chains = nn.Parameter(torch.ones(20_000, dtype=torch.float64))
        optimizer = torch.optim.SGD([chains], lr=lr)
        GradientNoise(optimizer, noise)
        for _ in range(steps):
            chains.grad = curve * chains.detach()
            optimizer.step()
        assert float(chains.detach().square().mean()) == pytest.approx(expected, rel=0.04)


class Loop:
    """A small network with a loop of its own."""

    def __init__(self, make=None, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        make = make or (lambda parameters: torch.optim.Adam(parameters, lr=0.05))
        self.optimizer = make(self.model.parameters())
        self.noise = noisy(self.optimizer, **options) if options.pop("noise", True) else None
        self.steps = 0

    def backward(self):
        generator = torch.Generator().manual_seed(self.steps)
        x, y = torch.randn(6, 4, generator=generator), torch.arange(6) % 2
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def run(self, steps):
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
            self.steps += 1
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_without_variance_it_is_the_plain_optimiser_bit_for_bit():
    plain = Loop()
    plain.noise.remove()
    assert same(Loop(eta=0.0).run(5), plain.run(5))
    assert not same(Loop(eta=0.01).run(5), plain.run(0))
    assert noise_or_none(0.0, 0.55, 0) is None and noise_or_none(0.1, 0.5, 3).gamma == 0.5


def test_a_seed_gives_the_same_training_and_another_one_another():
    assert same(Loop(seed=1).run(4), Loop(seed=1).run(4))
    assert not same(Loop(seed=1).run(4), Loop(seed=2).run(4))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(steps):
    whole, halted = Loop(), Loop()
    halted.run(steps)
    again = Loop()
    again.model.load_state_dict(halted.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(halted.optimizer.state_dict()))
    again.noise.load_state_dict(json.loads(json.dumps(halted.noise.state_dict())))
    again.steps = halted.steps
    assert same(again.run(5 - steps), whole.run(5))


def test_the_state_of_another_noise_is_refused():
    state = Loop(eta=0.3).noise.state_dict()
    with pytest.raises(UserError, match="that of this noise"):
        Loop(eta=0.1).noise.load_state_dict(state)


def test_what_has_no_gradient_gets_no_noise_and_changes_no_other():
    first, second, third = zero_gradient(5), zero_gradient(5), zero_gradient(5)
    noise = AnnealedNoise(seed=0)
    noise.add_([first, second, third], 2)
    expected = third.grad.clone()
    second.grad, third.grad = None, torch.zeros(5)
    frozen = nn.Parameter(torch.ones(5), requires_grad=False)
    noise.add_([first, second, third, frozen], 2)
    assert second.grad is None and frozen.grad is None and torch.equal(third.grad, expected)
    assert not torch.equal(first.grad[:5], third.grad)


def test_chosen_parameters_alone_get_noise_and_the_same_as_without_a_choice():
    def gradients(choose):
        parameters = [zero_gradient(4) for _ in range(3)]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        noisy(optimizer, parameters=choose(parameters))
        optimizer.step()
        return [parameter.grad for parameter in parameters]

    everywhere, chosen = gradients(lambda parameters: None), gradients(lambda parameters: parameters[1:2])
    assert torch.equal(chosen[1], everywhere[1])
    assert not chosen[0].any() and not chosen[2].any()


def test_batch_normalisations_keep_their_statistics():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)).train()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noisy(optimizer)
    x = torch.rand(4, 1, 2, 2)
    for network in (model, plain):
        network(x).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].running_mean, plain[1].running_mean)


def test_four_micro_batches_and_one_step_give_the_noise_of_one_step():
    parameter = zero_gradient(10**5)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    noise = noisy(optimizer, eta=1.0)
    for _ in range(4):
        (0.0 * parameter).sum().backward()
    optimizer.step()
    assert noise.t == 1
    assert float(parameter.grad.std()) == pytest.approx(1.0, rel=0.02)


def test_the_clip_comes_first_unless_asked_otherwise():
    def norm_after(**options):
        parameter = zero_gradient(10**4)
        parameter.grad += 1.0
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        noisy(optimizer, eta=1.0, clip_norm=1.0, **options)
        optimizer.step()
        return float(parameter.grad.norm())

    assert norm_after() == pytest.approx(100.0, rel=0.05)  # the noise of 10^4 entries, hardly any gradient
    assert norm_after(noise_first=True) == pytest.approx(1.0, abs=1e-4)


def test_a_closure_is_disturbed_behind_its_gradients():
    plain, closed = Loop(), Loop()
    plain.run(2)
    for _ in range(2):
        closed.optimizer.step(closed.backward)
        closed.steps += 1
    assert same(list(plain.model.parameters()), list(closed.model.parameters()))


def test_under_a_gradient_scaler_the_noise_comes_after_unscaling_and_skipped_steps_do_not_count():
    loop = Loop(make=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = Loop(make=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    plain.run(1)
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    scaler.scale(nn.functional.cross_entropy(loop.model(x), y)).backward()
    scaler.step(loop.optimizer)
    scaler.update()
    for ours, theirs in zip(loop.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    loop.model[0].weight.grad.fill_(torch.inf)
    scaler.scale(torch.zeros((), requires_grad=True)).backward()
    scaler.step(loop.optimizer)
    assert loop.noise.t == 1


def test_two_replicas_stay_equal():
    one, two = Loop(seed=5), Loop(seed=5)
    for _ in range(3):
        one.backward(), two.backward()
        for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
            mean = (a.grad + b.grad) / 2
            a.grad, b.grad = mean.clone(), mean.clone()
        one.optimizer.step(), two.optimizer.step()
    assert same(list(one.model.parameters()), list(two.model.parameters()))


def test_half_precision_gets_noise_of_the_same_size():
    parameter = zero_gradient(10**5, torch.bfloat16)
    AnnealedNoise(seed=0, eta=1.0).add_([parameter], 0)
    assert parameter.grad.dtype == torch.bfloat16
    assert float(parameter.grad.float().std()) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AnnealedNoise(seed=0, eta=-1.0), "eta: got -1.0"),
        (lambda: AnnealedNoise(seed=0, gamma=math.nan), "gamma: got nan"),
        (lambda: Loop(noise_first=True), "clip_norm is 0"),
        (lambda: Loop(clip_norm=-1.0), "clip_norm: got -1.0"),
        (lambda: Loop(parameters=[torch.zeros(1)]), "parameters of it"),
    ],
)
def test_what_makes_no_sense_is_refused(make, text):
    with pytest.raises(UserError, match=text):
        make()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    noisy(optimizer)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="dense gradients"):
        optimizer.step()
