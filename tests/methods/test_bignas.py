"""BigNAS: what a step does to whom, the rate, the selection, and what is delivered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from darts_runs import copied, small_task, stop_after, to_the_end
from search_samples import Notes
from small_runs import ending, events, run_cli, start_cli, wait_for
from torch import nn
from torch.nn import functional

from archsmith import api
from archsmith.cli import _summarise
from archsmith.core.errors import UserError
from archsmith.families.bignas import bignas_family
from archsmith.layers.bignas import DropConnect
from archsmith.methods import load_method
from archsmith.methods.bignas import Searcher, Settings, preset_settings
from archsmith.run.costs import CostModel
from archsmith.run.prepare import default_family
from archsmith.run.supernet_search import Evaluated
from archsmith.space import Budget
from archsmith.train.compute import Compute
from archsmith.train.loop import Diverged

QUICK = {
    "epochs": 2,
    "batch_size": 8,
    "optimizer": "sgd",
    "lr": 0.1,
    "calibration_batches": 2,
    "levels": {"resolution": 1, "width": 2, "depth": 2, "kernel": 1, "expansion": 1},
    "mutations": 6,
    "points": 3,
}
HALF = "macs<=0.5x"


def family(**changes):
    return bignas_family(**{"preset": "tiny", "image": (3, 8, 8), "num_classes": 3, **changes})


def searcher(*, budget=None, own=None, seed=0, compute=None, **changes):
    own = own or family()
    costs = CostModel(own, Budget.parse(budget), Notes()) if budget else None
    settings = Settings(**{**QUICK, **changes})
    return Searcher(family=own, task=small_task(), settings=settings, costs=costs, seed=seed, compute=compute)


def batch_of(search, number=0):
    return next(search.task.batches("train", batch_size=8, epoch=number))


def plain(**changes):
    """Return a search whose loss can be written down: no dropout, no decay, no clipping."""
    quiet = {"weight_decay": 0.0, "clip_value": 0.0}
    search = searcher(own=family(dropout=0.0, drop_connect=0.0), **{**quiet, **changes})
    for parameter in search.supernet.parameters():  # closed blocks have no gradients inside
        parameter.data.add_(
            0.05 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        )
    return search


def pass_over(search, where=(0, 0)):
    """Return the children of a step, its batch, and the step's gradients before clipping; the weights stay."""
    batch = batch_of(search)
    generator = torch.Generator().manual_seed(0)
    search.supernet.zero_grad()
    children = search.children(where)
    search.step.backward(children, lambda forward: search.task.loss(forward, batch, generator)[0])
    return [child.architecture for child in children], batch, gradients(search.supernet.network)


def gradients(module):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def test_it_is_found_and_described():
    row, module = load_method("bignas")
    assert row["kind"] == "search" and module.SYSTEM["arxiv"] == "2003.11142"
    assert load_method("single-stage")[1] is module
    assert preset_settings((3, 224, 224)) == {}
    assert preset_settings((3, 32, 32))["optimizer"] == "sgd"


# ---------------------------------------------------------------------------------------------------------- the step


def test_gradients_are_the_sum_over_the_children_that_hold_a_weight():
    """Check 7: the children one by one add up to the step; what the largest alone holds learns from labels only."""
    search = plain()
    supernet, network = search.supernet, search.supernet.network
    (largest, *children), batch, found = pass_over(search)
    assert len(children) == 3 and children[-1] == search.family.smallest() and largest == search.family.largest()
    supernet.zero_grad()
    supernet.activate(largest)
    logits = supernet(batch.inputs)
    functional.cross_entropy(logits, batch.targets).backward()
    by_labels, total = gradients(network), gradients(network)
    reached = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in network.named_parameters()}
    for child in children:
        supernet.zero_grad()
        supernet.activate(child)
        (-(logits.detach().softmax(-1) * supernet(batch.inputs).log_softmax(-1)).sum(-1).mean()).backward()
        for name, gradient in gradients(network).items():
            total[name] += gradient
            reached[name] |= gradient != 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient[~reached[name]], by_labels[name][~reached[name]], rtol=1e-4, atol=1e-6)
    assert any((by_labels[name][~mask] != 0).any() for name, mask in reached.items())


