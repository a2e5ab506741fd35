import json
import math
from pathlib import Path

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.families.densenet_space import DenseSpace
from archsmith.families.plain_space import LARGE_WIDTHS, SMALL_WIDTHS, PlainSpace
from archsmith.space import Architecture, Objective, Result
from archsmith.strategies import open_strategy
from archsmith.strategies.eas import CEILING, Eas, GrowthStage, moved_baseline, tangent_reward
from archsmith.testing.strategies import flat_space

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden/eas.json").read_text())["cases"]


def scored(value, **more):
    return Result(metrics={"valid_accuracy": value}, **more)


def test_the_published_rewards():
    case = GOLDEN["tan-shaped rewards minus moving baseline over three episodes"]
    baseline, found = 0.0, []
    for accuracies in case["input"]["val_acc"]:
        rewards = [tangent_reward(a) for a in accuracies]
        baseline = moved_baseline(baseline, rewards, case["input"]["decay"])  # before it is subtracted
        found.append([reward - baseline for reward in rewards])
    np.testing.assert_allclose(found, case["expected"], atol=1e-9)


def test_a_search_moves_its_baseline_by_that_rule_and_weighs_all_actions_alike(monkeypatch):
    case = GOLDEN["tan-shaped rewards minus moving baseline over three episodes"]
    search, seen = Eas(PlainSpace(), nets=3), []

    def listen(wider, deeper, entropy_weight):
        assert entropy_weight == 1e-5
        seen.append([[a for _, a in wider], [a for _, a in deeper]])
        return 0.0, {}

    monkeypatch.setattr(search.controller, "objective", listen)
    (start,) = search.ask()
    search.tell(start.id, scored(0.5))
    for accuracies in case["input"]["val_acc"]:
        for trial, accuracy in zip(search.ask(3), accuracies, strict=True):
            search.tell(trial.id, scored(accuracy))
    for (wider, deeper), expected in zip(seen, case["expected"], strict=True):
        np.testing.assert_allclose(wider, np.repeat(expected, 4) / 10, atol=1e-9)
        np.testing.assert_allclose(deeper, np.repeat(expected, 5) / 10, atol=1e-9)


def test_a_perfect_score_has_a_finite_reward():
    assert tangent_reward(1.0) == tangent_reward(CEILING) == math.tan(CEILING * math.pi / 2) < 1_000
    assert tangent_reward(-1.0) == 0.0 and tangent_reward(0.5) == pytest.approx(1.0)


def test_every_network_grows_from_the_start_and_says_how():
    space = PlainSpace()
    search = Eas(space, seed=3)
    (start,) = search.ask(5)  # nothing grows before it is trained
    assert start.architecture == space.start() and start.parent is None
    assert search.ask(5) == []
    search.tell(start.id, scored(0.6, weights="abc"))
    for trial in search.ask(10):
        assert trial.parent == start.id and trial.info["weights"] == "abc" and trial.info["episode"] == 0
        parent = space.validate(Architecture.from_json(trial.info["parent_architecture"]))
        assert parent == space.start()
        assert space.grown(parent, [tuple(edit) for edit in trial.info["edits"]]) == trial.architecture
        kinds = [kind for kind, _ in trial.info["actions"]]
        assert kinds == ["widen"] * 4 + ["deepen"] * 5
        layers = [token for token in space.tokens(trial.architecture) if token != "pool"]
        assert len(layers) == 5 + 5
        assert trial.info["log_prob"] < 0
    assert search.ask()[0].info["episode"] == 1


def test_log_probabilities_are_those_of_the_controller():
    search = started(Eas(PlainSpace(), seed=1))
    trial = search.ask()[0]
    actions = [(kind, tuple(chosen)) for kind, chosen in trial.info["actions"]]
    wider, deeper = search._steps(search.base.architecture, actions)
    value, _ = search.controller.objective([(s, 1.0) for s in wider], [(s, 1.0) for s in deeper], 0.0)
    assert value == pytest.approx(trial.info["log_prob"], abs=1e-9)
    assert sum(len(step.chosen) for step in deeper) < 15 or all(step.chosen[0] < 4 for step in deeper)


def started(search, value=0.5):
    (start,) = search.ask()
    search.tell(start.id, scored(value))
    return search


def test_a_full_string_ends_the_deepening():
    space = PlainSpace(depth=2, longest=11)  # 9 tokens and two more
    search = started(Eas(space, deeper=5))
    for trial in search.ask(5):
        assert len(space.tokens(trial.architecture)) == 11
        assert [kind for kind, _ in trial.info["actions"]] == ["widen"] * 4 + ["deepen"] * 2


def test_stages_go_on_from_the_best_network_with_other_widths():
    filters = sorted({*SMALL_WIDTHS["filters"], *LARGE_WIDTHS["filters"]})
    units = sorted({*SMALL_WIDTHS["units"], *LARGE_WIDTHS["units"]})
    space = PlainSpace(filters=filters, units=units)
    stages = (GrowthStage(2, SMALL_WIDTHS), GrowthStage(1, LARGE_WIDTHS))
    search = started(Eas(space, nets=3, wider=1, deeper=1, stages=stages))
    first = search.ask(10)
    assert len(first) == 6 and not search.done and search.ask() == []
    assert max(max(w for w in trial.architecture.values()) for trial in first) <= 16
    for trial in first:
        search.tell(trial.id, scored(0.9 if trial.id == 4 else 0.6, weights=f"w{trial.id}"))
    second = search.ask(10)
    assert len(second) == 3
    for trial in second:
        assert trial.parent == 4 and trial.info["weights"] == "w4"
        grown = space.grown(first[2].architecture, [tuple(edit) for edit in trial.info["edits"]])
        assert grown == trial.architecture
        widened = [edit for edit in trial.info["edits"] if edit[0] == "widen"]
        assert all(edit[3] in LARGE_WIDTHS["units" if edit[1] == 4 else "filters"] for edit in widened)
    for trial in second:
        search.tell(trial.id, Result.failed("crashed"))
    assert search.done and search.ask() == []
    assert search.best.trial == 4
    search.action_probabilities()


