"""Searches for a device: what is measured, what a limit on latency does, and what is left for a resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bignas_runs import BIGNAS, TRAINING, words
from darts_runs import copied, small_task, stop_after, to_the_end
from search_samples import Notes

from archsmith import api
from archsmith.cli import main
from archsmith.core.errors import UserError
from archsmith.cost import Deployment, Latency
from archsmith.cost.latency import Provenance
from archsmith.families.bignas import bignas_family
from archsmith.methods import bignas, hw_aware_system, simq_nas
from archsmith.run.costs import LATENCY_MARGIN, CostModel
from archsmith.run.foretold import FEWEST, Foretold
from archsmith.run.prepare import deployment_of
from archsmith.space import Budget

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

QUICK = {
    bignas: BIGNAS,
    hw_aware_system: {**TRAINING, "evaluations": 14, "population": 6, "inner_evaluations": 40, "points": 3},
    simq_nas: {**TRAINING, "lr": 0.05, "calibration_images": 12, "ranges": "minmax", "population": 4,
               "inner_evaluations": 20, "evaluations": 8, "points": 2},
}  # fmt: skip
METHODS = pytest.mark.parametrize("method", list(QUICK), ids=["bignas", "linas", "simq-nas"])
WHERE = Provenance("torch", "cpu", 1, "fp32", ((1, 2),), "reference-1", 1, 1.0, "2", None, "3", "c", "a", 1, ())


def family():
    return bignas_family("tiny", image=(3, 8, 8), num_classes=3)


def by_macs(own, macs):
    """Return a latency that follows the MACs: 2 ms for the smallest, 10 ms for the largest, with some unevenness."""
    low, high = own.exact_costs(own.smallest())["macs"], own.exact_costs(own.largest())["macs"]
    share = (macs - low) / (high - low)
    ms = float(2 + 8 * share + 0.2 * np.sin(40 * share) * (0 < share < 1))
    return Latency((ms,) * 10, (1.0,) * 10, 1, WHERE)


@pytest.fixture
def clock(monkeypatch):
    """Make latency a known function of a child; count what is measured, in a search and in its cost model."""
    calls = []
    own = family()

    def of_child(self, architecture, network=None):
        child = self.main_part(architecture) if hasattr(self, "main_part") else architecture
        calls.append(child.digest)
        return by_macs(own, own.exact_costs(child)["macs"])

    for owner in (CostModel, bignas.Searcher, hw_aware_system.Searcher, simq_nas.Searcher):
        monkeypatch.setattr(owner, "measure", of_child)
    return calls


def searcher(of, *, budget=None, notes=None, deployment=None, **changes):
    own = family()
    costs = CostModel(
        own, Budget.parse(budget) if budget else None, notes or Notes(),
        deployment=deployment, calibration=small_task().examples(12, "train"),
    )  # fmt: skip
    settings = of.Settings(**{**QUICK[of], **changes})
    return of.Searcher(family=own, task=small_task(), settings=settings, costs=costs, seed=0)


# ------------------------------------------------------------------------------------------------ limits on latency


@METHODS
def test_a_limit_on_latency_is_aimed_at_with_a_margin(method, clock):
    run = searcher(method, budget="latency<=6ms")
    figures = to_the_end(run)
    limit = LATENCY_MARGIN * 6
    assert all(child.costs["latency"] <= limit for child in run.evaluated)
    assert all(child.costs["latency"] > limit and not child.metrics for child in run.refused)
    for _, architecture in run.chosen():
        assert run.costs_of(architecture)["latency"] <= limit
    assert all(figure["within_budget"] for figure in figures if figure["phase"] != "training")
    events = run.costs._journal.events()
    assert len(clock) == len(events) == len({(event["kind"], event["digest"]) for event in events})


@METHODS
def test_what_breaks_the_limit_is_not_evaluated(method, clock, monkeypatch):
    run = searcher(method, budget="latency<=4ms")
    scored = []
    evaluate = type(run).evaluate
    monkeypatch.setattr(type(run), "evaluate", lambda self, each: scored.append(each) or evaluate(self, each))
    figures = to_the_end(run)
    assert run.refused and not {each.architecture for each in run.refused} & set(scored)
    assert sum(len(figure.get("refused", [])) for figure in figures) == len(run.refused)
    assert sum(len(figure.get("evaluated", [])) for figure in figures) == len(run.evaluated)


def test_a_limit_that_no_network_keeps_names_the_nearest(clock):
    with pytest.raises(UserError, match=r"allowed: latency at least 2.0ms, what the smallest network reaches"):
        searcher(bignas, budget="latency<=1ms")
    with pytest.raises(
        UserError, match=r"at least 2.105 ms: the nearest that exists, the smallest network, takes 2 ms"
    ):
        searcher(bignas, budget="latency<=2.05ms")
    searcher(bignas, budget="latency<=2.2ms")


def test_where_nothing_measured_keeps_the_limit_the_smallest_is_delivered(clock):
    for method in QUICK:
        run = searcher(method, budget="latency<=2.2ms", **({"mutations": 0} if method is bignas else {}))
        run.evaluated = []
        assert run.main_part(run.chosen()[0][1]) == run.family.smallest()


def test_budgets_are_latencies_where_latency_is_the_objective(clock):
    run = searcher(bignas, budget="latency<=8ms", objectives=("accuracy", "latency"))
    limits = [budget.limits[0] for budget in run.budgets()]
    assert {limit.cost for limit in limits} == {"latency"} and limits[-1].value == pytest.approx(7.6)
    values = [2.0, *(limit.value for limit in limits)]
    assert np.allclose(np.diff(np.log(values)), np.log(7.6 / 2) / 3)
    figures = to_the_end(run)
    assert run.axis == figures[-1]["axis"] == "latency"
    front = figures[-1]["front"]
    assert front == sorted(front) and [point[1] for point in front] == sorted(point[1] for point in front)
    with pytest.raises(ValueError, match="accuracy and one cost"):
        bignas.Settings(objectives=("macs", "latency"))


def test_mutants_that_are_foretold_to_break_the_limit_are_never_measured(clock):
    levels = {"resolution": 3, "width": 3, "depth": 2, "kernel": 1, "expansion": 1}
    run = searcher(bignas, budget="latency<=4ms", levels=levels, mutations=30)
    to_the_end(run)
    fine = [child for child in run.in_order if child.number >= len(run.strategy.coarse)]
    late = [child for child in fine if child.predicted]
    assert late and sum(not child.metrics for child in late) <= len(late) / 2
    errors = [abs(child.predicted["latency"] / child.costs["latency"] - 1) for child in late]
    assert np.median(errors) < 0.15


def test_foretelling_depends_on_what_was_measured_alone(clock):
    own = family()
    drawn = own.space.sample_many(np.random.default_rng(0), 2 * FEWEST + 3)
    known = [(each, by_macs(own, own.exact_costs(each)["macs"]).median_ms) for each in drawn]
    one, other = Foretold(own.space), Foretold(own.space)
    assert one.ms(drawn[-1], known[: FEWEST - 1]) is None and one.least_ms(drawn[-1], known[: FEWEST - 1]) == 0
    one.ms(drawn[-1], known[:FEWEST])
    found = one.ms(drawn[-1], known)
    assert found == other.ms(drawn[-1], known) == other.ms(drawn[-1], known[: 2 * FEWEST])
    assert found is not None and one.least_ms(drawn[-1], known) < found


@pytest.mark.parametrize(
    ("method", "steps"),
    [(bignas, 2), (bignas, 9), (hw_aware_system, 9), pytest.param(simq_nas, 6, marks=pytest.mark.slow)],
)
def test_a_killed_search_goes_on_with_the_latencies_it_measured(method, steps, clock, monkeypatch):
    """Measured anew they would be other numbers: the journal decides."""
    notes = Notes()
    whole = searcher(method, budget="latency<=6ms", notes=notes)
    figures = to_the_end(whole)
    halted = searcher(method, budget="latency<=6ms", notes=notes)
    stop_after(halted, steps)
    tensors, state = copied(halted.state())

    def fails(*_):
        raise AssertionError("measured again")

    for owner in (CostModel, method.Searcher):
        monkeypatch.setattr(owner, "measure", fails)
    again = searcher(method, budget="latency<=6ms", notes=notes)
    again.load(tensors, json.loads(json.dumps(state)))
    left = to_the_end(again)
    assert left and left == figures[-len(left) :]
    assert [each.costs for each in again.in_order] == [each.costs for each in whole.in_order]
    assert [label for label, _ in again.chosen()] == [label for label, _ in whole.chosen()]


def test_predictions_were_made_before_the_measurement(clock):
    run = searcher(hw_aware_system, objectives=["accuracy", "latency"], method="archsmith", evaluations=34)
    figures = to_the_end(run)[-1]
    pairs = figures["predictions"]
    assert set(pairs) == {"valid_accuracy", "latency"} and len(pairs["latency"]) == 14  # all but the first 20
    measured = {child.costs["latency"] for child in run.evaluated}
    assert {found for _, found in pairs["latency"]} <= measured
    assert figures["repeats"] and all(len(pair) == 2 for pair in figures["repeats"])
    assert all("latency" not in child.predicted for child in run.evaluated[:20])


# ------------------------------------------------------------------------------------------------ where it runs


@pytest.mark.parametrize(
    "deployment",
    [pytest.param(Deployment("onnxruntime"), marks=pytest.mark.slow), Deployment("onnxruntime", "int8-static")],
)
def test_what_is_measured_and_scored_is_the_network_as_it_runs(deployment, monkeypatch):
    made = []
    ready = Deployment.ready

    def noted(self, network, calibration):
        made.append((self, network))
        return ready(self, network, calibration)

    monkeypatch.setattr(Deployment, "ready", noted)
    run = searcher(bignas, objectives=("accuracy", "latency"), deployment=deployment, mutations=0)
    to_the_end(run)
    child = run.evaluated[-1]
    assert all(self == deployment for self, _ in made)
    assert {run.family.architecture_of(network) for _, network in made} >= {each.architecture for each in run.evaluated}
    network = run.network_of(child.architecture)
    scores = run.task.evaluate(ready(deployment, network, run.costs.calibration).forward(), "valid")
    assert child.accuracy == float(scores["accuracy"])
    plain = run.scores_inside(child.architecture)
    same = child.metrics["valid_loss"] == pytest.approx(plain["valid_loss"], abs=1e-5)
    assert same == (deployment.precision == "fp32")
    event = run.costs._journal.events("latency_measured")[-1]
    assert event["latency"]["provenance"]["backend"] == "onnxruntime"


@pytest.mark.slow
def test_the_command_delivers_and_verifies_an_int8_file(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    options = ("--device", "onnxruntime", "--latency-precision", "int8-static", "--objectives", "accuracy,latency")
    main_exits(words(tmp_path / "run", *options))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for each in result["outcomes"]:
        deployed = each["deployed"]
        assert deployed["file"] == "model-int8.onnx" and (tmp_path / "run" / each["folder"] / deployed["file"]).exists()
        where = each["costs"]["latency"]["provenance"]
        assert where["backend"] == "onnxruntime" and "int8" in where["precision"]
        assert deployed["layers"] and "valid_accuracy" in deployed["metrics"]
    report = api.verify(tmp_path / "run")
    rows = {(row.subject, row.name): row for row in report.rows}
    assert report.ok and rows["final", "as deployed"].status == "ok"
    assert "onnxruntime" in rows["final", "latency"].detail
    file = tmp_path / "run" / "networks" / "final" / "model-int8.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    broken = {(row.subject, row.name): row for row in api.verify(tmp_path / "run").rows}
    assert broken["final", "as deployed"].status == "failed"


def main_exits(arguments):
    """Run the command line, which leaves by an exit."""
    with pytest.raises(SystemExit) as found:
        main(arguments)
    assert not found.value.code, found.value.code


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = {
        ("--device", "cuda"): "cuda, but torch finds no CUDA device here",
        ("--latency-device", "cuda"): "cuda, but torch finds no CUDA device here",
        ("--device", "tpu"): "allowed: auto, cpu, cuda, onnxruntime",
        ("--latency-precision", "int8-dynamic"): "int8-dynamic on cpu; allowed: fp32, bf16 on cpu",
        ("--device", "onnxruntime", "--latency-threads", "999"): "allowed: 1 to",
        ("--method", "simq-nas", "--latency-device", "cpu"): "latency device: got cpu for the method simq-nas",
        ("--method", "atomnas", "--device", "onnxruntime"): "this method measures in torch on the CPU",
    }
    for options, text in refused.items():
        method = () if "--method" in options else ("--method", "bignas")
        with pytest.raises(SystemExit) as found:
            main(["search", *method, *options, "--task-set", "limit=60", "--out", str(tmp_path / "run")])
        assert found.value.code == 2 and text in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_the_configuration_keeps_what_is_not_the_default(tmp_path):
    for device, given, kept in (
        ("cpu", None, None),
        ("cpu", {"precision": "bf16"}, {"device": "cpu", "precision": "bf16"}),
        ("onnxruntime", None, {"device": "onnxruntime"}),
        ("cpu", {"device": "onnxruntime", "threads": 2}, {"device": "onnxruntime", "threads": 2}),
    ):
        assert api._latency_section(device, given, bignas) == kept
    assert api._latency_section("cpu", None, simq_nas) is None

    class Config:
        method, latency = "simq-nas", None

    assert deployment_of(Config, simq_nas) == Deployment("onnxruntime")
    assert deployment_of(Config, bignas) == Deployment()
