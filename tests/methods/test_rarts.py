import json
import math

import pytest
import torch
from darts_runs import copied, small_family, small_task, stop_after, to_the_end
from killed_searches import killed_and_whole
from pydantic import ValidationError

from archsmith.methods import darts, load_method
from archsmith.methods.rarts import Searcher, Settings, preset_settings
from archsmith.train.noise import AnnealedNoise
from archsmith.train.two_copies import TwoCopies

SMALL = {
    "search_epochs": 2,
    "search_batch_size": 8,
    "search_channels": 4,
    "search_cells": 3,
    "epochs": 1,
    "batch_size": 16,
    "logit_lr": 0.1,
    "auxiliary_weight": 0.0,
}


def searcher(**changes):
    family = small_family(nodes=1, operations=("none", "skip_connect", "dil_conv_3x3"))
    return Searcher(family=family, task=small_task(), seed=1, settings=Settings(**{**SMALL, **changes}))


def test_it_is_listed_and_has_the_stated_defaults():
    row, module = load_method("rarts")
    assert row["kind"] == "search" and module.SYSTEM["arxiv"] == "2008.03901"
    s = Settings()
    assert (s.passes, s.train_weight, s.coupling, s.order) == ("fused", 1.0, 1e-2, "first")
    for name in ("search_epochs", "search_batch_size", "search_channels", "search_cells", "search_lr", "logit_lr"):
        assert getattr(s, name) == getattr(darts.Settings(), name)
    for image in ((1, 8, 8), (3, 32, 32), (3, 48, 48)):
        assert Settings(**preset_settings(image))


def test_it_has_no_second_order():
    with pytest.raises(ValidationError, match="order"):
        Settings(order="second")


def test_its_settings_reach_the_step_and_both_halves_move_the_weights():
    search = searcher(passes="gauss-seidel", train_weight=2.0, coupling=0.3)
    updater = search.updater
    assert isinstance(updater, TwoCopies) and updater.passes == "gauss-seidel"
    assert (updater.relaxed.train_weight, updater.relaxed.coupling) == (2.0, 0.3)
    figures = to_the_end(search)
    assert [epoch["phase"] for epoch in figures] == ["search", "search", "final"]
    assert all(math.isfinite(epoch["loss"]) for epoch in figures)
    assert search.deliver().network(torch.rand(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_search_goes_on_bit_for_bit(steps):
    whole, halted = searcher(), searcher()
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    assert any(name.startswith("updater.copy.") for name in tensors)
    assert any(name.endswith("momentum_buffer") and name.startswith("updater.optimizer.") for name in tensors)
    stop_after(halted, 1)
    again = searcher()
    again.load(tensors, json.loads(json.dumps(state)))
    figures, left = to_the_end(whole), to_the_end(again)
    assert left == figures[-len(left) :]
    ours, theirs = again.deliver().network.state_dict(), whole.deliver().network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_a_killed_run_on_real_digits_goes_on_bit_for_bit(tmp_path):
    settings = {"search_epochs": 2, "search_batch_size": 64, "search_channels": 4, "search_cells": 3, "epochs": 1}
    killed, whole = killed_and_whole(tmp_path, "rarts", settings, {"channels": 4, "cells": 3, "nodes": 2})
    assert killed == whole


def test_each_copy_of_the_weights_has_noise_of_its_own(monkeypatch):
    """One stream for both would push the copies the same way, and their difference would have no noise at all."""
    seen = {}

    def add_(noise, parameters, step, **_):
        parameters = list(parameters)
        before = [parameter.grad.clone() for parameter in parameters]
        original(noise, parameters, step)
        added = [parameter.grad - was for parameter, was in zip(parameters, before, strict=True)]
        seen.setdefault(step, []).append(torch.cat([each.flatten() for each in added]))

    original = AnnealedNoise.add_
    monkeypatch.setattr(AnnealedNoise, "add_", add_)
    search = searcher(gradient_noise=0.1, gradient_noise_on="weights", search_epochs=1)
    stop_after(search, 2)
    assert sorted(seen) == [0, 1] and all(len(added) == 2 for added in seen.values())
    for w, y in seen.values():
        assert w.shape == y.shape and w.std() > 0.1
        assert abs(float(torch.corrcoef(torch.stack([w, y]))[0, 1])) < 0.05
