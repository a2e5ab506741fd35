import copy

import pytest
import torch
from users_networks import digits_net

from archsmith.core.errors import UserError
from archsmith.methods import load_method, method_table, rarts
from archsmith.methods.rarts_width import Searcher, Settings, preset_settings
from archsmith.run.own_model import OwnCosts, OwnModel
from archsmith.run.prepare import EarlyJournal
from archsmith.tasks import open_task
from archsmith.train.width_search import WidthSearch

SMALL = {"epochs_shrink": 2, "epochs_after": 1, "batch_size": 20, "gate_lr": 0.02}


class Stop:
    """A monitor that asks to stop after a number of steps."""

    def __init__(self, steps=10**6):
        self.left, self.losses = steps, []

    def step(self, total, **figures):
        self.left -= 1
        self.losses.append(figures["loss"])

    def should_stop(self):
        return self.left <= 0


@pytest.fixture(scope="module")
def task():
    return open_task("digits", limit=120)


def searcher(task, budget=None, **changes):
    model = OwnModel("users_networks:digits_net", 0)
    costs = OwnCosts(digits_net(), task, budget, {"minimum": 1, "divisor": 1}, EarlyJournal())
    return Searcher(model=model, task=task, settings=Settings(**{**SMALL, **changes}), costs=costs, seed=0)


def to_the_end(search):
    figures = []
    while not search.done:
        figures.append(search.advance(Stop()))
    return figures


def test_one_name_for_both_searches_and_the_stated_defaults():
    row = next(row for row in method_table() if row["slug"] == "rarts-width")
    assert (row["kind"], row["arxiv"], row["docs"]) == ("shrink", "2008.03901", "docs/systems/rarts-width.md")
    for name in ("rarts", "rarts-width"):
        assert load_method(name, kind="shrink")[1].Settings is Settings
    assert load_method("rarts")[1].Settings is rarts.Settings
    s, other = Settings(), rarts.Settings()
    for name in ("passes", "train_weight", "coupling"):
        assert getattr(s, name) == getattr(other, name)
    assert (s.gate_lr, s.penalty, s.order, s.epochs_before) == (other.logit_lr, 1e-3, "score", 0)
    assert Settings(**preset_settings((1, 8, 8))).epochs_shrink < Settings(**preset_settings((3, 32, 32))).epochs_shrink


def test_settings_reach_the_step_and_all_phases_have_their_rate(task):
    search = searcher(task, passes="gauss-seidel", train_weight=2.0, coupling=0.3, penalty=0.05, epochs_before=1)
    steps, half = search.steps, search._search_steps
    assert half == -(-steps // 2) or half == steps // 2
    first = search.advance(Stop())
    second = search.advance(Stop())
    widths = search.shrinker
    assert isinstance(widths, WidthSearch) and widths.passes == "gauss-seidel"
    assert (widths.relaxed.train_weight, widths.relaxed.coupling, widths.rho) == (2.0, 0.3, 0.05)
    assert (first["phase"], second["phase"]) == ("before", "shrink")
    assert second["distance"] > 0 and second["twin_loss"] > 0 and second["penalty"] > 0
    s = search.settings
    assert search.rate(steps) == s.lr_shrink and search.rate(steps + half) == pytest.approx(s.lr_shrink / 2)
    assert search.rate(steps + 2 * half) == s.lr_after and search.rate(2 * steps + 2 * half) == 0.0


def test_each_network_sees_its_own_half(task, monkeypatch):
    search = searcher(task)
    seen = {"weights": set(), "copy": set()}
    original = Searcher._loss

    def watched(self, part, batch, metrics, *names):
        seen[names[0]] |= {bytes(image.numpy().tobytes()) for image in batch.inputs}
        return original(self, part, batch, metrics, *names)

    monkeypatch.setattr(Searcher, "_loss", watched)
    search.advance(Stop())
    search.advance(Stop())
    assert seen["weights"] and seen["copy"] and not seen["weights"] & seen["copy"]


@pytest.mark.slow
def test_a_stronger_penalty_leaves_a_smaller_network_and_the_search_ends_alone(task):
    left = []
    for penalty in (0.0, 0.02, 0.2):
        search = searcher(task, penalty=penalty, epochs_shrink=12, epochs_after=0, threshold=0.05, gate_lr=0.05)
        figures = to_the_end(search)[-1]
        left.append(figures["macs_fraction"])
        assert search.shrinker.twin is None and not any(m._forward_pre_hooks for m in search.network.modules())
    assert left[0] == 1.0 and left[0] > left[1] > left[2]


@pytest.mark.parametrize("steps", [pytest.param(2, marks=pytest.mark.slow), 7, pytest.param(9, marks=pytest.mark.slow)])
def test_a_stopped_search_goes_on_bit_for_bit(task, steps):
    whole, halted = searcher(task, ratio=0.3), searcher(task, ratio=0.3)
    to_the_end(whole)
    monitor = Stop(steps)
    while not monitor.should_stop():
        halted.advance(monitor)
    tensors, state = halted.state()
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}, copy.deepcopy(state)
    again = searcher(task, ratio=0.3)
    again.load(*kept)
    to_the_end(again)
    one, two = whole.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    halted.deliver()
    assert sum(p.numel() for p in whole.network.parameters()) < sum(p.numel() for p in digits_net().parameters())


def test_images_that_cannot_be_parted_are_refused(task):
    class Streamed:
        name = "streamed"

        def __getattr__(self, attribute):
            if attribute == "training_halves":
                raise AttributeError(attribute)
            return getattr(task, attribute)

    with pytest.raises(UserError, match="different halves"):
        searcher(Streamed())
