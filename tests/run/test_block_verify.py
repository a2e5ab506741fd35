"""A child's runtime and exact costs are found again by a verification, and fail where they do not hold."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from slot_nets import llama, worn
from tokenizers import Tokenizer, models, pre_tokenizers

from archsmith import api
from archsmith.run import block_verify


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run under limits on latency and memory, and that of its parent."""
    folder = tmp_path_factory.mktemp("timed")
    words = {word: number for number, word in enumerate(["[UNK]", *(f"w{i}" for i in range(39))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    worn(llama).save_pretrained(folder / "parent")
    tokenizer.save(str(folder / "parent" / "tokenizer.json"))
    ids = torch.randint(39, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    outcome = api.search_blocks(
        model=str(folder / "parent"),
        task="language-modelling",
        budget="latency<=1.5x, memory<=0.9x",
        data=folder / "text.txt",
        settings={
            "alternatives": {"attention": ["kv1", "none"], "ffn": ["ffn50", "none"]},
            "training": {"steps": 2, "held_out": 1},
            "uptraining": {"steps": 2},
            "generation": 2,
        },
        task_options={"length": 8, "train": 4, "valid": 2, "batch": 4},
        quiet=True,
        out=folder / "run",
    )
    assert outcome.status == "finished"
    return folder


def scaled(monkeypatch, child, *, wobble=0.0):
    """Measurements of the child take ``child`` times the parent's 1 ms, in every round but for ``wobble``."""
    real = block_verify.measure_layers
    calls = []

    def measured(variants, networks, phases, batch, load):
        calls.append(sorted(networks))
        found = real(variants, networks, phases, batch, load)

        def fixed(latency, ms, wobble):
            samples = tuple(ms * (1 + wobble * (i % 2)) for i in range(len(latency.samples_ms)))
            return replace(latency, samples_ms=samples, reference_ms=(1.0,) * len(samples))

        return {
            name: {
                phase: fixed(each, *((1.0, 0.0) if name == "model parent" else (child, wobble)))
                for phase, each in rows.items()
            }
            for name, rows in found.items()
        }

    monkeypatch.setattr(block_verify, "measure_layers", measured)
    return calls


def row(run, name):
    return next(row for row in api.verify(run).rows if row.name == name)


def test_the_runtime_is_measured_again_beside_the_parent(finished, monkeypatch):
    calls = scaled(monkeypatch, 1.4)
    assert row(finished / "run", "runtime").status == "ok"
    assert calls == [["child", "parent"]]
    scaled(monkeypatch, 1.6)
    found = row(finished / "run", "runtime")
    assert found.status == "failed"
    assert "the 95 % interval begins at" in found.detail


def test_an_unsteady_machine_verifies_nothing(finished, monkeypatch):
    calls = scaled(monkeypatch, 5.0, wobble=0.5)
    found = row(finished / "run", "runtime")
    assert found.status == "not checked"
    assert "not verifiable now" in found.detail
    assert len(calls) == block_verify.ATTEMPTS


def test_without_its_parent_the_stored_reference_counts(finished, monkeypatch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    result = json.loads((run / "result.json").read_text())
    monkeypatch.setattr(api, "parent_here", lambda target, trust: None)
    measured = result["outcomes"][0]["measured"]
    for latency in measured["latency"].values():
        latency["reference_ms"] = [2.0] * len(latency["reference_ms"])
    measured["parent_ms"] = 6.0  # a prefill and two tokens of 2 ms: the parent takes what the reference takes
    (run / "result.json").write_text(json.dumps(result))
    for slower, status in ((1.4, "ok"), (1.6, "failed")):
        with monkeypatch.context() as patch:
            calls = scaled(patch, slower)
            assert row(run, "runtime").status == status
            assert calls == [["child"]]
    assert row(run, "costs").status == "not checked"


@pytest.mark.parametrize("cost", ["memory", "macs", "params"])
def test_costs_are_counted_again_exactly(finished, tmp_path, cost):
    assert row(finished / "run", "costs").status == "ok"
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    result = json.loads((run / "result.json").read_text())
    result["outcomes"][0]["predicted"][cost] -= 1
    (run / "result.json").write_text(json.dumps(result))
    found = row(run, "costs")
    assert found.status == "failed"
    assert cost in found.detail


def test_a_loosened_limit_is_found(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    result = json.loads((run / "result.json").read_text())
    result["limits"]["latency"] *= 10
    (run / "result.json").write_text(json.dumps(result))
    assert row(run, "limits").status == "failed"
