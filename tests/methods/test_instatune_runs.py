"""InstaTune as one run: from pre-trained weights to a Pareto set of networks that verify, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import events, history, run_cli, start_cli, wait_for

from archsmith import api
from archsmith.core.errors import UserError
from archsmith.run.own_model import made_network
from archsmith.tasks import open_task
from tests.pretrained_samples import write_encoder

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

SETTINGS = {
    "epochs": 2,
    "batch_size": 16,
    "lr": 2e-3,
    "evaluations": 10,
    "initial": 5,
    "batch": 3,
    "points": 2,
    "dims": {"depth": [1, 2, 3], "heads": [2, 4], "ffn": [32, 64]},
}
TASK = {"limit": 60, "max_tokens": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def searched(folder, out, **given):
    settings = {**SETTINGS, **given.pop("settings", {})}
    options = {"task": "phrases", "task_options": TASK, "threads": 1, "quiet": True, "settings": settings, **given}
    return api.search(method="instatune", model=str(folder), out=out, **options)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run with measured latency among the objectives."""
    return searched(folder, tmp_path_factory.mktemp("run") / "run", objectives=["accuracy", "latency"])


def test_a_run_ends_with_a_pareto_set_of_standalone_networks(finished):
    outcomes = finished.result["outcomes"]
    assert finished.status == "finished" and outcomes[0]["label"] == "final"
    accuracies = [each["metrics"]["valid_accuracy"] for each in outcomes]
    assert accuracies == sorted(accuracies, reverse=True)
    assert finished.result["figures"]["one_shot_accuracy"] == accuracies[0]  # the active path is what is delivered
    for outcome in outcomes:
        files = set(outcome["files"])
        assert {"record.json", "weights.safetensors", "model.onnx", "program.pt2"} <= files
        sizes = outcome["sizes"]
        weights = load_file(finished.path / outcome["folder"] / "weights.safetensors")
        depth = sizes["encoder.encoder.layer.depth"]
        heads = [sizes[f"encoder.encoder.layer.{n}.attention.self.query.rows"] for n in range(depth)]
        for number in range(3):
            name = f"encoder.encoder.layer.{number}.attention.self.query.weight"
            assert (name in weights) == (number < depth)
            if number < depth:
                assert weights[name].shape == (8 * heads[number], 32)


def test_the_front_is_of_measured_latencies(finished):
    """Every subnet was timed once, as its own network; the epoch of the search says what was measured."""
    measured = {e["digest"]: e["median_ms"] for e in events(finished.path, "latency_measured")}
    last = history(finished.path)[-1]
    assert last["axis"] == "latency" and len(last["evaluated"]) == SETTINGS["evaluations"]
    assert {cost for cost, _ in last["evaluated"]} <= set(measured.values())
    assert len(measured) == len(events(finished.path, "latency_measured"))
    front = last["front"]
    assert front == sorted(front) and [a for _, a in front] == sorted(a for _, a in front)
    page = (finished.path / "report.html").read_text()
    assert "latency in ms, measured" in page


def test_everything_verifies_and_no_code_is_needed_for_a_folder(finished):
    report = api.verify(finished.path)
    unchecked = {row.name for row in report.rows if row.status == "not checked"}
    assert not [row for row in report.rows if row.status == "failed"]
    assert unchecked == {"program.pt2"}
    trusted = api.verify(finished.path, trust=True)
    assert trusted.ok and not [row for row in trusted.rows if row.status == "not checked"]


