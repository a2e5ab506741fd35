import json
import math
from pathlib import Path

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.families.nasnet_space import nasnet_space
from archsmith.space import Categorical, Objective, ProductSpace, Result
from archsmith.strategies.ppo import PPO, ReinforceController, clipped_surrogate, moved_baseline, surrogate_slopes

GOLDEN = {
    case["name"]: case
    for case in json.loads(Path(__file__).parents[1].joinpath("golden/nasnet.json").read_text())["cases"]
}
CHOICES = (2, 2, 13, 13, 2, 3, 3, 13, 13, 2)


def bandit() -> ProductSpace:
    """Ten decisions, as many alternatives as those of two blocks."""
    return ProductSpace("bandit", {f"d{i}": Categorical(tuple(range(n))) for i, n in enumerate(CHOICES)})


def bandit_rewards(make, seed: int, batches: int, choices=CHOICES) -> list[float]:
    """Return the mean reward of each batch of 20: the fraction of decisions equal to a hidden target."""
    rng = np.random.default_rng(seed)
    target = [int(rng.integers(n)) for n in choices]
    strategy, means = make(seed), []
    for _ in range(batches):
        rewards = []
        for trial in strategy.ask(20):
            hits = [trial.architecture[f"d{i}"] == wanted for i, wanted in enumerate(target)]
            rewards.append(sum(hits) / len(hits))
            strategy.tell(trial.id, Result(metrics={"valid_accuracy": rewards[-1]}))
        means.append(sum(rewards) / len(rewards))
    return means


def reward(value):
    return Result(metrics={"valid_accuracy": value})


def test_the_surrogate_is_clipped_as_published():
    case = GOLDEN["controller/ppo_clip"]
    ratios, advantages = np.array(case["input"]["ratio_advantage"]).T
    found = clipped_surrogate(ratios, advantages, case["input"]["clip"])
    np.testing.assert_allclose(found, case["expected"], atol=1e-12)


def test_slopes_are_the_derivative_of_the_surrogate():
    rng = np.random.default_rng(0)
    log_ratios, advantages = rng.normal(0, 0.4, 300), rng.normal(size=300)
    step = 1e-6
    up, down = (clipped_surrogate(np.exp(log_ratios + s), advantages, 0.2) for s in (step, -step))
    slopes = surrogate_slopes(np.exp(log_ratios), advantages, 0.2)
    np.testing.assert_allclose(slopes, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)
    assert 0 < np.count_nonzero(slopes == 0.0) < 300


def test_the_baseline_is_an_exponential_average():
    assert moved_baseline(0.5, [1.0, 0.0], 0.95) == pytest.approx(0.95 * (0.95 * 0.5 + 0.05))
    assert moved_baseline(0.5, [], 0.95) == 0.5


@pytest.mark.parametrize("kind", [PPO, ReinforceController])
def test_advantages_use_the_baseline_of_before(kind, monkeypatch):
    seen = []
    monkeypatch.setattr(kind, "_climb", lambda self, steps, old, advantages: seen.append(advantages))
    strategy = kind(bandit(), batch=2)
    for value in (0.2, 0.4, 1.0, 0.0):
        strategy.tell(strategy.ask()[0].id, reward(value))
    after_first = moved_baseline(0.3, [0.2, 0.4], 0.95)
    np.testing.assert_allclose(seen[0], [-0.1, 0.1])
    np.testing.assert_allclose(seen[1], [1.0 - after_first, -after_first])
    assert strategy.baseline == moved_baseline(after_first, [1.0, 0.0], 0.95)


def test_trials_carry_their_log_probabilities():
    strategy = PPO(nasnet_space(), seed=4)
    for trial in strategy.ask(3):
        assert len(trial.info["log_probs"]) == 50
        assert trial.info["log_prob"] == pytest.approx(sum(trial.info["log_probs"]), abs=1e-6)
        assert trial.info["log_prob"] == strategy.controller.log_prob(trial.architecture)
        assert trial.info["updates"] == 0


@pytest.mark.parametrize("kind", [PPO, ReinforceController])
def test_the_controller_learns(kind):
    means = bandit_rewards(lambda seed: kind(small(), seed=seed, learning_rate=3e-3), 0, 40, (4, 4, 4))
    assert np.mean(means[:2]) < 0.5 and np.mean(means[-5:]) > 0.9


def small() -> ProductSpace:
    return ProductSpace("small", {f"d{i}": Categorical(tuple(range(4))) for i in range(3)})


