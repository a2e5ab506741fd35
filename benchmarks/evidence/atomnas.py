"""AtomNAS against its own baselines on real images: several seeds, equal budget, equal recipe.

For each seed: the search, the search with equal penalties (network slimming), the uniformly scaled network, and random
networks of the same family just within the budget; the last two are trained by the same recipe without searching.
Prints mean test accuracy with a 95 % interval over seeds (t distribution), MACs and seconds. Runs are resumable: type
the same command again.

Run: ``python benchmarks/evidence/atomnas.py --task digits --out runs/evidence-digits``
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml


def one_seed(arguments: dict[str, Any]) -> None:
    """Search with baselines for one seed and one kind of penalty."""
    import archsmith

    archsmith.search(**arguments)


def figures(run: Path) -> tuple[float, int, float]:
    """Return test accuracy in percent, MACs and seconds of a finished run."""
    result = json.loads((run / "result.json").read_text())
    best = result["outcomes"][0]
    return 100 * best["metrics"]["test_accuracy"], best["costs"]["macs"], result["seconds"]


def row(name: str, values: list[tuple[float, int, float]]) -> str:
    """Return one line of the table."""
    from scipy.stats import t

    accuracies = [value[0] for value in values]
    half = float("nan")
    if len(values) > 1:
        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(accuracies) / len(values) ** 0.5
    macs = statistics.mean(value[1] for value in values)
    seconds = statistics.mean(value[2] for value in values)
    listed = ", ".join(f"{a:.2f}" for a in accuracies)
    interval = f"{statistics.mean(accuracies):.2f} ± {half:.2f}"
    return f"| {name} | {len(values)} | {interval} | {listed} | {macs:,.0f} | {seconds:.0f} |"


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--data")
    parser.add_argument("--budget", default="macs<=0.4x")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random", type=int, default=2, help="random networks for each seed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--task-set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    settings, options = (
        {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
        for pairs in (given.set, given.task_set)
    )
    common = {
        "task": given.task,
        "data": given.data,
        "budget": given.budget,
        "task_options": options,
        "threads": 1,
        "quiet": True,
    }
    jobs = []
    for seed in range(given.seeds):
        for penalty in ("macs", "equal"):
            baselines = given.random if penalty == "macs" else 0
            out = given.out / f"{penalty}-{seed}"
            own = {"settings": {**settings, "penalty": penalty}, "seed": seed, "out": out, "baselines": baselines}
            jobs.append({**common, **own})
    with ProcessPoolExecutor(given.processes) as pool:
        list(pool.map(one_seed, jobs))

    folders = [given.out / f"macs-{seed}" for seed in range(given.seeds)]
    table = {
        "AtomNAS": folders,
        "equal penalty": [given.out / f"equal-{seed}" for seed in range(given.seeds)],
        "uniformly scaled": [folder / "baselines" / "uniform" for folder in folders],
        "random networks": [
            folder / "baselines" / f"random-{i + 1}" for folder in folders for i in range(given.random)
        ],
    }
    print(f"task {given.task}, budget {given.budget}, settings {settings}, options {options}\n")
    print("| network | runs | test accuracy, % (95 % interval) | each | MACs | seconds |")
    print("|---|---|---|---|---|---|")
    for name, runs in table.items():
        print(row(name, [figures(run) for run in runs]))


if __name__ == "__main__":
    main()
