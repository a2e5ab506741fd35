"""Exact resume: whatever ends the process, and whenever, the run ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from small_runs import ENVIRONMENT, ROOT, arguments, ending, events, start_cli, uninterrupted, wait_for


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory)


class Starter:
    """Starts the command line by forking a process that has imported everything (see ``forked_cli.py``)."""

    def __init__(self, output: Path) -> None:
        self.output = output
        script = Path(__file__).with_name("forked_cli.py")
        self._server = subprocess.Popen(
            [sys.executable, str(script), str(output)],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, *words: str) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def status(self) -> int:
        """Wait for the end of the process; a negative number is the signal that ended it."""
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.communicate(timeout=60)


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("forked") / "output.txt")
    yield starter
    starter.close()


def moment(kind: str, run: Path, before: int) -> bool:
    """Return whether a process that found ``before`` events in the journal has come to a moment."""
    if kind == "start":
        return True
    if kind == "folder":
        return run.exists()
    if kind == "export":
        return (run / "networks" / ".final.unfinished").exists()
    wanted = {"epoch": "epoch", "checkpoint": "checkpoint", "evaluation": "test_read"}[kind]
    found = events(run)[before:]
    return any(event["kind"] == wanted for event in found) or (run / "result.json").exists()


def kill_again_and_again(starter: Starter, run: Path, *, kills: int, seed: int) -> int:
    """Kill a run ``kills`` times at random moments from its start to its end, then let it finish; return the kills.

    A moment is something that the process is seen doing, and a random delay after it.
    """
    moments = random.Random(seed)
    kinds = ["start", "folder", "epoch", "checkpoint", "evaluation", "export", "epoch"]
    done = 0
    while done < kills:
        kind = kinds[done % len(kinds)] if kills <= len(kinds) else moments.choice(kinds)
        before = len(events(run))
        words = ["resume", str(run), "--quiet"] if before else arguments(run)
        process = starter.start(*words)
        deadline = time.monotonic() + 100
        while not moment(kind, run, before) and time.monotonic() < deadline and Path(f"/proc/{process}").exists():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.4 if kind in ("start", "export", "evaluation") else 0.1))
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        status = starter.status()
        if status == 0:  # it was faster; its run is finished and another is needed for the kills that are left
            assert json.loads((run / "result.json").read_text())["status"] == "finished"
            return done
        assert status == -signal.SIGKILL, starter.output.read_text()[-2000:]
        done += 1
    starter.start("resume" if events(run) else "search", *([str(run)] if events(run) else arguments(run)[1:]))
    assert starter.status() == 0, starter.output.read_text()[-2000:]
    return done


def killed_runs(starter: Starter, reference: Path, folder: Path, *, kills: int, each: int) -> int:
    expected = ending(reference)
    total = number = 0
    while total < kills:
        run = folder / f"run-{number}"
        done = kill_again_and_again(starter, run, kills=min(each, kills - total), seed=number)
        assert ending(run) == expected
        assert not list(run.rglob(".*")), "half-written files are left"
        total += done
        number += 1
        assert number <= kills
    return total


def test_a_run_killed_at_every_kind_of_moment_ends_with_the_same_bits(
    starter: Starter, reference: Path, tmp_path: Path
) -> None:
    kills = killed_runs(starter, reference, tmp_path, kills=6, each=6)
    print(f"{kills} kills of the real process, all ends equal")
    assert kills >= 6


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_runs_killed_a_hundred_times_end_with_the_same_bits(starter: Starter, reference: Path, tmp_path: Path) -> None:
    kills = killed_runs(starter, reference, tmp_path, kills=100, each=12)
    print(f"{kills} kills of the real process, all ends equal")
    assert kills >= 100


@pytest.mark.slow
def test_processes_killed_while_starting_and_while_training(starter: Starter, reference: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    delays = random.Random(5)
    process = start_cli(*arguments(run), output=output)
    time.sleep(delays.uniform(0.1, 1.0))  # imports: nothing is written yet
    process.kill()
    process.wait()
    assert not run.exists()
    process = start_cli(*arguments(run), output=output)
    wait_for(lambda: events(run, "epoch"), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL, output.read_text()
    starter.start("resume", str(run), "--quiet")
    assert starter.status() == 0, starter.output.read_text()[-4000:]
    assert ending(run) == ending(reference)


def test_ctrl_c_leaves_a_result_that_verifies_and_a_run_that_goes_on(
    starter: Starter, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    starter.output.write_text("")
    process = starter.start(*arguments(run))
    wait_for(lambda: events(run, "epoch"))
    os.killpg(process, signal.SIGINT)  # as a terminal does
    assert starter.status() == 0, starter.output.read_text()
    assert f"Next: archsmith resume {run}" in starter.output.read_text()
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "stopped"
    assert result["outcomes"][0]["costs"]["macs"] <= result["limits"]["macs"]
    starter.start("verify", str(run))
    assert starter.status() == 0, starter.output.read_text()[-4000:]
    starter.start("resume", str(run), "--quiet")
    assert starter.status() == 0, starter.output.read_text()[-4000:]
    assert ending(run) == ending(reference)


@pytest.mark.slow
def test_a_time_limit_ends_with_a_result_and_ctrl_c_does_not_break_the_last_check(
    starter: Starter, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    starter.start(*arguments(run, "--time", "0.01s"))  # over before the first step
    assert starter.status() == 0, starter.output.read_text()[-4000:]
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
    assert [event["step"] for event in events(run, "checkpoint")] == ["epoch-0000-step-00000"]
    process = starter.start(*arguments(run))  # typed again instead of resume
    wait_for(lambda: (run / "networks" / ".final.unfinished").exists())
    time.sleep(0.2)  # the process that checks the source is at work
    os.killpg(process, signal.SIGINT)
    assert starter.status() == 0, starter.output.read_text()[-4000:]
    assert ending(run) == ending(reference)


def test_a_corrupt_newest_checkpoint_is_passed_over_and_said(starter: Starter, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = starter.start(*arguments(run))
    wait_for(lambda: len(events(run, "checkpoint")) >= 3)
    os.kill(process, signal.SIGKILL)
    assert starter.status() == -signal.SIGKILL
    newest, before = [event["file"] for event in events(run, "checkpoint")[:-3:-1]]
    file = run / "checkpoints" / newest
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    starter.output.write_text("")
    starter.start("resume", str(run), "--quiet")
    assert starter.status() == 0, starter.output.read_text()[-4000:]
    said = " ".join(starter.output.read_text().split())
    assert re.search(rf"checkpoint \S*{re.escape(newest)} cannot be used: .*{re.escape(before)} was used instead", said)
    assert ending(run) == ending(reference)


def test_without_a_sound_checkpoint_the_run_says_so_and_keeps_its_files(
    starter: Starter, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (run / "journal.jsonl").write_text("".join(line for line in lines if '"finished"' not in line))
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    starter.output.write_text("")
    starter.start("resume", str(run), "--quiet")
    assert starter.status() == 2
    said = " ".join(starter.output.read_text().split())
    assert re.search("checkpoint: got .*checkpoints without a sound file .*allowed: at least one checkpoint", said)
