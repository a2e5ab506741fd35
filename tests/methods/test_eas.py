import json

import pytest
from shared_data import cifar10_arrays

from archsmith.cli import main
from archsmith.core.errors import UserError
from archsmith.evaluate.weights import FolderWeightStore, MemoryWeightStore
from archsmith.methods import load_method, method_table
from archsmith.methods.eas import (
    RECIPES,
    SYSTEM,
    Settings,
    evaluator,
    family_for,
    preset_settings,
    search,
    strategy,
    train_best,
)
from archsmith.run.study import JournalStore, recorded_trials
from archsmith.strategies import GrowthStage
from archsmith.tasks.catalogue import open_task
from archsmith.tasks.vision import ImageClassification
from archsmith.train.recipe import TrainingRecipe, result_weights


def quick(**changes):
    return Settings(**{**preset_settings((1, 8, 8)), "nets": 2, "episodes": 2, "wider": 1, "deeper": 1, **changes})


def test_it_is_listed():
    row, module = load_method("eas")
    assert row["slug"] == SYSTEM["slug"] and module.SYSTEM is SYSTEM
    assert "eas" in [row["slug"] for row in method_table()]


def test_the_defaults_are_the_published_ones():
    settings = Settings()
    family = family_for(settings, image=(3, 32, 32), num_classes=10)
    found = strategy(family.space, settings)
    assert (found.nets, found.wider, found.deeper) == (10, 4, 5)
    assert (found.entropy_weight, found.baseline_decay, found.reward_scale) == (1e-5, 0.95, 10.0)
    assert found.optimizer.learning_rate == 2e-3 and found.reward == "tan"
    assert [stage.episodes for stage in found.stages] == [15, 15]
    assert found.stages[0].widths["filters"] == tuple(range(4, 41, 4))
    assert found.stages[1].widths["filters"][:7] == (16, 32, 64, 96, 128, 192, 256)
    small = family_for(Settings(large_episodes=0), image=(3, 32, 32), num_classes=10)
    assert strategy(small.space, Settings(large_episodes=0)).controller.size == 76_447
    dense = Settings(space="dense")
    dense_family = family_for(dense, image=(3, 32, 32), num_classes=10)
    found = strategy(dense_family.space, dense)
    assert (found.wider, found.deeper) == (10, 5) and found.stages == (GrowthStage(15),)
    assert dense_family.space.growths == tuple(range(4, 49, 2))
    assert (family.widen_noise, family.deepen_noise, family.norm_eps, family.norm_momentum) == (0.01, 1e-3, 1e-5, 0.1)
    shared = {"batch_size": 64, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine"}
    assert RECIPES["published"].candidate == TrainingRecipe(epochs=20, lr=0.02, **shared)
    assert RECIPES["published"].final == TrainingRecipe(epochs=300, lr=0.1, **shared)


@pytest.mark.parametrize("space", ["plain", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_search_on_the_digits_inherits_and_ends_with_a_trained_network(space, tmp_path, monkeypatch):
    short = {name: recipe.changed({"epochs": 1, "batch_size": 20}) for name, recipe in RECIPES["cpu"]._asdict().items()}
    monkeypatch.setitem(RECIPES, "cpu", RECIPES["cpu"]._replace(**short))
    task, weights = open_task("digits", limit=20), FolderWeightStore(tmp_path / "study" / "weights")
    settings = quick(space=space)
    outcome = search(task, settings, seed=3, store=JournalStore(tmp_path / "study"), costs=("params",))
    assert (outcome.told, outcome.failed, outcome.status) == (5, 0, "finished")
    rows = list(recorded_trials(tmp_path / "study"))
    family = family_for(settings, image=task.input_shape, num_classes=10)
    start, result = rows[0]
    assert start.parent is None and result is not None
    for trial, grown in rows[1:]:
        assert trial.parent == start.id and trial.info["weights"] == result.weights
        assert grown.metrics["inherited"] == 1.0
        assert grown.costs["params"] > result.costs["params"]
        assert grown.costs["params"] == family.exact_costs(trial.architecture)["params"]
    last = train_best(task, outcome, weights, settings, costs=())
    network = family.build(outcome.best[0].architecture)
    network.load_state_dict(result_weights(weights.get(last.weights)))
    assert task.evaluate(network.eval(), "valid")["accuracy"] == last.metrics["valid_accuracy"]
    again = search(task, settings, seed=3, weights=MemoryWeightStore(), costs=("params",))
    assert again.best[0].to_json() == outcome.best[0].to_json()
    assert json.dumps(again.best[1].to_json()["metrics"]) == json.dumps(outcome.best[1].to_json()["metrics"])


def test_recipes_are_told_apart_by_the_parent():
    trainer = evaluator(open_task("digits", limit=20), quick(), space={"blocks": 2}, costs=())
    assert trainer.start.recipe == RECIPES["cpu"].start and trainer.candidate.recipe == RECIPES["cpu"].candidate
    assert trainer.start.family.space.blocks == trainer.candidate.family.space.blocks == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_real_images_inherited_candidates_are_better_than_reinitialised_ones():
    """The claim that carries the method, on the CIFAR-10 subset at 16x16: paired over the candidates of one search."""
    arrays = cifar10_arrays()
    task = ImageClassification.from_arrays(
        arrays["x_train"],
        arrays["y_train"],
        name="cifar10-subset",
        valid_fraction=0.25,
        test_fraction=0.01,
        resolution=16,
    )
    settings = Settings(**preset_settings(task.input_shape))
    trainer, weights = evaluator(task, settings, costs=()), MemoryWeightStore()
    found, gains = strategy(trainer.candidate.family.space, settings, seed=0), []
    while not found.done:
        for trial in found.ask(settings.nets):
            result = trainer.evaluate(trial, weights=weights)
            if trial.parent is not None:
                fresh = trainer.evaluate(trial)
                gains.append(result.metrics["valid_accuracy"] - fresh.metrics["valid_accuracy"])
            found.tell(trial.id, result)
    assert len(gains) == 12
    assert sum(gains) / len(gains) > 0.05
    assert sum(gain > 0 for gain in gains) >= 10


def test_the_command_line_says_that_it_is_used_from_python(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["search", "--method", "eas", "--task", "digits", "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "docs/systems/eas.md" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("wrong", [{"space": "cells"}, {"nets": 0}, {"episodes": 0}, {"baseline_decay": 2}, {"c": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_what_cannot_be_is_said():
    task = open_task("digits", limit=20)
    with pytest.raises(UserError, match=r"budget: got 5; allowed: nothing here\. Set Settings\(episodes=\.\.\.\)"):
        search(task, budget=5)

    with pytest.raises(UserError, match="weights: got a store in memory with several workers; allowed: a FolderWeight"):
        search(task, workers=2)
    with pytest.raises(UserError, match="a store in memory with time_limit"):
        search(task, time_limit=5, weights=MemoryWeightStore())

    class Nothing:
        best = None

    with pytest.raises(UserError, match="no trained network"):
        train_best(task, Nothing(), MemoryWeightStore())  # type: ignore[arg-type]
