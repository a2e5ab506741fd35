"""Is PC-DARTS more stable than DARTS? Cells of both, over seeds, on the digits.

For each seed one search and one final training by each method, both first order, with the same search network (8
channels, 3 cells, ``--nodes`` nodes), batch and numbers of epochs; what else differs is the methods' own (small recipe:
K = 4, edge weights, a warm-up, a larger learning rate). The final networks have the same skeleton and training.
Counted: operations without weights in the derived cells, test accuracy (359 images, read once a network) and its spread
over seeds. Every finished (method, seed) is kept: type the same command again to go on; ``--read`` only prints.

``--only "PC-DARTS, K = 1"`` adds an arm with all that PC-DARTS has but partial channels.

Run: ``python benchmarks/evidence/pc_darts.py --out runs/evidence-pc-darts --seeds 10``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from archsmith import open_task
from archsmith.core.files import write_json
from archsmith.families.darts import DartsFamily
from archsmith.methods import load_method
from archsmith.run.intervals import mean_interval

SHARED = {"order": "first", "search_channels": 8, "search_cells": 3, "search_batch_size": 64, "logit_lr": 6e-3}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DARTS": ("darts", {}),
    "PC-DARTS": ("pc-darts", {"warmup_epochs": 2, "channel_divisor": 4}),
    "PC-DARTS, K = 1": ("pc-darts", {"warmup_epochs": 2, "channel_divisor": 1}),
}
"""Name to method and settings."""


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def run_of(name: str, task: Any, seed: int, search_epochs: int, epochs: int, nodes: int) -> dict[str, Any]:
    """Search, train and test once."""
    slug, changes = CONTENDERS[name]
    _, module = load_method(slug)
    family = DartsFamily(image=task.input_shape, num_classes=task.num_classes, channels=8, cells=3, nodes=nodes)
    recipe = {**module.preset_settings(task.input_shape), **SHARED, "search_epochs": search_epochs, "epochs": epochs}
    settings = module.Settings(**{**recipe, **changes})
    begun = time.process_time()
    searcher = module.Searcher(family=family, task=task, settings=settings, seed=seed, memory_format="channels_last")
    last: dict[str, Any] = {}
    searching = 0.0
    while not searcher.done:
        epoch = searcher.advance(Silent())
        if epoch["phase"] == "search":
            last, searching = epoch, time.process_time() - begun
    delivered = searcher.deliver()
    return {
        "test_accuracy": 100 * float(task.evaluate(delivered.network, "test")["accuracy"]),
        "weightless": last["weightless"],
        "entropy": last["entropy"],
        "decisions": dict(delivered.architecture),
        "macs": family.exact_costs(delivered.architecture)["macs"],
        "search_seconds": searching,
        "seconds": time.process_time() - begun,
    }


def shown(values: list[float]) -> str:
    """Return mean and half the 95 % interval."""
    interval = mean_interval(values)
    return f"{values[0]:.2f}" if interval is None else f"{interval[0]:.2f} ± {interval[0] - interval[1]:.2f}"


def report(results: dict[str, dict[int, Any]]) -> str:
    """Return the comparison as lines of a table, and the differences by seed."""
    lines = [
        "| method | seeds | without weights, normal | reduction | test accuracy, % | standard deviation "
        "| lowest | MACs | entropy, normal | search, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        rows = list(runs.values())
        accuracies = [row["test_accuracy"] for row in rows]
        lines.append(
            f"| {name} | {len(rows)} | {shown([row['weightless']['normal'] for row in rows])} | "
            f"{shown([row['weightless']['reduce'] for row in rows])} | {shown(accuracies)} | "
            f"{statistics.stdev(accuracies) if len(rows) > 1 else 0:.2f} | {min(accuracies):.1f} | "
            f"{statistics.fmean(row['macs'] for row in rows):,.0f} | "
            f"{statistics.fmean(row['entropy']['normal'] for row in rows):.3f} | "
            f"{statistics.fmean(row['search_seconds'] for row in rows):.0f} |"
        )
    for other in ("DARTS", "PC-DARTS, K = 1"):
        seeds = sorted(set(results.get("PC-DARTS", {})) & set(results.get(other, {})))
        if seeds:
            pairs = [(results["PC-DARTS"][seed], results[other][seed]) for seed in seeds]
            free = [a["weightless"]["normal"] - b["weightless"]["normal"] for a, b in pairs]
            gain = [a["test_accuracy"] - b["test_accuracy"] for a, b in pairs]
            lines.append(
                f"PC-DARTS - {other}, {len(seeds)} seeds: operations without weights {shown(free)}, "
                f"test accuracy {shown(gain)}"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--search-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["DARTS", "PC-DARTS"], choices=list(CONTENDERS))
    parser.add_argument("--read", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, Any]] = {}
    for seed in range(given.seeds):
        for name in CONTENDERS:  # every arm of a seed before the next seed
            file = given.out / f"{name.replace(', ', '-').replace(' ', '')}-{seed}.json"
            if not file.exists() and not given.read and name in given.only:
                task = open_task("digits")
                write_json(file, run_of(name, task, seed, given.search_epochs, given.epochs, given.nodes))
                row = json.loads(file.read_text())
                print(
                    name, seed, row["weightless"], f"{row['test_accuracy']:.1f} %, {row['seconds']:.0f} s", flush=True
                )
            if file.exists():
                results.setdefault(name, {})[seed] = json.loads(file.read_text())
    print(report(results))


if __name__ == "__main__":
    main()
