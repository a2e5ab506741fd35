import dataclasses
import json
import math

import pytest
import torch
from darts_runs import Stop, copied, small_family, small_task, stop_after, to_the_end
from small_runs import run_cli

from archsmith.core.errors import UserError
from archsmith.families import relaxable_families
from archsmith.families.cells import NasBench201Family
from archsmith.families.darts_space import Genotype, architecture_of
from archsmith.layers.darts import DenseLayers
from archsmith.methods import load_method
from archsmith.methods.darts import Searcher, Settings, preset_settings
from archsmith.run.relaxed_settings import plan_of
from archsmith.train.schedules import cosine_by_epoch

SMALL = {
    "order": "second",
    "search_epochs": 2,
    "search_batch_size": 8,
    "search_channels": 4,
    "search_cells": 3,
    "epochs": 2,
    "batch_size": 16,
    "logit_lr": 0.1,
    "auxiliary_weight": 0.0,
    "drop_path": 0.3,
}


def searcher(**changes):
    return Searcher(
        family=changes.pop("family", small_family()),
        task=small_task(),
        seed=changes.pop("seed", 1),
        settings=Settings(**{**SMALL, **changes}),
    )


def test_it_is_listed_and_has_the_published_defaults():
    row, module = load_method("darts")
    assert row["kind"] == "search" and module.SYSTEM["arxiv"] == "1806.09055"
    plan = plan_of(Settings())
    (search,), (training,) = plan.search, plan.final
    assert (plan.channels, plan.cells, plan.order) == (16, 8, "second")
    assert (plan.logit_lr, plan.logit_betas, plan.logit_decay) == (3e-4, (0.5, 0.999), 1e-3)
    assert (search.epochs, search.batch_size, search.lr, search.lr_min) == (50, 64, 0.025, 0.001)
    assert (search.momentum, search.weight_decay, search.clip_norm, search.logits) == (0.9, 3e-4, 5.0, True)
    assert (training.epochs, training.batch_size, training.lr, training.lr_min) == (600, 96, 0.025, 0.0)
    assert (training.drop_path, training.auxiliary_weight, training.logits) == (0.2, 0.4, False)


def test_rates_are_those_of_their_epoch():
    rates = [cosine_by_epoch(epoch, epochs=50, peak=0.025, floor=0.001) for epoch in range(50)]
    assert rates[0] == 0.025
    assert rates[25] == pytest.approx(0.013)
    assert rates[49] == pytest.approx(0.001 + 0.024 * (1 + math.cos(math.pi * 49 / 50)) / 2)


def test_a_search_finds_trains_and_delivers():
    search = searcher()
    figures = to_the_end(search)
    assert [epoch["phase"] for epoch in figures] == ["search", "search", "final", "final"]
    assert [epoch["within_budget"] for epoch in figures] == [False, False, True, True]
    assert all(math.isfinite(epoch["loss"]) for epoch in figures)
    assert all(0 < epoch["entropy"]["normal"] <= math.log(4) + 1e-6 for epoch in figures[:2])
    delivered = search.deliver()
    assert delivered.architecture == search.chosen
    assert set(delivered.figures) >= {"discretisation_gap", "weightless_operations"}
    gap = delivered.figures["supernet_accuracy"] - delivered.figures["selected_path_accuracy"]
    assert delivered.figures["discretisation_gap"] == pytest.approx(gap)
    assert delivered.network(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    assert not delivered.network.training and type(delivered.network.layers) is DenseLayers
    assert search.done and search.epochs == 4


def test_the_logits_learn_from_one_half_and_the_weights_from_the_other():
    search = searcher()
    first, second = (set(half.split_indices("train").tolist()) for half in search.halves)
    assert not first & second
    assert first | second == set(search.task.split_indices("train").tolist())
    assert abs(len(first) - len(second)) <= 1
    seen = {"weights": [], "logits": []}
    for name, half in zip(seen, search.halves, strict=True):
        loss = half.loss

        def spied(forward, batch, generator, loss=loss, name=name):
            seen[name].append(batch.inputs)
            return loss(forward, batch, generator)

        half.loss = spied
    stop_after(search, 2)
    assert len(seen["logits"]) == 2 and len(seen["weights"]) == 2 * 4  # w', both sides of the difference, the step
    assert all(torch.equal(x, seen["weights"][0]) for x in seen["weights"][:4])


def test_logits_and_weights_have_optimisers_of_their_own():
    search = searcher(logit_lr=0.0, logit_decay=0.0)
    logits = {name: tensor.detach().clone() for name, tensor in search.supernet.logits.items()}
    weights = {name: tensor.detach().clone() for name, tensor in search.supernet.weights().items()}
    stop_after(search, 3)
    assert all(torch.equal(tensor, logits[name]) for name, tensor in search.supernet.logits.items())
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in search.supernet.weights().items())


