import pytest
import torch
from mobile_samples import fact, images, small_family, worn_
from torch import nn

from archsmith.atoms.groups import tensors_of
from archsmith.atoms.penalty import ScalePenalty, penalty_weights
from archsmith.families.mobile import mobile_family
from archsmith.train.optim import RMSprop


def published_atoms(preset):
    family = mobile_family(preset, image=(3, 224, 224), num_classes=1000)
    with torch.device("meta"):
        return family.atoms(family.build(family.largest()))


def penalty_over(scales, weights):
    parameters = {name: nn.Parameter(torch.tensor(values, dtype=torch.float64)) for name, values in scales.items()}
    return ScalePenalty(weights, parameters), parameters


def test_weights_are_the_published_ones():
    _, expected = fact("atom_cost_and_penalty")
    atoms = published_atoms("atomnas-c")
    weights = penalty_weights(atoms)
    for feature, kernel, _, _, c in expected["rows"]:
        assert weights[f"blocks.{feature - 1}.branches.k{kernel}"] == pytest.approx(c, abs=1e-9)
    mean = sum(weights[group.name] * group.size for group in atoms) / len(atoms)
    assert mean == pytest.approx(1, abs=1e-8)  # 1e-5 is added to the 31392 units


@pytest.mark.parametrize(("preset", "rho", "expected"), [("atomnas-c", 1e-4, 3.1392), ("atomnas-a", 1.8e-4, 5.6506)])
def test_the_penalty_is_a_sum_over_atoms(preset, rho, expected):
    atoms = published_atoms(preset)
    penalty = ScalePenalty(penalty_weights(atoms), {g.name: torch.ones(g.size) for g in atoms})
    assert rho * penalty.value() == pytest.approx(expected, abs=5e-5)


def test_the_gradient_is_that_of_the_sum_and_zero_at_zero():
    weights = {"a": 2.0, "b": 0.5}
    penalty, scales = penalty_over({"a": [1.0, -2.0, 0.0], "b": [0.0, -3.0]}, weights)
    assert penalty.value() == 2.0 * 3 + 0.5 * 3
    penalty.add_gradient_(0.1)
    assert scales["a"].grad.tolist() == pytest.approx([0.2, -0.2, 0.0])
    assert scales["b"].grad.tolist() == pytest.approx([0.0, -0.05])


def test_the_gradient_comes_on_top_of_the_data():
    family = small_family()
    one, two = (worn_(family.build(family.largest())).double().eval() for _ in range(2))
    x = images(family, dtype=torch.float64)
    weights = penalty_weights(family.atoms(one))
    one(x).square().sum().backward()
    named = tensors_of(one)
    ScalePenalty(weights, {g.name: named[g.scale] for g in family.atoms(one)}).add_gradient_(0.3)
    written = sum(weights[g.name] * tensors_of(two)[g.scale].abs().sum() for g in family.atoms(two))
    (two(x).square().sum() + 0.3 * written).backward()
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_without_strength_nothing_is_touched():
    penalty, scales = penalty_over({"a": [1.0, -2.0]}, {"a": 1.0})
    penalty.add_gradient_(0.0)
    assert scales["a"].grad is None
    penalty.proximal_step_(0.0)
    assert scales["a"].tolist() == [1.0, -2.0]


def test_the_proximal_step_solves_its_problem():
    penalty, scales = penalty_over({"a": [1.0, -0.3, 0.1, 0.0]}, {"a": 2.0})
    before = scales["a"].detach().clone()
    penalty.proximal_step_(0.1)
    assert scales["a"].tolist() == pytest.approx([0.8, -0.1, 0.0, 0.0])
    grid = torch.linspace(-2, 2, 40001, dtype=torch.float64)
    objective = 0.5 * (grid[:, None] - before) ** 2 + 0.2 * grid[:, None].abs()  # argmin of it is the definition
    assert grid[objective.argmin(0)].tolist() == pytest.approx(scales["a"].tolist(), abs=1e-4)


