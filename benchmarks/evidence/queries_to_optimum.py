"""How many trained networks a search asks for until it has the best of a real table.

One query is one network (``network_digest``) evaluated for the first time: validation accuracy after 200 epochs on
NAS-Bench-201 (mean of the recorded trainings), test accuracy after 108 epochs on NAS-Bench-101, which records nothing
else. The same network asked again is free and counted beside. No other column of the tables is looked at: no zero-cost
scores, no short trainings, no sizes.

The settings of predictor-guided search were chosen on CIFAR-10 of NAS-Bench-201 alone: the last choices on seeds 1000
to 1059, earlier ones (features, acquisition, scaling) with a prototype on seeds below 50. The other tables are
reported as they came out. One core, resumable: every search is a line of ``--records``; what is there is not run again.

Run: ``python benchmarks/evidence/queries_to_optimum.py --data FOLDER`` (the folder with ``nas-bench-201.npz`` and
``nas-bench-101.npz``), then the tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.rng import numpy_stream
from archsmith.evaluate.cache import CachedEvaluator
from archsmith.evaluate.tables import Table, TableEvaluator, open_table
from archsmith.families.cell_features import (
    NB201_FEATURE_GROUPS,
    graph_cell_features,
    nas_bench_201_features,
    path_encoding,
)
from archsmith.predictors import GaussianProcess
from archsmith.space import Architecture, Objective, Space
from archsmith.strategies import RandomSearch, RegularizedEvolution, Strategy
from archsmith.strategies.candidates import CandidatePool
from archsmith.strategies.evolution import MutateWithin
from archsmith.strategies.predictor_guided import PredictorGuided, bananas

TASKS = {
    "cifar10": ("nas-bench-201", "cifar10", "valid_accuracy"),
    "cifar100": ("nas-bench-201", "cifar100", "valid_accuracy"),
    "imagenet16-120": ("nas-bench-201", "imagenet16_120", "valid_accuracy"),
    "nas-bench-101": ("nas-bench-101", "cifar10", "test_accuracy"),
}

FROZEN = {"initial": 5}
"""Of ``PredictorGuided``, beside its defaults and the features: chosen on CIFAR-10, the same everywhere."""

SMALL = {"population": 10, "tournament": 3}
"""Regularised evolution as NAS-Bench-201 runs it."""

REPEATS = 20
"""A search is given up after so many trials for each query of its budget: all that is left are repetitions."""


def features_101(cell: Architecture) -> np.ndarray:
    """Return the same kind of features for NAS-Bench-101: words and shape; vertices have no fixed places."""
    from archsmith.families.graph_cells import nas_bench_101_space

    numbers = nas_bench_101_space().cell(cell)
    adjacency = np.zeros((numbers.vertices, numbers.vertices), dtype=bool)
    for source, target in numbers.edges:
        adjacency[source, target] = True
    return graph_cell_features(adjacency, numbers.operations, kinds=3, longest=5)


@cache
def pool_201() -> CandidatePool:
    """Return the 6,466 networks of NAS-Bench-201, listed once for all searches."""
    from archsmith.families.cell_spaces import nas_bench_201_space

    return CandidatePool(nas_bench_201_space().enumerate(), nas_bench_201_features)


def _guided(space: Space, objective: Objective, seed: int, **settings: Any) -> Strategy:
    small = space.name == "nas-bench-201"
    groups = NB201_FEATURE_GROUPS if small else (364, 11)
    own: dict[str, Any] = {
        "features": nas_bench_201_features if small else features_101,
        "predictor": lambda own_seed: GaussianProcess(groups=groups, seed=own_seed),
        "pool": pool_201() if small else None,
    }
    return PredictorGuided(space, objectives=[objective], seed=seed, **(own | FROZEN | settings))


def _evolution(space: Space, objective: Objective, seed: int) -> Strategy:
    if space.name != "nas-bench-201":
        return RegularizedEvolution(space, objectives=[objective], seed=seed, **SMALL)
    by_target = MutateWithin([[f"edge/{s}-{t}" for s in range(t)] for t in (1, 2, 3)])
    return RegularizedEvolution(space, objectives=[objective], seed=seed, mutation=by_target, **SMALL)


METHODS: dict[str, Callable[[Space, Objective, int], Strategy]] = {
    "random search": lambda space, objective, seed: RandomSearch(space, objectives=[objective], seed=seed),
    "regularised evolution": _evolution,
    "predictor-guided": _guided,
    "predictor-guided, drawn candidates": lambda s, o, seed: _guided(s, o, seed, pool=None, whole=0),
    "predictor-guided, one-hot features": lambda s, o, seed: PredictorGuided(s, objectives=[o], seed=seed, **FROZEN),
    "BANANAS": lambda s, o, seed: bananas(s, objectives=[o], seed=seed, features=path_encoding, initial=10),
}


def search(table: Table, task: str, method: str, seed: int, budget: int) -> dict[str, Any]:
    """Return what one search found: best value after each query, the query that found the optimum, repetitions."""
    _, dataset, metric = TASKS[task]
    values = table.values(metric, dataset=dataset)
    strategy = METHODS[method](table.space, Objective(metric), seed)
    evaluator = CachedEvaluator(TableEvaluator(table, dataset=dataset))
    optimum, best = float(np.nanmax(values)), -math.inf
    curve: list[float] = []
    started = time.process_time()
    for _ in range(REPEATS * budget):
        trials = strategy.ask()
        if not trials or len(curve) == budget or best == optimum:
            break
        known = evaluator.evaluations
        result = evaluator.evaluate(trials[0])
        strategy.tell(trials[0].id, result)
        if evaluator.evaluations > known:
            best = max(best, result.metrics.get(metric, -math.inf))
            curve.append(best)
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "budget": budget,
        "found": len(curve) if best == optimum else None,
        "queries": len(curve),
        "repetitions": evaluator.repetitions,
        "regret": {str(n): optimum - curve[min(n, len(curve)) - 1] for n in (25, 50, 100, 150)},
        "seconds": time.process_time() - started,
    }


def interval(values: np.ndarray, statistic: Callable[..., Any], name: str) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic over seeds (10,000 resamples, percentiles)."""
    draws = numpy_stream(0, "bootstrap", name).integers(len(values), size=(10_000, len(values)))
    low, high = np.percentile(statistic(values[draws], axis=1), [2.5, 97.5], method="inverted_cdf")
    return float(low), float(high)


