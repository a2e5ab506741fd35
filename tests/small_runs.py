"""Small real runs for tests: a tiny supernet on few digits, the command line as a process, and what must be equal."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from archsmith.core.journal import Journal

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
"""Processes import modules beside this file (networks of users), as somebody's shell in that folder would."""

FILES = ("architecture.json", "check.safetensors", "model.onnx", "model.py", "weights.safetensors")

ROWS = "[[1, 8, 1, 1, [3]], [4, 8, 2, 2, [3, 5]]]"
FAMILY = ("--family-set", f"rows={ROWS}", "--family-set", "stem_channels=8", "--family-set", "last_channels=16")
SETTINGS = {"epochs": 8, "batch_size": 40, "lr": 0.05, "warmup_epochs": 1, "rho": 0.02, "shrink_fraction": 0.001}
"""Cuts happen in several epochs, and the budget's mask at the sixth."""


def arguments(
    out: Path, *more: str, budget: str | None = "macs<=0.6x", task_set: Sequence[str] = ("limit=20",), **settings: Any
) -> list[str]:
    """Return the command line of a small search; ``settings`` replace those of ``SETTINGS``."""
    words = ["search", "--out", str(out), "--threads", "1", "--quiet", *FAMILY]
    words += [] if budget is None else ["--budget", budget]
    for pair in task_set:
        words += ["--task-set", pair]
    for name, value in {**SETTINGS, **settings}.items():
        words += ["--set", f"{name}={value}"]
    return [*words, *more]


def command(*words: str | Path) -> list[str]:
    """Return what starts the command line in this environment."""
    return [sys.executable, "-c", "from archsmith.cli import main; main()", *map(str, words)]


def run_cli(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own to its end; standard error goes into ``stdout`` too."""
    return subprocess.run(
        command(*words), env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def start_cli(*words: str | Path, output: Path) -> subprocess.Popen[bytes]:
    """Start the command line in a process (and process group) of its own; its output goes to a file."""
    with open(output, "ab") as stream:
        return subprocess.Popen(
            command(*words), env=ENVIRONMENT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until the condition holds or the process has ended."""
    deadline = time.monotonic() + 200
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline, "waited for 200 s"
        time.sleep(0.005)


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the journal's events, as far as they are written."""
    return [e for e in Journal(run / "journal.jsonl").read() if kind is None or e["kind"] == kind]


def history(run: Path) -> list[dict[str, Any]]:
    """Return the figures of every epoch, the last attempt winning, without times of day."""
    kept: list[dict[str, Any]] = []
    for event in events(run, "epoch"):
        while kept and kept[-1]["epoch"] >= event["epoch"]:
            kept.pop()
        kept.append({key: value for key, value in event.items() if key != "time"})
    return kept


def ending(run: Path) -> dict[str, Any]:
    """Return everything that must be equal after an interruption: files, figures, accuracies and exact costs."""
    result = json.loads((run / "result.json").read_text())
    outcome = result["outcomes"][0]
    return {
        "status": result["status"],
        "files": {name: digest(run / "networks" / "final" / name) for name in FILES},
        "recorded": outcome["files"],
        "metrics": outcome["metrics"],
        "costs": {name: value for name, value in outcome["costs"].items() if name != "latency"},
        "history": history(run),
    }


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def snapshot(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, except the lock; empty when there is no folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): digest(path) for path in files}


def uninterrupted(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one finished small run, a copy of this test process's own.

    The run itself is made once in a session, by the first process that asks. A run has one living process at a time, so
    test processes must not share a folder.
    """
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    original, own = shared / "uninterrupted-run", base / "own-uninterrupted-run"
    with open(shared / "uninterrupted-run.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if not (original / "result.json").exists():
            done = run_cli(*arguments(original))
            assert done.returncode == 0, done.stdout
        if not own.exists():
            shutil.copytree(original, own)
    return own