def test_a_changed_weight_is_noticed(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    file = copy / "networks" / "final" / "weights.safetensors"
    weights = load_file(file)
    weights["head.bias"] = weights["head.bias"] + 1
    save_file(weights, file)
    assert {row.name for row in api.verify(copy).rows if row.status == "failed"} >= {"rebuilt"}


def test_a_run_begins_with_the_pretrained_weights(folder):
    task = open_task("phrases", tokenizer=folder, **TASK)
    network = made_network(str(folder), task).eval()
    given = load_file(folder / "model.safetensors")
    assert all(torch.equal(given[f"bert.{name}"], value) for name, value in network.encoder.state_dict().items())
    ids = task.examples(3)
    shorter = ids[:, : int((ids != 0).sum(1).max())]
    with torch.no_grad():
        assert torch.allclose(network(ids), network(shorter), atol=1e-6)  # padding counts for nothing


def test_a_budget_on_macs_is_kept_and_one_that_nothing_meets_is_refused(folder, tmp_path):
    settings = {"epochs": 1, "evaluations": 6}
    outcome = searched(folder, tmp_path / "run", budget="macs<=0.6x", settings=settings)
    largest = outcome.result["reference"]["macs"]
    assert all(each["costs"]["macs"] <= 0.6 * largest for each in outcome.result["outcomes"])
    with pytest.raises(UserError, match="macs"):
        searched(folder, tmp_path / "other", budget="macs<=0.01x")
    with pytest.raises(UserError, match="limits on macs, params, latency"):
        searched(folder, tmp_path / "other", budget="memory<=1kB")
    assert not (tmp_path / "other").exists()


def test_a_stopped_run_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    from archsmith.run import drive

    whole = searched(folder, tmp_path / "whole")
    calls = {"left": 9}  # in the middle of the second epoch, then in the search

    def stops(self):
        calls["left"] -= 1
        if calls["left"] > 0:
            return False
        self.stop.request("a test")
        return True

    parts = 0
    outcome = None
    while outcome is None or outcome.status != "finished":
        parts += 1
        calls["left"] = 7 if parts < 3 else 10**6
        with monkeypatch.context() as patch:
            patch.setattr(drive._RunMonitor, "should_stop", stops)
            outcome = searched(folder, tmp_path / "parts")
    assert parts >= 3
    assert _without_times(history(tmp_path / "parts")) == _without_times(history(tmp_path / "whole"))
    for one, other in zip(outcome.result["outcomes"], whole.result["outcomes"], strict=True):
        assert one["files"]["weights.safetensors"] == other["files"]["weights.safetensors"]
        assert one["metrics"] == other["metrics"]


def _without_times(rows):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


@pytest.mark.slow
def test_any_measured_point_is_exported_by_one_command(finished, tmp_path):
    rows = api.export(finished.path)
    assert [row["point"] for row in rows] == list(range(1, len(rows) + 1)) and "latency" in rows[0]
    (record,) = api.export(finished.path, points=[1], out=tmp_path)
    assert record["metrics"]["valid_accuracy"] == rows[0]["valid_accuracy"]
    assert (tmp_path / "front-1" / "weights.safetensors").is_file() and "test_accuracy" not in record["metrics"]


# --------------------------------------------------------------------- what is refused


def test_weights_that_do_not_fit_are_said(folder, tmp_path):
    task = open_task("phrases", tokenizer=folder, **TASK)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(UserError, match=r"model.safetensors with 'encoder.layer.0.intermediate.dense.weight' of shape "
                       r"\(64, 32\), where config.json says \(48, 32\) .and 8 more."):  # fmt: skip
        made_network(str(other), task)
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"without 'encoder.layer.3.attention"):
        made_network(str(other), task)
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="weights that can be read"):
        made_network(str(other), task)
    (other / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"without weights; allowed: model.safetensors in it.*save_pretrained"):
        made_network(str(other), task)
    (other / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(UserError, match="which makes no encoder"):
        made_network(str(other), task)


def test_a_vocabulary_beyond_the_encoder_is_said(folder):
    words_of_its_own = open_task("phrases", **TASK)
    words_of_its_own.vocab_size = 500
    with pytest.raises(UserError, match=r"500 ids for an encoder with .*--task-set tokenizer="):
        made_network(str(folder), words_of_its_own)


def test_what_does_not_go_together_is_refused(folder, tmp_path):
    def refused(match, **given):
        with pytest.raises(UserError, match=match):
            api.search(**{"task": "phrases", "method": "instatune", "out": tmp_path / "run", **given})
        assert not (tmp_path / "run").exists()

    refused("--model: got None; allowed: a Hugging Face folder")
    refused("got 'elsewhere'; allowed: module:factory, or a Hugging Face folder that exists", model="elsewhere")
    refused("nothing for the method bignas", method="bignas", model=str(folder))
    refused("nothing beside --model", model=str(folder), family="mobile")
    refused("the task digits, of images", model=str(folder), task="digits")
    refused("accuracy and at least one of", model=str(folder), objectives=["accuracy"])
    refused("objectives", model=str(folder), objectives=["accuracy", "energy"])
    refused("0 in a run.*strong teacher", model=str(folder), settings={**SETTINGS, "teacher_epochs": 1})
    refused("latency device: got .*onnxruntime", model=str(folder), device="onnxruntime")
    refused("latency device: got .*bf16", model=str(folder), latency={"precision": "bf16"})
    refused("one process on the CPU in float32", model=str(folder), precision="bf16")


# --------------------------------------------------------------------- a real process, killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objectives", "moment"),
    [("accuracy,macs", "training"), ("accuracy,macs", "search"), ("accuracy,latency", "search")],
)
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(folder, tmp_path, objectives, moment):
    settings = {**SETTINGS, "epochs": 3, "evaluations": 30}

    def words(run):
        pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        given = ["search", "--method", "instatune", "--model", str(folder), "--task", "phrases", "--out", str(run)]
        return [*given, "--objectives", objectives, "--threads", "1", "--device", "cpu", "--quiet", *pairs]

    killed, output = tmp_path / "killed", tmp_path / "output.txt"
    process = start_cli(*words(killed), output=output)
    # Three epochs of training end the training; latencies are measured in the search that follows.
    wait_for(lambda: len(events(killed, "epoch")) >= (1 if moment == "training" else 3), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL, output.read_text()
    before = {e["digest"]: e["median_ms"] for e in events(killed, "latency_measured")}
    resumed = run_cli("resume", killed, "--quiet")
    assert resumed.returncode == 0, resumed.stdout
    measured = events(killed, "latency_measured")
    assert len({e["digest"] for e in measured}) == len(measured)  # none is measured again
    assert all({e["digest"]: e["median_ms"] for e in measured}[digest] == ms for digest, ms in before.items())
    if objectives.endswith("latency"):
        return
    whole = tmp_path / "whole"
    done = run_cli(*words(whole))
    assert done.returncode == 0, done.stdout
    assert _without_times(history(killed)) == _without_times(history(whole))
    digests = [
        [
            outcome["files"]["weights.safetensors"]
            for outcome in json.loads((run / "result.json").read_text())["outcomes"]
        ]
        for run in (killed, whole)
    ]
    assert digests[0] == digests[1]
