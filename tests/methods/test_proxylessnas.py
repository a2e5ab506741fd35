import json
import shutil
import signal

import pytest
import torch
from darts_runs import copied, small_task, stop_after, to_the_end
from small_runs import ending, events, run_cli, start_cli, wait_for

from archsmith.core.errors import UserError
from archsmith.cost import LookupTable, Row
from archsmith.families.cells import open_family
from archsmith.families.mobile_chain import chain_family
from archsmith.families.mobile_chain_space import ZERO
from archsmith.methods import load_method
from archsmith.methods.proxylessnas import PRESETS, Searcher, Settings, plan_of, preset_settings
from archsmith.run.costs import CostModel
from archsmith.supernet.gates import BinaryGates
from archsmith.tasks.augment import Augment
from archsmith.train.gated import GatedAlternation, Reinforced
from archsmith.train.optim import RowAdam

SMALL = {
    "warmup_epochs": 1,
    "search_epochs": 2,
    "search_batch_size": 8,
    "logits_every": 1,
    "logit_lr": 0.05,
    "form": "additive",
    "epochs": 2,
    "batch_size": 16,
}


def family(**changes):
    small = {"widths": (8, 12), "cells": (2, 1), "strides": (1, 2), "last_channels": 24, "kernels": (3, 5)}
    return chain_family("tiny", image=(3, 8, 8), num_classes=3, **{**small, **changes})


@pytest.fixture
def table(monkeypatch):
    """Every block takes its kernel's size in ms; measuring counts."""
    calls = []

    def measured(parts):
        calls.append(set(parts))
        rows = {key: Row(float(key.partition("kernel:")[2][:1] or 1)) for key in parts}
        return LookupTable(rows, device="a model")

    monkeypatch.setattr("archsmith.methods.proxylessnas.measure_table", measured)
    monkeypatch.setattr("archsmith.run.costs.measure_table", measured)
    return calls


def searcher(*, chain=None, seed=1, costs=None, task=None, **changes):
    return Searcher(
        family=chain or family(),
        task=task or small_task(),
        seed=seed,
        costs=costs,
        settings=Settings(**{**SMALL, **changes}),
    )


class Notes:
    """A journal in memory."""

    def __init__(self):
        self.kept = []

    def record(self, kind, **fields):
        self.kept.append({"kind": kind, **json.loads(json.dumps(fields))})

    def events(self, kind=None):
        return [event for event in self.kept if kind in (None, event["kind"])]


def test_it_is_listed_and_has_the_published_defaults():
    row, module = load_method("proxylessnas")
    assert row["kind"] == "search" and module.SYSTEM["arxiv"] == "1812.00332"
    s, plan = Settings(), plan_of(Settings())
    (warmup, search), (training,) = plan.search, plan.final
    assert (warmup.epochs, warmup.lr, warmup.lr_min, warmup.logits) == (40, 0.05, 0.0, False)
    assert (search.epochs, search.lr, search.lr_min, search.logits, search.logits_from) == (120, 0.025, 0.0, True, 1)
    assert all((p.batch_size, p.momentum, p.weight_decay, p.clip_norm) == (256, 0.9, 4e-5, 0.0) for p in plan.search)
    assert (plan.logit_lr, plan.logit_betas, plan.logit_decay) == (1e-3, (0.0, 0.999), 0.0)
    assert (s.mode, s.logits_every, s.form, s.cost_scale, s.cost_exponent) == ("full_v2", 5, "multiplicative", 0.2, 0.3)
    assert (s.cost_weight, s.samples, s.baseline_decay, s.reward_exponent) == (0.1, 10, 0.99, 0.1)
    assert not training.logits and module.TASK_OPTIONS == {"label_smoothing": 0.1}


