import json
import math

import numpy as np
import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.families.nasnet_space import nasnet_a, nasnet_space
from archsmith.space import (
    AtMost,
    Categorical,
    Count,
    DeadEnd,
    Given,
    Ordinal,
    Predicate,
    ProductSpace,
    Real,
    Repeat,
    When,
)
from archsmith.strategies.controller import Adam, Controller, packed, unpacked
from archsmith.strategies.distribution import Distribution, UniformDecisions
from archsmith.strategies.policy import TablePolicy


def flat_space() -> ProductSpace:
    return ProductSpace("flat", {f"x{i}": Categorical(tuple("abcde")[: 2 + i % 3]) for i in range(5)})


def deep_space() -> ProductSpace:
    """Depth is a choice, kernels exist for convolutions only, widths are masked by their sum."""
    layer = {
        "op": Categorical(("conv", "pool")),
        "kernel": Given(When("op", "conv"), Ordinal((3, 5, 7))),
        "width": Count(1, 4),
    }
    return ProductSpace("deep", {"net": Repeat(Count(0, 3), layer)}, constraints=[AtMost(["net/*/width"], 6)])


def samples(distribution, n, seed=0):
    rng = np.random.default_rng(seed)
    return [distribution.sample(rng) for _ in range(n)]


def test_controller_and_uniform_decisions_are_distributions():
    assert isinstance(Controller(flat_space(), seed=0), Distribution)
    assert isinstance(UniformDecisions(flat_space()), Distribution)
    assert isinstance(TablePolicy(flat_space(), seed=0), Distribution)


@pytest.mark.parametrize("make", [flat_space, deep_space, nasnet_space])
def test_an_unchanged_sequence_has_a_ratio_of_exactly_one(make):
    space = make()
    controller = Controller(space, seed=3)
    for architecture, log_prob in samples(controller, 12):
        assert math.exp(controller.log_prob(architecture) - log_prob) == 1.0


@pytest.mark.parametrize("make", [flat_space, deep_space, nasnet_space])
def test_the_log_probability_is_the_sum_over_the_decisions(make):
    space = make()
    controller = Controller(space, seed=3)
    rng = np.random.default_rng(1)
    for _ in range(5):
        architecture, logs = controller.draw(rng)
        assert len(logs) == len(controller.steps(architecture)) == len(space.trace(architecture))
        assert controller.log_prob(architecture) == pytest.approx(sum(logs), abs=1e-6)
        scored = controller.score([controller.steps(architecture)])
        assert scored.log_probs_B[0] == pytest.approx(sum(logs), abs=1e-12)


def test_probabilities_of_all_architectures_sum_to_one_and_are_what_is_drawn():
    space = deep_space()
    controller = Controller(space, seed=1, units=8, init=1.0)
    probability = {a: math.exp(controller.log_prob(a)) for a in space.enumerate()}
    assert sum(probability.values()) == pytest.approx(1.0, abs=1e-12)
    n = 3_000
    drawn = [architecture for architecture, _ in samples(controller, n)]
    likely = sorted(probability, key=probability.__getitem__)[-10:]
    for architecture in likely:
        p = probability[architecture]
        assert abs(drawn.count(architecture) / n - p) <= 4 * math.sqrt(p * (1 - p) / n)
    assert sum(probability[a] for a in likely) > 0.3


def test_the_mean_of_the_entropies_on_the_way_is_the_entropy():
    space = deep_space()
    controller = Controller(space, seed=1, units=8, init=1.0)
    log_probs = {a: controller.log_prob(a) for a in space.enumerate()}
    exact = -sum(math.exp(log) * log for log in log_probs.values())
    scored = controller.score([controller.steps(architecture) for architecture in log_probs])
    np.testing.assert_allclose(scored.log_probs_B, list(log_probs.values()), atol=1e-12)
    expected = float(np.exp(scored.log_probs_B) @ scored.entropies_B)
    assert expected == pytest.approx(exact, abs=1e-10)


