"""NAS-Bench-201: the published table beside ours, by simulation on the real table.

Searchers look at CIFAR-10 (validation accuracy after 12 epochs, 12,000 simulated seconds) and return a cell; printed
are means and standard deviations over runs of its 200-epoch accuracy on all three data sets. Rows of searchers that
train a super-network stay "not run" here. The last rows are what the table itself says.

Run: ``python benchmarks/evidence/nas_bench_201.py --table data/nas-bench-201.npz``
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np

from archsmith.evaluate.tables import Table, open_table
from archsmith.families.cell_spaces import cell_from_string
from archsmith.methods.nas_bench_201 import SEARCHERS, WEIGHT_SHARING, Settings, Simulation, simulate

COLUMNS = [(dataset, metric) for dataset in ("cifar10", "cifar100", "imagenet16_120") for metric in ("valid", "test")]

PUBLISHED = {
    "RSPS": "80.42±3.58 84.07±3.61 52.12±5.55 52.31±5.77 27.22±3.24 26.28±3.09",
    "DARTS-V1": "39.77±0.00 54.30±0.00 15.03±0.00 15.61±0.00 16.43±0.00 16.32±0.00",
    "DARTS-V2": "39.77±0.00 54.30±0.00 15.03±0.00 15.61±0.00 16.43±0.00 16.32±0.00",
    "GDAS": "89.89±0.08 93.61±0.09 71.34±0.04 70.70±0.30 41.59±1.33 41.71±0.98",
    "SETN": "84.04±0.28 87.64±0.00 58.86±0.06 59.05±0.24 33.06±0.02 32.52±0.21",
    "ENAS": "37.51±3.19 53.89±0.58 13.37±2.35 13.96±2.33 15.06±1.95 14.84±2.10",
    "RANDOM": "? 93.70±0.36 ? ? ? ?",
    "REA": "? ? ? ? ? ?",
    "REINFORCE": "? 93.85±0.37 ? 71.71±1.09 ? 45.24±1.18",
    "BOHB": "? ? ? ? ? ?",
    "optimum": "91.61 94.37 73.49 73.51 46.73 47.31",
    "ResNet": "? 93.97 ? 70.86 ? 43.63",
}
"""Quoted from the paper's revised table in later publications; "?" could not be read anywhere."""

RESNET = "|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|skip_connect~2|"
"""Two 3x3 convolutions and a skip around them: our reading of which cell the "ResNet" row is."""


def line(name: str, who: str, cells: list[str]) -> str:
    """Return one row of the table."""
    return f"| {name} | {who} | " + " | ".join(cells) + " |"


def measured(simulation: Simulation) -> list[str]:
    """Return mean ± standard deviation over runs per column."""
    values = [simulation.accuracy(f"{metric}_accuracy", dataset) for dataset, metric in COLUMNS]
    return [f"{each.mean():.2f}±{each.std(ddof=1):.2f}" for each in values]


def of_rows(table: Table, row: int | None) -> list[str]:
    """Return the accuracies of one row, or the best of each column for None."""
    found = [table.values(f"{metric}_accuracy", dataset=dataset) for dataset, metric in COLUMNS]
    return [f"{each.max() if row is None else each[row]:.2f}" for each in found]


def paired_gain(first: Simulation, second: Simulation) -> str:
    """Return the mean gain in CIFAR-10 test accuracy over the same seeds with its 95 % interval."""
    gain = second.accuracy("test_accuracy", "cifar10") - first.accuracy("test_accuracy", "cifar10")
    half = 1.96 * gain.std(ddof=1) / math.sqrt(len(gain))
    return f"{gain.mean():+.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="nas-bench-201.npz or .parquet, or the folder that holds it")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run")
    arguments = parser.parse_args()
    table = open_table("nas-bench-201", arguments.table)
    settings = Settings(runs=arguments.runs, seed=arguments.seed)
    heads = [f"{dataset} {metric}" for dataset, metric in COLUMNS]
    print(line("method", "source", heads))
    print("|" + "---|" * (len(heads) + 2))
    simulations: dict[str, Simulation] = {}
    notes = []
    for name, row in PUBLISHED.items():
        print(line(name, "published", row.split()))
        if name in WEIGHT_SHARING or name == "BOHB":
            print(line(name, "ours", ["not run"] * len(heads)))
        for searcher in [each for each in SEARCHERS if each.split()[0] == name]:
            start = time.perf_counter()
            simulations[searcher] = found = simulate(SEARCHERS[searcher], table, settings)
            print(line(searcher, "ours", measured(found)), flush=True)
            seconds = time.perf_counter() - start
            notes.append(f"{searcher}: {np.mean(found.queries):.1f} queries a run, {seconds:.1f} s for all runs")
        if name == "optimum":
            print(line(name, "the table", of_rows(table, None)))
        if name == "ResNet":
            print(line(name, "the table", of_rows(table, table.row(cell_from_string(RESNET)))))
    print(f"\n{settings.runs} runs from seed {settings.seed}. " + "; ".join(notes) + ".")
    print(f"REA over RANDOM, CIFAR-10 test, same seeds: {paired_gain(simulations['RANDOM'], simulations['REA'])}.")


if __name__ == "__main__":
    main()