def test_the_first_update_of_ppo_is_that_of_reinforce_and_further_ones_are_clipped():
    first, second = PPO(small(), seed=1), ReinforceController(small(), seed=1)
    many = PPO(small(), seed=1, updates_per_batch=200, learning_rate=3e-3)
    trials = first.ask(20)
    batch = [(trial.architecture, trial.info["log_prob"], number % 5 / 5) for number, trial in enumerate(trials)]
    for strategy in (first, second, many):
        strategy._update(batch)
    assert first.updates == second.updates == many.updates == 1
    for name, array in second.controller.weights.items():
        np.testing.assert_allclose(first.controller.weights[name], array, atol=1e-9)
    ratios = [math.exp(many.controller.log_prob(architecture) - log_prob) for architecture, log_prob, _ in batch]
    # Without the clip these 200 steps make them 2e-19 to 60.
    assert min(ratios) > 0.1 and max(ratios) < 5


@pytest.mark.slow
@pytest.mark.parametrize(("updates", "final"), [(1, 0.9), (10, 0.99)])
def test_the_published_bandit_is_solved_within_3000_samples(updates, final):
    means = bandit_rewards(lambda seed: PPO(bandit(), seed=seed, updates_per_batch=updates), 0, 150)
    assert 0.2 < np.mean(means[:3]) < 0.4
    assert np.mean(means[-5:]) >= final


def test_without_a_learning_rate_it_stays_at_chance():
    means = bandit_rewards(lambda seed: PPO(bandit(), seed=seed, learning_rate=0.0), 0, 25)
    chance = np.mean([1 / n for n in CHOICES])
    spread = math.sqrt(sum(1 / n * (1 - 1 / n) for n in CHOICES)) / 10
    # The initial weights are not exactly uniform; they stay where they are.
    assert abs(np.mean(means) - chance) < 4 * spread / math.sqrt(500) + 0.03


def test_failures_count_as_the_worst_so_far_and_teach_nothing_before_there_is_any():
    strategy = PPO(small(), batch=4)
    results = [Result.failed("crashed"), reward(0.5), reward(0.25), reward(math.nan), Result.infeasible("too large")]
    for result in results:
        strategy.tell(strategy.ask()[0].id, result)
    assert strategy.updates == 1 and strategy.finished == [] and strategy.worst == 0.25
    assert strategy.baseline == pytest.approx(moved_baseline(0.3125, [0.5, 0.25, 0.25, 0.25], 0.95))


def test_a_metric_to_minimise_is_a_negative_reward():
    strategy = PPO(small(), objectives=[Objective("loss", "minimize")], batch=2)
    for value in (3.0, 1.0):
        strategy.tell(strategy.ask()[0].id, Result(metrics={"loss": value}))
    assert strategy.worst == -3.0 and strategy.baseline < -1.9


@pytest.mark.parametrize("kind", [PPO, ReinforceController])
def test_resuming_from_json_equals_going_on(kind):
    def run(strategy, rounds, stop=None):
        asked = []
        for number in range(rounds):
            if number == stop:
                state = json.loads(json.dumps(strategy.state_dict(), allow_nan=False))
                strategy = kind(bandit(), seed=3, batch=4)
                strategy.load_state_dict(state)
            asked += strategy.ask(3)
            for trial in list(strategy.pending.values())[:2]:
                strategy.tell(trial.id, reward(trial.id % 7 / 7))
        return [trial.to_json() for trial in asked], strategy.state_dict()

    whole, state = run(kind(bandit(), seed=3, batch=4), 9)
    resumed, again = run(kind(bandit(), seed=3, batch=4), 9, stop=5)
    assert resumed == whole and again == state
    assert kind(bandit(), seed=4).ask()[0].architecture != kind(bandit(), seed=3).ask()[0].architecture


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"clip": 1.5}, "clip"),
        ({"updates_per_batch": 0}, "updates_per_batch: got 0; allowed: an integer from 1"),
        ({"batch": True}, "batch"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"entropy_weight": math.inf}, "entropy_weight"),
        ({"baseline_decay": 1.0}, "baseline_decay"),
        ({"objectives": [Objective("a"), Objective("b")]}, "objectives"),
    ],
)
def test_wrong_settings_say_what_is_allowed(settings, match):
    with pytest.raises(UserError, match=match):
        PPO(small(), **settings)
