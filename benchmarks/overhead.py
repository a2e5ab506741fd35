"""How much of a searching run is the library's own work.

Work is forward, backward, optimiser, validation and recalibration; everything else is overhead, batches and
augmentation included. The phases are timed from outside (``_phases.py``) in one whole ``archsmith.search`` at 32
pixels, each moment in exactly one of them. What happens once in a run (preparation, export and its check, latency
measurement, report) does not grow with its length; it is a line of its own, because a benchmark is shorter than a real
run. Two clocks run at once: seconds on the wall, and processor seconds of this process, in which waiting for a turn and
for the disk are left out; on a busy machine only the second means anything.

What happens once in an epoch weighs the more, the fewer steps an epoch has. With ``--data`` (an ``.npz`` of images, for
example CIFAR-10) the task is ``arrays``; without, the digits of scikit-learn are enlarged, 17 steps an epoch.

Run: ``python benchmarks/overhead.py [--threads 1] [--epochs 4] [--data cifar10.npz]``
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
    given = parser.parse_args()
    task = given.task or ("arrays" if given.data else "digits")
    settings = {"epochs": given.epochs, "warmup_epochs": min(4.0, given.epochs / 4)}
    with (
        tempfile.TemporaryDirectory() as folder,
        timed_phases(CLOCKS["wall"]) as wall,
        timed_phases(CLOCKS["cpu"]) as cpu,
    ):
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
        columns = [cpu.close(), wall.close()]
    examples = outcome.result["examples"]["train"]
    steps = examples // preset_settings((3, SIDE, SIDE))["batch_size"]
    print("library overhead at 32x32:", machine(given.threads).rsplit(",", 1)[0])
    print(f"  {task}, {examples:,} training images, {given.epochs} epochs of {steps} steps")
    print(f"  {'':30s}{'processor':>20s}{'wall':>20s}")

    def line(name: str, values: list[float], wholes: list[float], remark: str = "") -> None:
        cells = (f"{value:10.2f} s {100 * value / whole:5.2f} %" for value, whole in zip(values, wholes, strict=True))
        print(f"  {name:30s}{' '.join(cells)}{remark}")

    totals = [sum(seconds.values()) for seconds in columns]
    once = [sum(seconds[name] for name in ONCE if name in seconds) for seconds in columns]
    work = [sum(seconds[name] for name in WORK) for seconds in columns]
    every = [total - a - b for total, a, b in zip(totals, work, once, strict=True)]
    for name in sorted(columns[0], key=lambda name: -columns[0][name]):
        remark = "   work" * (name in WORK) + "   once in a run" * (name in ONCE)
        line(name, [seconds[name] for seconds in columns], totals, remark)
    line("the whole run", totals, totals)
    line("overhead, once in a run", once, totals)
    growing = [total - value for total, value in zip(totals, once, strict=True)]
    line("overhead, grows with the run", every, growing, "   of the run without what happens once")


if __name__ == "__main__":
    main()
