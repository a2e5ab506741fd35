"""AtomNAS against its own baselines on real images: several seeds, equal budget, equal recipe.

For each seed: the search, the search with equal penalties (network slimming), the uniformly scaled network, and random
networks of the same family just within the budget; the last two are trained by the same recipe without searching.
Prints mean test accuracy with a 95 % interval over runs (t distribution), MACs, seconds, and the differences by seed.
Runs are resumable: type the same command again. ``--read`` only prints what is finished so far.

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


def interval(values: list[float]) -> str:
    """Return mean and half width of the 95 % interval of the mean (t distribution)."""
    from scipy.stats import t

    half = float("nan")
    if len(values) > 1:
        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def row(name: str, values: list[tuple[float, int, float]]) -> str:
    """Return one line of the table."""
    accuracies = [value[0] for value in values]
    macs = statistics.mean(value[1] for value in values)
    seconds = statistics.mean(value[2] for value in values)
    listed = ", ".join(f"{a:.2f}" for a in accuracies)
    return f"| {name} | {len(values)} | {interval(accuracies)} | {listed} | {macs:,.0f} | {seconds:.0f} |"


def paired(name: str, ours: list[list[float]], others: list[list[float]]) -> str:
    """Return one line of differences by seed, in points; several networks of a seed count as their mean."""
    differences = [statistics.mean(a) - statistics.mean(b) for a, b in zip(ours, others, strict=True) if a and b]
    listed = ", ".join(f"{d:+.2f}" for d in differences)
    return f"| AtomNAS - {name} | {len(differences)} | {interval(differences)} | {listed} |"


def finished(run: Path) -> bool:
    """Return whether a run has its final result."""
    file = run / "result.json"
    return file.exists() and json.loads(file.read_text())["status"] == "finished"


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
    parser.add_argument("--read", action="store_true", help="train nothing, print the table of what is finished")
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
    if not given.read:
        with ProcessPoolExecutor(given.processes) as pool:
            list(pool.map(one_seed, jobs))

    searches = [given.out / f"macs-{seed}" for seed in range(given.seeds)]
    table = {
        "AtomNAS": [[folder] for folder in searches],
        "equal penalty": [[given.out / f"equal-{seed}"] for seed in range(given.seeds)],
        "uniformly scaled": [[folder / "baselines" / "uniform"] for folder in searches],
        "random networks": [
            [folder / "baselines" / f"random-{i + 1}" for i in range(given.random)] for folder in searches
        ],
    }
    found = {name: [[figures(run) for run in runs if finished(run)] for runs in seeds] for name, seeds in table.items()}
    print(f"task {given.task}, budget {given.budget}, settings {settings}, options {options}\n")
    print("| network | runs | test accuracy, % (95 % interval) | each | MACs | seconds |")
    print("|---|---|---|---|---|---|")
    for name, seeds in found.items():
        if any(seeds):
            print(row(name, [value for values in seeds for value in values]))
    accuracies = {name: [[value[0] for value in values] for values in seeds] for name, seeds in found.items()}
    print("\n| paired by seed, points | seeds | difference (95 % interval) | each |")
    print("|---|---|---|---|")
    for name in list(table)[1:]:
        if any(a and b for a, b in zip(accuracies["AtomNAS"], accuracies[name], strict=True)):
            print(paired(name, accuracies["AtomNAS"], accuracies[name]))


if __name__ == "__main__":
    main()
