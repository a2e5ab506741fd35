"""Does SD-DARTS end in flatter places than without teachers, and lose less when it decides? Over seeds, on the digits.

For each seed three searches of the NAS-Bench-201 cell (three cells, 4 channels) that differ in the teachers alone: none
(which is DARTS, first order), one, and the three of the default. Measured at the end of each search: the largest
eigenvalue of the Hessian over the logits, the rise of the training loss one step uphill, and the accuracy lost when the
mixture becomes one architecture; then what was found is trained from scratch and tested. Differences are paired by
seed. Every finished (arm, seed) is kept: type the same command again to go on; ``--read`` only prints.

Run: ``python benchmarks/evidence/sd_darts.py --out runs/evidence-sd-darts --seeds 10``
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from archsmith import open_task
from archsmith.core.files import write_json
from archsmith.families.cells import NasBench201Family
from archsmith.methods import sd_darts
from archsmith.run.intervals import mean_interval

SHARED: dict[str, Any] = {
    "search_channels": 4,
    "search_cells": 1,
    "search_batch_size": 64,
    "logit_lr": 0.01,
    "batch_size": 32,
}
ARMS = {"no teacher": {"teachers": 0}, "one teacher": {"teachers": 1}, "three teachers": {"teachers": 3}}
FIGURES = {
    "logit_curvature": "curvature over logits",
    "weight_sharpness": "rise one step uphill",
    "gap": "accuracy lost by deciding, points",
    "test_accuracy": "test accuracy, %",
}


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def run_of(arm: str, seed: int, search_epochs: int, epochs: int) -> dict[str, Any]:
    """Search, train and test once."""
    task = open_task("digits")
    family = NasBench201Family(image=task.input_shape, num_classes=task.num_classes, channels=4, cells=1)
    recipe = {**sd_darts.preset_settings(task.input_shape), **SHARED, **ARMS[arm]}
    settings = sd_darts.Settings(**{**recipe, "search_epochs": search_epochs, "epochs": epochs})
    begun = time.process_time()
    searcher = sd_darts.Searcher(family=family, task=task, settings=settings, seed=seed, memory_format="channels_last")
    while not searcher.done:
        searcher.advance(Silent())
    figures = dict(searcher.figures)
    delivered = searcher.deliver()
    return {
        "logit_curvature": figures.get("logit_curvature", math.nan),
        "weight_sharpness": figures.get("weight_sharpness", math.nan),
        "gap": 100 * figures["discretisation_gap"],
        "test_accuracy": 100 * float(task.evaluate(delivered.network, "test")["accuracy"]),
        "architecture": dict(delivered.architecture),
        "seconds": time.process_time() - begun,
    }


def shown(values: list[float]) -> str:
    """Return mean and half the 95 % interval."""
    interval = mean_interval(values)
    return f"{values[0]:.4g}" if interval is None else f"{interval[0]:.4g} ± {interval[0] - interval[1]:.2g}"


def report(results: dict[str, dict[int, Any]]) -> str:
    """Return the arms as lines of a table, and the differences by seed."""
    lines = [f"| arm | seeds | {' | '.join(FIGURES.values())} |", "|" + "---|" * (2 + len(FIGURES))]
    for arm, runs in results.items():
        cells = [shown([row[figure] for row in runs.values() if math.isfinite(row[figure])]) for figure in FIGURES]
        lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    for first, second in (("three teachers", "no teacher"), ("three teachers", "one teacher")):
        seeds = sorted(set(results.get(first, {})) & set(results.get(second, {})))
        if seeds:
            cells = []
            for figure in FIGURES:
                pairs = [(results[first][seed][figure], results[second][seed][figure]) for seed in seeds]
                cells.append(shown([a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)]))
            lines.append(f"| {first} - {second} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--search-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--read", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, Any]] = {}
    for seed in range(given.seeds):
        for arm in ARMS:  # every arm of a seed before the next seed
            file = given.out / f"{arm.replace(' ', '-')}-{seed}.json"
            if not file.exists() and not given.read:
                write_json(file, run_of(arm, seed, given.search_epochs, given.epochs))
                print(arm, seed, json.loads(file.read_text()), flush=True)
            if file.exists():
                results.setdefault(arm, {})[seed] = json.loads(file.read_text())
    print(report(results))


if __name__ == "__main__":
    main()
