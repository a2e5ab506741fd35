import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from darts_runs import Stop, copied, small_family, small_task, stop_after, to_the_end

from archsmith.families.cells import NasBench201Family
from archsmith.methods import darts, load_method, pc_darts
from archsmith.methods.darts_pt import Searcher, Settings, preset_settings, search_plan
from archsmith.run.perturbed_selection import SELECTION
from archsmith.supernet.relaxed import batch_statistics

SMALL = {
    "search_epochs": 1,
    "search_batch_size": 8,
    "search_channels": 4,
    "search_cells": 3,
    "selection_interval": 1,
    "epochs": 1,
    "batch_size": 16,
    "logit_lr": 0.1,
    "auxiliary_weight": 0.0,
    "drop_path": 0.0,
}
EVENTS = 6  # edges of two nodes: 2 + 3, and one node that has to leave one out


def searcher(method=Searcher, settings=Settings, **changes):
    return method(
        family=changes.pop("family", None) or small_family(),
        task=small_task(),
        seed=changes.pop("seed", 1),
        settings=settings(**{**SMALL, **changes}),
    )


def benchmark_family():
    return NasBench201Family(image=(3, 8, 8), num_classes=3, channels=4, cells=1)


class StopDeciding(Stop):
    """Stops after a number of questions of the selection."""

    def __init__(self, search, evaluations):
        super().__init__()
        self.search, self.evaluations = search, evaluations

    def should_stop(self):
        return self.search.selection.machine.evaluations >= self.evaluations


@pytest.fixture(scope="module")
def whole():
    search = searcher()
    return search, to_the_end(search)


def test_it_is_listed_and_has_the_published_defaults():
    row, module = load_method("darts-pt")
    assert row["kind"] == "search" and module.SYSTEM["arxiv"] == "2108.04392"
    plan = search_plan(Settings())
    (search,) = plan.search
    assert (plan.channels, plan.cells, plan.order) == (16, 8, "first")
    assert (plan.logit_lr, plan.logit_betas, plan.logit_decay) == (3e-4, (0.5, 0.999), 1e-3)
    assert (search.epochs, search.batch_size, search.lr, search.lr_min) == (50, 64, 0.025, 0.001)
    pt = plan.perturbation
    assert (pt.interval, pt.criterion, pt.edge_criterion, pt.logits) == (5, "acc", "acc", True)
    assert (pt.lr, pt.batch_size, pt.momentum, pt.weight_decay, pt.clip_norm) == (0.0025, 64, 0.9, 3e-4, 5.0)
    assert search.logits and preset_settings((3, 32, 32)) == {}
    assert preset_settings((1, 8, 8))["selection_interval"] == 1


def test_the_published_search_fine_tunes_for_81_epochs():
    family = small_family(nodes=4)
    search = searcher(family=family, selection_interval=5)
    phase = next(phase for phase in search.phases if phase.name == SELECTION)
    assert phase.epochs == 81 and phase.schedule == "constant" and search.rate(phase, 80) == 0.0025
    cell = searcher(family=benchmark_family(), selection_interval=5)
    assert cell.selection.phase.epochs == 25 and cell.selection.machine.never == ()


def test_a_run_decides_edges_then_nodes_and_trains_what_is_left(whole):
    search, figures = whole
    assert [epoch["phase"] for epoch in figures] == ["search", *[SELECTION] * EVENTS, "final"]
    decided = [sum(name is not None for name in epoch["selection"]["decided"]["normal"]) for epoch in figures[1:-1]]
    assert decided == [1, 2, 3, 4, 5, 4]
    # No edge is asked about "none": three operations on five edges, three edges of the last node, both kinds of cells.
    assert figures[-2]["selection"]["evaluations"] == 2 * (5 * 3 + 3)
    last = figures[-2]
    kept = [name for name in last["selection"]["decided"]["normal"] if name is not None]
    assert kept == [operation for _, operation in last["chosen"]["normal"]]
    assert search.figures["discretisation_gap"] == 0.0
    assert search.deliver().architecture == search.chosen
    assert all(math.isfinite(epoch["loss"]) for epoch in figures)


def test_the_decided_supernet_is_the_path_that_it_extracts_to():
    search = searcher()
    stop_after(search, search._steps[0])
    assert search.selection.decide(EVENTS, lambda: False) and search.selection.machine.done
    supernet = search.supernet
    rows = supernet.mixing()
    for kind in ("normal", "reduce"):
        sums = [float(row.sum()) for row in rows[kind]]
        assert sums[:2] == [1.0, 1.0] and sorted(sums[2:]) == [0.0, 1.0, 1.0]
    architecture = supernet.derive()
    x = torch.rand(6, 3, 8, 8)
    network = supernet.extract(architecture)
    with torch.no_grad(), batch_statistics(supernet), batch_statistics(network):
        assert torch.allclose(supernet(x), network(x), atol=1e-6)


def test_decisions_are_made_on_all_images_of_the_logits_by_batch_statistics_without_gradients():
    search = searcher()
    stop_after(search, search._steps[0])
    seen = []
    task, half = search.selection.task, search.halves[1]
    assert task.split_indices("valid").tolist() == half.split_indices("train").tolist()
    evaluate = task.evaluate

    def spied(forward, split):
        norms = [m for m in forward.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        seen.append((split, all(norm.training and not norm.track_running_stats for norm in norms)))
        return evaluate(forward, split)

    task.evaluate = spied
    before = {name: tensor.clone() for name, tensor in search.supernet.state_dict().items()}
    assert search.selection.decide(0, lambda: False)
    assert seen == [("valid", True)] * 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in search.supernet.state_dict().items())
    assert search.supernet.active is None
    assert {group: len(rows) for group, rows in search.supernet.fixed.items()} == {"normal": 1, "reduce": 1}