def test_a_search_finds_trains_and_delivers(table):
    search = searcher()
    assert isinstance(search.updater, GatedAlternation) and isinstance(search.logit_optimizer, RowAdam)
    assert isinstance(search.supernet.relaxation, BinaryGates)
    assert search.optimizer.param_groups[0]["nesterov"]
    start = search.supernet.logits["blocks"].detach().clone()
    stop_after(search, 4)  # warm-up, and the first epoch with the logits at rest
    assert torch.equal(search.supernet.logits["blocks"], start)
    figures = to_the_end(search)
    assert [epoch["phase"] for epoch in figures][-3:] == ["search", "final", "final"]
    assert len(table) == 1 and table[0] == set(family().measurable())
    delivered, chosen = search.deliver(), search.chosen
    assert delivered.architecture == chosen
    assert delivered.network(torch.rand(2, 3, 8, 8)).shape == (2, 3) and not delivered.network.training
    empty = [number for number, name in enumerate(family().chosen(chosen)) if name == ZERO]
    assert not any(str(number) in delivered.network.blocks for number in empty)
    assert delivered.figures["table_latency_ms"] == search.table.cost(family().keys(chosen))
    assert {"discretisation_gap", "weightless_operations"} <= set(delivered.figures)


def test_the_logits_move_after_their_rest_and_are_reported_as_probabilities(table):
    search = searcher()
    figures = [epoch for epoch in to_the_end(search) if "probabilities" in epoch]
    rows = [torch.tensor(epoch["probabilities"]["blocks"]) for epoch in figures]
    assert all(torch.allclose(row.sum(-1), torch.ones(len(row))) for row in rows)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    for epoch, row in zip(figures, rows, strict=True):
        expected = family().expected_latency(search.table)({"blocks": row})
        assert epoch["expected_latency_ms"] == pytest.approx(float(expected), rel=1e-6)
        assert epoch["expected_macs"] == pytest.approx(float(family().expected_macs()({"blocks": row})), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"mode": "full_v2"}, 3),
        ({"mode": "two", "form": "multiplicative"}, 5),
        ({"gradient": "reinforce", "samples": 2}, 6),
        ({}, 8),
    ],
)
def test_a_stopped_search_goes_on_bit_for_bit(table, changes, steps):
    whole, halted = searcher(**changes), searcher(**changes)
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    stop_after(halted, 1)  # what happens later does not reach the checkpoint
    again = searcher(**changes)
    again.load(tensors, json.loads(json.dumps(state)))
    assert again.position.total == steps
    figures, left = to_the_end(whole), to_the_end(again)
    assert left == figures[-len(left) :]
    assert again.chosen == whole.chosen
    ours, theirs = again.deliver().network.state_dict(), whole.deliver().network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_checkpoint_brings_its_own_table(monkeypatch, table):
    halted = searcher()
    stop_after(halted, 4)
    tensors, state = copied(halted.state())
    again = searcher()
    again.table = LookupTable({key: Row(7.0) for key in again.table.rows}, device="another day")
    again.load(tensors, json.loads(json.dumps(state)))
    assert again.table == halted.table
    assert torch.equal(again.updater.cost.of_candidates["blocks"], halted.updater.cost.of_candidates["blocks"])
    assert again.updater.term == halted.updater.term


def test_a_run_measures_once_and_keeps_it_in_its_journal(table):
    journal = Notes()
    first = searcher(costs=CostModel(family(), None, journal))
    again = searcher(costs=CostModel(family(), None, journal))
    assert len(table) == 1 and len(journal.events("latency_table")) == 1
    assert again.table.rows.keys() == first.table.rows.keys() and again.table.device == "a model"


def test_reinforce_can_measure_the_sampled_networks_themselves(table, monkeypatch):
    journal, seen = Notes(), []
    costs = CostModel(family(), None, journal)
    monkeypatch.setattr(costs, "latency_ms", lambda architecture: seen.append(architecture) or 2.0)
    search = searcher(costs=costs, gradient="reinforce", samples=3, measure=True, reference=4.0)
    assert isinstance(search.updater, Reinforced) and search.updater.reference == 4.0
    stop_after(search, 5)
    assert len(seen) == 3 and all(family().space.contains(architecture) for architecture in seen)
    assert search.updater.state()[1]["baseline"] is not None