def test_the_controller_sees_what_was_chosen_before():
    space = ProductSpace("pair", {"a": Categorical((0, 1)), "b": Categorical((0, 1))})
    controller = Controller(space, seed=0, init=1.0)

    def b_given(a):
        first, second = (controller.log_prob(space.validate({"a": a, "b": b})) for b in (0, 1))
        return first - second

    assert abs(b_given(0) - b_given(1)) > 1e-3


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("make", [flat_space, deep_space])
def test_the_gradient_is_that_of_automatic_differentiation(make, entropy_weight):
    controller = Controller(make(), seed=2, units=7, init=0.7)
    batch = [controller.steps(architecture) for architecture, _ in samples(controller, 9)]
    weights = np.linspace(-1.0, 2.0, len(batch))
    scored = controller.score(batch)
    found = controller.gradient(scored, weights, entropy_weight)

    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in controller.weights.items()}
    total = torch.zeros((), dtype=torch.float64)
    for factor, steps in zip(weights, batch, strict=True):
        log_prob, entropy = torch_scores(leaves, steps, controller.units)
        total = total + factor * log_prob + entropy_weight * entropy
    total.backward()
    expected = {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-9, atol=1e-12, err_msg=name)


def torch_scores(leaves, steps, units):
    """Return log-probability and entropy of one sequence: the LSTM cell of torch, one decision at a time."""
    # torch orders the gates input, forget, candidate, output; here it is input, forget, output, candidate.
    order = torch.cat([torch.arange(2 * units), torch.arange(3 * units, 4 * units), torch.arange(2 * units, 3 * units)])
    h = c = torch.zeros(1, units, dtype=torch.float64)
    x = leaves["start"]
    log_prob = entropy = torch.zeros((), dtype=torch.float64)
    for part, index in steps:
        h, c = torch.lstm_cell(x[None], (h, c), leaves["x"].T[order], leaves["h"].T[order], leaves["bias"][order], None)
        logits = h[0] @ leaves[f"softmax/{part.name}"] + leaves[f"softmax_bias/{part.name}"]
        if part.mask is not None:
            logits = logits[torch.tensor(part.mask)]
            index_among = int(part.mask[:index].sum())
        else:
            index_among = index
        logs = logits.log_softmax(0)
        log_prob = log_prob + logs[index_among]
        entropy = entropy - (logs.exp() * logs).sum()
        x = leaves[f"embedding/{part.name}"][index]
    return log_prob, entropy


def test_a_batch_is_scored_as_its_members_are():
    controller = Controller(deep_space(), seed=2)
    found = samples(controller, 10)
    scored = controller.score([controller.steps(architecture) for architecture, _ in found])
    np.testing.assert_allclose(scored.log_probs_B, [log for _, log in found], atol=1e-12)
    np.testing.assert_allclose(scored.entropies_B, [controller.entropy(a) for a, _ in found], atol=1e-12)


def test_masked_options_are_never_drawn_and_never_counted():
    space = deep_space()
    controller = Controller(space, seed=5, init=2.0)
    for architecture, _ in samples(controller, 200):
        assert space.contains(architecture)
        for step in controller.steps(architecture):
            assert step.part.mask is None or step.part.mask[step.chosen]


def test_weights_start_within_their_range_and_depend_on_the_seed_alone():
    controller, other = Controller(nasnet_space(), seed=0), Controller(nasnet_space(), seed=1)
    again = Controller(nasnet_space(), seed=0)
    samples(again, 1)  # met in another order
    for each in (controller, other):
        each.log_prob(nasnet_a())
    assert len(controller.weights) == 4 + 3 * 50
    for name, array in controller.weights.items():
        assert np.abs(array).max() <= 0.1
        assert np.array_equal(array, again.weights[name])
        assert not np.array_equal(array, other.weights[name])
    assert np.abs(controller.weights["x"]).max() > 0.0999 and controller.weights["x"].shape == (100, 400)


def test_the_start_is_nearly_uniform():
    space = nasnet_space()
    controller, uniform = Controller(space, seed=0), UniformDecisions(space)
    decisions = len(space.trace(nasnet_a()))
    assert uniform.log_prob(nasnet_a()) == pytest.approx(-math.log(space.size))
    assert abs(controller.log_prob(nasnet_a()) - uniform.log_prob(nasnet_a())) < 0.2 * decisions
    assert uniform.entropy(nasnet_a()) == pytest.approx(math.log(space.size))