def test_the_teacher_learns_nothing_from_its_pupils():
    """Without labels what only the largest child holds gets no gradient."""
    search = plain(children=2)
    batch, children = batch_of(search), search.children((0, 0))
    search.step.backward(children, lambda forward: 0.0 * forward(batch.inputs).sum())
    network, small = search.supernet.network, search.supernet.extract(search.family.smallest())
    shapes = {name: p.shape for name, p in small.named_parameters()}
    moved = gradients(network)
    assert any(gradient.any() for gradient in moved.values())
    outside = [gradient for name, gradient in moved.items() if name not in shapes]
    outside += [gradient[shapes[name][0] :] for name, gradient in moved.items() if name in shapes]
    assert sum(gradient.numel() for gradient in outside) > 1000
    assert not any(gradient.any() for gradient in outside)


def test_only_the_largest_child_is_regularised():
    search = searcher(own=family(dropout=0.5, drop_connect=0.5))
    supernet, seen = search.supernet, []

    def look(module, inputs):
        modes = {m.training for m in module.network.modules() if isinstance(m, nn.Dropout | DropConnect)}
        norms = {m.training for m in module.network.modules() if isinstance(m, nn.BatchNorm2d)}
        seen.append((module.active == search.family.largest(), modes, norms))

    supernet.register_forward_pre_hook(look)
    search.train_step(batch_of(search), (0, 0))
    assert seen == [(True, {True}, {True}), *[(False, {False}, {True})] * 3]


def test_decay_is_a_gradient_of_the_largest_pass_and_spares_scales_and_biases():
    """The same step with and without decay differs by the penalty's gradient on what the largest child convolves."""
    with_decay, without = plain(weight_decay=0.1), plain(weight_decay=0.0)
    assert all(group.get("weight_decay", 0.0) == 0.0 for group in with_decay.optimizer.param_groups)
    found, plainly = pass_over(with_decay)[2], pass_over(without)[2]
    weights = dict(without.supernet.network.named_parameters())
    held = {name for name, _ in without.family.build(without.family.largest()).named_parameters()}
    decayed = {name for name, weight in weights.items() if weight.dim() > 1} & held
    assert {"stem.conv.weight", "classifier.weight", "stages.1.1.body.gate.reduce.weight"} <= decayed
    for name, gradient in found.items():
        expected = 0.1 * weights[name].detach() if name in decayed else torch.zeros_like(gradient)
        torch.testing.assert_close(gradient - plainly[name], expected, rtol=1e-4, atol=1e-6)


def test_a_step_moves_the_weights_once_however_many_children_it_has():
    search, calls = searcher(children=5), []
    search.optimizer.register_step_post_hook(lambda *given: calls.append(1))
    stop_after(search, 3)
    assert len(calls) == 3


def test_children_are_drawn_anew_for_every_step():
    search = searcher(children=4)
    drawn = [[child.architecture for child in search.children((e, step))] for e in range(2) for step in range(4)]
    assert len({tuple(child.digest for child in children) for children in drawn}) > 6
    assert drawn[0] == [child.architecture for child in searcher(children=4).children((0, 0))]
    ends = [search.family.largest(), search.family.smallest()]
    assert [child.architecture for child in searcher(children=2).children((0, 0))] == ends


def test_every_child_sees_its_own_resolution():
    search, sizes = searcher(), []
    search.supernet.network.stem.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]))
    search.train_step(batch_of(search), (0, 0))
    assert sizes == [child.architecture["resolution"] for child in search.children((0, 0))]
    assert (sizes[0], sizes[-1]) == (8, 6)


@pytest.mark.parametrize(("changes", "measured"), [({"clip_value": 1e-4}, "max"), ({"clip_norm": 1e-3}, "norm")])
def test_the_summed_gradient_is_clipped_before_the_step(changes, measured):
    search = plain(**changes)
    search.train_step(batch_of(search), (0, 0))
    every = torch.cat([gradient.flatten() for gradient in gradients(search.supernet).values()])
    found = every.abs().max() if measured == "max" else every.norm()
    assert float(found) == pytest.approx(next(iter(changes.values())), rel=1e-3)


def test_the_rate_is_the_published_one_and_keeps_its_proportions():
    cases = json.loads((Path(__file__).parents[1] / "golden" / "bignas.json").read_text())["cases"]
    case = next(case for case in cases if case["name"].startswith("lr-staircase"))
    search = searcher(epochs=360, lr=0.256)
    search.training_steps = case["input"]["iters_per_epoch"]
    for step, rate in case["expected"].items():
        assert search.rate(int(step)) == pytest.approx(rate, abs=1e-9)
    short = searcher(epochs=36, lr=0.256)
    short.training_steps = 10 * search.training_steps
    assert [short.rate(step) for step in (0, 50, 2425, 2426, 3599)] == pytest.approx(
        [search.rate(step) for step in (0, 50, 2425, 2426, 3599)]
    )


