import json
import shutil

import pytest
import torch
import yaml
from finished_networks import mixed_network, run_here
from safetensors.torch import load_file, save_file

import archsmith.run.claims as claims
from archsmith.core.errors import UserError
from archsmith.core.files import sha256_file, write_json
from archsmith.cost import measure_latency
from archsmith.run.checks import Failed, NotChecked, Row, Rows
from archsmith.run.claims import check_accuracy, check_cost, check_latency
from archsmith.run.costs import exact_costs
from archsmith.run.directory import Run
from archsmith.run.export import export_network
from archsmith.run.onnx_file import onnx_bytes, onnx_texts
from archsmith.run.verify import verify_network, verify_run
from archsmith.tasks import open_task

pytest.importorskip("onnxruntime")
CONFIG = {
    "method": "atomnas",
    "family": {"name": "mobile"},
    "task": {"name": "digits"},
    "budget": "macs<=0.5x, params<=1M, latency<=1000s",
}


@pytest.fixture(scope="module")
def digits():
    return open_task("digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """A finished run on the digits with one network."""
    path = tmp_path_factory.mktemp("verify") / "run"
    network = mixed_network().eval()
    with pytest.MonkeyPatch.context() as patch, Run.create_or_open(path, CONFIG) as run:
        patch.setattr("archsmith.run.export.run_fresh", run_here)
        metrics = {f"{split}_accuracy": digits.evaluate(network, split)["accuracy"] for split in ("valid", "test")}
        files = export_network(
            network,
            path / "networks" / "final",
            family="mobile",
            input_shape=digits.input_shape,
            normalisation=digits.normalisation,
            class_names=digits.class_names,
            examples=digits.examples(8),
        )
        exact = exact_costs(network, digits.input_shape)
        costs = {"macs": exact["macs"], "params": exact["params"], "memory_bytes": exact["memory"]}
        latency = measure_latency(network, torch.zeros(1, 1, 8, 8)).to_dict()
        outcome = {
            "label": "final",
            "folder": "networks/final",
            "files": files,
            "metrics": metrics,
            "costs": {**costs, "latency": latency},
        }
        reference = {"macs": 2 * exact["macs"] + 1}
        limits = {"macs": exact["macs"] + 0.5, "params": 1_000_000, "latency": 1_000_000}
        run.finish({"task_digest": digits.digest, "reference": reference, "limits": limits, "outcomes": [outcome]})
    return path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be tampered with."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def without_onnx_runtime(monkeypatch):
    """Leave out the comparison in ONNX Runtime and the latency, which cost time and are not what the test is about."""
    monkeypatch.setattr("archsmith.run.verify_network.run_onnx", lambda *_: {})
    monkeypatch.setattr("archsmith.run.verify_network.check_latency", lambda *_: "left out")


@pytest.fixture
def cheap(without_onnx_runtime, monkeypatch):
    """Leave out the fresh process as well."""
    monkeypatch.setattr("archsmith.run.verify_network.run_fresh", lambda *_: {})


@pytest.fixture
def clock(monkeypatch):
    """Measurements with the given samples instead of real ones: ``clock(samples_ms)``."""
    real = measure_latency(torch.nn.Linear(1, 1), torch.zeros(1, 1))

    def set_samples(samples):
        latency = type(real)(tuple(samples), (1.0,) * len(samples), 1, real.provenance)
        monkeypatch.setattr(claims, "measure_latency", lambda *_, **__: latency)
        return latency.to_dict()

    return set_samples


def edit_result(run, change, *, accept_files=False):
    """Edit result.json; with ``accept_files`` its digests are made to fit the tampered files."""
    result = json.loads((run / "result.json").read_text())
    outcome = result["outcomes"][0]
    if accept_files:
        outcome["files"] = {name: sha256_file(run / outcome["folder"] / name) for name in outcome["files"]}
    change(outcome)
    write_json(run / "result.json", result)


def failed(report):
    return {row.name for row in report.failed}


def details(report):
    return {row.name: row.detail for row in report.rows}


def test_everything_about_a_sound_run_is_ok(finished, clock):
    clock([0.5] * 10)
    reads = []
    report = verify_run(finished, on_test_read=lambda: reads.append("verify"))
    assert {row.status for row in report.rows} == {"ok"}, report.failed
    assert report.ok
    assert reads == ["verify"]
    assert [(row.subject, row.name) for row in report.rows] == [
        *(("run", name) for name in ("result.json", "config.yaml", "budget", "task data")),
        *(("final", f"sha256 of {name}") for name in ("architecture.json", "model.py", "weights.safetensors")),
        *(("final", f"sha256 of {name}") for name in ("model.onnx", "check.safetensors")),
        *(("final", name) for name in ("architecture.json", "weights.safetensors", "check.safetensors", "model.py")),
        *(("final", name) for name in ("task images", "fresh process", "ONNX file", "ONNX Runtime")),
        *(("final", name) for name in ("macs", "params", "memory", "latency", "valid_accuracy", "test_accuracy")),
    ]
    text = details(report)
    assert "largest gap" in text["fresh process"] and "32 test images" in text["fresh process"]
    assert "limit" in text["macs"] and "limit 1e+06 ms holds" in text["latency"]
    json.dumps(report.to_dict())


def test_one_changed_weight_fails_digest_outputs_and_accuracy(run, monkeypatch):
    monkeypatch.setattr("archsmith.run.verify_network.run_fresh", run_here)
    file = run / "networks/final/weights.safetensors"
    weights = load_file(file)
    weights["classifier.bias"][8] += (
        1e3  # always says 8: 28 and 35 images, another number than the constant answer before
    )
    save_file(weights, file)
    report = verify_run(run)
    assert failed(report) == {
        "sha256 of weights.safetensors",
        "fresh process",
        "ONNX Runtime",
        "valid_accuracy",
        "test_accuracy",
    }
    assert (
        "model.py on the stored inputs differs from the searched network by 1e+03" in details(report)["fresh process"]
    )


def test_an_edited_source_is_not_executed(run):
    folder = run / "networks/final"
    trace = run / "executed"
    source = (folder / "model.py").read_text()
    (folder / "model.py").write_text(f"{source}\n\nopen({str(trace)!r}, 'w').close()\n")
    report = verify_run(run)
    assert not trace.exists()
    assert failed(report) == {"sha256 of model.py", "model.py"}
    line = source.count("\n") + 1
    assert f"differs in line {line} from what archsmith writes" in details(report)["model.py"]
    unchecked = {row.name for row in report.rows if row.status == "not checked"}
    assert unchecked == {"fresh process", "macs", "params", "memory", "latency", "valid_accuracy", "test_accuracy"}


def test_an_edited_source_that_does_the_same_runs_when_trusted(run, without_onnx_runtime):
    folder = run / "networks/final"
    trace = run / "executed"
    source = (folder / "model.py").read_text()
    (folder / "model.py").write_text(f"{source}\n\nopen({str(trace)!r}, 'w').close()\n")
    edit_result(run, lambda outcome: None, accept_files=True)
    report = verify_run(run, trust=True)
    assert trace.exists()
    assert failed(report) == {"result.json"}
    rows = {row.name: row for row in report.rows}
    assert rows["model.py"].status == "not checked" and "executed because you trust it" in rows["model.py"].detail
    assert rows["fresh process"].status == rows["macs"].status == rows["test_accuracy"].status == "ok"


def test_a_trusted_source_that_does_something_else_fails(run, without_onnx_runtime, monkeypatch):
    monkeypatch.setattr("archsmith.run.verify_network.run_fresh", run_here)
    file = run / "networks/final/model.py"
    file.write_text(file.read_text().replace('activation="swish"', 'activation="relu"'))
    report = verify_network(run / "networks/final", trust=True)
    assert failed(report) == {"fresh process"}


def test_another_networks_onnx_file_is_caught(run):
    folder = run / "networks/final"
    texts = onnx_texts(json.loads((folder / "architecture.json").read_text()))
    other = mixed_network(seed=1).eval()
    (folder / "model.onnx").write_bytes(onnx_bytes(other, torch.zeros(2, 1, 8, 8), {**texts, "classes": "[]"}))
    report = verify_network(folder)
    assert failed(report) == {"ONNX file", "ONNX Runtime"}
    assert "differ in classes" in details(report)["ONNX file"]


def test_an_edited_architecture_is_caught(run, cheap):
    file = run / "networks/final/architecture.json"
    content = json.loads(file.read_text())
    content["arguments"]["blocks"][1][2][0][1] += 1
    file.write_text(json.dumps(content))
    report = verify_run(run)
    assert {"sha256 of architecture.json", "architecture.json", "model.py"} <= failed(report)
    assert "network_digest" in details(report)["architecture.json"]


@pytest.mark.parametrize("path", ["os.path.join", "subprocess.Popen", "archsmith.run.directory.Run"])
def test_an_architecture_cannot_name_foreign_code(run, cheap, path):
    file = run / "networks/final/architecture.json"
    content = json.loads(file.read_text())
    content["class"] = path
    file.write_text(json.dumps(content))
    report = verify_network(run / "networks/final")
    assert failed(report) == {"architecture.json", "model.py"}
    assert "no other code is loaded" in details(report)["architecture.json"]


def test_edited_numbers_fail_their_own_rows(run, cheap):
    def change(outcome):
        outcome["costs"]["macs"] -= 1
        outcome["costs"]["params"] += 1
        outcome["costs"]["memory_bytes"] += 4
        outcome["metrics"]["test_accuracy"] += 0.1

    edit_result(run, change)
    report = verify_run(run)
    assert failed(report) == {"result.json", "macs", "params", "memory", "test_accuracy"}
    assert "not the file that the journal recorded" in details(report)["result.json"]
    assert "recorded" in details(report)["macs"] and "on 359 examples, recorded" in details(report)["test_accuracy"]


def test_a_loosened_limit_is_caught(run, cheap):
    result = json.loads((run / "result.json").read_text())
    result["limits"]["macs"] += 1
    write_json(run / "result.json", result)
    report = verify_run(run)
    assert failed(report) == {"result.json", "budget"}
    assert "the budget 'macs<=0.5x, params<=1M, latency<=1000s' means" in details(report)["budget"]


def test_a_network_above_its_limit_fails(finished, cheap):
    expected = json.loads((finished / "result.json").read_text())["outcomes"][0]
    report = verify_network(finished / "networks/final", expected=expected, limits={"macs": 100, "params": 10**6})
    assert failed(report) == {"macs"}
    assert "above the limit 100" in details(report)["macs"]


def test_a_pickle_named_safetensors_is_never_unpickled(run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    for name in ("weights.safetensors", "check.safetensors"):
        torch.save(Bomb(), run / "networks/final" / name)
    report = verify_run(run)
    assert not (tmp_path / "exploded").exists()
    assert {"weights.safetensors", "check.safetensors", "sha256 of weights.safetensors", "model.py"} <= failed(report)
    assert "nothing was unpickled" in details(report)["weights.safetensors"]


def test_missing_files_and_unknown_files_fail(run, cheap):
    (run / "networks/final/check.safetensors").unlink()
    edit_result(run, lambda outcome: outcome["files"].update({"../../secret": "0" * 64}))
    report = verify_run(run)
    text = details(report)
    assert {"sha256 of check.safetensors", "check.safetensors", "sha256 of ../../secret"} <= failed(report)
    assert text["sha256 of check.safetensors"] == "the file is missing"
    assert "only architecture.json, model.py" in text["sha256 of ../../secret"]


def test_a_result_without_onnx_is_no_failure(run, cheap):
    (run / "networks/final/model.onnx").unlink()
    edit_result(run, lambda outcome: outcome["files"].pop("model.onnx"))
    report = verify_run(run)
    assert failed(report) == {"result.json"}
    unchecked = {row.name for row in report.rows if row.status == "not checked"}
    assert unchecked == {"sha256 of model.onnx", "ONNX file", "ONNX Runtime"}


def test_without_the_onnx_packages_the_file_is_not_checked(finished, cheap, monkeypatch):
    monkeypatch.setattr("archsmith.run.onnx_file._PACKAGES", ("onnx_not_installed_here",))
    rows = {row.name: row for row in verify_network(finished / "networks/final").rows}
    assert rows["ONNX file"].status == "not checked"
    assert "pip install 'archsmith[onnx]'" in rows["ONNX file"].detail


def test_missing_data_are_no_failure_and_other_data_are(run, cheap, monkeypatch):
    def missing(**_):
        raise UserError("data", "nowhere", allowed="a folder with the data")

    monkeypatch.setattr("archsmith.run.verify.open_task", missing)
    report = verify_run(run)
    assert report.ok
    rows = {row.name: row for row in report.rows}
    assert rows["task data"].status == rows["test_accuracy"].status == "not checked"
    assert "data: got 'nowhere'" in rows["task data"].detail
    monkeypatch.setattr("archsmith.run.verify.open_task", lambda **_: open_task("digits", valid_fraction=0.3))
    report = verify_run(run)
    assert failed(report) == {"task data"}
    assert "the data or their split are not the run's" in details(report)["task data"]


def test_a_task_of_ones_own_is_passed_in(finished, tmp_path, cheap, digits):
    result = json.loads((finished / "result.json").read_text())
    with Run.create_or_open(tmp_path / "run", {**CONFIG, "task": {"name": "mine", "data": None, "own": True}}) as run:
        shutil.copytree(finished / "networks", tmp_path / "run" / "networks")
        run.finish(result)
    report = verify_run(tmp_path / "run")
    assert report.ok
    assert "pass it as task=" in details(report)["task data"]
    assert {row.status for row in verify_run(tmp_path / "run", task=digits).rows} == {"ok"}


def test_an_edited_configuration_is_caught(run, cheap):
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "method": "other"}))
    report = verify_run(run)
    assert failed(report) == {"config.yaml"}
    assert 'method: "atomnas" -> "other"' in details(report)["config.yaml"]


def test_outcomes_outside_the_run_are_refused(run, cheap):
    shutil.copytree(run / "networks/final", run.parent / "elsewhere")
    edit_result(run, lambda outcome: outcome.update(folder="../elsewhere"))
    report = verify_run(run)
    assert failed(report) == {"result.json", "folder"}
    assert details(report)["folder"] == "'../elsewhere' does not lie inside the run"
    edit_result(run, lambda outcome: outcome.update(folder="networks/gone"))
    assert details(verify_run(run))["folder"] == "networks/gone is missing"


def test_a_stopped_run_is_verified_too(finished, tmp_path, cheap):
    result = json.loads((finished / "result.json").read_text())
    with Run.create_or_open(tmp_path / "run", CONFIG) as run:
        shutil.copytree(finished / "networks", tmp_path / "run" / "networks")
        run.stopped(result)
    report = verify_run(tmp_path / "run")
    assert report.ok
    assert details(report)["result.json"].startswith("stopped")


def test_what_is_no_run_is_one_clear_paragraph(tmp_path):
    with pytest.raises(UserError, match=r"run: got .*nothing, where no run is; allowed: the folder of a run"):
        verify_run(tmp_path / "nothing")
    with Run.create_or_open(tmp_path / "run", CONFIG) as run:
        with pytest.raises(UserError, match=r"has no result yet; .* Type: archsmith resume .*run"):
            verify_run(run.path)
        run.stopped({"outcomes": []})
    with pytest.raises(UserError, match=r"whose result has no finished network.*archsmith resume"):
        verify_run(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json, which is not JSON"):
        verify_run(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match=r"format_version: got 2 in .*allowed: 1 to 1"):
        verify_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"folder: got .*allowed: the folder of a finished network"):
        verify_network(tmp_path / "nothing")


def test_limits_hold_exactly():
    costs = {"macs": 100, "memory_bytes": 7}
    assert check_cost("macs", 100, costs, {"macs": 100}) == "100 macs, limit 100"
    with pytest.raises(Failed, match=r"recounted 100 macs, above the limit 99\.9"):
        check_cost("macs", 100, costs, {"macs": 99.9})
    with pytest.raises(Failed, match="recounted 8 bytes of weights and activations, recorded 7"):
        check_cost("memory", 8, costs, {})


class _ThreeImages:
    """A task of three examples, of which ``forward`` gets the first logit right twice."""

    def evaluate(self, forward, split):
        logits = forward(torch.zeros(3, 2))
        return {"accuracy": float((logits.argmax(1) == 0).double().mean()), "examples": 3}


@pytest.mark.parametrize(("margin", "ok"), [(1e-7, True), (1e-3, False)])
def test_one_example_may_differ_only_at_a_tie(margin, ok):
    def network(_):
        return torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0 + margin]])

    assert check_accuracy(network, _ThreeImages(), "test", 2 / 3) == "0.666667 on 3 examples, as recorded"
    if ok:
        assert "equal within rounding" in check_accuracy(network, _ThreeImages(), "test", 1.0)
    else:
        with pytest.raises(Failed, match=r"evaluated 0\.666667 on 3 examples, recorded 1\.000000"):
            check_accuracy(network, _ThreeImages(), "test", 1.0)
    with pytest.raises(Failed, match=r"recorded 0\.000000"):
        check_accuracy(network, _ThreeImages(), "test", 0.0)


def test_a_latency_claim_follows_the_rule(clock, tmp_path):
    network, example = torch.nn.Linear(1, 1), torch.zeros(1, 1)

    def judge(recorded, **limits):
        return check_latency(network, tmp_path / "model.onnx", example, recorded, limits)

    recorded = clock([2.0] * 10)
    assert judge(recorded, latency=2.0).endswith("limit 2 ms holds")
    assert judge(recorded, throughput=400).endswith("limit 2.5 ms holds")
    assert judge(recorded, latency=3.0, throughput=400).endswith("limit 2.5 ms holds")
    assert judge(recorded).endswith("no limit was set")
    assert judge(None).endswith("nothing was claimed")
    with pytest.raises(Failed, match=r"the 95 % interval begins at 2 ms, above the limit 1\.9 ms"):
        judge(recorded, latency=1.9)
    with pytest.raises(Failed, match="above the limit 1 ms"):
        judge(recorded, throughput=1000)
    with pytest.raises(Failed, match="a limit on latency was set, but no latency is recorded"):
        judge(None, latency=1.0)
    recorded["provenance"]["cpu"] = "another processor"
    with pytest.raises(NotChecked, match="recorded on another processor, this is"):
        judge(recorded, latency=1.9)
    recorded = clock([1.0, 2.0] * 5)
    with pytest.raises(NotChecked, match="too unsteady to be verified now"):
        judge(recorded, latency=1.9)


def test_any_surprise_in_a_check_is_a_failed_row():
    rows = Rows("network")

    def surprise():
        raise ZeroDivisionError("by a stranger's file")

    assert not rows.check("odd", surprise)
    assert rows.report().rows == (Row("network", "odd", "failed", "ZeroDivisionError: by a stranger's file"),)
    assert not rows.report().ok


def test_a_folder_alone_can_be_verified(finished, cheap):
    report = verify_network(finished / "networks/final")
    assert {row.status for row in report.rows} == {"ok"}
    names = ["architecture.json", "weights.safetensors", "check.safetensors", "model.py"]
    assert [row.name for row in report.rows] == [*names, "fresh process", "ONNX file", "ONNX Runtime", "latency"]
