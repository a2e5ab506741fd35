"""A real search that is killed in the middle and goes on: what must be equal to a run that never stopped."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_runs import ending, events, run_cli, start_cli, wait_for


def killed_and_whole(
    folder: Path, method: str, settings: Mapping[str, Any], family: Mapping[str, Any], *, epochs: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the endings of two runs on real digits, one of them killed after its first ``epochs`` epochs.

    Args:
        folder: For both runs, "whole" and "killed".
        method: Slug.
        settings: Of the method.
        family: Of the family "darts".
        epochs: Epochs before the kill.
    """

    def words(run: Path) -> list[str]:
        pairs = [("--set", name, value) for name, value in settings.items()]
        pairs += [("--family-set", name, value) for name, value in family.items()]
        given = ["search", "--method", method, "--family", "darts", "--task", "digits", "--out", str(run), "--quiet"]
        return [*given, "--threads", "1", *(word for flag, name, value in pairs for word in (flag, f"{name}={value}"))]

    whole, killed, output = folder / "whole", folder / "killed", folder / "output.txt"
    done = run_cli(*words(whole))
    assert done.returncode == 0, done.stdout
    process = start_cli(*words(killed), output=output)
    wait_for(lambda: len(events(killed, "epoch")) >= epochs, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL, output.read_text()
    resumed = run_cli("resume", killed, "--quiet")
    assert resumed.returncode == 0, resumed.stdout
    return ending(killed), ending(whole)