def test_the_mode_takes_the_likeliest_option_each_time():
    controller = Controller(deep_space(), seed=4, init=1.0)
    mode = controller.mode()
    assert controller.space.contains(mode) and controller.mode() == mode
    single = ProductSpace("one", {"x": Categorical(tuple(range(9)))})
    controller = Controller(single, seed=4, init=1.0)
    assert controller.mode() == max(single.enumerate(), key=controller.log_prob)
    assert UniformDecisions(deep_space()).mode() in set(deep_space().enumerate())


def test_dead_ends_are_walked_anew_and_given_up_at_last():
    elements = {f"w{i}": Ordinal((1, 2, 3)) for i in range(3)}
    rising = ProductSpace("rising", elements, constraints=[Predicate("rises", lambda d: d["w0"] < d["w1"] < d["w2"])])
    assert samples(Controller(rising, seed=0), 3)[0][0] == rising.validate({"w0": 1, "w1": 2, "w2": 3})
    empty = ProductSpace("empty", elements, constraints=[Predicate("never", lambda d: False)])
    with pytest.raises(UserError, match="none was found"):
        samples(Controller(empty, seed=0), 1)
    with pytest.raises(DeadEnd):
        Controller(empty, seed=0).mode()


def test_real_numbers_are_chosen_by_stretches():
    space = ProductSpace("real", {"lr": Real(1e-4, 1.0, log=True), "op": Categorical(("a", "b"))})
    controller = Controller(space, seed=0)
    architecture, log_prob = samples(controller, 1)[0]
    assert space.contains(architecture) and controller.log_prob(architecture) == log_prob
    assert UniformDecisions(space).log_prob(architecture) == pytest.approx(-math.log(20 * 2))


def test_the_state_is_plain_json_and_exact():
    controller = Controller(deep_space(), seed=0)
    samples(controller, 5)
    text = json.dumps(controller.state_dict(), allow_nan=False)
    other = Controller(deep_space(), seed=0)
    samples(other, 5)
    for weights in other.weights.values():
        weights += 0.5
    other.load_state_dict(json.loads(text))
    assert json.dumps(other.state_dict()) == text
    assert samples(other, 5, seed=7) == samples(controller, 5, seed=7)
    array = np.array([[1 / 3, -0.0], [5e-324, 1e300]])
    assert unpacked(json.loads(json.dumps(packed(array)))).tobytes() == array.tobytes()


def test_a_state_of_another_width_is_refused():
    with pytest.raises(UserError, match=r"state\.units: got 8; allowed: 100"):
        Controller(flat_space(), seed=0).load_state_dict(Controller(flat_space(), seed=0, units=8).state_dict())


@pytest.mark.parametrize(
    ("settings", "match"), [({"units": 0}, "controller.units"), ({"init": 0.0}, "controller.init")]
)
def test_wrong_settings_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        Controller(flat_space(), seed=0, **settings)


def test_a_decision_whose_list_changes_its_length_is_refused():
    controller = Controller(flat_space(), seed=0)
    samples(controller, 1)
    controller.space = ProductSpace("longer", {f"x{i}": Categorical(tuple("abcdefg")) for i in range(5)})
    with pytest.raises(UserError, match="2 alternatives, as at its first time"):
        samples(controller, 1)


def test_adam_is_torchs():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 4)), rng.normal(size=(6, 3, 4))
    array = start.copy()
    adam = Adam(0.01)
    leaf = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([leaf], lr=0.01, maximize=True)
    for number, gradient in enumerate(gradients):
        if number == 3:  # through the state
            moments = json.loads(json.dumps(adam.state_dict()))
            adam = Adam(0.01)
            adam.load_state_dict(moments)
        adam.ascend_({"w": array}, {"w": gradient})
        leaf.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(array, leaf.detach().numpy(), rtol=1e-12)
