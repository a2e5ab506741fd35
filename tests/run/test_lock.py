import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from archsmith.core.errors import UserError
from archsmith.run.directory import Run

HOLDER = """
import sys, time
from archsmith.run.directory import Run
run = Run.create_or_open(sys.argv[1], {"seed": 0})
print("holding", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        before = sorted(os.listdir(path))
        entrances: list[Callable[[], Run]] = [lambda: Run.create_or_open(path, {"seed": 0}), lambda: Run.open(path)]
        for enter in entrances:
            with pytest.raises(
                UserError, match=rf"out: got .*in use by process {holder.pid} on .*Wait for that process"
            ):
                enter()
        assert sorted(os.listdir(path)) == before
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with Run.open(path) as run:
            assert run.status == "new"
            assert f"process {os.getpid()} on" in (path / "lock").read_text()


def test_one_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    run = Run.create_or_open(tmp_path, {})
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        Run.open(tmp_path)
    run.close()
    run.close()
    Run.open(tmp_path).close()


def test_the_lock_is_given_back_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run.create_or_open(tmp_path, {}):
        _ = 1 / 0
    Run.open(tmp_path).close()
