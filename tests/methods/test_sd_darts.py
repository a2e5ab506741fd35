import json
import math

import pytest
import torch
from darts_runs import copied, small_family, small_task, stop_after, to_the_end
from killed_searches import killed_and_whole

from archsmith.methods import darts, load_method
from archsmith.methods.sd_darts import Searcher, Settings, preset_settings
from archsmith.train.taught import Taught

SMALL = {
    "search_epochs": 2,
    "search_batch_size": 8,
    "search_channels": 4,
    "search_cells": 3,
    "epochs": 1,
    "batch_size": 16,
    "logit_lr": 0.1,
    "auxiliary_weight": 0.0,
    "landscape": False,
}


def tiny_family():
    return small_family(nodes=1, operations=("none", "skip_connect", "dil_conv_3x3"))


def searcher(**changes):
    settings = Settings(**{**SMALL, **changes})
    return Searcher(family=tiny_family(), task=small_task(), seed=1, settings=settings)


def test_it_is_listed_and_has_the_stated_defaults():
    row, module = load_method("sd-darts")
    assert row["kind"] == "search" and module.SYSTEM["arxiv"] == "2302.05629"
    s = Settings()
    assert (s.teachers, s.teacher_every, s.teacher_unit, s.distill_weight) == (3, 1, "step", 0.5)
    assert (s.temperature, s.vote, s.ramp, s.distill_logits, s.order) == (2.0, "soft", 0.1, False, "first")
    for name in ("search_epochs", "search_batch_size", "search_channels", "search_cells", "search_lr", "logit_lr"):
        assert getattr(s, name) == getattr(darts.Settings(), name)
    for image in ((1, 8, 8), (3, 32, 32), (3, 48, 48)):
        assert Settings(**preset_settings(image))


def test_its_settings_reach_the_step():
    search = searcher(teachers=2, distill_weight=0.3, temperature=4.0, vote="majority", ramp=0.5, distill_logits=True)
    assert isinstance(search.updater, Taught)
    given = search.updater.teaching
    assert (given.teachers, given.weight, given.temperature, given.vote) == (2, 0.3, 4.0, "majority")
    steps = 2 * search.halves[0].steps_per_epoch(8)
    assert (given.ramp_steps, given.every, given.unit, given.logits_too) == (0.5 * steps, 1, "step", True)


@pytest.mark.parametrize(("order", "changes"), [("first", {"teachers": 0}), ("second", {"distill_weight": 0.0})])
def test_without_teaching_it_is_darts_bit_for_bit(order, changes):
    ours = searcher(order=order, **changes)
    names = darts.Settings.model_fields
    settings = darts.Settings(**{name: value for name, value in {**SMALL, "order": order}.items() if name in names})
    theirs = darts.Searcher(family=tiny_family(), task=small_task(), seed=1, settings=settings)
    figures = to_the_end(ours)
    assert figures == to_the_end(theirs)
    one, other = ours.deliver().network.state_dict(), theirs.deliver().network.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert to_the_end(searcher(order=order)) != figures


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_search_goes_on_bit_for_bit(steps):
    whole, halted = searcher(), searcher()
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    assert sum(name.startswith("updater.teacher.") for name in tensors) > 0
    stop_after(halted, 1)
    again = searcher()
    again.load(tensors, json.loads(json.dumps(state)))
    figures, left = to_the_end(whole), to_the_end(again)
    assert left == figures[-len(left) :]
    ours, theirs = again.deliver(), whole.deliver()
    assert ours.figures == theirs.figures
    assert all(torch.equal(t, theirs.network.state_dict()[name]) for name, t in ours.network.state_dict().items())


def test_the_end_of_the_search_says_how_sharp_it_is():
    search = searcher(landscape=True)
    to_the_end(search)
    figures = search.deliver().figures
    assert set(figures) >= {"logit_curvature", "weight_sharpness", "discretisation_gap"}
    assert all(math.isfinite(figures[name]) for name in ("logit_curvature", "weight_sharpness"))
    assert figures["weight_sharpness"] > 0


@pytest.mark.slow
def test_a_killed_run_on_real_digits_goes_on_bit_for_bit(tmp_path):
    settings = {"search_epochs": 2, "search_batch_size": 64, "search_channels": 4, "search_cells": 3, "epochs": 1}
    killed, whole = killed_and_whole(tmp_path, "sd-darts", settings, {"channels": 4, "cells": 3, "nodes": 2})
    assert killed == whole
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["figures"]["logit_curvature"] != 0
