import json
import math

import pytest
import torch
from darts_runs import copied, small_family, small_task, stop_after, to_the_end
from shared_data import cifar10_arrays
from sharp_recipe import case
from small_runs import run_cli

from archsmith.core.errors import UserError
from archsmith.families.darts import open_family
from archsmith.families.hypercuboid import HyperCuboidFamily, hypercuboid_family
from archsmith.layers.sharp import SharpPrimitives
from archsmith.methods import load_method
from archsmith.methods.sharpdarts import PRESETS, Searcher, Settings, plan_of, preset_settings
from archsmith.supernet import MaxW, Softmax
from archsmith.supernet.grid_paths import bottom_up_path, longest_path, top_down_path
from archsmith.tasks.vision import ImageClassification

SMALL = {
    "search_epochs": 2,
    "search_batch_size": 8,
    "search_channels": 4,
    "search_cells": 3,
    "search_lr_warmup": 0,
    "epochs": 2,
    "batch_size": 16,
    "lr_warmup": 1,
    "logit_lr": 0.1,
    "auxiliary_weight": 0.0,
    "drop_path": 0.3,
}


def cells(**changes):
    operations = ("none", "skip_connect", "dil_conv_3x3", "choke_conv_3x3")
    small = {"channels": 4, "cells": 3, "nodes": 2, "choke": 8, "operations": operations}
    return open_family("sharpdarts", image=(3, 8, 8), num_classes=3, **{**small, **changes})


def grid(**changes):
    small = {"widths": (4, 8), "stages": 1, "filters": 8}
    return hypercuboid_family(image=(3, 8, 8), num_classes=3, **{**small, **changes})


def searcher(family=None, **changes):
    settings = Settings(**{**SMALL, **changes})
    return Searcher(family=family or cells(), task=small_task(), seed=1, settings=settings)


def test_it_is_listed_and_has_the_published_defaults():
    row, module = load_method("sharpdarts")
    assert row["kind"] == "search" and module.SYSTEM["arxiv"] == "1903.09900"
    assert load_method("sharp-darts")[1] is module
    s = Settings()
    plan = plan_of(s)
    (search,), (training,) = plan.search, plan.final
    assert (plan.channels, plan.cells, plan.order) == (16, 8, "first")
    assert (plan.logit_lr, plan.logit_betas, plan.logit_decay) == (3e-4, (0.5, 0.999), 1e-3)
    assert (search.epochs, search.lr, search.lr_min) == (120, 0.025, 1e-4)
    assert (s.search_power, s.search_lr_warmup, s.power, s.lr_warmup, s.max_w) == (2, 5, 2, 5, True)
    assert (training.epochs, training.batch_size, training.lr, training.lr_min) == (2000, 64, 0.025, 1e-8)
    assert (training.drop_path, training.auxiliary_weight) == (0.2, 0.4)
    large = plan_of(Settings(**PRESETS["imagenet"])).final[0]
    assert (large.epochs, large.lr, large.lr_min, large.weight_decay) == (300, 0.05, 7.5e-4, 1e-4)
    assert plan_of(Settings(**PRESETS["imagenet"])).search[0].weight_decay == 3e-4


def test_rates_are_the_published_ones():
    settings = Settings(search_batch_size=8, batch_size=8, auxiliary_weight=0.0)
    search = Searcher(family=small_family(), task=small_task(), seed=0, settings=settings)
    expected = case("cosine_power_annealing:search_default_120")["expected"]
    phase = search.phases[0]
    found = {epoch: search.rate(phase, int(epoch) - 1) for epoch in expected}
    assert found == pytest.approx(expected, rel=1e-9)
    assert search.rate(search.phases[1], 1999) == 1e-8
    with pytest.raises(UserError, match=r"cosine_power\.warmup: got 2; allowed: fewer than the 2 epochs"):
        searcher(search_lr_warmup=2)