def test_fine_tuning_is_a_phase_of_its_own_with_the_logits_of_undecided_edges():
    search = searcher(logit_decay=0.0)
    stop_after(search, search._steps[0])
    while search.position.epoch < 3:
        before = {name: logits.detach().clone() for name, logits in search.supernet.logits.items()}
        search.advance(Stop())
    fixed = search.supernet.fixed["normal"]
    assert len(fixed) == 2 and search.optimizer.param_groups[0]["lr"] == 0.0025
    moved = (search.supernet.logits["normal"] - before["normal"]).abs().amax(dim=1) > 0
    undecided = [edge for edge in range(5) if edge not in fixed]
    assert all(bool(moved[edge]) for edge in undecided)
    assert search.supernet.mixing()["normal"][next(iter(fixed))].tolist() == list(fixed[next(iter(fixed))])


def test_fixed_logits_stay_where_they_began():
    search = searcher(fixed_alpha=True)
    begun = {name: logits.detach().clone() for name, logits in search.supernet.logits.items()}
    while search.index < 1 or search.position.epoch < search.epochs - 2:
        search.advance(Stop())
    assert all(torch.equal(logits, begun[name]) for name, logits in search.supernet.logits.items())
    assert len(search.supernet.fixed["normal"]) == 5


@pytest.mark.parametrize("criterion", ["acc", "loss"])
def test_it_works_behind_another_method_and_on_another_family(criterion):
    search = searcher(
        darts.Searcher,
        darts.Settings,
        family=benchmark_family(),
        order="second",
        selection="perturbation",
        selection_criterion=criterion,
    )
    figures = to_the_end(search)
    assert [epoch["phase"] for epoch in figures].count(SELECTION) == 6
    assert figures[-2]["selection"]["evaluations"] == 6 * 5
    decided = figures[-2]["selection"]["decided"]["cell"]
    assert decided == [search.chosen[f"edge/{edge}"] for edge in ("0-1", "0-2", "1-2", "0-3", "1-3", "2-3")]


def test_without_it_the_method_is_darts():
    plain = searcher(darts.Searcher, darts.Settings, order="first")
    search = searcher(selection="magnitude")
    assert search.selection is None
    assert to_the_end(search) == to_the_end(plain) and search.chosen == plain.chosen


@pytest.mark.parametrize("evaluations", [4, pytest.param(31, marks=pytest.mark.slow)])
def test_a_selection_stopped_between_two_questions_goes_on_bit_for_bit(whole, evaluations):
    search, figures = whole
    halted = searcher()
    monitor = StopDeciding(halted, evaluations)
    while not monitor.should_stop():
        halted.advance(monitor)
    tensors, state = copied(halted.state())
    again = searcher()
    again.load(tensors, json.loads(json.dumps(state)))
    assert again.selection.machine.evaluations == evaluations
    left = to_the_end(again)
    assert left == figures[-len(left) :]
    assert again.chosen == search.chosen
    ours, theirs = again.deliver().network.state_dict(), search.deliver().network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_before_the_end_what_is_decided_so_far_is_delivered():
    search = searcher()
    while search.position.epoch < 4:
        search.advance(Stop())
    delivered = search.deliver()
    assert delivered.architecture == search.supernet.derive()
    assert delivered.network(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_behind_pc_darts_edges_that_are_left_out_have_no_weight_and_the_others_keep_theirs():
    search = searcher(
        pc_darts.Searcher, pc_darts.Settings, selection="perturbation", channel_divisor=2, warmup_epochs=0
    )
    figures = to_the_end_of_the_selection(search)
    supernet = search.supernet
    assert figures["selection"]["evaluations"] == 2 * (5 * 3 + 3)
    with torch.no_grad():
        mixing = supernet.mixing()
        supernet.fixed, fixed = {}, supernet.fixed
        free = supernet.mixing()
    for group in ("normal", "reduce"):
        (out,) = [edge for edge, row in fixed[group].items() if not any(row)]
        assert float(mixing[f"{group}_edges"][out]) == 0.0 < float(free[f"{group}_edges"][out])
        others = [edge for edge in range(5) if edge != out]
        assert torch.equal(mixing[f"{group}_edges"][others], free[f"{group}_edges"][others])


def to_the_end_of_the_selection(search):
    """Advance to the last epoch of the selection, and decide what is due before it; return the last figures."""
    while search.position.epoch < search.epochs - 2:
        search.advance(Stop())
    assert search.selection.decide(EVENTS, lambda: False) and search.selection.machine.done
    return {"selection": search.selection.figures()}


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_its_selection_ends_in_the_same_files(tmp_path):
    words = [sys.executable, "-m", "archsmith", "search", "--method", "darts-pt", "--family", "nas-bench-201"]
    words += ["--task", "digits", "--quiet", "--family-set", "channels=4", "--family-set", "cells=1"]
    for pair in ("search_epochs=2", "selection_interval=1", "epochs=2", "search_batch_size=64"):
        words += ["--set", pair]
    results = []
    for name in ("whole", "killed"):
        run = tmp_path / name
        process = subprocess.Popen([*words, "--out", run])
        if name == "killed":
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:
                journal = run / "journal.jsonl"
                if journal.exists() and journal.read_text().count('"phase": "selection"') >= 2:
                    break
                time.sleep(0.02)
            assert process.poll() is None, "the run was over before it could be killed"
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert subprocess.run([*words[:3], "resume", run, "--quiet"], check=False).returncode == 0
        else:
            assert process.wait() == 0
        results.append(run / "networks" / "final")
    for file in ("architecture.json", "weights.safetensors"):
        assert (results[0] / file).read_bytes() == (results[1] / file).read_bytes()
