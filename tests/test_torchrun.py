"""``torchrun -m archsmith``: real processes, killed and resumed, equal to one process with micro-batches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import ENVIRONMENT, ROOT, arguments, ending, events, history, run_cli, wait_for

from archsmith import api
from archsmith.core.errors import UserError

PATHED = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}


def torchrun(*words: str | Path, output: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    """Start the command line in two processes; standard output and errors go to a file."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with open(output, "ab") as stream:
        return subprocess.Popen(
            [*launcher, "-m", "archsmith", *map(str, words)], env=PATHED, stdout=stream, stderr=subprocess.STDOUT
        )


def children(process: int) -> list[int]:
    """Return the ids of the processes that ``process`` started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and the workers that it started, all at once."""
    for process in (*children(launcher.pid), launcher.pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()


def last_state(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the last checkpoint: weights, averages, optimiser."""
    return load_file(run / "checkpoints" / events(run, "checkpoint")[-1]["file"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an uninterrupted run in two processes."""
    folder = tmp_path_factory.mktemp("torchrun")
    process = torchrun(*arguments(folder / "run"), output=folder / "output.txt")
    assert process.wait(200) == 0, (folder / "output.txt").read_text()
    text = (folder / "output.txt").read_text()
    assert text.count("atomnas on digits: finished") == 1, text  # the first process speaks, the other is silent
    return folder / "run"


@pytest.mark.slow
def test_two_processes_end_like_one_with_two_micro_batches(reference: Path, tmp_path: Path) -> None:
    done = run_cli(*arguments(tmp_path / "run", "--micro-batches", "2"), timeout=200)
    assert done.returncode == 0, done.stdout
    one, two = last_state(tmp_path / "run"), last_state(reference)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6, msg=name)
    mine, theirs = history(tmp_path / "run"), history(reference)
    assert [epoch["kernels"] for epoch in mine] == [epoch["kernels"] for epoch in theirs]
    assert any(epoch["cut"] for epoch in mine)
    exported = [load_file(run / "networks" / "final" / "weights.safetensors") for run in (tmp_path / "run", reference)]
    for name, value in exported[0].items():
        torch.testing.assert_close(exported[1][name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_a_group_killed_in_the_middle_goes_on_with_the_same_bits(reference: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = torchrun(*arguments(run), output=output)
    wait_for(lambda: events(run, "checkpoint"), process)
    kill_all(process)
    assert not (run / "result.json").exists()
    process = torchrun("resume", run, "--quiet", output=output)
    assert process.wait(200) == 0, output.read_text()
    assert events(run, "resumed")
    assert ending(run) == ending(reference)


def test_another_number_of_processes_is_refused(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runtime.processes: 2 -> \(not set\)"):
        api.search_file(single(reference, tmp_path), out=reference)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    first = (reference / "journal.jsonl").read_text().splitlines(keepends=True)[0]
    (unfinished / "journal.jsonl").write_text(first)
    with pytest.raises(UserError, match=r"processes: got 1; allowed: 2, .*torchrun --nproc-per-node 2 -m archsmith"):
        api.resume(unfinished)
    with pytest.raises(UserError, match=r"processes: got 1; allowed: 2, .*--micro-batches 2 does the same"):
        api.search_file(reference / "config.yaml", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def single(run: Path, folder: Path) -> Path:
    """Return a copy of a run's configuration as it was before there were several processes."""
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    file = folder / "config.yaml"
    file.write_text("".join(line for line in lines if "processes:" not in line))
    return file


@pytest.mark.slow
def test_wrong_input_is_said_once_and_ends_all(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    process = torchrun(*arguments(tmp_path / "run", batch_size=41), output=output)
    assert process.wait(100) != 0
    said = " ".join(output.read_text().split())
    assert said.count("batch_size: got 41; allowed: a multiple of 2") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_killed_process_ends_the_other_and_the_run_goes_on(reference: Path, tmp_path: Path, rank: int) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = torchrun(*arguments(run), output=output)
    wait_for(lambda: events(run, "epoch"), process)
    os.kill(sorted(children(process.pid))[rank], signal.SIGKILL)
    assert process.wait(100) != 0
    process = torchrun(*arguments(run), output=output)  # typed again
    assert process.wait(200) == 0, output.read_text()
    assert ending(run) == ending(reference)


@pytest.mark.slow
def test_ctrl_c_stops_all_with_a_result(reference: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = torchrun(*arguments(run), output=output)
    wait_for(lambda: events(run, "epoch"), process)
    process.send_signal(signal.SIGINT)
    process.wait(100)
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    assert result["status"] == "stopped", output.read_text()
    process = torchrun("resume", run, "--quiet", output=output)
    assert process.wait(200) == 0, output.read_text()
    assert ending(run) == ending(reference)


@pytest.mark.slow
def test_baselines_are_trained_by_all_processes(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = torchrun(*arguments(run, "--baselines", "1", epochs=2), output=output)
    assert process.wait(200) == 0, output.read_text()
    for name in ("uniform", "random-1"):
        assert json.loads((run / "baselines" / name / "result.json").read_text())["status"] == "finished"
    time.sleep(0.1)
    assert not list(run.rglob(".*"))
