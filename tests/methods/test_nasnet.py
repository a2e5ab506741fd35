import math

import numpy as np
import pytest
import torch

from archsmith.cli import main
from archsmith.core.errors import UserError
from archsmith.families.cell_spaces import nas_bench_201_space
from archsmith.families.nasnet_space import Genotype, architecture_of, genotype_of, nasnet_a, nasnet_space
from archsmith.methods import load_method, method_table
from archsmith.methods.nasnet import (
    RECIPES,
    SYSTEM,
    Recipe,
    Settings,
    family_for,
    finalists,
    preset_settings,
    strategy,
    train,
)
from archsmith.space import Result
from archsmith.strategies import PPO, RandomSearch, ReinforceController
from archsmith.tasks.catalogue import open_task
from archsmith.train.auxiliary import WithAuxiliary


def test_it_is_listed():
    row, module = load_method("nasnet")
    assert row["slug"] == SYSTEM["slug"] and module.SYSTEM is SYSTEM
    assert "nasnet" in [row["slug"] for row in method_table()]


def test_the_defaults_are_the_papers():
    search = strategy()
    assert type(search) is PPO and search.space.name == "nasnet"
    assert (search.optimizer.learning_rate, search.entropy_weight, search.baseline_decay) == (3.5e-4, 1e-5, 0.95)
    assert (search.batch, search.controller.units, search.clip, search.updates_per_batch) == (20, 100, 0.2, 1)
    assert (Settings().children, Settings().finalists) == (20_000, 250)
    child = family_for(RECIPES["child"], image=(3, 32, 32), num_classes=10)
    assert (child.repeats, child.filters, RECIPES["child"].epochs, child.auxiliary) == (2, 32, 20, False)
    final = family_for(RECIPES["cifar"], image=(3, 32, 32), num_classes=10)
    assert (final.repeats, 24 * final.filters, final.final_keep, final.auxiliary) == (6, 768, 0.6, True)


@pytest.mark.parametrize(
    ("policy", "kind"), [("ppo", PPO), ("reinforce", ReinforceController), ("random", RandomSearch)]
)
def test_policies_work_on_any_space(policy, kind):
    search = strategy(nas_bench_201_space(), Settings(policy=policy, batch=2), seed=3)
    assert type(search) is kind
    for trial in search.ask(4):
        search.tell(trial.id, Result(metrics={"valid_accuracy": 0.5}))
    assert search.told == 4


def test_random_search_draws_every_option_equally_often():
    search = strategy(settings=Settings(policy="random"))
    trials = search.ask(2_000)
    for path, options in (("normal/0/first_op", 13), ("reduction/4/second", 6)):
        values = [trial.architecture[path] for trial in trials]
        for value in set(values):
            assert abs(values.count(value) / 2_000 - 1 / options) <= 4 * math.sqrt(1 / options / 2_000)
        assert len(set(values)) == options


def test_a_child_learns_the_digits_and_the_seed_decides_how():
    task = open_task("digits", limit=40)
    recipe = RECIPES["cpu-child"].model_copy(update={"epochs": 2})
    family = family_for(recipe, image=task.input_shape, num_classes=task.num_classes)
    found = [train(family.build(nasnet_a(), seed=0), task, recipe, seed=1) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["valid_accuracy"] > 0.4  # chance is 0.1


def test_the_command_line_says_that_it_is_used_from_python(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["search", "--method", "nasnet", "--task", "digits", "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "docs/systems/nasnet.md" in " ".join(capsys.readouterr().err.split())


def test_training_drives_the_drop_path_schedule(monkeypatch):
    task = open_task("digits", limit=60)
    recipe = RECIPES["cpu-final"].model_copy(update={"epochs": 1, "batch_size": 300})
    network = family_for(recipe, image=task.input_shape, num_classes=task.num_classes).build(nasnet_a(), seed=0)
    steps = task.steps_per_epoch(recipe.batch_size)
    seen, original = [], network.set_progress
    monkeypatch.setattr(network, "set_progress", lambda progress: (seen.append(progress), original(progress)))
    train(network, task, recipe)
    assert seen == pytest.approx([step / steps for step in range(steps + 1)])
    assert network.cells[-1].keep == pytest.approx(0.8)


def test_the_auxiliary_loss_is_added_on_the_same_augmented_images():
    task = open_task("digits", crop=1, mixup=0.5)
    recipe = Recipe(family={"filters": 4, "repeats": 1}, auxiliary_weight=0.4)
    network = family_for(recipe, image=(1, 16, 16), num_classes=10).build(nasnet_a(), seed=0)
    small = next(iter(task.batches("train", batch_size=8)))

    def head(which):  # the digits are too small for the head
        return lambda images: network.forward_with_auxiliary(images.repeat(1, 1, 2, 2))[which]

    class Enlarged:
        auxiliary = network.auxiliary

        def forward_with_auxiliary(self, images):
            return network.forward_with_auxiliary(images.repeat(1, 1, 2, 2))

    both = WithAuxiliary(task, Enlarged(), 0.4)
    generators = [torch.Generator().manual_seed(5) for _ in range(3)]
    loss, metrics = both.loss(head(0), small, generators[0])
    expected = [task.loss(head(which), small, generators[1 + which])[0].item() for which in (0, 1)]
    assert loss.item() == pytest.approx(expected[0] + 0.4 * expected[1], rel=1e-5)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert set(metrics) == {"accuracy"}
    loss.backward()
    assert network.auxiliary.classifier.weight.grad.abs().sum() > 0


def test_without_a_head_the_task_is_itself():
    task = open_task("digits")
    network = family_for(RECIPES["cpu-child"], image=(1, 8, 8), num_classes=10).build(nasnet_a(), seed=0)
    same, batch = WithAuxiliary(task, network, 0.4), next(iter(task.batches("train", batch_size=8)))
    losses = [each.loss(network, batch, torch.Generator().manual_seed(1))[0].item() for each in (task, same)]
    assert losses[0] == losses[1]
    for name in ("input_shape", "num_classes", "digest", "splits"):
        assert getattr(same, name) == getattr(task, name)
    assert same.size("train") == task.size("train") and torch.equal(same.examples(2), task.examples(2))


def test_finalists_are_the_best_and_each_network_comes_once():
    space = nasnet_space()
    first, second, third = (space.sample(np.random.default_rng(seed)) for seed in range(3))
    genotype = genotype_of(first)
    swapped = [
        block._replace(first=block.second, second=block.first, first_op=block.second_op, second_op=block.first_op)
        if block.combiner == "add"
        else block
        for block in genotype.normal
    ]
    twin = architecture_of(Genotype(tuple(swapped), genotype.reduction))
    assert twin != first
    scored = [(first, 0.2), (second, 0.9), (third, math.nan), (twin, 0.95), (second, 0.1)]
    assert finalists(scored, 5) == [twin, second]
    assert finalists(scored, 1) == [twin]
    assert finalists([(first, 0.5), (second, 0.5)], 1) == [first]


def test_the_settings_for_one_cpu_are_valid():
    settings = Settings(**preset_settings((3, 32, 32)))
    assert settings.children == 200 and settings.recipe in RECIPES and settings.final_recipe in RECIPES


@pytest.mark.parametrize("wrong", [{"policy": "greedy"}, {"children": 0}, {"clip": 1.0}, {"rate": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_a_skeleton_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="skeleton"):
        family_for(Recipe(skeleton="tower"), image=(3, 8, 8), num_classes=2)
