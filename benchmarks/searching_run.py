"""A whole searching run at ``macs<=0.4x`` against training the unshrunk supernet for the same epochs.

Three runs of the same seed take turns, an epoch each, so that a slow minute of the machine hits all of them:

- ``supernet``: ordinary training of the whole supernet, no penalty, no budget, no cut;
- ``cut at the end``: the search that trains the whole supernet and cuts once, after the last epoch (``cuts=end``);
- ``search``: the search as it is.

Seconds are those of all epochs (steps, shrinking, recalibration, validation), processor seconds of this process and
seconds on the wall; on a busy machine only the first mean anything. Printed for each seed: the seconds and the
validation accuracies of the delivered networks; then the quartiles of the ratios over seeds. At 32 pixels widths are
multiples of 16: on CPUs, widths off such multiples cost more time than they save.

Run: ``python benchmarks/searching_run.py [--threads 1] [--case digits] [--seeds 3] [--set budget_by=0.4]``
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import yaml
from _rounds import CLOCKS, machine

from archsmith.families.mobile import open_family
from archsmith.methods.atomnas import TASK_OPTIONS, Searcher, Settings, preset_settings
from archsmith.run.costs import CostModel
from archsmith.run.prepare import EarlyJournal
from archsmith.space import Budget
from archsmith.tasks import open_task

BUDGET = "macs<=0.4x"
CASES: dict[str, tuple[dict[str, Any], int, int, float]] = {
    # task options, divisor, epochs by default, the ratio that is aimed at
    "digits": ({}, 1, 12, 0.85),
    "digits32": ({"resolution": 32}, 16, 6, 0.7),
}


class Quiet:
    """A monitor that never asks to stop."""

    def step(self, total: int, **figures: float) -> None:
        """Take note of nothing."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def one_seed(task, settings: dict[str, Any], seed: int) -> dict[str, tuple[dict[str, float], float, float]]:
    """Return (seconds by clock, validation accuracy, MACs relative to the supernet) of the three runs."""
    arms = {
        "supernet": (None, {"rho": 0.0, "shrink_fraction": 1.0}),
        "cut at the end": (BUDGET, {"cuts": "end"}),
        "search": (BUDGET, {}),
    }
    searchers = {}
    for name, (budget, own) in arms.items():
        family = open_family(name="mobile", image=task.input_shape, num_classes=task.num_classes)
        costs = CostModel(family, Budget.parse(budget) if budget else None, EarlyJournal())
        chosen = Settings(**{**settings, **own})
        searchers[name] = Searcher(family=family, task=task, settings=chosen, costs=costs, seed=seed)
    seconds = {name: dict.fromkeys(CLOCKS, 0.0) for name in arms}
    last: dict[str, dict[str, Any]] = {}
    while not all(searcher.done for searcher in searchers.values()):
        for name, searcher in searchers.items():
            start = {clock: now() for clock, now in CLOCKS.items()}
            figures = searcher.advance(Quiet())
            for clock, now in CLOCKS.items():
                seconds[name][clock] += now() - start[clock]
            assert figures is not None
            last[name] = figures
    return {name: (seconds[name], last[name]["valid_accuracy"], last[name]["macs_fraction"]) for name in arms}


def quartiles(values: list[float]) -> str:
    """Return "median (quartiles low to high)"; the range where there are too few values for quartiles."""
    if len(values) < 3:
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f})"


def main() -> None:
    """Run the chosen cases and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("whole searching run:", machine(given.threads).rsplit(",", 1)[0])
    changed = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in given.set)}
    for case in given.case or CASES:
        options, divisor, epochs, target = CASES[case]
        task = open_task("digits", **TASK_OPTIONS, **options)
        epochs = given.epochs or epochs
        settings = {
            **preset_settings(task.input_shape),
            "epochs": epochs,
            "warmup_epochs": min(4.0, epochs / 4),
            "divisor": divisor,
            **changed,
        }
        side = task.input_shape[1]
        print(f"\n{case}: {side}x{side}, {BUDGET}, divisor {settings['divisor']}, {epochs} epochs, changed: {changed}")
        ratios: dict[str, list[list[float]]] = {clock: [[], []] for clock in CLOCKS}
        gaps = []
        for seed in range(given.seeds):
            found = one_seed(task, settings, seed)
            plain, end, search = (found[name] for name in ("supernet", "cut at the end", "search"))
            for clock, (to_plain, to_end) in ratios.items():
                to_plain.append(search[0][clock] / plain[0][clock])
                to_end.append(search[0][clock] / end[0][clock])
            gaps.append(100 * (search[1] - end[1]))
            cells = "; ".join(
                f"{name} {s['cpu']:.1f} s (wall {s['wall']:.1f} s), {100 * a:.2f} %, {m:.3f}x"
                for name, (s, a, m) in found.items()
            )
            print(f"  seed {seed}: {cells}", flush=True)
        for clock in ("cpu", "wall"):
            to_plain, to_end = (quartiles(values) for values in ratios[clock])
            print(f"  {clock:4s} seconds, search / supernet       {to_plain}, at most {target}, aim 0.6")
            print(f"  {clock:4s} seconds, search / cut at the end {to_end}")
        each = ", ".join(f"{gap:+.2f}" for gap in gaps)
        print(f"  validation accuracy, search - cut at the end, points: mean {statistics.mean(gaps):+.2f} ({each})")


if __name__ == "__main__":
    main()
