"""Runs on a network of the user's own, through the functions behind the command line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import events, start_cli, wait_for
from users_networks import DigitsNet, digits_net

import archsmith
from archsmith.api import report, shrink
from archsmith.atoms.records import Record, rebuild
from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.run.own_model import OwnModel
from archsmith.run.plain_state import joined_state, split_state

QUICK = {"epochs_before": 1, "epochs_shrink": 1, "epochs_after": 1, "batch_size": 60, "cuts": 2}
NET = "users_networks:digits_net"


def quick(out, *, model=NET, budget="macs<=0.5x", **changes):
    settings = {**QUICK, **changes.pop("settings", {})}
    return shrink(
        model,
        "digits",
        budget=budget,
        out=out,
        settings=settings,
        task_options={"limit": 120},
        threads=1,
        quiet=True,
        **changes,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return quick(tmp_path_factory.mktemp("own") / "run", score="l2").path


def tampered(finished, tmp_path, change):
    path = tmp_path / "received"
    shutil.copytree(finished, path)
    change(path / "networks" / "final")
    return path


def statuses(report, name):
    return [row.status for row in report.rows if row.name == name]


def test_a_run_ends_with_a_finished_network_within_the_budget(finished):
    result = json.loads((finished / "result.json").read_text())
    folder = finished / "networks" / "final"
    names = {
        "architecture.json",
        "record.json",
        "weights.safetensors",
        "model.onnx",
        "program.pt2",
        "check.safetensors",
    }
    assert names == {file.name for file in folder.iterdir()} == set(result["outcomes"][0]["files"])
    costs = result["outcomes"][0]["costs"]
    assert costs["macs"] <= 0.5 * result["reference"]["macs"]
    assert set(result["figures"]) == {"accuracy_before", "accuracy_after_cut", "accuracy_final"}
    network = rebuild(
        digits_net(), Record.from_json((folder / "record.json").read_text()), load_file(folder / "weights.safetensors")
    )
    assert count(network, torch.zeros(1, 1, 8, 8)).macs == costs["macs"]
    stored = load_file(folder / "check.safetensors")
    torch.testing.assert_close(network.eval()(stored["inputs"]), stored["logits"], rtol=1e-5, atol=1e-5)
    program = torch.export.load(folder / "program.pt2").module()
    torch.testing.assert_close(program(stored["inputs"]), stored["logits"], rtol=1e-5, atol=1e-5)


def test_verify_executes_nothing_without_trust(finished, monkeypatch):
    monkeypatch.setattr("archsmith.run.own_model.load_target", lambda target: pytest.fail("executed"))
    monkeypatch.setattr("torch.export.load", lambda *args: pytest.fail("deserialised"))
    found = archsmith.verify(finished)
    assert found.ok
    assert statuses(found, "rebuilt") == statuses(found, "program.pt2") == ["not checked"]
    assert statuses(found, "macs") == statuses(found, "ONNX Runtime") == ["ok"]


def test_verify_with_trust_checks_everything(finished):
    found = archsmith.verify(finished, trust=True)
    assert [row for row in found.rows if row.status != "ok"] == []
    assert {"rebuilt", "test_accuracy", "valid_accuracy", "params", "memory"} <= {row.name for row in found.rows}


def test_verify_finds_other_weights_and_other_records(finished, tmp_path):
    def halve(folder):
        weights = load_file(folder / "weights.safetensors")
        save_file({**weights, "head.bias": weights["head.bias"] + 1}, folder / "weights.safetensors")

    found = archsmith.verify(tampered(finished, tmp_path / "a", halve), trust=True)
    assert statuses(found, "sha256 of weights.safetensors") == statuses(found, "rebuilt") == ["failed"]

    def widen(folder):
        what = json.loads((folder / "record.json").read_text())
        what["result"] = "0" * 16
        (folder / "record.json").write_text(json.dumps(what))

    found = archsmith.verify(tampered(finished, tmp_path / "b", widen), trust=True)
    assert statuses(found, "record.json") == statuses(found, "rebuilt") == ["failed"]


def test_the_report_shows_what_is_left_without_executing_anything(finished, monkeypatch):
    monkeypatch.setattr("archsmith.run.own_model.load_target", lambda target: pytest.fail("executed"))
    page = report(finished, quiet=True).read_text()
    for text in ("users_networks:digits_net", "after the cut", "8×1×3×3", "archsmith verify"):
        assert text in page
    with pytest.raises(UserError, match="this one shrinks a network of your own"):
        report(finished, baselines=2)


def test_a_finished_run_is_only_read(finished):
    before = (finished / "journal.jsonl").read_bytes()
    assert quick(finished, score="l2").status == "finished"
    assert archsmith.resume(finished).status == "finished"
    assert (finished / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "method", [pytest.param("shrink", marks=pytest.mark.slow), "figs", pytest.param("rarts", marks=pytest.mark.slow)]
)
def test_a_stopped_run_delivers_within_the_budget_and_goes_on_bit_for_bit(tmp_path, method):
    settings = {"epochs_before": 0, "epochs_shrink": 2} if method != "shrink" else {"score": "taylor"}
    whole = quick(tmp_path / "whole", method=method, settings=settings)
    out = tmp_path / "parts"
    stopped = quick(out, method=method, settings=settings, time_limit=0.01)
    assert stopped.status == "stopped"
    assert stopped.best["costs"]["macs"] <= 0.5 * stopped.result["reference"]["macs"]
    if method == "shrink":
        archsmith.resume(out, time_limit=0.01, quiet=True, trust=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="allowed: such a run with --trust"):
        patch.setattr("archsmith.run.own_model.load_target", lambda target: pytest.fail("executed"))
        archsmith.resume(out, quiet=True)
    with pytest.raises(UserError, match="run: got one that executes users_networks:digits_net"):
        archsmith.search_file(out / "config.yaml", out=tmp_path / "received", quiet=True)
    again = archsmith.resume(out, quiet=True, trust=True)
    assert again.status == "finished"
    one, two = (load_file(outcome.folder / "weights.safetensors") for outcome in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (whole.folder / "record.json").read_bytes() == (again.folder / "record.json").read_bytes()
    assert whole.result["figures"] == again.result["figures"]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path, finished):
    words = [
        "shrink",
        NET,
        "--budget",
        "macs<=0.5x",
        "--score",
        "l2",
        "--threads",
        "1",
        "--quiet",
        "--task-set",
        "limit=120",
    ]
    for name, value in QUICK.items():
        words += ["--set", f"{name}={value}"]
    out = tmp_path / "killed"
    for kind in ("epoch", "checkpoint", "test_read"):
        process = start_cli(*words, "--out", out, output=tmp_path / "output.txt")
        seen = len(events(out, kind)) if out.exists() else 0
        wait_for(lambda kind=kind, seen=seen: out.exists() and len(events(out, kind)) > seen, process)
        process.kill()
        process.wait()
    process = start_cli(*words, "--out", out, output=tmp_path / "output.txt")
    assert process.wait() == 0
    for name in ("weights.safetensors", "record.json"):
        assert (out / "networks" / "final" / name).read_bytes() == (finished / "networks" / "final" / name).read_bytes()


def test_weights_of_a_file_need_no_training_before(tmp_path):
    torch.manual_seed(3)
    save_file(DigitsNet().state_dict(), tmp_path / "w.safetensors")
    outcome = quick(
        tmp_path / "run", weights=tmp_path / "w.safetensors", settings={"epochs_before": 0, "epochs_after": 0}
    )
    assert outcome.result["figures"]["accuracy_before"] > 0
    assert len(events(outcome.path, "epoch")) == 1
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"weights: got .* which does not fit"):
        quick(tmp_path / "no", weights=tmp_path / "other.safetensors")


def test_scratch_draws_weights_of_the_small_size():
    model = OwnModel(NET, 0)
    what = Record.from_json(_record_of_a_cut())
    fresh = model.initialised(what)
    assert fresh.head.weight.shape == (10, 4)
    assert torch.equal(fresh.head.weight, model.initialised(what).head.weight)
    sliced = model.build(what, fresh=True)
    assert not torch.equal(fresh.head.weight, sliced.head.weight)
    assert float(fresh.head.weight.detach().abs().max()) > 1 / 22**0.5  # drawn for 4 inputs, not for 22


def _record_of_a_cut():
    from archsmith.atoms.finding import find
    from archsmith.atoms.records import record
    from archsmith.atoms.transaction import apply_

    network = digits_net()
    atoms = find(network, torch.zeros(2, 1, 8, 8))
    removed = {group.name: range(group.size - 2) for group in atoms.groups if group.size in (10, 12)}
    apply_(network, atoms.plan(removed))
    return record(network).to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "users_networks:nine_classes"},
            r"output for 2 examples is \(2, 9\); allowed: logits of shape \(2, 10\)",
        ),
        ({"model": "users_networks:colour_net"}, r"a network for images of shape \(1, 8, 8\)"),
        ({"model": "users_networks:nothing"}, "has no 'nothing'"),
        ({"budget": "macs<=2x"}, "there is nothing to shrink"),
        ({"budget": "macs<=0.001x"}, "when everything removable is gone"),
        ({"budget": "energy<=1mJ"}, "limits on macs, params, latency"),
        ({"method": "atomnas"}, "method: got 'atomnas'; allowed: figs"),
        ({"score": "magic"}, "settings.score"),
        ({"settings": {"epochs": 3}}, "an unknown field"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        quick(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_states_are_taken_apart_and_joined():
    state = {"a": torch.ones(2), "b": {0: {"step": torch.tensor(3.0)}, 1: 5}, "c": [1, "x", None, torch.zeros(1)]}
    plain, tensors = split_state(state, "s")
    again = joined_state(json.loads(json.dumps(plain)), tensors)
    assert again["b"][1] == 5 and torch.equal(again["b"][0]["step"], torch.tensor(3.0))
    assert again["c"][:3] == [1, "x", None] and torch.equal(again["a"], torch.ones(2))
