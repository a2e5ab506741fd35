"""What a strategy costs: ask + tell, ten thousand evaluations on a table, and memory over a hundred thousand.

    python benchmarks/strategies.py [--quick]

One process, one thread. Times are processor time of this process, so that a busy machine does not count. The space is
NAS-Bench-201's (six choices of five) and, to show the growth with depth, a mobile space of 63 counts. The evaluation
is a look into a synthetic additive table, so that what is measured is the strategy.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from archsmith.families.cell_spaces import nas_bench_201_space
from archsmith.space import AtLeast, Count, Objective, ProductSpace, Result, Space, Trial
from archsmith.space.formulations import Rejected, at_most
from archsmith.strategies import RegularizedEvolution, Strategy, open_strategy, strategy_table

FIDELITIES = (1.0, 3.0, 9.0)
PARETO = (Objective("valid_accuracy"), Objective("params", "minimize"))

SETTINGS: dict[str, dict[str, object]] = {
    "bohb": {"fidelities": FIDELITIES},
    "hyperband": {"fidelities": FIDELITIES},
    "mcts": {"reward_range": (0.0, 100.0)},
    "nsga2": {"objectives": PARETO},
    "scalarised": {
        "formulation": Rejected(objective=Objective("valid_accuracy"), limits=(at_most("params", 97.0),)),
        "inner": RegularizedEvolution,
    },
    "successive-halving": {"fidelities": FIDELITIES},
}

WINDOW = 20


def mobile_space() -> ProductSpace:
    elements = {f"blocks/{b}/k{k}": Count(0, 96, 8) for b in range(21) for k in (3, 5, 7)}
    constraints = [AtLeast([f"blocks/{b}/k{k}" for k in (3, 5, 7)], 1) for b in range(0, 21, 3)]
    return ProductSpace("mobile", elements, constraints=constraints)


class Table:
    """A synthetic additive table: the score of an architecture is a sum over its decisions."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.scores: dict[tuple[str, object], float] = {}

    def __call__(self, trial: Trial) -> Result:
        """Return the trial's score, and a cost that falls as the score rises."""
        total = 0.0
        for pair in trial.architecture.items():
            if (score := self.scores.get(pair)) is None:
                score = self.scores[pair] = float(self.rng.random())
            total += score
        return Result(metrics={"valid_accuracy": total}, costs={"params": 100.0 - total}, seconds=1.0)


def steps(strategy: Strategy, evaluate: Callable[[Trial], Result], n: int) -> list[float]:
    """Run n ask + tell and return the milliseconds of each, without the evaluation."""
    times = []
    while len(times) < n:
        start = time.process_time()
        trials = strategy.ask()
        spent = time.process_time() - start
        for trial in trials:
            result = evaluate(trial)
            start = time.process_time()
            strategy.tell(trial.id, result)
            times.append(1e3 * (spent + time.process_time() - start))
        if not trials:
            break  # a finite space is through
    return times


def overhead(space: Space, names: list[str], seen: int) -> None:
    print(f"\n## ask + tell on {space.name}: milliseconds, mean (largest) of {WINDOW} trials\n")
    print(f"| strategy | trials 11 to {10 + WINDOW} | after {seen} trials |\n|---|---|---|")
    for name in names:
        settings = SETTINGS.get(name, {})
        strategy, table = open_strategy(name, space, seed=0, **settings), Table()
        steps(strategy, table, 10)
        early = steps(strategy, table, WINDOW)
        if name in ("gp", "tpe"):  # random until then: what counts is the cost with that many observations
            strategy, table = open_strategy(name, space, seed=0, **settings, startup=seen), Table()
        steps(strategy, table, seen - strategy.told)
        late = steps(strategy, table, WINDOW if name != "gp" else 5)
        columns = (f"{statistics.mean(times):.2f} ({max(times):.2f})" if times else "-" for times in (early, late))
        print(f"| {name} | {' | '.join(columns)} |", flush=True)


def loop(n: int) -> None:
    print(f"\n## {n:,} evaluations on a synthetic table, one process\n")
    print("| strategy | seconds, evaluation included | best |\n|---|---|---|")
    for name in ("random", "regularized-evolution", "reinforce", "local-search", "nsga2", "hyperband"):
        strategy, table, best = (
            open_strategy(name, nas_bench_201_space(), seed=0, **SETTINGS.get(name, {})),
            Table(),
            0.0,
        )
        start, count = time.process_time(), 0
        while count < n and (trials := strategy.ask()):
            for trial in trials:
                result = table(trial)
                best = max(best, result.metrics["valid_accuracy"])
                strategy.tell(trial.id, result)
                count += 1
        print(f"| {name} ({count:,}) | {time.process_time() - start:.2f} | {best:.4f} |", flush=True)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(n: int) -> None:
    print(f"\n## memory over {n:,} evaluations\n")
    print("| strategy | after | traced KiB | resident MiB |\n|---|---|---|---|")
    for name in ("random", "regularized-evolution", "reinforce", "nsga2", "hyperband"):
        strategy, table = open_strategy(name, nas_bench_201_space(), seed=0, **SETTINGS.get(name, {})), Table()
        tracemalloc.start()
        for part in range(4):
            done = 0
            while done < n // 4:
                for trial in strategy.ask():
                    strategy.tell(trial.id, table(trial))
                    done += 1
            gc.collect()
            traced = tracemalloc.get_traced_memory()[0] / 1024
            print(f"| {name} | {(part + 1) * n // 4:,} | {traced:.0f} | {resident_mib():.1f} |", flush=True)
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    scale = 10 if parser.parse_args().quick else 1
    print(f"Python {sys.version.split()[0]}, numpy {np.__version__}, {platform.machine()}, {os.cpu_count()} CPUs")
    names = [str(row["name"]) for row in strategy_table()]
    overhead(nas_bench_201_space(), names, 500 // scale)
    overhead(mobile_space(), [name for name in names if name not in ("gp", "grid", "mcts", "surrogate")], 500 // scale)
    loop(10_000 // scale)
    memory(100_000 // scale)


if __name__ == "__main__":
    main()