def test_equal_costs_are_network_slimming():
    """With one cost for all units, the weighting by MACs and the equal one are the same (up to the published 1e-5)."""
    family = mobile_family("tiny", image=(1, 8, 8), num_classes=2, stem_channels=4, rows=((2, 4, 3, 1, (3,)),))
    atoms = family.atoms(family.build(family.largest()))
    assert len({group.cost["macs"] for group in atoms}) == 1
    weighted, equal = penalty_weights(atoms), penalty_weights(atoms, "equal")
    assert weighted == pytest.approx(equal, abs=1e-6)
    assert set(equal.values()) == {1.0}


def test_one_kernel_for_each_block_is_channel_pruning():
    family = mobile_family("mobilenetv2", image=(3, 32, 32), num_classes=10)
    with torch.device("meta"):
        network = family.build(family.largest())
        atoms = family.atoms(network)
    assert [g.name for g in atoms] == [f"blocks.{i}.branches.k3" for i in range(1, 17)]
    assert [g.size for g in atoms] == [block.branches["k3"].project.in_channels for block in network.blocks][1:]


def test_units_that_are_gone_are_no_longer_asked_for():
    penalty, scales = penalty_over({"a": [1.0], "b": [2.0]}, {"a": 3.0, "b": 5.0})
    penalty.follow({"b": scales["b"]})
    assert penalty.value() == 10.0
    penalty.add_gradient_(1.0)
    assert scales["a"].grad is None
    assert scales["b"].grad.tolist() == [5.0]  # the weight is what it was: survivors are not normalised anew


# ------------------------------------------------------- who dies when, without any gradient from data


def death_times(make_optimizer, *, costs, rho, threshold, steps, gradient=True):
    """Return for each scale the first step after which it is at most ``threshold``."""
    scales = {str(i): nn.Parameter(torch.ones(1, dtype=torch.float64)) for i in range(len(costs))}
    penalty = ScalePenalty({str(i): c for i, c in enumerate(costs)}, scales)
    optimizer = make_optimizer(list(scales.values()))
    times: dict[str, int] = {}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        if gradient:
            penalty.add_gradient_(rho)
            optimizer.step()
        else:
            for scale in scales.values():
                scale.grad = torch.zeros_like(scale)
            optimizer.step()
            penalty.proximal_step_(optimizer.param_groups[0]["lr"] * rho)
        for name, scale in scales.items():
            if abs(scale.item()) <= threshold:
                times.setdefault(name, step)
        if len(times) == len(costs):
            break
    return [times[str(i)] for i in range(len(costs))]


@pytest.fixture
def death():
    given, expected = fact("penalty_only_death_times")
    return {key: given[key] for key in ("costs", "threshold")}, given["rho"], expected


def test_rmsprop_kills_dear_atoms_first(death):
    shared, rho, expected = death
    times = death_times(lambda p: RMSprop(p, 0.1), rho=rho, steps=1000, **shared)
    assert times == pytest.approx(expected["reference_rmsprop"], abs=1)


def test_sgd_kills_in_proportion_to_the_cost(death):
    shared, _, expected = death
    times = death_times(lambda p: torch.optim.SGD(p, 1.0), rho=1e-3, steps=3000, **shared)
    assert times == pytest.approx(expected["sgd"], abs=1)
    products = [time * cost for time, cost in zip(times, shared["costs"], strict=True)]
    assert max(products) - min(products) < 2 * max(shared["costs"])


def test_adam_forgets_the_costs_when_they_come_as_a_gradient(death):
    shared, rho, expected = death
    times = death_times(lambda p: torch.optim.Adam(p, 1e-3, eps=1e-8), rho=rho, steps=1200, **shared)
    assert times == pytest.approx(expected["adam"], abs=1)


def test_adam_keeps_the_costs_with_the_proximal_step(death):
    shared, _, expected = death
    times = death_times(
        lambda p: torch.optim.AdamW(p, 1.0, eps=1e-8, weight_decay=0.0), rho=1e-3, steps=3000, gradient=False, **shared
    )
    assert times == pytest.approx(expected["sgd"], abs=1)