def report(records: list[dict[str, Any]], optima: dict[str, float]) -> str:
    """Return the tables of all records as Markdown."""
    lines = []
    for task in TASKS:
        rows = [record for record in records if record["task"] == task]
        if not rows:
            continue
        lines += [
            f"\n**{task}** (best: {optima[task]:.2f})\n",
            "| strategy | seeds | median queries | 95 % | quartiles | found | free repetitions "
            "| regret at 25 | 50 | 100 | 150 | CPU s per search |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for method in METHODS:
            own = [record for record in rows if record["method"] == method]
            if own:
                lines.append(_row(method, own))
    return "\n".join(lines)


def _row(method: str, own: list[dict[str, Any]]) -> str:
    budget = max(record["budget"] for record in own)
    queries = np.array([math.inf if record["found"] is None else record["found"] for record in own])

    def shown(number: float) -> str:
        return f"> {budget}" if math.isinf(number) else f"{number:g}"

    low, high = interval(queries, np.median, "median")
    quarter, three = np.percentile(queries, [25, 75], method="inverted_cdf")
    regrets = []
    for n in ("25", "50", "100", "150"):
        regret = np.array([record["regret"][n] for record in own])
        below, above = interval(regret, np.mean, "mean")
        regrets.append(f"{regret.mean():.3f} [{below:.3f}, {above:.3f}]")
    cells = [
        f"{len(own)}",
        f"**{shown(float(np.median(queries)))}**",
        f"{shown(low)} to {shown(high)}",
        f"{shown(quarter)} to {shown(three)}",
        f"{np.isfinite(queries).sum()}",
        f"{np.mean([record['repetitions'] for record in own]):.1f}",
        *regrets,
        f"{np.mean([record['seconds'] for record in own]):.2f}",
    ]
    return f"| {method} | " + " | ".join(cells) + " |"


def overhead(table: Table, observations: int = 550) -> str:
    """Return how long ``ask`` and ``tell`` take near 500 observations, every network of NAS-Bench-201 scored."""
    objective = Objective("valid_accuracy")
    strategy, evaluator = _guided(table.space, objective, 0), TableEvaluator(table)
    times = []
    for _ in range(observations):
        started = time.perf_counter()
        (trial,) = strategy.ask()
        asked = time.perf_counter()
        result = evaluator.evaluate(trial)
        answered = time.perf_counter()
        strategy.tell(trial.id, result)
        times.append(1e3 * (asked - started + time.perf_counter() - answered))
    late = np.array(times[450:550])
    return (
        f"ask + tell at observations 450 to 550: mean {late.mean():.1f} ms, median {np.median(late):.1f} ms, "
        f"largest {late.max():.0f} ms (fits of the hyperparameters); over all 550: mean {np.mean(times):.1f} ms"
    )


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the tables")
    parser.add_argument("--records", type=Path, default=Path("queries_to_optimum.jsonl"))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=100, help="seeds 0 to this; slow searches take fewer")
    parser.add_argument("--budget", type=int, default=300, help="queries of a search with a model; others get 1,000")
    parser.add_argument("--overhead", action="store_true", help="measure ask and tell instead")
    options = parser.parse_args()
    tables = {name: open_table(name, options.data) for name in {TASKS[task][0] for task in options.tasks}}
    if options.overhead:
        print(overhead(tables["nas-bench-201"]))
        return
    lines = options.records.read_text().splitlines() if options.records.exists() else []
    records = [json.loads(line) for line in lines]
    known = {(record["task"], record["method"], record["seed"]) for record in records}
    with options.records.open("a") as stream:
        for task in options.tasks:
            for method in options.methods:
                for seed in range(_seeds(task, method, options.seeds)):
                    if (task, method, seed) in known:
                        continue
                    budget = 1_000 if method in ("random search", "regularised evolution") else options.budget
                    if task == "nas-bench-101" or method == "BANANAS":
                        budget = 150
                    record = search(tables[TASKS[task][0]], task, method, seed, budget)
                    records.append(record)
                    print(json.dumps(record), file=stream, flush=True)
                print(f"{task}, {method}: done", file=sys.stderr)
    optima = {}
    for task in options.tasks:
        name, dataset, metric = TASKS[task]
        optima[task] = float(np.nanmax(tables[name].values(metric, dataset=dataset)))
    print(report([record for record in records if record["task"] in optima], optima))


def _seeds(task: str, method: str, seeds: int) -> int:
    """Return how many seeds a method gets: searches that take long get fewer, and those that say nothing new none."""
    if method == "predictor-guided, drawn candidates" and task == "nas-bench-101":
        return 0  # that is what predictor-guided does there
    if method == "predictor-guided, one-hot features" and task != "cifar10":
        return 0
    if method == "BANANAS":
        return seeds // 10 if task == "cifar10" else 0
    if task == "nas-bench-101" and method == "predictor-guided":
        return seeds // 5
    return seeds


if __name__ == "__main__":
    main()
