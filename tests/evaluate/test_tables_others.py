"""The other real tables: facts of their origin, every row found again, equal networks on one row, what is not there."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from benchmark_tables import real_table, table_folder

from archsmith.core.errors import UserError
from archsmith.evaluate.tables import Table, TableEvaluator, open_table, table_catalogue
from archsmith.families.graph_cells import GraphCellSpace, graph_hash
from archsmith.space import Objective, Trial

OTHERS = sorted(row["name"] for row in table_catalogue() if row["name"] != "nas-bench-201")


@pytest.mark.parametrize("name", OTHERS)
def test_the_catalogue_says_what_the_table_is(name: str) -> None:
    row = next(row for row in table_catalogue() if row["name"] == name)
    table = real_table(name)
    assert (len(table), table.space.name) == (row["rows"], row["space"])
    assert set(table.datasets) == set(row["datasets"])
    for dataset in table.datasets:
        known = tuple(range(1, 51)) if row["fidelities"] == "1 to 50" else row["fidelities"]
        assert table.fidelities(dataset) == known


@pytest.mark.parametrize("name", OTHERS)
def test_rows_are_found_again(name: str) -> None:
    table = real_table(name)
    evaluator = TableEvaluator(table)
    for row in np.random.default_rng(0).integers(len(table), size=60).tolist():
        architecture = table.architecture(row)
        assert table.space.validate(dict(architecture)) == architecture
        found = table.row(architecture)
        if name in ("ofa-mobilenet-latency", "flexibert-500"):  # rows may be the same network
            assert found is not None and found <= row
        else:
            assert found == row
        result = evaluator.evaluate(Trial(id=1, architecture=architecture))
        assert result.status == "ok" or name.startswith("nas-bench-nlp")
        assert set(result.costs) <= {"params", "macs_paper"}


@pytest.mark.parametrize("name", [*OTHERS, "nas-bench-201"])
def test_an_evaluator_can_be_sent_to_another_process(name: str) -> None:
    evaluator = TableEvaluator(real_table(name))
    again = pickle.loads(pickle.dumps(evaluator))  # noqa: S301 - our own bytes
    for row in (0, 99):
        trial = Trial(id=1, architecture=evaluator.table.architecture(row))
        assert again.evaluate(trial) == evaluator.evaluate(trial)
        assert again.table.architecture(row).network_digest == trial.architecture.network_digest


def test_nas_bench_101_is_what_its_origin_says() -> None:
    table = real_table("nas-bench-101")
    space = table.space
    assert isinstance(space, GraphCellSpace)
    test = table.values("test_accuracy")
    best = int(test.argmax())
    assert test[best] == pytest.approx(94.31758, abs=1e-5)
    assert graph_hash(space.cell(table.architecture(0))) == "00005c142e6f48ac74fdcf73e3439874"
    assert graph_hash(space.cell(table.architecture(best))) == "02e5a0247bbdcf2860b7e96f74961594"
    rows = range(0, len(table), 1000)
    names = [graph_hash(space.cell(table.architecture(row))) for row in rows]
    assert names == sorted(names)


def test_every_numbering_finds_the_row() -> None:
    table = real_table("nas-bench-101")
    space = table.space
    assert isinstance(space, GraphCellSpace)
    rng = np.random.default_rng(1)
    for _ in range(200):
        drawn = space.sample(rng)
        row = table.row(drawn)
        assert row is not None
        assert table.architecture(row).network_digest == drawn.network_digest


def test_nas_bench_101_numpy_and_parquet_say_the_same() -> None:
    table, other = real_table("nas-bench-101"), open_table("nas-bench-101", table_folder() / "nas-bench-101.parquet")
    assert np.array_equal(table.values("test_accuracy"), other.values("test_accuracy"))
    assert all(table.architecture(row) == other.architecture(row) for row in (0, 99, 423623))


def test_nas_bench_macro() -> None:
    table = real_table("nas-bench-macro")
    best = int(table.values("test_accuracy").argmax())
    result = TableEvaluator(table).evaluate(Trial(id=1, architecture=table.architecture(best)))
    assert result.metrics["test_accuracy"] == pytest.approx(93.1267, abs=1e-4)
    seeded = TableEvaluator(table, repeat="seeded")
    seen = {
        seeded.evaluate(Trial(id=1, architecture=table.architecture(0), seed=s)).metrics["test_accuracy"]
        for s in range(3)
    }
    assert np.mean(list(seen)) == pytest.approx(table.values("test_accuracy")[0], abs=1e-3)
    macs = table.values("macs_paper")
    assert macs[table.row(table.space.validate({f"layer/{i}": "identity" for i in range(8)}))] == macs.min()


def test_equal_graph_networks_share_a_row() -> None:
    table = real_table("nas-bench-graph")
    rng = np.random.default_rng(0)
    shared = 0
    for _ in range(300):
        drawn = table.space.sample(rng)
        row = table.row(drawn)
        assert row is not None
        named = table.architecture(row)
        assert named.network_digest == drawn.network_digest
        shared += named != drawn
        assert table.row(drawn) == row
    assert shared > 50
    result = TableEvaluator(table, dataset="arxiv").evaluate(Trial(id=1, architecture=table.architecture(0)))
    assert dict(result.metrics) == pytest.approx({"valid_accuracy": 67.9, "test_accuracy": 67.247}, abs=1e-3)
    assert result.costs["params"] == 138920
    recorded = TableEvaluator(table, dataset="arxiv", devices=["recorded"])
    assert recorded.evaluate(Trial(id=1, architecture=table.architecture(0))).costs["latency"] == pytest.approx(
        105.86, abs=0.01
    )
    with pytest.raises(UserError, match="the input itself does not reach the output"):
        table.row(type(drawn)({"links": "0000", **{f"op/{i}": "skip" for i in (1, 2, 3, 4)}}, space="nas-bench-graph"))


def test_a_recurrent_cell_and_its_learning_curve() -> None:
    table = real_table("nas-bench-nlp-wikitext2")
    evaluator = TableEvaluator(table)
    cell = table.architecture(0)
    early, full = (evaluator.evaluate(Trial(id=1, architecture=cell, fidelity=f)) for f in (1, None))
    assert early.metrics["valid_loss"] == pytest.approx(5.68066, abs=1e-5)
    assert full.metrics["valid_loss"] < early.metrics["valid_loss"]
    assert full.seconds == pytest.approx(50 * early.seconds)
    assert '"op": "activation_tanh"' in table.columns["recepie"][0]
    diverged = np.flatnonzero(table.columns["n_epochs"] < 50)
    assert len(diverged) == 4
    for row in diverged.tolist():
        broken = evaluator.evaluate(Trial(id=1, architecture=table.architecture(row)))
        assert broken.status == "failed" and "diverged" in str(broken.reason) and broken.seconds > 0


def test_penn_treebank_is_minimised() -> None:
    table = real_table("nas-bench-nlp-ptb")
    result = TableEvaluator(table).evaluate(Trial(id=1, architecture=table.architecture(0)))
    assert result.metrics["perplexity"] == pytest.approx(np.exp(result.metrics["loss"]), rel=1e-6)
    assert Objective("loss", "minimize").value(result) == pytest.approx(5.070841669)
    with pytest.raises(UserError, match=r"row'\]: got 12342"):
        table.row(type(table.architecture(0))({"row": 12342}, space=table.space.name))


def test_networks_that_were_not_measured_fail() -> None:
    table = real_table("fbnet-latency")
    evaluator = TableEvaluator(table, devices=["pixel3"])
    measured = evaluator.evaluate(Trial(id=1, architecture=table.sample(np.random.default_rng(0))))
    assert measured.costs["latency"] > 0 and not measured.metrics
    other = evaluator.evaluate(Trial(id=1, architecture=table.space.sample(np.random.default_rng(0))))
    assert other.status == "failed" and "holds no measurement of this architecture" in str(other.reason)


def test_inactive_layers_do_not_count() -> None:
    table = real_table("ofa-mobilenet-latency")
    architecture = table.architecture(0)
    assert [architecture[f"stage/{s}/depth"] for s in range(5)] == [2, 2, 2, 2, 3]
    assert "stage/0/2/kernel" not in architecture
    latency = TableEvaluator(table, devices=["v100_64"]).evaluate(Trial(id=1, architecture=architecture)).costs
    assert latency["latency"] == pytest.approx(21.8071, abs=1e-4)
    with pytest.raises(UserError, match="stage/0/2/kernel"):
        table.row(type(architecture)({**architecture, "stage/0/2/kernel": 3}, space=table.space.name))


def test_transformers_by_setting() -> None:
    table = real_table("hat-transformer-latency")
    evaluator = TableEvaluator(table, dataset="iwslt14deen_gpu_titanxp", devices=["total"])
    costs = evaluator.evaluate(Trial(id=1, architecture=table.architecture(0))).costs
    assert costs["latency"] == pytest.approx(5.495998 + 124.549820, abs=1e-4)
    assert table.columns["iwslt14deen_gpu_titanxp/encoder_embed_dim"][0] == 640


DAMAGE = {
    "nas-bench-101": ("adj_bits", 0),
    "nas-bench-macro": ("arch", "00000003"),
    "nas-bench-graph": ("hash", 99999),
    "fbnet-latency": ("b03", 9),
    "ofa-mobilenet-latency": ("ks00", 9),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_cells_are_refused(name: str, tmp_path: Path) -> None:
    columns = dict(real_table(name).columns)
    bad = DAMAGE[name]
    columns[bad[0]] = columns[bad[0]].copy()
    columns[bad[0]][5] = bad[1]
    np.savez(tmp_path / "bad.npz", **columns)
    with pytest.raises(UserError, match=rf"table\.{bad[0]}"):
        open_table(name, tmp_path / "bad.npz", checksum=False)


def test_a_table_of_another_space_is_refused() -> None:
    table: Table = real_table("nas-bench-macro")
    with pytest.raises(UserError, match=r"architecture\.space: got 'nas-bench-macro'; allowed: 'nas-bench-101'"):
        real_table("nas-bench-101").row(table.architecture(0))