def test_failures_count_as_the_worst_and_teach_nothing_before_there_is_one():
    search = started(Eas(PlainSpace(), nets=2))
    trials = search.ask(6)
    search.tell(trials[0].id, Result.failed("crashed"))
    assert search.finished == []
    search.tell(trials[1].id, scored(0.5))
    search.tell(trials[2].id, scored(math.nan))
    assert search.updates == 1 and search.baseline == pytest.approx(0.95)
    search = started(Eas(PlainSpace(), nets=2))
    crashed = search.ask(1)[0]
    search.tell(crashed.id, scored(math.inf))
    assert search.best.value == 0.5


def test_the_dense_space_widens_and_inserts_and_settles():
    space = DenseSpace()
    search = started(Eas(space, wider=10, deeper=5, seed=2))
    trial = search.ask()[0]
    kinds = [kind for kind, _ in trial.info["actions"]]
    assert kinds == ["widen"] * 10 + ["deepen"] * 5
    dense = space.dense(trial.architecture)
    assert sum(map(len, dense.growths)) == 8
    assert [edit[0] for edit in trial.info["edits"]][-3:] == ["stem", "transition", "transition"]
    every = [growth for rows in dense.growths for growth in rows]
    assert dense.stem >= int(2 * sum(every) / len(every))


def score(trial, space, wanted=8):
    """Return ``-|depth - 8| - |log2 width - 3|``: layers without pools, geometric mean width of the convolutions."""
    tokens = space.tokens(trial.architecture)
    depth = sum(token != "pool" for token in tokens)
    widths = [int(token.split("-")[1]) for token in tokens if token.startswith("conv")]
    return -abs(depth - wanted) - abs(float(np.mean(np.log2(widths))) - 3)


def late_mean(search, space, rate, episodes=30, nets=10):
    """Return the mean score of the last 5 episodes."""
    search = started(search)
    rewards = []
    for _ in range(episodes):
        for trial in search.ask(nets):
            rewards.append(rate(trial, space))
            search.tell(trial.id, scored(rewards[-1]))
    return float(np.mean(rewards[-5 * nets :]))


def compared(space, rate, seeds, shape=None, **settings):
    found = []
    for seed in seeds:
        pair = [
            late_mean(
                Eas(
                    space,
                    seed=seed,
                    reward="plain",
                    policy=policy,
                    **{"nets": (shape or {}).get("nets", 10)} | settings,
                ),
                space,
                rate,
                **(shape or {}),
            )
            for policy in ("controller", "random")
        ]
        found.append(pair)
    return np.array(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_controller_learns_what_pays():
    """Published target: better than random search in at least 8 of 10 seeds."""
    means = compared(PlainSpace(), score, range(10))
    assert (means[:, 0] > means[:, 1]).sum() >= 8, means


def test_both_actors_learn():
    """Small: the first wants wide layers, the second layers in block 2; both have to be found."""
    space = PlainSpace(depth=6, longest=34)

    def rate(trial, space):
        layers = space.layers(trial.architecture)
        return len(layers[2]) + 0.2 * sum(layer.width > 4 for rows in layers[:4] for layer in rows)

    shorter = {"episodes": 15, "nets": 6}
    means = compared(space, rate, range(2), shorter, wider=1, deeper=2, learning_rate=0.02, reward_scale=1.0, units=12)
    assert (means[:, 0] > means[:, 1] + 0.5).all(), means


def test_it_is_listed_and_says_what_it_needs():
    assert type(open_strategy("eas", PlainSpace(), nets=2)) is Eas
    for settings, message in (
        ({"nets": 0}, "nets: got 0; allowed: an integer from 1"),
        ({"wider": -1}, "wider: got -1; allowed: an integer from 0"),
        ({"baseline_decay": 2.0}, "baseline_decay"),
        ({"reward_scale": 0.0}, "reward_scale"),
        ({"reward": "log"}, "'tan' or 'plain'"),
        ({"policy": "greedy"}, "'controller' or 'random'"),
        ({"stages": ()}, "at least one GrowthStage"),
        ({"stages": (GrowthStage(), GrowthStage(3))}, "a number of episodes for each stage but the last"),
        ({"objectives": (Objective("error", "minimize"),)}, "objectives"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ):
        with pytest.raises(UserError, match=message):
            Eas(PlainSpace(), **settings)
    with pytest.raises(UserError, match=r"stage\.episodes: got 0"):
        GrowthStage(0)
    with pytest.raises(UserError, match="space: got flat; allowed: a space that grows"):
        Eas(flat_space())


def test_probabilities_can_be_looked_at():
    search = Eas(PlainSpace(), seed=0)
    found = search.action_probabilities()
    assert [token for token, _ in found["widen"]] == ["conv-4-3"] * 4 + ["fc-8"]
    assert all(0.4 < p < 0.6 for _, p in found["widen"])
    assert sum(p for _, p in found["deepen"]) == pytest.approx(1) and len(found["deepen"]) == 5