def test_the_reference_is_the_cost_before_the_search_unless_it_is_given(table):
    uniform = {"blocks": torch.zeros_like(searcher().supernet.logits["blocks"])}
    search = searcher()
    expected = family().expected_latency(search.table)(search.supernet.probabilities(uniform))
    assert search.updater.term.reference == pytest.approx(float(expected))
    assert searcher(reference=80.0, form="multiplicative").updater.term.reference == 80.0


@pytest.mark.parametrize("cost", ["macs", "none"])
def test_without_latency_nothing_is_measured(table, cost):
    search = searcher(cost=cost)
    assert not table and search.table is None
    if cost == "none":
        assert search.updater.cost is None and search.updater.term is None
    else:
        macs = family().expected_macs()
        mixing = search.supernet.probabilities()
        expected = float(macs(mixing).detach()) / 1e6
        assert float(search.updater.cost(mixing).detach()) == pytest.approx(expected)
    stop_after(search, 5)
    assert "table_latency_ms" not in search.figures


def test_other_families_are_searched_by_macs():
    cells = open_family("nas-bench-201", image=(3, 8, 8), num_classes=3, channels=4, cells=1)
    search = searcher(chain=cells, search_channels=4, search_cells=1, mode="two")
    assert search.cost == "macs"
    figures = to_the_end(search)
    assert figures[-1]["phase"] == "final" and search.chosen is not None
    with pytest.raises(UserError, match=r"cost: got 'latency'; allowed: macs or none for this family"):
        searcher(chain=cells, cost="latency")


def test_labels_are_smoothed_for_the_weights_alone(table):
    task = small_task()
    task.augment = Augment(label_smoothing=0.1)
    search = searcher(task=task)
    assert [half.augment.label_smoothing for half in search.halves] == [0.1, 0.0]
    assert search.task.augment.label_smoothing == 0.1


def test_recipes_fit_the_image():
    assert preset_settings((3, 32, 32)) == {} == PRESETS["paper"]
    assert preset_settings((1, 8, 8)) == PRESETS["tiny"]
    assert all(Settings(**preset) for preset in PRESETS.values())
    for bad in ({"mode": "one"}, {"order": "second"}, {"logit_decay": 1e-3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Settings(**bad)
    with pytest.raises(UserError, match="measure: got True; allowed: False, but for gradient='reinforce'"):
        searcher(measure=True)


def command(run):
    words = [
        "search",
        "--method",
        "proxylessnas",
        "--family",
        "mobile-chain",
        "--task",
        "digits",
        "--out",
        run,
        "--quiet",
    ]
    for pair in ("warmup_epochs=1", "search_epochs=3", "search_batch_size=32", "epochs=2", "logits_every=2"):
        words += ["--set", pair]
    for pair in ("widths=[8, 12]", "cells=[2, 1]", "last_channels=24", "kernels=[3, 5]"):
        words += ["--family-set", pair]
    return [str(word) for word in [*words, "--quiet", "--threads", "1", "--task-set", "limit=20"]]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_that_it_would_have_had(tmp_path):
    """The latency table is a measurement, so both ends come from one beginning: a run killed and copied."""
    run, other, output = tmp_path / "run", tmp_path / "other", tmp_path / "output.txt"
    process = start_cli(*command(run), output=output)
    wait_for(lambda: len(events(run, "epoch")) >= 2, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL, output.read_text()
    shutil.copytree(run, other)
    assert run_cli("resume", run, "--quiet").returncode == 0
    process = start_cli("resume", str(other), "--quiet", output=output)
    before = len(events(other))
    wait_for(lambda: any(event["kind"] == "epoch" for event in events(other)[before:]), process)
    process.kill()
    process.wait()
    done = run_cli("resume", other, "--quiet")
    assert done.returncode == 0, done.stdout
    assert ending(other) == ending(run)
    assert len(events(other, "latency_table")) == 1
    verified = run_cli("verify", run)
    assert verified.returncode == 0, verified.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and "table_latency_ms" in result["figures"]