# ------------------------------------------------------------------------------------------------ selection and result


def test_a_search_trains_selects_and_delivers_within_the_budget():
    search = searcher(budget=HALF)
    figures = to_the_end(search)
    assert [epoch["phase"] for epoch in figures] == ["training", "training", "coarse", "fine"]
    assert [epoch["within_budget"] for epoch in figures] == [False, False, True, True]
    limit = 0.5 * search.family.exact_costs(search.family.largest())["macs"]
    delivered = search.deliver()
    every = [delivered, *delivered.others]
    assert [each.label for each in every] == ["final", *(f"point-{n}" for n in range(1, len(every)))]
    for each in every:
        assert search.family.exact_costs(each.architecture)["macs"] <= limit
        assert search.family.architecture_of(each.network) == each.architecture
        scores = search.task.evaluate(each.network, "valid")
        assert scores["accuracy"] == each.figures["one_shot_accuracy"]  # calibrated alone as inside
    front = [child.architecture for child in search.front()]
    assert delivered.architecture == front[-1] and {each.architecture for each in every} <= set(front)
    best = max(child.accuracy for child in search.evaluated)
    assert best == -search.strategy.best[-1].loss
    assert delivered.figures["one_shot_accuracy"] == best
    assert len(search.evaluated) == len(figures[2]["evaluated"]) + 6
    macs, accuracies = zip(*figures[-1]["front"], strict=True)
    assert list(macs) == sorted(macs) and list(accuracies) == sorted(accuracies)


def test_budgets_rise_geometrically_to_the_runs_own():
    search = searcher(budget="macs<=0.5x, params<=0.9x", points=3)
    low, high = search.family.exact_costs(search.family.smallest()), search.family.exact_costs(search.family.largest())
    budgets = search.budgets()
    macs = [budget.limits[0].value for budget in budgets]
    assert macs[-1] == 0.5 * high["macs"]
    assert macs[0] / low["macs"] == pytest.approx(macs[1] / macs[0]) == pytest.approx(macs[2] / macs[1])
    assert all(budget.limits[1].value == pytest.approx(0.9 * high["params"]) for budget in budgets)
    assert [limit.value for limit in searcher(points=1).budgets()[0].limits] == [high["macs"]]


def test_of_equally_good_children_the_cheapest_is_delivered():
    search = searcher(points=2)
    space = search.family.space
    small, large = search.family.smallest(), search.family.largest()
    middle = space.validate({**small, "mb1/width": 16})
    accuracies = ((large, 0.9), (middle, 0.9), (small, 0.5))
    search.evaluated = [
        Evaluated(each, {"valid_accuracy": accuracy, "valid_loss": 1.0}, search.costs_of(each))
        for each, accuracy in accuracies
    ]
    assert search.chosen() == [("final", middle), ("point-1", small)]


def test_before_the_selection_the_costliest_skeleton_within_the_budget_is_delivered():
    search = searcher(budget=HALF)
    stop_after(search, 3)
    delivered = search.deliver()
    costs = [search.costs_of(each)["macs"] for each in search.strategy.coarse]
    assert search.costs_of(delivered.architecture)["macs"] == max(costs)
    assert not delivered.others and not delivered.figures


@pytest.mark.parametrize(
    "steps", [2, pytest.param(7, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.slow), 16]
)
def test_a_stopped_search_goes_on_bit_for_bit(steps):
    """Within an epoch, between epochs, within the coarse and the fine phase."""
    whole, halted = searcher(budget=HALF), searcher(budget=HALF)
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    stop_after(halted, 1)  # what happens later does not reach the checkpoint
    again = searcher(budget=HALF)
    again.load(tensors, json.loads(json.dumps(state)))
    figures, left = to_the_end(whole), to_the_end(again)
    assert left and left == figures[-len(left) :]
    ours, theirs = again.deliver(), whole.deliver()
    assert [each.architecture for each in ours.others] == [each.architecture for each in theirs.others]
    for one, other in zip([ours, *ours.others], [theirs, *theirs.others], strict=True):
        state = other.network.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.network.state_dict().items())


