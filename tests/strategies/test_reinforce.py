from __future__ import annotations

import json
import math

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Categorical, ProductSpace, Result
from archsmith.strategies import Reinforce, TablePolicy
from archsmith.strategies.reinforce import Adam, entropy_gradient
from archsmith.testing.strategies import ChainSpace, deep_space, flat_space


def test_adam_takes_the_published_first_steps() -> None:
    # With a constant gradient both corrected moments are the gradient and its square: each step is lr * sign.
    values, adam = np.array([1.0, -1.0]), Adam(0.1)
    for step in (1, 2, 3):
        adam.ascend_("x", values, np.array([5.0, -0.25]))
        assert values == pytest.approx([1.0 + 0.1 * step, -1.0 - 0.1 * step], abs=1e-6)


def test_one_result_moves_the_logits_as_computed_by_hand() -> None:
    space = ProductSpace("toy", {"op": Categorical(["a", "b", "c"])})
    search = Reinforce(space, learning_rate=0.1, init_scale=0.0)
    first, second = search.ask(2)
    search.tell(first.id, Result(metrics={"valid_accuracy": 4.0}))
    # The baseline contains the first reward only: no advantage, no step.
    assert search.policy.logits["op"] == pytest.approx([0.0, 0.0, 0.0])
    search.tell(second.id, Result(metrics={"valid_accuracy": 7.0}))
    # Moving average 0.9 * 0.4 + 0.1 * 7 = 1.06 over weight 0.19; the advantage is positive.
    assert search.average / search.weight == pytest.approx(1.06 / 0.19)
    advantage = 7.0 - 1.06 / 0.19
    gradient = -advantage / 3 * np.ones(3)
    index = ["a", "b", "c"].index(str(second.architecture["op"]))
    gradient[index] += advantage
    # Adam, second step after a zero gradient: m = 0.1 g, v = 0.001 g^2, corrected by 0.19 and 0.001999.
    expected = 0.1 * (0.1 * gradient / 0.19) / np.sqrt(0.001 * gradient**2 / 0.001999)
    assert search.policy.logits["op"] == pytest.approx(expected, rel=1e-6)


def test_the_nb201_card_is_one_table_of_six_by_five() -> None:
    from archsmith.families.cell_spaces import nas_bench_201_space

    search = Reinforce(nas_bench_201_space(), learning_rate=0.01)
    search.ask()
    tables = np.stack(list(search.policy.logits.values()))
    assert tables.shape == (6, 5)
    assert 2e-4 < tables.std() < 3e-3


def test_entropy_pays_for_staying_uniform() -> None:
    space = ProductSpace("toy", {"op": Categorical(["a", "b"])})
    finals = []
    for weight in (0.0, 10.0):
        search = Reinforce(space, learning_rate=0.1, entropy_weight=weight)
        for _ in range(200):
            (trial,) = search.ask()
            search.tell(trial.id, Result(metrics={"valid_accuracy": float(trial.architecture["op"] == "a")}))
        finals.append(math.exp(search.policy.log_prob(Architecture({"op": "a"}, space="toy"))))
    assert finals[0] > 0.9
    assert finals[1] < 0.7


def test_the_gradient_of_the_entropy_equals_a_finite_difference() -> None:
    logits = np.array([0.3, -1.0, 0.8])

    def value(x: np.ndarray) -> float:
        p = np.exp(x) / np.exp(x).sum()
        return float(-(p * np.log(p)).sum())

    probabilities = np.exp(logits) / np.exp(logits).sum()
    steps = 1e-6 * np.eye(3)
    numeric = [(value(logits + step) - value(logits - step)) / 2e-6 for step in steps]
    assert entropy_gradient(probabilities) == pytest.approx(numeric, abs=1e-8)


def test_log_probabilities_sum_to_one_over_a_conditional_space() -> None:
    space = deep_space()
    policy = TablePolicy(space, seed=0, init_scale=1.0)
    total = sum(math.exp(policy.log_prob(architecture)) for architecture in space.enumerate())
    assert total == pytest.approx(1.0, abs=1e-9)


def test_sampled_log_probability_is_that_of_the_architecture() -> None:
    for space in (flat_space(), deep_space(), ChainSpace()):
        policy = TablePolicy(space, seed=1, init_scale=1.0)
        for seed in range(10):
            architecture, log_prob = policy.sample(np.random.default_rng(seed))
            assert log_prob == pytest.approx(policy.log_prob(architecture))
            assert policy.entropy(architecture) > 0


def test_samples_follow_the_tables() -> None:
    space = ProductSpace("toy", {"op": Categorical(["a", "b", "c"])})
    policy = TablePolicy(space, seed=0)
    policy.load_state_dict({"op": [math.log(0.2), math.log(0.5), math.log(0.3)]})
    rng = np.random.default_rng(0)
    drawn = [policy.sample(rng)[0]["op"] for _ in range(4_000)]
    for op, share in (("a", 0.2), ("b", 0.5), ("c", 0.3)):
        assert abs(drawn.count(op) - 4_000 * share) < 4 * math.sqrt(4_000 * share * (1 - share))
    assert policy.mode()["op"] == "b"


def test_initial_logits_do_not_depend_on_the_order_of_discovery() -> None:
    space = deep_space()
    first, second = TablePolicy(space, seed=3), TablePolicy(space, seed=3)
    for seed in range(20):
        first.sample(np.random.default_rng(seed))
        second.sample(np.random.default_rng(100 - seed))
    shared = set(first.logits) & set(second.logits)
    assert shared
    assert all((first.logits[name] == second.logits[name]).all() for name in shared)


def test_the_policy_survives_json() -> None:
    policy = TablePolicy(flat_space(), seed=0, init_scale=1.0)
    policy.sample(np.random.default_rng(0))
    again = TablePolicy(flat_space(), seed=99)
    again.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert again.sample(np.random.default_rng(1)) == policy.sample(np.random.default_rng(1))


def test_bad_settings_are_named() -> None:
    for settings, text in (
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"baseline_decay": 1.0}, "baseline_decay: got 1.0"),
        ({"entropy_weight": -1.0}, "entropy_weight, init_scale"),
    ):
        with pytest.raises(UserError, match=text):
            Reinforce(flat_space(), **settings)
