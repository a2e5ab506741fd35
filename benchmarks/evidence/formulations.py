"""How well strategies of one objective search under a limit, by the way the limit is told to them.

``python benchmarks/evidence/formulations.py FOLDER`` with the folder of the NAS-Bench-201 table and its latency file:
CIFAR-100 test accuracy under a latency limit on pixel3, 500 evaluations, 20 seeds. Judged by the best *feasible*
accuracy among the evaluated, whatever the formulation scored. Exact optima are by enumeration. About two minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np

from archsmith.evaluate.tables import TableEvaluator, open_table
from archsmith.methods.hw_nas_survey import optimum, table_columns
from archsmith.space import Objective
from archsmith.space.formulations import FeasibleFirst, Formulation, Lagrangian, Penalised, Rejected, at_most
from archsmith.strategies import LocalSearch, RandomSearch, RegularizedEvolution, Reinforce
from archsmith.strategies.scalarised import MakeInner, Scalarised

COST = "latency_pixel3"
ACCURACY = Objective("test_accuracy", reference=0.0)
EVALUATIONS, SEEDS = 500, 20

INNERS: dict[str, MakeInner] = {
    "regularized-evolution": partial(RegularizedEvolution, population=30, tournament=10),
    "local-search": LocalSearch,
    "reinforce": partial(Reinforce, learning_rate=0.01),
    "random": RandomSearch,
}


def formulations(limit: float) -> dict[str, Formulation]:
    """Return the ways to tell a limit; weights and rates were set once, not tuned."""
    limits = (at_most(COST, limit),)
    return {
        "rejected": Rejected(objective=ACCURACY, limits=limits),
        "penalty 100": Penalised(objective=ACCURACY, limits=limits, weight=100.0),
        "Lagrangian, rate 1": Lagrangian(objective=ACCURACY, limits=limits, rate=1.0),
        "feasible first": FeasibleFirst(objective=ACCURACY, limits=limits),
    }


def searched(evaluator: TableEvaluator, problem: Formulation, inner: MakeInner, limit: float, seed: int) -> float:
    """Return the best feasible accuracy among the evaluated; NaN when none was."""
    strategy = Scalarised(evaluator.table.space, formulation=problem, inner=inner, seed=seed)
    best = math.nan
    for _ in range(EVALUATIONS):
        if not (trials := strategy.ask()):
            break
        result = evaluator.evaluate(trials[0])
        strategy.tell(trials[0].id, result)
        if result.costs[COST] <= limit:
            best = np.fmax(best, result.metrics["test_accuracy"])
    return float(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    table = open_table(
        "nas-bench-201", folder / "nas-bench-201.npz", beside=[folder / "nas-bench-201-latency-help.parquet"]
    )
    evaluator = TableEvaluator(table, dataset="cifar100", devices=["pixel3"])
    print(f"Python {sys.version.split()[0]}, numpy {np.__version__}; {EVALUATIONS} evaluations, {SEEDS} seeds\n")
    for limit in (5.0, 10.0, 15.0):
        problems = formulations(limit)
        exact = optimum(table_columns(table, ("test_accuracy", COST), dataset="cifar100"), problems["rejected"])
        assert exact is not None
        print(f"pixel3 <= {limit:g} ms: exact optimum {exact.value:.2f}, {exact.admitted:,} of 15,625 feasible\n")
        print("| strategy | " + " | ".join(problems) + " |\n|---" + "|---" * len(problems) + "|")
        for name, inner in INNERS.items():
            cells = []
            for problem in problems.values():
                found = [searched(evaluator, problem, inner, limit, seed) for seed in range(SEEDS)]
                cells.append(f"{np.mean(found):.2f} ± {np.std(found, ddof=1):.2f}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
