"""The hardware-aware system: what is measured, what is returned, and how a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_tables import real_table
from darts_runs import copied, small_task, stop_after, to_the_end
from ofa_samples import GOLDEN, SPACE, black_box
from safetensors.torch import save_file
from search_samples import Notes
from small_runs import run_cli

from archsmith import api
from archsmith.core.errors import UserError
from archsmith.evaluate.surrogate import SurrogateEvaluator
from archsmith.evaluate.tables import TableEvaluator
from archsmith.families.bignas import bignas_family
from archsmith.families.ofa_mobile import open_family
from archsmith.methods import load_method
from archsmith.methods.hw_aware_system import (
    PUBLISHED_EVALUATIONS,
    Searcher,
    Settings,
    latency_steps,
    preset_settings,
    published_latency_ms,
    search,
    strategy,
)
from archsmith.run.costs import CostModel
from archsmith.run.study_store import JournalStore
from archsmith.space import Budget, Objective, dominates
from archsmith.space.pareto import losses

QUICK = {"epochs": 1, "batch_size": 16, "calibration_batches": 1, "evaluations": 9, "population": 3}
QUICK |= {"inner_evaluations": 30, "children": 2, "points": 3}


def family():
    return bignas_family("tiny", image=(3, 8, 8), num_classes=3)


def searcher(*, budget=None, seed=0, costs=True, own=None, **changes):
    own = own or family()
    model = CostModel(own, Budget.parse(budget) if budget else None, Notes()) if costs else None
    return Searcher(family=own, task=small_task(), settings=Settings(**{**QUICK, **changes}), costs=model, seed=seed)


def test_it_is_found_and_described() -> None:
    row, module = load_method("linas")
    assert row["slug"] == "hw-aware-system" and row["kind"] == "search"
    assert load_method("dynas-t")[1] is module
    assert preset_settings((3, 224, 224)) == {}
    assert Settings(**preset_settings((3, 32, 32))).method == "archsmith"
    assert PUBLISHED_EVALUATIONS["MobileNetV3 0.810"]["LINAS"] == 100


def test_the_published_settings_are_those_of_the_strategy() -> None:
    published = strategy(SPACE, objectives=[Objective("valid_accuracy")])
    assert (published.batch, published.initial, published.select) == (50, 50, "rank")
    assert published.inner.evaluations == 20_000
    ours = strategy(SPACE, Settings(method="archsmith", inner_evaluations=40))
    assert (ours.batch, ours.initial, ours.select) == (10, 20, "hypervolume")


def test_a_search_returns_what_was_measured_and_nothing_dominates() -> None:
    """On the black box: 60 measurements, a front of measured values, no network twice."""
    settings = Settings(evaluations=60, population=15, inner_evaluations=200)
    objectives = (Objective("macs", "minimize", 600.0), Objective("valid_accuracy", reference=70.0))
    found = search(SPACE, SurrogateEvaluator(black_box()), settings, objectives=objectives)
    assert found.study.evaluated == 60
    everything = losses([result for _, result in found.study.history], objectives)
    front = np.array([(values["macs"], -values["valid_accuracy"]) for values in found.values])
    assert len({trial.architecture.network_digest for trial, _ in found.study.history}) == 60
    assert not any(dominates(other, one) for one in front for other in everything)
    assert (np.diff(front[:, 0]) > 0).all() and (np.diff(front[:, 1]) < 0).all()
    truth = black_box().values(found.architectures)
    assert [values["macs"] for values in found.values] == pytest.approx(truth[:, 0])
    assert [values["valid_accuracy"] for values in found.values] == pytest.approx(truth[:, 1])


def test_a_search_that_was_killed_returns_the_same_set(tmp_path: Path) -> None:
    settings = Settings(evaluations=30, population=10, inner_evaluations=100)
    objectives = (Objective("macs", "minimize"), Objective("valid_accuracy"))
    whole = search(SPACE, SurrogateEvaluator(black_box()), settings, objectives=objectives)

    class Stop:
        reason: str | None = None

    stop = Stop()

    def halt(trial, result) -> None:
        stop.reason = "enough" if trial.id == 17 else None

    for _ in range(2):
        options = {"store": JournalStore(tmp_path / "study"), "stop": stop, "on_result": halt}
        found = search(SPACE, SurrogateEvaluator(black_box()), settings, objectives=objectives, **options)
        stop.reason = None
    assert (found.architectures, found.values) == (whole.architectures, whole.values)


def test_a_table_is_searched_like_any_space() -> None:
    table = real_table("nas-bench-macro")
    settings = Settings(evaluations=60, method="archsmith", inner_evaluations=300)
    objectives = (Objective("test_accuracy"), Objective("params", "minimize"))
    found = search(table.space, TableEvaluator(table), settings, objectives=objectives)
    best = found.values[0]["test_accuracy"]
    assert best == max(values["test_accuracy"] for values in found.values)
    assert best > np.quantile(table.values("test_accuracy"), 0.99)


def test_a_run_trains_searches_and_delivers_the_measured_set() -> None:
    run = searcher()
    figures = to_the_end(run)
    assert [each["phase"] for each in figures] == ["training", "search"]
    assert len(run.evaluated) == 9 == len({child.architecture.network_digest for child in run.evaluated})
    front = run.front()
    delivered = run.deliver()
    every = [delivered, *delivered.others]
    assert delivered.architecture == front[-1].architecture and len(every) <= 3
    assert {each.architecture for each in every} <= {child.architecture for child in front}
    for each in every:
        child = run.known(each.architecture)
        assert each.figures["one_shot_accuracy"] == child.accuracy
        each.network.eval()
        scores = run.task.evaluate(each.network, "valid")
        assert float(scores["accuracy"]) == pytest.approx(child.accuracy)


def test_a_budget_on_exact_costs_is_hard() -> None:
    run = searcher(budget="macs<=0.5x")
    limit = run.costs.limits["macs"]
    assert run.chosen()[0][1] == run.family.smallest()  # before anything was measured
    to_the_end(run)
    assert all(child.costs["macs"] <= limit for child in run.evaluated)


def test_latency_is_an_objective_that_is_measured_once_for_each() -> None:
    run = searcher(objectives=["accuracy", "latency"], evaluations=6)
    to_the_end(run)
    measured = run.costs._journal.events("latency_measured")
    assert len(measured) >= 6
    assert [child.costs["latency"] for child in run.evaluated] == [
        run.costs.latency_ms(child.architecture) for child in run.evaluated
    ]
    with pytest.raises(UserError, match="nothing measures it"):
        searcher(objectives=["latency"], costs=False)


@pytest.mark.slow
def test_once_for_all_is_searched_too() -> None:
    own = open_family("ofa-mobile", image=(3, 8, 8), num_classes=3, width=0.125)
    run = searcher(own=own, evaluations=3)
    to_the_end(run)
    assert len(run.evaluated) == 3 and run.deliver().network.constructor()["num_classes"] == 3


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_stopped_run_goes_on_bit_for_bit(steps: int) -> None:
    whole, halted = searcher(budget="macs<=0.9x"), searcher(budget="macs<=0.9x")
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    stop_after(halted, 1)
    again = searcher(budget="macs<=0.9x")
    again.load(tensors, json.loads(json.dumps(state)))
    figures, left = to_the_end(whole), to_the_end(again)
    assert left and left == figures[-len(left) :]
    assert [each.architecture for each in again.deliver().others] == [
        each.architecture for each in whole.deliver().others
    ]


def test_a_trained_supernet_is_searched_as_it_is(tmp_path: Path) -> None:
    trained = searcher()
    to_the_end(trained)
    file = tmp_path / "supernet.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in trained.supernet.state_dict().items()}, file)
    given = searcher(supernet=str(file))
    assert given.epochs == 1 and given.selecting
    to_the_end(given)
    assert [child.architecture for child in given.evaluated] == [child.architecture for child in trained.evaluated]
    assert [child.accuracy for child in given.evaluated] == [child.accuracy for child in trained.evaluated]
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in copied(trained.state())[0].items()}
    save_file(tensors, folder / "epoch-0002-step-00000.safetensors")
    save_file({"supernet.x": torch.zeros(1)}, folder / "epoch-0001-step-00000.safetensors")
    other = searcher(supernet=str(tmp_path / "run"))
    own = trained.supernet.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in other.supernet.state_dict().items())
    save_file({"network.stem.conv.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="of another shape: network"):
        searcher(supernet=str(file))
    with pytest.raises(UserError, match="a safetensors file"):
        searcher(supernet=str(tmp_path / "none"))


@pytest.mark.slow
def test_the_command_exports_every_point(tmp_path: Path) -> None:
    words = ["search", "--method", "linas", "--family", "bignas", "--task", "digits", "--threads", "1", "--quiet"]
    words += ["--objectives", "accuracy,params", "--task-set", "limit=60"]
    settings = {**QUICK, "batch_size": 32, "points": 2, "evaluations": 6}
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    run_cli(*words, "--out", str(tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    labels = [each["label"] for each in result["outcomes"]]
    assert labels[0] == "final" and set(labels[1:]) <= {"point-1"}
    for each in result["outcomes"]:
        assert (tmp_path / "run" / each["folder"] / "model.py").exists()
    with pytest.raises(UserError, match="nothing for proxylessnas"):
        api.search("digits", method="proxylessnas", objectives=["macs"], out=tmp_path / "other")


def test_the_published_latency_protocol() -> None:
    for batch, (warmup, steps) in GOLDEN["latency_steps"].items():
        assert latency_steps(int(batch)) == (warmup, steps)
    calls = []
    mean, spread = published_latency_ms(lambda: calls.append(None), 16)
    assert len(calls) == sum(latency_steps(16)) and mean >= 0 and spread >= 0


def test_wrong_settings_are_named() -> None:
    for changes in ({"objectives": ["speed"]}, {"objectives": ["macs", "macs"]}, {"evaluations": 1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            Settings(**changes)
