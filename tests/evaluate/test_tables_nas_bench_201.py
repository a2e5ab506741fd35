"""The real NAS-Bench-201 table: facts of the card, published optimum, exact costs, queries, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_tables import real_table, table_folder

from archsmith.core.errors import UserError
from archsmith.evaluate.base import Evaluator
from archsmith.evaluate.tables import Table, TableEvaluator, open_table
from archsmith.families.cell_spaces import cell_from_string, nas_bench_201_space, network_counts, structure_string
from archsmith.space import Architecture, Budget, Trial

ROOT = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((ROOT / "nas-bench-201.json").read_text())
LATENCY = json.loads((ROOT / "nas-bench-201-latency.json").read_text())
SHAPES = {"cifar10": (10, 32), "cifar100": (100, 32), "imagenet16_120": (120, 16)}


@pytest.fixture
def table() -> Table:
    return real_table("nas-bench-201")


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    known = np.isfinite(first) & np.isfinite(second)
    return float(spearmanr(first[known], second[known]).statistic)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_facts_of_the_table(table: Table, dataset: str) -> None:
    case = GOLDEN["table"][dataset]
    expected, close = case["expected"], case["tolerance"]
    test, valid = table.values("test_accuracy", dataset=dataset), table.values("valid_accuracy", dataset=dataset)
    assert (test.argmax(), valid.argmax()) == (expected["best_test_index"], expected["best_val_index"])
    assert test.max() == pytest.approx(expected["best_test"], abs=close)
    assert valid.max() == pytest.approx(expected["best_val"], abs=close)
    assert test.mean() == pytest.approx(expected["mean_test"], abs=close)
    assert spearman(valid, test) == pytest.approx(expected["spearman_val_test"], abs=close)
    short = table.values("valid_accuracy", dataset=dataset, fidelity=12)
    assert spearman(short, test) == pytest.approx(expected["spearman_val12_test"], abs=close)
    macs = table.values("macs", dataset=dataset)
    assert spearman(macs, test) == pytest.approx(expected["spearman_flops_test"], abs=close)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_scores_beside_the_table(dataset: str) -> None:
    table = real_table("nas-bench-201", "nas-bench-201-zero-cost.parquet")
    case = GOLDEN["table"][dataset]
    test = table.values("test_accuracy", dataset=dataset)
    for score in ("naswot", "logsynflow"):
        found = spearman(table.columns[f"{score}_{dataset}"], test)
        assert found == pytest.approx(case["expected"][f"spearman_{score}_test"], abs=case["tolerance"])


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_local_maxima_under_edits_of_one_edge(table: Table, dataset: str) -> None:
    """Strict local maxima of test accuracy, by arithmetic on the codes; then the same through ``space.neighbours``."""
    test = table.values("test_accuracy", dataset=dataset)
    ops = table.columns["ops"].astype(np.int64)
    weights = 5 ** np.arange(6)
    row_of = np.empty(5**6, dtype=np.int64)
    row_of[ops @ weights] = np.arange(len(ops))
    beats_all = np.ones(len(ops), dtype=bool)
    for edge in range(6):
        for shift in range(1, 5):
            other = ops.copy()
            other[:, edge] = (other[:, edge] + shift) % 5
            beats_all &= test > test[row_of[other @ weights]]
    assert beats_all.sum() == GOLDEN["table"][dataset]["expected"]["strict_local_maxima_single_edge"]
    for row in [*np.flatnonzero(beats_all), *range(40)]:
        around = [table.row(other) for other in table.space.neighbours(table.architecture(int(row)))]
        assert len(around) == 24
        assert (test[around] < test[row]).all() == beats_all[row]


def test_the_published_optimum(table: Table) -> None:
    for dataset, best in GOLDEN["published_optimum"].items():
        if dataset != "best_valid":
            test = table.values("test_accuracy", dataset=dataset)
            assert round(float(test.max()), 2) == best["test"]
            assert sorted(np.flatnonzero(np.round(test, 2) == best["test"]).tolist()) == best["index"]
    for dataset, valid in GOLDEN["published_optimum"]["best_valid"].items():
        assert round(float(table.values("valid_accuracy", dataset=dataset).max()), 2) == valid


def test_indices_are_the_official_ones(table: Table) -> None:
    for text, row in GOLDEN["params_flops"].items():
        cell = cell_from_string(text)
        assert table.row(cell) == row["index"]
        assert table.architecture(row["index"]) == cell
        assert table.architecture(row["index"]).network_digest == cell.network_digest


def test_costs_of_all_rows_in_closed_form(table: Table) -> None:
    for row in range(0, len(table), 5):
        cell = table.architecture(row)
        for dataset, (classes, size) in SHAPES.items():
            counts = network_counts(cell, classes=classes, size=size)
            assert {name: table.costs[dataset][name][row] for name in counts} == counts


def test_classes_are_those_of_the_table(table: Table) -> None:
    first: dict[str, int] = {}
    classes = [first.setdefault(structure_string(table.architecture(row)), row) for row in range(len(table))]
    assert classes == table.columns["iso_class"].tolist()


def test_a_result_of_every_fidelity(table: Table) -> None:
    cell = table.architecture(6111)
    evaluator = TableEvaluator(table)
    assert isinstance(evaluator, Evaluator)
    full = evaluator.evaluate(Trial(id=1, architecture=cell))
    assert full == evaluator.evaluate(Trial(id=2, architecture=cell, fidelity=200))
    assert dict(full.metrics) == pytest.approx({"valid_accuracy": 91.6067, "test_accuracy": 94.3733}, abs=1e-4)
    assert dict(full.costs) == {"params": 1073466, "macs": 153272960, "macs_paper": 153272970}
    short = evaluator.evaluate(Trial(id=3, architecture=cell, fidelity=12))
    assert short.seconds == pytest.approx(full.seconds * 12 / 200, rel=1e-6)
    assert short.metrics["valid_accuracy"] == pytest.approx(table.columns["val_acc_12ep_cifar10"][6111])
    assert short == TableEvaluator(table, fidelity=12).evaluate(Trial(id=4, architecture=cell))
    other = TableEvaluator(table, dataset="cifar100").evaluate(Trial(id=5, architecture=cell))
    assert other.metrics["test_accuracy"] < 74 and other.seconds > full.seconds


def test_seeded_repeats_are_recorded_trainings(table: Table) -> None:
    evaluator = TableEvaluator(table, repeat="seeded")
    for row in (0, 7, 6111):
        trainings = table.readings["cifar10"][200.0].repeats["valid_accuracy"][row]
        known = sorted(trainings[np.isfinite(trainings)].tolist())
        cell = table.architecture(row)
        seen = {evaluator.evaluate(Trial(id=1, architecture=cell, seed=s)).metrics["valid_accuracy"] for s in range(6)}
        assert sorted(seen) == sorted(set(known))
        assert np.mean(known) == pytest.approx(table.values("valid_accuracy")[row], abs=1e-4)


def test_devices_give_costs_that_budgets_understand() -> None:
    table = real_table("nas-bench-201", "nas-bench-201-latency-help.parquet", "nas-bench-201-latency-oneproxy.parquet")
    trial = Trial(id=1, architecture=table.architecture(0))
    costs = TableEvaluator(table, devices=["pixel3"]).evaluate(trial).costs
    assert costs["latency"] == costs["latency_pixel3"] == pytest.approx(3.60585, abs=1e-5)
    assert Budget.parse("latency<=5ms").violations(costs) == []
    both = TableEvaluator(table, devices=["pixel3", "1gpu"]).evaluate(trial).costs
    assert "latency" not in both and both["latency_1gpu"] == pytest.approx(13.936, abs=1e-3)
    assert np.isfinite(table.values("latency_brpnas_i7")).sum() <= 1999
    with pytest.raises(UserError, match=r"devices: got 'pixel9'; allowed: devices of the table: \['1gpu', '1080ti_1'"):
        TableEvaluator(table, devices=["pixel9"])


@pytest.mark.parametrize("case", LATENCY["cases"], ids=lambda case: case["name"])
def test_facts_of_the_latencies(case: dict) -> None:  # type: ignore[type-arg]
    table = real_table("nas-bench-201", "nas-bench-201-latency-help.parquet", "nas-bench-201-latency-oneproxy.parquet")
    if case["name"].startswith("device_rank"):
        first, second = case["name"].split("/")[1].split("|")
        found = spearman(table.values(f"latency_{first}"), table.values(f"latency_{second}"))
        assert found == pytest.approx(case["expected"], abs=case["tolerance"])
        return
    expected = case["expected"]
    latency = table.values(f"latency_{expected['device']}", dataset="cifar100")
    test = np.where(latency <= expected["limit_ms"], table.values("test_accuracy", dataset="cifar100"), -1)
    assert (test >= 0).sum() == expected["n_feasible"]
    assert test.argmax() == expected["best_index"]
    assert latency[test.argmax()] == pytest.approx(expected["cost"], abs=case["tolerance"])


def test_numpy_and_parquet_say_the_same(table: Table) -> None:
    other = open_table("nas-bench-201", table_folder() / "nas-bench-201.parquet")
    assert (other.columns["ops"] == table.columns["ops"]).all()
    for dataset in table.datasets:
        for fidelity in table.fidelities(dataset):
            for metric in ("valid_accuracy", "test_accuracy"):
                first = table.values(metric, dataset=dataset, fidelity=fidelity)
                assert np.array_equal(first, other.values(metric, dataset=dataset, fidelity=fidelity))


def test_values_are_read_only(table: Table) -> None:
    with pytest.raises(ValueError, match="read-only"):
        table.values("params")[0] = 1


def test_queries_outside_the_space_are_refused(table: Table) -> None:
    evaluator = TableEvaluator(table)
    cell = dict(table.architecture(0))
    wrong = [
        (Architecture(cell, space="other"), r"architecture\.space: got 'other'; allowed: 'nas-bench-201'"),
        (Architecture(cell | {"edge/0-1": "conv"}, space="nas-bench-201"), r"edge/0-1'\]: got 'conv'"),
        (Architecture({"edge/0-1": "none"}, space="nas-bench-201"), r"edge/0-2'\]: got None"),
        (Architecture(cell | {"edge/0-4": "none"}, space="nas-bench-201"), r"\['edge/0-4'\]; allowed: active paths"),
    ]
    for architecture, match in wrong:
        with pytest.raises(UserError, match=match):
            evaluator.evaluate(Trial(id=1, architecture=architecture))
    with pytest.raises(UserError, match=r"fidelity: got 50.*one of \(12.0, 200.0\)"):
        evaluator.evaluate(Trial(id=1, architecture=nas_bench_201_space().validate(cell), fidelity=50))
    with pytest.raises(UserError, match=r"dataset: got 'imagenet'; allowed: one of \['cifar10'"):
        TableEvaluator(table, dataset="imagenet")
    with pytest.raises(UserError, match=r"metric: got 'accuracy'; allowed: one of \['valid_accuracy'"):
        table.values("accuracy")
    with pytest.raises(UserError, match=r"row: got 15625; allowed: an integer from 0 to 15624"):
        table.architecture(15625)
    with pytest.raises(UserError, match=r"repeat: got 'best'; allowed: 'mean' or 'seeded'"):
        TableEvaluator(table, repeat="best")
