import sys
from dataclasses import replace
from pathlib import Path

import darts_runs
import pytest
import torch
from mobile_samples import small_family

from archsmith.core.errors import UserError
from archsmith.methods import atomnas, clicktrain, darts, load_method, nasnet
from archsmith.methods.gradient_noise import ETAS, Settings, attach, chosen_eta
from archsmith.tasks import open_task
from archsmith.train.recipe import Training, TrainingRecipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "evidence"))
import gradient_noise as evidence


def test_it_is_listed_and_has_the_published_defaults():
    row, module = load_method("gradient-noise", kind="train")
    assert row["docs"] == "docs/systems/gradient-noise.md" and module.SYSTEM["arxiv"] == "1511.06807"
    settings = Settings()
    assert (settings.eta, settings.gamma, settings.noise_first) == (0.01, 0.55, False)
    assert ETAS == (0.01, 0.3, 1.0)


@pytest.mark.parametrize("recipe", [atomnas.Settings, clicktrain.Recipe, nasnet.Recipe, TrainingRecipe])
def test_recipes_have_it_switched_off(recipe):
    assert recipe().gradient_noise == 0.0 and recipe().gradient_noise_decay == 0.55


def test_attach_hands_its_settings_on():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    noise = attach(
        torch.optim.SGD(parameters, lr=0.1),
        Settings(eta=0.3, gamma=0.4, clip_norm=2.0, noise_first=True),
        seed=7,
        parameters=parameters[:1],
    )
    assert (noise.noise.eta, noise.noise.gamma, noise.noise.seed) == (0.3, 0.4, 7)
    assert noise.clip_norm == 2.0 and noise.noise_first and len(noise.parameters) == 1
    with pytest.raises(ValueError, match="noise_first"):
        Settings(noise_first=True)


def test_the_variance_is_chosen_by_validation():
    eta, scores = chosen_eta({0.0: 0.5, 0.01: 0.9, 0.3: float("nan"), 1.0: 0.9}.__getitem__)
    assert eta == 0.01 and scores[:2] == [0.5, 0.9]
    assert chosen_eta(lambda eta: float("nan"))[0] == 0.0
    with pytest.raises(UserError, match="etas"):
        chosen_eta(float, ())


@pytest.fixture(scope="module")
def task():
    return open_task("digits", limit=32)


def weights_after(task, recipe, epochs, state=None):
    family = small_family(num_classes=10)
    training = Training(family.build(family.smallest(), seed=0), task, recipe, seed=1)
    if state is not None:
        training.load(state)
    training.run(epochs)
    return training.state()


def test_an_ordinary_recipe_with_noise_is_another_training_and_resumes_exactly(task):
    recipe = TrainingRecipe(epochs=2, batch_size=16, clip_norm=1.0, gradient_noise=0.01)
    whole = weights_after(task, recipe, 2)
    plain = weights_after(task, replace(recipe, gradient_noise=0.0), 2)
    resumed = weights_after(task, recipe, 2, weights_after(task, recipe, 1))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in whole.items())


def test_a_recipe_refuses_a_negative_variance():
    with pytest.raises(UserError, match=r"recipe.gradient_noise: got -1"):
        TrainingRecipe(gradient_noise=-1.0)


@pytest.mark.slow
def test_noise_trains_the_deep_network_that_plain_descent_does_not():
    etas = {eta: [evidence.best_accuracy(16, eta, seed) for seed in range(2)] for eta in (0.0, 0.05)}
    assert min(etas[0.05]) > 0.9
    assert min(etas[0.0]) < 0.6 and sum(etas[0.05]) > sum(etas[0.0])


def relaxed(**changes):
    settings = {"search_epochs": 1, "search_batch_size": 8, "search_channels": 4, "search_cells": 3, "epochs": 1}
    small = {"batch_size": 16, "auxiliary_weight": 0.0, "drop_path": 0.0, "order": "first", "logit_lr": 0.1}
    return darts.Searcher(
        family=darts_runs.small_family(),
        task=darts_runs.small_task(),
        seed=1,
        settings=darts.Settings(**{**settings, **small, **changes}),
    )


@pytest.mark.parametrize("on", ["weights", "logits", "both"])
def test_a_differentiable_search_has_noise_on_weights_logits_or_both(on):
    plain, noisy = relaxed(), relaxed(gradient_noise=0.1, gradient_noise_on=on)
    for search in (plain, noisy):
        darts_runs.stop_after(search, 1)
    moved = {
        name: any(not torch.equal(ours, theirs[key]) for key, ours in one.items())
        for name, one, theirs in (
            ("weights", noisy.supernet.weights(), plain.supernet.weights()),
            ("logits", noisy.supernet.logits, plain.supernet.logits),
        )
    }
    # The logits move first: their noise reaches the weights of this step too, not the other way round.
    assert moved["logits"] == (on != "weights") and moved["weights"]


def test_noise_of_a_search_counts_steps_and_begins_again_with_the_final_network():
    search = relaxed(gradient_noise=0.1, search_epochs=3, gradient_noise_on="both")
    assert search._noise("weights").sigma(0) == pytest.approx(0.1**0.5)
    assert search._noise("logits").stream == "logits"
    steps = 3 * search._steps[0]
    final = search._noise("final")
    assert final.first == steps and final.stream == "final"
    assert relaxed(gradient_noise=0.1, gradient_noise_on="logits")._noise("final") is None
    assert relaxed()._noise("weights") is None


def test_a_stopped_search_with_noise_goes_on_bit_for_bit():
    whole, halted = (relaxed(gradient_noise=0.1, gradient_noise_on="both") for _ in range(2))
    darts_runs.stop_after(halted, 1)
    again = relaxed(gradient_noise=0.1, gradient_noise_on="both")
    again.load(*darts_runs.copied(halted.state()))
    figures, left = darts_runs.to_the_end(whole), darts_runs.to_the_end(again)
    assert left == figures and again.chosen == whole.chosen