def test_the_published_optimiser_learns_too():
    search = searcher(optimizer="rmsprop", lr=0.01, epochs=6, mutations=0)
    losses = [epoch["loss"] for epoch in to_the_end(search) if epoch["phase"] == "training"]
    assert losses[-1] < losses[0]
    assert search.epochs == 7  # there is no fine phase without mutations


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"family: got 'mobile'; allowed: 'bignas' for the method bignas"):
        api.search("digits", method="bignas", family="mobile", out=tmp_path / "run")
    with pytest.raises(UserError, match="allowed: one process, whole batches and no compilation"):
        searcher(compute=Compute(micro_batches=2))
    with pytest.raises(UserError, match=r"family: got 'str'; allowed: 'bignas', say"):
        Searcher(family="bignas", task=small_task(), settings=Settings(**QUICK), seed=0)
    with pytest.raises(UserError, match="batch_size: got 64; allowed: 1 to"):
        searcher(batch_size=64)
    assert not (tmp_path / "run").exists()


def test_its_own_family_is_the_default():
    assert [default_family(load_method(name)[1]) for name in ("bignas", "atomnas")] == ["bignas", "mobile"]


def words(run):
    given = ["search", "--method", "bignas", "--family", "bignas", "--task", "digits", "--budget", HALF]
    given += ["--threads", "1", "--quiet", "--task-set", "limit=60", "--out", str(run)]
    settings = {**QUICK, "epochs": 3, "batch_size": 32, "levels": json.dumps(QUICK["levels"])}
    return [*given, *(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))]


def test_a_run_exports_every_point_and_reports_the_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    settings = {**QUICK, "epochs": 1, "batch_size": 32, "points": 2}
    options = {"settings": settings, "task_options": {"limit": 60}, "budget": HALF, "threads": 1, "quiet": True}
    outcome = api.search("digits", method="bignas", family="bignas", out=tmp_path / "run", **options)
    labels = [each["label"] for each in outcome.result["outcomes"]]
    assert labels[0] == "final" and set(labels[1:]) <= {"point-1"}
    for each in outcome.result["outcomes"]:
        assert {"model.py", "weights.safetensors", "model.onnx"} <= set(each["files"])
        assert each["costs"]["macs"] <= outcome.result["limits"]["macs"]
    _summarise(outcome)
    shown = capsys.readouterr().out
    assert all(f"networks/{label}" in shown.replace("\n", "") for label in labels)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "evaluated, coarse" in page and "chart-pareto" in page


def test_latency_and_memory_limits_hold_for_every_child():
    """Costs that are not additive come from the cost model; the latency aims at a part of its limit."""
    search = searcher(budget="memory<=0.6x")
    whole = search.costs.largest["memory"]
    search.costs.limits["latency"] = 10.0
    limits = {limit.cost: limit.value for limit in search.limits().limits}
    assert limits == {"memory": pytest.approx(0.6 * whole), "latency": pytest.approx(9.5)}
    del search.costs.limits["latency"]
    figures = to_the_end(search)
    assert figures[-1]["evaluated"]
    assert all(search.costs.of(child.architecture)["memory"] <= 0.6 * whole for child in search.front())


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_never_stopped(tmp_path):
    """A real kill between the first and the last epoch; every exported point is equal, and verifies."""
    whole, killed, output = tmp_path / "whole", tmp_path / "killed", tmp_path / "output.txt"
    done = run_cli(*words(whole))
    assert done.returncode == 0, done.stdout
    process = start_cli(*words(killed), output=output)
    wait_for(lambda: events(killed, "epoch"), process)
    process.kill()
    process.wait()
    resumed = run_cli("resume", killed, "--quiet")
    assert resumed.returncode == 0, resumed.stdout
    assert ending(killed) == ending(whole)
    results = [json.loads((run / "result.json").read_text())["outcomes"] for run in (whole, killed)]
    files = [[(each["label"], each["files"]) for each in result] for result in results]
    assert files[0] == files[1]
    verified = run_cli("verify", killed)
    assert verified.returncode == 0, verified.stdout


def test_soft_targets_are_the_teachers_probabilities():
    """In a step with the smallest child alone its loss is the cross-entropy with the largest one's predictions."""
    search = plain(children=2)
    supernet, inputs = search.supernet.train(), batch_of(search).inputs
    with torch.no_grad():
        supernet.activate(search.family.largest())
        teacher = supernet(inputs)
        supernet.activate(search.family.smallest())
        expected = functional.cross_entropy(supernet(inputs), teacher.softmax(-1))
    figures = search.train_step(batch_of(search), (0, 0))
    assert figures["last_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_is_not_a_number_stops_the_run_at_its_step():
    search = searcher()
    search.supernet.network.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(Diverged, match=r"the loss is nan at epoch 3, step 5"):
        search.train_step(batch_of(search), (2, 4))
