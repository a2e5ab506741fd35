"""How much of a searching run is the library's own work.

Work is forward, backward, optimiser, validation and recalibration; everything else is overhead, batches and
augmentation included. The phases are timed from outside (``_phases.py``) in one whole ``archsmith.search`` at 32
pixels, each moment in exactly one of them. What happens once in a run (preparation, export and its check, latency
measurement, report) does not grow with its length; it is a line of its own, because a benchmark is shorter than a real
run. On a busy machine ``--clock cpu`` counts processor seconds: waiting for a turn, and for the disk, is left out.

What happens once in an epoch weighs the more, the fewer steps an epoch has. With ``--data`` (an ``.npz`` of images, for
example CIFAR-10) the task is ``arrays``; without, the digits of scikit-learn are enlarged, 17 steps an epoch.

Run: ``python benchmarks/overhead.py [--threads 1] [--epochs 4] [--clock cpu] [--data cifar10.npz]``
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _phases import WORK, timed_phases
from _rounds import CLOCKS, machine

import archsmith
from archsmith.methods.atomnas import preset_settings

SIDE = 32
ONCE = ("preparation", "delivery: the rest", "export and check", "latency measurement", "report")


def main() -> None:
    """Run one search and print where its time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--task", help="default: arrays with --data, else digits; resized to 32 pixels")
    parser.add_argument("--data")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    task = given.task or ("arrays" if given.data else "digits")
    settings = {"epochs": given.epochs, "warmup_epochs": min(4.0, given.epochs / 4)}
    with tempfile.TemporaryDirectory() as folder, timed_phases(CLOCKS[given.clock]) as phases:
        outcome = archsmith.search(
            task,
            data=given.data,
            budget="macs<=0.4x",
            out=Path(folder) / "run",
            settings=settings,
            task_options={"resolution": SIDE},
            threads=given.threads,
            quiet=True,
        )
        seconds = phases.close()
    examples = outcome.result["examples"]["train"]
    total = sum(seconds.values())
    work = sum(seconds.pop(name, 0.0) for name in WORK)
    once = sum(seconds.get(name, 0.0) for name in ONCE)
    print(f"library overhead at 32x32, {given.clock} time:", machine(given.threads).rsplit(",", 1)[0])
    steps = examples // preset_settings((3, SIDE, SIDE))["batch_size"]
    print(f"  {task}, {examples:,} training images, {given.epochs} epochs of {steps} steps: {total:.1f} s", end="")
    print(f", of them work {work:.1f} s")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:30s}{value:8.2f} s {100 * value / total:6.2f} %{'   once in a run' * (name in ONCE)}")
    every = total - work - once
    print(f"  grows with the run            {every:8.2f} s {100 * every / (total - once):6.2f} % of a run without once")
    print(f"  once in a run                 {once:8.2f} s")
    print(f"  all overhead of this run      {every + once:8.2f} s {100 * (every + once) / total:6.2f} %")


if __name__ == "__main__":
    main()
