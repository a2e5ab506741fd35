"""How fast a benchmark table answers: one query, a search of 10,000 evaluations, and memory over 100,000.

A query is ``TableEvaluator.evaluate``: architecture to row, metrics, costs and simulated seconds as a ``Result``.
Beside it the bare lookup ``Table.row`` and a search (random search by ask and tell). Processor time, best and median
of rounds; memory is the resident size after 20,000 and after 100,000 further evaluations.

Run: ``python benchmarks/table_query.py --tables data``
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from archsmith.evaluate.tables import Table, TableEvaluator, open_table
from archsmith.space import Architecture, Trial
from archsmith.strategies import RandomSearch

ROUNDS = 7
QUERIES = 5_000
NAMES = ("nas-bench-201", "nas-bench-101", "nas-bench-macro", "nas-bench-graph")


def microseconds(call: Callable[[int], object], count: int) -> tuple[float, float]:
    """Return best and median over rounds of the processor time of one call."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for i in range(count):
            call(i)
        found.append(1e6 * (time.process_time() - start) / count)
    return min(found), statistics.median(found)


def queries(table: Table, architectures: list[Architecture]) -> list[tuple[float, float]]:
    """Return the times of a bare lookup and of an evaluation."""
    evaluator = TableEvaluator(table)
    trials = [Trial(id=i, architecture=each) for i, each in enumerate(architectures)]
    lookup = microseconds(lambda i: table.row(architectures[i]), len(architectures))
    return [lookup, microseconds(lambda i: evaluator.evaluate(trials[i]), len(trials))]


def search(table: Table, evaluations: int) -> float:
    """Return the processor seconds of a random search."""
    strategy, evaluator = RandomSearch(table.space, seed=0), TableEvaluator(table)
    start = time.process_time()
    for _ in range(evaluations):
        (trial,) = strategy.ask()
        strategy.tell(trial.id, evaluator.evaluate(trial))
    return time.process_time() - start


def resident_mebibytes() -> float:
    """Return the memory of this process that is in use (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("ARCHSMITH_DATA")
    default = Path(data) / "nas-benchmarks" if data else None
    parser.add_argument("--tables", default=default, help="folder of the table files; ARCHSMITH_DATA/nas-benchmarks")
    if (folder := parser.parse_args().tables) is None:
        print(
            "No tables: pass --tables, the folder that holds them (docs/guide/tables.md); archsmith downloads nothing."
        )
        return
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{platform.machine()}, {versions}, load {os.getloadavg()[0]:.1f}")
    print(
        "| table | open, s | row, us (best / median) | evaluate, us (best / median) | 10,000 ask + evaluate + tell, s |"
    )
    print("|---|---|---|---|---|")
    for name in NAMES:
        start = time.process_time()
        table = open_table(name, folder)
        opened = time.process_time() - start
        rng = np.random.default_rng(0)
        (row, row_median), (query, query_median) = queries(table, [table.space.sample(rng) for _ in range(QUERIES)])
        whole = search(table, 10_000)
        times = f"{row:.1f} / {row_median:.1f} | {query:.1f} / {query_median:.1f}"
        print(f"| {name} | {opened:.2f} | {times} | {whole:.2f} |", flush=True)
    table = open_table("nas-bench-201", folder)
    search(table, 20_000)
    before = resident_mebibytes()
    search(table, 100_000)
    after = resident_mebibytes()
    grown = f"after 100,000 more {after:.1f} MiB ({after - before:+.1f})"
    print(f"\nMemory after 20,000 evaluations {before:.1f} MiB, {grown}.")


if __name__ == "__main__":
    main()
