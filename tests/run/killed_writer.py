"""Forks writers on one run, kills each at a random moment, and checks from a fresh process what is left.

Prints one line per kill: the last step the writer had reported as saved, and the step that was found.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from archsmith.core.files import sha256_file
from archsmith.core.journal import Journal
from archsmith.run.checkpoints import CheckpointStore
from archsmith.run.directory import Run


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((20_000,), float(step)), "n": torch.tensor(step)}


def write_forever(path: Path, pipe: int) -> None:
    os.write(pipe, b"r")
    with Run.create_or_open(path, {"seed": 0}) as run:
        store = CheckpointStore(path / "checkpoints", run)
        loaded = store.load_latest()
        step = loaded.state["step"] if loaded else 0
        while True:
            step += 1
            run.record("step", step=step, note="x" * 200)
            store.save(f"step-{step}", tensors_of(step), {"step": step}, best=step % 5 == 0)
            os.write(pipe, b".")


def check(path: Path) -> int:
    """Return the newest step; everything must be readable and no half-written file may be under a final name."""
    if not (path / "journal.jsonl").exists():
        return 0
    events = Journal(path / "journal.jsonl").read()
    if not events:
        return 0
    with Run.open(path) as run:
        assert run.events() == events
        assert list(path.rglob(".*")) == []
        for file in (path / "checkpoints").glob("*.safetensors"):  # those never recorded, too
            assert sha256_file(file).startswith(file.name.split(".")[1]), file
        loaded = CheckpointStore(path / "checkpoints", run).load_latest()
        if loaded is None:
            return 0
        assert loaded.notes == [], loaded.notes
        step: int = loaded.state["step"]
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors_of(step).items())
        assert run.events("checkpoint_rejected") == []
        return step


def in_a_child(path: Path) -> int:
    """Run ``check`` in a process of its own, as a resume would."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, str(check(path)).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    with os.fdopen(read) as stream:
        return int(stream.read())


def main(path: Path, kills: int) -> None:
    """Kill after no to three saves and a random part of the next ones."""
    moments = random.Random(0)
    found = 0
    for _ in range(kills):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            write_forever(path, write)
        os.close(write)
        assert os.read(read, 1) == b"r"
        # Moments are counted in saves, not in seconds, so that a busy machine kills at the same places.
        started, saves = time.monotonic(), moments.randrange(4)
        for _ in range(saves):
            assert os.read(read, 1) == b"."
        time.sleep(moments.uniform(0, 2) * (time.monotonic() - started) / saves if saves else moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), status  # killed by us, not ended by an error
        with os.fdopen(read, "rb") as stream:
            acknowledged = found + saves + len(stream.read())
        found = in_a_child(path)
        print(acknowledged, found, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