@pytest.mark.parametrize("family", [cells, grid, small_family], ids=["cells", "grid", "darts"])
def test_a_search_finds_trains_and_delivers(family):
    search = searcher(family())
    assert isinstance(search.supernet.relaxation, MaxW)
    if family is cells:
        assert search.small.choke == 32  # published searches have it, whatever the final network has
    groups = len(search.supernet.options)
    figures = to_the_end(search)
    assert [epoch["phase"] for epoch in figures] == ["search", "search", "final", "final"]
    assert all(math.isfinite(epoch["loss"]) for epoch in figures)
    for epoch in figures[:2]:
        assert len(epoch["entropy"]) == len(epoch["probabilities"]) == groups
        for rows in epoch["probabilities"].values():  # of the softmax, not what candidates are multiplied with
            assert torch.tensor(rows).sum(-1).tolist() == pytest.approx([1.0] * len(rows))
        assert epoch["expected_macs"] > 0
    delivered = search.deliver()
    assert delivered.architecture == search.chosen
    assert delivered.network(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    if family is cells:
        primitives = delivered.network.primitives
        assert isinstance(primitives, SharpPrimitives) and primitives.choke == 8
    gap = delivered.figures["supernet_accuracy"] - delivered.figures["selected_path_accuracy"]
    assert delivered.figures["discretisation_gap"] == pytest.approx(gap)


def test_max_w_can_be_left_out():
    assert isinstance(searcher(max_w=False).supernet.relaxation, Softmax)
    assert searcher(detached_max=True).supernet.relaxation.detached


@pytest.mark.parametrize(("family", "steps"), [(cells, 3), (grid, 3), pytest.param(grid, 6, marks=pytest.mark.slow)])
def test_a_stopped_search_goes_on_bit_for_bit(family, steps):
    whole, halted = searcher(family()), searcher(family())
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    stop_after(halted, 1)
    again = searcher(family())
    again.load(tensors, json.loads(json.dumps(state)))
    figures, left = to_the_end(whole), to_the_end(again)
    assert left == figures[-len(left) :]
    ours, theirs = again.deliver().network.state_dict(), whole.deliver().network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_measured_times_are_kept_by_a_checkpoint(monkeypatch):
    real, measured = HyperCuboidFamily.measured_times, []

    def once(family):
        measured.append(family)
        return real(family, block_ms=0.05)

    monkeypatch.setattr(HyperCuboidFamily, "measured_times", once)
    priced = {"path": "priced", "path_price": 0.5}
    search = searcher(grid(), **priced)
    stop_after(search, 2)
    tensors, state = copied(search.state())
    again = searcher(grid(), **priced)
    again.load(tensors, json.loads(json.dumps(state)))
    figures, left = to_the_end(search), to_the_end(again)
    assert len(measured) == 1
    assert left == figures
    assert again.chosen == search.chosen


def test_paths_are_taken_as_the_settings_say():
    search = searcher(grid(stages=2), path="priced", path_cost="macs", path_price=1e6)
    supernet, family = search.supernet, search.family
    assert search.select(supernet) == family.smallest()
    strengths = supernet.grid_strengths()
    for name, rule in (("longest", longest_path), ("bottom_up", bottom_up_path), ("top_down", top_down_path)):
        found = searcher(grid(stages=2), path=name)
        assert found.select(supernet) == family.grid.architecture(rule(strengths))
    with pytest.raises(UserError, match=r"settings\.path: got 'top_down'; allowed: 'longest' for families other than"):
        searcher(cells(), path="top_down")
    with pytest.raises(UserError, match="rule: got 'shortest'; allowed: longest, bottom_up, top_down, priced"):
        supernet.derive_by("shortest")


def test_max_w_moves_the_logits_of_a_search_otherwise():
    moved = []
    for changes in ({}, {"max_w": False}, {"detached_max": True}):
        search = searcher(grid(), **changes)
        stop_after(search, 2)
        moved.append(search.supernet.logits["grid"].detach().clone())
    assert not any(torch.equal(moved[i], moved[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_recipes_fit_the_image():
    assert preset_settings((3, 16, 16))["order"] == "first"
    assert preset_settings((3, 32, 32)) == {}
    for recipe in PRESETS.values():
        assert Settings(**recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharpdarts", "hypercuboid"])
def test_a_search_on_real_images_goes_on_where_it_stopped(name):
    arrays = cifar10_arrays()
    images = arrays["x_train"][::20].reshape(200, 3, 16, 2, 16, 2).mean((3, 5)) / 255
    labels = arrays["y_train"][::20].astype("i8")
    task = ImageClassification.from_arrays(images.astype("f4"), labels, name="cifar10-16", valid_fraction=0.2)
    if name == "sharpdarts":
        family = open_family(name, image=(3, 16, 16), num_classes=10, channels=4, cells=4, nodes=2)  # nine primitives
    else:
        family = hypercuboid_family(image=(3, 16, 16), num_classes=10, widths=(8, 16), filters=32, stages=2)

    def fresh():
        settings = Settings(**{**SMALL, "search_cells": 4, "search_batch_size": 16, "batch_size": 32})
        return Searcher(family=family, task=task, seed=3, settings=settings)

    whole, halted, again = fresh(), fresh(), fresh()
    stop_after(halted, 5)
    tensors, state = copied(halted.state())
    again.load(tensors, json.loads(json.dumps(state)))
    figures, left = to_the_end(whole), to_the_end(again)
    assert left == figures[-len(left) :]
    assert again.chosen == whole.chosen
    assert all(math.isfinite(epoch["loss"]) for epoch in figures)
    ours, theirs = again.deliver().network.state_dict(), whole.deliver().network.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sharpdarts", "hypercuboid"])
def test_a_whole_run_from_the_command_line(tmp_path, family):
    run = tmp_path / "run"
    words = ["search", "--method", "sharpdarts", "--family", family, "--task", "digits", "--out", run, "--quiet"]
    for pair in ("search_epochs=2", "search_batch_size=64", "epochs=2"):
        words += ["--set", pair]
    sizes = ("channels=4", "cells=3", "nodes=2") if family == "sharpdarts" else ("stages=1", "filters=16")
    for pair in sizes:
        words += ["--family-set", pair]
    done = run_cli(*words)
    assert done.returncode == 0, done.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and "discretisation_gap" in result["figures"]
    verified = run_cli("verify", run)
    assert verified.returncode == 0, verified.stdout
