"""The report of a search in a supernet, and the export of any point of its measured set."""

from __future__ import annotations

import json

import pytest
import torch
from bignas_runs import words

from archsmith import api
from archsmith.cli import main
from archsmith.core.errors import UserError
from archsmith.run.search_sections import _errors, genotypes, sections_of_search
from archsmith.run.set_charts import calibration, selection, training
from archsmith.run.verify_network import verify_network

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

WHERE = {
    "onnxruntime": "1.20", "torch": "2.11", "device": "cpu", "cpu": "some cpu", "precision": "as stored", "threads": 1,
}  # fmt: skip
LATENCY = {"median_ms": 2.0, "interval_ms": [1.9, 2.2], "noisy": False, "provenance": WHERE}
TIMES = [{"layer": "stem.conv", "kernels": ["Conv"], "integer": False, "latency_ms": 1.5},
         {"layer": "(conversions)", "kernels": ["Transpose"], "integer": False, "latency_ms": 0.5}]  # fmt: skip
OUTCOME = {
    "label": "final",
    "metrics": {"valid_accuracy": 0.7, "test_accuracy": 0.69},
    "costs": {"macs": 1_000, "params": 100, "latency": LATENCY},
    "deployed": {"precision": "int8-static", "file": "model-int8.onnx", "layers_of": "model-int8.onnx",
                 "layers": TIMES, "metrics": {"valid_accuracy": 0.6}},
}  # fmt: skip
RESULT = {"outcomes": [OUTCOME], "reference": {"macs": 2_000, "params": 200}, "limits": {"latency": 2.5}}
EPOCHS = [
    {"epoch": 0, "train_accuracy": 0.4, "smallest_accuracy": 0.3, "largest_accuracy": 0.5},
    {
        "epoch": 1,
        "phase": "search",
        "axis": "latency",
        "evaluated": [[1.0, 0.5], [2.0, 0.7]],
        "refused": [3.0],
        "front": [[1.0, 0.5], [2.0, 0.7]],
        "predictions": {"latency": [[1.1, 1.0], [1.9, 2.0], [3.0, 3.0]], "valid_accuracy": [[0.5, 0.52]]},
        "repeats": [[1.0, 1.04], [2.0, 2.0], [3.0, 3.03]],
    },
]


def page(epochs=EPOCHS, result=RESULT):
    return "".join(sections_of_search(epochs, result, "runs/some"))


def test_every_section_says_what_was_found():
    text = page()
    assert "smallest child has 30.0 % and the largest 50.0 %" in text
    assert "onnxruntime 1.20 on some cpu, fp32, 1 thread, batch 1" in text
    assert "archsmith export runs/some --point all" in text
    assert "as it runs (int8-static)" in text and "60.00" in text
    assert "1.9 to 2.2" in text
    assert "3 networks differed by 1.0 % in the median" in text
    assert "5.0 % (kept)" in text and "2.00 points" in text
    assert "stem.conv" in text and "75.0%" in text and "(conversions)" in text
    assert all(f'id="{name}"' in text for name in ("chart-pareto", "chart-training", "chart-calibration-latency"))


def test_what_was_not_measured_is_left_out():
    plain = {key: value for key, value in EPOCHS[1].items() if key not in ("predictions", "repeats")}
    without = {**OUTCOME, "deployed": {}}
    text = page([EPOCHS[0], {**plain, "axis": "macs"}], {**RESULT, "outcomes": [without]})
    assert "predictors" not in text and "layer-times" not in text and "Accuracy against MACs" in text
    assert page([EPOCHS[0]], {**RESULT, "outcomes": [without]}).count("<section") == 1
    measured = page([EPOCHS[0], {**plain, "repeats": [[1.0, 1.1]]}])
    assert "Nothing was predicted: every latency was measured" in measured
    nothing = {**EPOCHS[1], "evaluated": [], "front": [], "refused": [3.0, 4.0]}
    assert "chart-pareto" not in page([nothing])


def test_the_error_of_a_predictor_is_compared_with_what_repeats():
    pairs = [[1.2, 1.0], [2.4, 2.0], [3.6, 3.0]]
    assert _errors("latency", pairs, 0.01)[:3] == ("20.0 % (above)", "10 %", "1.0 %")
    assert _errors("latency", pairs, 0.2)[:3] == ("20.0 % (kept)", "30 %", "20.0 %")
    assert _errors("latency", pairs, None)[2:] == ("not measured", "1.00")
    assert _errors("latency", [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], None)[3] == "0.00"


def test_a_genotype_is_a_table_of_parts_and_kinds():
    text = genotypes(
        {"final": {"resolution": 32, "mb1/width": 16, "mb1/kernel": 5, "mb2/width": 24}, "point-1": {}}, "T"
    )
    assert "<tr><th>part</th><th" in text and text.count("<tr>") == 4 + 1
    assert "whole network" in text and "mb2" in text and "<summary>point-1</summary>" in text


def test_charts_carry_intervals_and_the_line_of_equality():
    figure = selection(
        {"search": [[1.0, 0.5]]}, [[1.0, 0.5]], [("final", 1.0, 0.5)], largest=2.0, limit=None, axis="latency",
        intervals=[(0.9, 1.3)],
    )  # fmt: skip
    assert figure["data"][-1]["error_x"]["array"] == [pytest.approx(0.3)]
    assert figure["data"][-1]["error_x"]["arrayminus"] == [pytest.approx(0.1)]
    drawn = calibration([[0.5, 0.6]], name="accuracy", unit="%", factor=100.0)
    assert drawn["data"][1]["x"] == [50.0] and drawn["data"][1]["y"] == [60.0]
    assert drawn["data"][0]["x"] == drawn["data"][0]["y"] == drawn["layout"]["xaxis"]["range"]
    assert calibration([[1.0, 1.0]], name="a", unit="b")["layout"]["xaxis"]["range"] == [0.0, 2.0]
    assert len(training(EPOCHS[:1])["data"]) == 3


def test_every_point_of_the_measured_set_is_exported_by_one_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(words(run))
    text = (run / "report.html").read_text()
    assert "no searched widths" not in text and "cuts removed" not in text and "mb1" in text
    rows = api.export(run)
    assert [row["point"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > 1
    assert [row["macs"] for row in rows] == sorted(row["macs"] for row in rows)
    reads = (run / "journal.jsonl").read_text().count("test_read")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["export", str(run), "--point", "1"])
    assert "front-1: valid accuracy" in capsys.readouterr().out
    folder = run / "exported" / "front-1"
    record = json.loads((folder / "outcome.json").read_text())
    assert (
        record["metrics"]["valid_accuracy"] == rows[0]["valid_accuracy"] and record["costs"]["macs"] == rows[0]["macs"]
    )
    assert "test_accuracy" not in record["metrics"]
    assert (run / "journal.jsonl").read_text().count("test_read") == reads
    assert verify_network(folder, expected=record).ok
    with pytest.raises(UserError, match=f"--point: got {len(rows) + 1}; allowed: 1 to {len(rows)}, or all"):
        api.export(run, points=[len(rows) + 1])
    with pytest.raises(SystemExit):
        main(["export", str(run), "--point", "x"])
    assert "--point: got 'x'; allowed: a number of the list" in " ".join(capsys.readouterr().err.split())
    assert torch.is_grad_enabled()
