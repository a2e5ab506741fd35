"""The command line: what it prints, what it does when typed again, how options are read, its exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_runs import ROOT, arguments, events, history, run_cli, snapshot, uninterrupted

from archsmith.cli import main

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process on a wide terminal; return exit code and standard output."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        code = end.value.code or 0
        assert isinstance(code, int)
        return code, printed.out + printed.err

    return run


def test_a_finished_run_prints_its_summary_and_is_not_touched(finished: Path, cli: Cli) -> None:
    before = snapshot(finished)
    for words in (arguments(finished), ["resume", str(finished)]):
        code, text = cli(*words)
        assert code == 0
        assert "atomnas on digits: finished" in text
        assert re.search(r"valid accuracy +\d+\.\d\d %", text) and re.search(r"test accuracy +\d+\.\d\d %", text)
        assert re.search(r"MACs +[\d,]+ \(0\.\d+x of the supernet's 107,680\)", text)
        assert "macs<=0.6x: kept" in text
        assert str(finished / "networks" / "final" / "model.onnx") in text
        assert text.rstrip().endswith(f"Next: archsmith verify {finished}")
    assert snapshot(finished) == before


def test_an_unfinished_run_goes_on_when_typed_again(finished: Path, tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    words = arguments(run, epochs=2, budget=None)
    code, text = cli(*words, "--time", "0.01s")
    assert code == 0 and "atomnas on digits: stopped early" in text
    assert text.rstrip().endswith(f"Next: archsmith resume {run}")
    assert history(run) == []
    code, text = cli(*words)
    assert code == 0 and "atomnas on digits: finished" in text
    assert [figures["epoch"] for figures in history(run)] == [0, 1]
    assert [event["epoch"] for event in events(run, "resumed")] == [0]
    assert len(events(run, "run_started")) == 1


def test_the_configuration_is_complete_and_can_be_run_again(finished: Path, tmp_path: Path, cli: Cli) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["format_version"] == 1
    assert config["method"] == "atomnas" and config["seed"] == 0 and config["budget"] == "macs<=0.6x"
    assert config["runtime"] == {"threads": 1, "memory_format": "channels_last"}
    assert config["task"] == {"name": "digits", "data": None, "limit": 20, "label_smoothing": 0.1}
    from archsmith.methods.atomnas import Settings

    assert set(config["settings"]) == set(Settings.model_fields)
    config["settings"]["epochs"] = 2
    edited, run = tmp_path / "edited.yaml", tmp_path / "run"
    edited.write_text(yaml.safe_dump(config))
    code, text = cli("search", "--config", edited, "--out", run, "--quiet", "--time", "0.01s")
    assert code == 0, text
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written == config
    code, text = cli("search", "--config", finished / "config.yaml", "--out", finished)
    assert code == 0 and "finished" in text  # the same configuration: the same run


@pytest.mark.parametrize("option", [["--threads", "2"], ["--task-set", "limit=9"], ["--task", "digits"]])
def test_options_beside_a_configuration_are_refused(
    option: list[str], finished: Path, tmp_path: Path, cli: Cli
) -> None:
    code, text = cli("search", "--config", finished / "config.yaml", "--out", tmp_path / "run", *option)
    assert code == 2
    assert f"--config: got the file together with {option[0]}; allowed: beside --config only --out, --time" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"colour": 1}, r"config.colour: got an unknown field; allowed: method, task"),
        ({"task": {"limit": 20}}, r"config.task: got .*; allowed: a section with a name"),
        (
            {"task": {"name": "digits", "limit": 30}},
            r"task.data: got data with the digest .*; allowed: the data of the",
        ),
        ({"runtime": {"threads": "two"}}, r"config.runtime.threads: got 'two'; allowed: .*integer"),
        ({"format_version": 2}, r"config.format_version: got 2; allowed: 1 to 1"),
        ({"settings": {"epochs": 0}}, r"settings.epochs: got 0"),
        ("not: [yaml", r"config: got .*bad.yaml .*; allowed: a config.yaml that can be read"),
        ("just words", r"config: got .*bad.yaml, which holds no settings"),
        (None, r"config: got .*bad.yaml \(No such file or directory\)"),
    ],
)
def test_a_wrong_configuration_file_is_refused(
    change: dict[str, object] | str | None, match: str, finished: Path, tmp_path: Path, cli: Cli
) -> None:
    file = tmp_path / "bad.yaml"
    if isinstance(change, dict):
        file.write_text(yaml.safe_dump({**yaml.safe_load((finished / "config.yaml").read_text()), **change}))
    elif change is not None:
        file.write_text(change)
    code, text = cli("search", "--config", file, "--out", tmp_path / "run")
    assert code == 2 and re.search(match, text), text
    assert not (tmp_path / "run").exists()


def test_options_are_read_as_yaml_and_reach_the_run(tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    more = [
        "--set",
        "optimizer=sgd",
        "--set",
        "weight_decay=1e-4",
        "--family-set",
        "dropout=0.1",
        "--task-set",
        "flip=true",
    ]
    code, text = cli(*arguments(run, *more, "--seed", "3", "--time", "0.01s", budget="macs <= 0.50x, params<=4k"))
    assert code == 0, text
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["settings"]["optimizer"] == "sgd" and config["settings"]["weight_decay"] == 1e-4
    assert (
        config["settings"]["epochs"] == 8 and config["settings"]["lr_warmup_epochs"] == 2.0
    )  # given, and the recipe's
    assert config["family"]["dropout"] == 0.1 and config["family"]["rows"][1] == [4, 8, 2, 2, [3, 5]]
    assert config["task"]["flip"] is True and config["task"]["limit"] == 20
    assert config["seed"] == 3 and config["budget"] == "macs<=0.5x, params<=4000"
    result = json.loads((run / "result.json").read_text())
    costs, limits = result["outcomes"][0]["costs"], result["limits"]
    assert limits["params"] == 4000 and costs["params"] <= 4000 and costs["macs"] <= limits["macs"]


def test_verify_ends_with_1_when_something_is_not_as_claimed(finished: Path, tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    result = json.loads((run / "result.json").read_text())
    result["outcomes"][0]["costs"]["macs"] -= 1
    (run / "result.json").write_text(json.dumps(result))
    code, text = cli("verify", run)
    assert code == 1
    assert re.search(r"macs .*failed", text) and re.search(r"[2-9] failed", text)
    assert re.search(r"weights.safetensors .*ok", text)


@pytest.mark.slow
def test_verify_ends_with_0_on_a_sound_run(finished: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(finished, tmp_path / "run")
    code, text = cli("verify", tmp_path / "run")
    assert code == 0, text
    assert re.search(r"\d+ checks passed, 0 failed", text)
    assert [event["why"] for event in events(tmp_path / "run", "test_read")] == ["final evaluation", "verify"]


def test_verify_needs_a_result(tmp_path: Path, cli: Cli, finished: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    code, text = cli("verify", run)
    assert code == 2
    assert re.search(r"which has no result yet; allowed: .* Type: archsmith resume", text)


FACTORY = """
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
"""


def test_profile_of_a_factory(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, text = cli("profile", "own_networks:network", "--shape", "1x3x6x6", "--json")
    assert code == 0, text
    found = json.loads(text)
    macs = 8 * 3 * 9 * 36 + 8 * 36 * 5
    assert found["counts"]["macs"] == macs
    assert found["counts"]["params"] == 8 * 27 + 8 + 8 * 36 * 5 + 5
    assert sum(layer["macs"] for layer in found["layers"]) == macs
    assert found["latency"]["median_ms"] > 0
    code, text = cli("profile", "own_networks:network", "--shape", "1x3x6x6")
    assert code == 0 and "Conv2d" in text and "Linear" in text


def test_profile_of_an_onnx_file(finished: Path, cli: Cli) -> None:
    code, text = cli("profile", finished / "networks" / "final" / "model.onnx", "--shape", "1x1x8x8", "--json")
    assert code == 0, text
    costs = json.loads((finished / "result.json").read_text())["outcomes"][0]["costs"]
    assert json.loads(text)["counts"]["macs"] == costs["macs"]


def test_methods_as_json(cli: Cli) -> None:
    code, text = cli("methods", "--json")
    assert code == 0
    rows = {row["slug"]: row for row in json.loads(text)}
    assert rows["atomnas"]["title"].startswith("AtomNAS") and rows["atomnas"]["year"] == 2020
    assert rows["atomnas"]["kind"] == "search"
    for row in rows.values():
        assert {"slug", "title", "year", "kind", "file", "tests", "docs"} <= set(row)
        for field in ("file", "tests", "docs"):
            assert not os.path.isabs(row[field])
        assert (ROOT / row["file"]).is_file()


@pytest.mark.parametrize(("verb", "name"), [("methods", "atomnas"), ("tasks", "digits"), ("families", "mobile")])
def test_tables(verb: str, name: str, cli: Cli) -> None:
    code, text = cli(verb)
    assert code == 0 and name in text
    code, text = cli(verb, "--json")
    assert code == 0 and name in {row.get("slug", row.get("name")) for row in json.loads(text)}


def test_help_names_the_commands_and_the_options(cli: Cli) -> None:
    code, text = cli("--help")
    assert code == 0
    for verb in ("search", "resume", "verify", "profile", "methods", "tasks", "families"):
        assert verb in text
    code, text = cli("search", "--help")
    for option in ("--config", "--budget", "--out", "--set", "--task-set", "--family-set", "--time", "--seed"):
        assert option in text


def test_the_installed_script_is_this_command_line() -> None:
    script = Path(sys.executable).with_name("archsmith")
    assert script.exists()
    done = run_cli("methods", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)