@pytest.mark.parametrize("steps", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_stopped_search_goes_on_bit_for_bit(steps):
    whole, halted = searcher(), searcher()
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    stop_after(halted, 1)  # what happens later does not reach the checkpoint
    again = searcher()
    again.load(tensors, json.loads(json.dumps(state)))
    assert again.position.total == steps
    figures, left = to_the_end(whole), to_the_end(again)
    assert left == figures[-len(left) :]
    assert again.chosen == whole.chosen
    ours, theirs = again.deliver().network.state_dict(), whole.deliver().network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_before_the_end_a_path_of_the_supernet_is_delivered():
    search = searcher()
    stop_after(search, 3)
    before = {name: tensor.clone() for name, tensor in search.supernet.state_dict().items()}
    delivered = search.deliver()
    assert delivered.architecture == search.supernet.derive()
    assert delivered.network(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in search.supernet.state_dict().items())


def test_the_auxiliary_classifier_trains_and_is_not_delivered():
    assert searcher().family.auxiliary is False
    task = small_task(48, 32)
    settings = Settings(**{**SMALL, "order": "first", "search_epochs": 1, "epochs": 1, "auxiliary_weight": 0.4})
    search = Searcher(family=small_family(image=(3, 32, 32)), task=task, seed=0, settings=settings)
    to_the_end(search)
    assert search.network.auxiliary.classifier.weight.grad is not None
    assert search.deliver().network.auxiliary is None


def test_collapse_is_counted():
    supernet = searcher().supernet
    genotype = Genotype((("skip_connect", 0), ("sep_conv_3x3", 1)) * 2, (("max_pool_3x3", 0), ("skip_connect", 1)) * 2)
    point = architecture_of(dataclasses.replace(genotype, normal_concat=(2, 3), reduce_concat=(2, 3)))
    assert supernet.weightless(point) == {"normal": 2, "reduce": 4}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"family": "cells"}, "family: got 'str'; allowed: 'darts' or .*, whose choices"),
        ({"search_batch_size": 64}, "batch_size: got 64; allowed: 1 to 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, text):
    with pytest.raises(UserError, match=text):
        searcher(**changes)


def test_tasks_that_cannot_be_halved_are_refused():
    task = small_task()
    task.training_halves = None
    with pytest.raises(UserError, match="different halves of them"):
        Searcher(family=small_family(), task=task, seed=0, settings=Settings(**SMALL))


def test_recipes_fit_the_image():
    assert preset_settings((3, 16, 16))["order"] == "first"
    assert preset_settings((3, 32, 32)) == {}
    assert preset_settings((3, 64, 64)) == {"auxiliary_weight": 0.0}
    for image in ((1, 8, 8), (3, 32, 32), (3, 48, 48)):
        assert Settings(**preset_settings(image))


def test_the_command_line_names_the_family_that_works(tmp_path):
    done = run_cli("search", "--method", "darts", "--task", "digits", "--out", tmp_path / "run")
    assert done.returncode == 2
    named = " or ".join(map(repr, relaxable_families()))
    assert f"family: got 'mobile'; allowed: {named} for the method darts" in " ".join(done.stdout.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_whole_run_from_the_command_line(tmp_path):
    run = tmp_path / "run"
    words = ["search", "--method", "darts", "--family", "darts", "--task", "digits", "--out", run, "--quiet"]
    for pair in ("search_epochs=1", "search_batch_size=64", "epochs=2"):
        words += ["--set", pair]
    for pair in ("channels=4", "cells=3", "nodes=2"):
        words += ["--family-set", pair]
    done = run_cli(*words)
    assert done.returncode == 0, done.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and "discretisation_gap" in result["figures"]
    verified = run_cli("verify", run)
    assert verified.returncode == 0, verified.stdout


def test_it_searches_every_family_that_can_be_relaxed():
    family = NasBench201Family(image=(3, 8, 8), num_classes=3, channels=4, cells=1)
    settings = Settings(**{**SMALL, "order": "first"})
    search = Searcher(family=family, task=small_task(), seed=0, settings=settings)
    stop_after(search, 3)
    tensors, state = copied(search.state())
    again = Searcher(family=family, task=small_task(), seed=0, settings=settings)
    again.load(tensors, json.loads(json.dumps(state)))
    figures, others = to_the_end(search), to_the_end(again)
    assert figures == others
    assert figures[0]["operations"] == {"cell": 6} and set(figures[0]["probabilities"]) == {"cell"}
    assert figures[0]["expected_macs"] > 0
    delivered = again.deliver()
    assert family.architecture_of(delivered.network) == search.chosen
    assert delivered.network(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_logits_can_wait():
    search = searcher(order="first", warmup_epochs=1)
    before = {name: tensor.detach().clone() for name, tensor in search.supernet.logits.items()}
    search.advance(Stop())
    assert all(torch.equal(tensor, before[name]) for name, tensor in search.supernet.logits.items())
    stop_after(search, 1)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in search.supernet.logits.items())
