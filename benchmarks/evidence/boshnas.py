"""BOSHNAS against random search, evolution and a Gaussian process, on 500 encoders that were really trained.

    python benchmarks/evidence/boshnas.py --table <folder> --seeds 10 --queries 60

Counts the evaluations until a network of the best percent is found, and the regret on the way. All searches choose
among the same rows; equal rows are one network with their first score.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from archsmith.evaluate.tables import TableEvaluator, open_table
from archsmith.families.flexibert_graph import encoder_graph, label_order
from archsmith.families.flexibert_space import nas_bench_bert
from archsmith.predictors.graph_embedding import learned_embedding, library_distances
from archsmith.space import Architecture, Objective, Result, Trial
from archsmith.space.labelled_graph import edit_bound
from archsmith.strategies.base import Strategy
from archsmith.strategies.boshnas import Boshnas
from archsmith.strategies.candidates import CandidatePool
from archsmith.strategies.predictor_guided import PredictorGuided

CHECKPOINTS = (20, 40, 60)


def curve(strategy: Strategy, evaluate: Callable[[Trial], Result], queries: int) -> np.ndarray:
    """Return the best score after each evaluation."""
    best: list[float] = []
    scores = TableEvaluatorScore(strategy, evaluate)
    while len(best) < queries:
        best.append(max(scores.step(), best[-1] if best else -np.inf))
    return np.array(best)


class TableEvaluatorScore:
    """Asks one trial, tells its result, returns its score."""

    def __init__(self, strategy: Strategy, evaluate: Callable[[Trial], Result]) -> None:
        self.strategy, self.evaluate = strategy, evaluate

    def step(self) -> float:
        """Return the score of one more trial."""
        (trial,) = self.strategy.ask()
        result = self.evaluate(trial)
        self.strategy.tell(trial.id, result)
        return float(result.metrics["score"])


def random_curve(scores: np.ndarray, queries: int, seed: int) -> np.ndarray:
    """Return the best score of random rows without repetition."""
    return np.maximum.accumulate(scores[np.random.default_rng(seed).permutation(len(scores))[:queries]])


def evolution_curve(rows: np.ndarray, scores: np.ndarray, queries: int, seed: int) -> np.ndarray:
    """Return the best score of regularised evolution among the rows: a child is the new row nearest to its parent.

    Most mutations of a row have no row of their own: hence the nearest one that is new, equal ones by chance.
    Ten parents at the start, the oldest of thirty dies, tournaments of ten.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(scores))[:10].tolist()
    while len(order) < queries:
        alive = order[-30:]
        parent = max((alive[i] for i in rng.integers(len(alive), size=10)), key=lambda row: scores[row])
        distance = np.abs(rows - rows[parent]).sum(axis=1) + rng.random(len(rows)) * 0.9
        distance[order] = np.inf
        order.append(int(distance.argmin()))
    return np.maximum.accumulate(scores[order])


def interval(values: np.ndarray) -> str:
    """Return a mean with its normal 95 % interval."""
    return f"{values.mean():.2f} +- {1.96 * values.std(ddof=1) / len(values) ** 0.5:.2f}"


def main() -> None:
    """Run all searches and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--queries", type=int, default=60)
    arguments = parser.parse_args()
    table, settings = open_table("flexibert-500", arguments.table), nas_bench_bert()
    unique: dict[str, Architecture] = {}
    for row in range(len(table)):
        architecture = table.architecture(row)
        unique.setdefault(architecture.digest, architecture)
    networks = list(unique.values())
    score = table.values("score")
    scores = np.array([score[table.row(each)] for each in networks])
    evaluator, objective = TableEvaluator(table), Objective("score")
    started = time.perf_counter()
    graphs = [encoder_graph(settings.layers(each)) for each in networks]
    distances = library_distances(graphs, partial(edit_bound, order=label_order(settings)))
    rows = learned_embedding(distances, epochs=100, batch_size=512, learning_rate=0.01)
    print(f"{len(networks)} networks; distances and embedding {time.perf_counter() - started:.0f} s", flush=True)
    places = {each.digest: number for number, each in enumerate(networks)}
    embedded = CandidatePool(networks, lambda each: rows[places[each.digest]])
    one_hot = CandidatePool(networks, lambda each: settings.space().encode(each, "one-hot"))
    space, common = settings.space(), {"objectives": (objective,)}
    makers: dict[str, Callable[[int], Strategy]] = {
        "BOSHNAS, edit-distance embedding": lambda seed: Boshnas(space, pool=embedded, seed=seed, **common),
        "BOSHNAS, one-hot": lambda seed: Boshnas(space, pool=one_hot, seed=seed, **common),
        "GP-BO, edit-distance embedding": lambda seed: PredictorGuided(space, pool=embedded, seed=seed, **common),
        "GP-BO, one-hot": lambda seed: PredictorGuided(space, pool=one_hot, seed=seed, **common),
    }
    top = np.sort(scores)[-max(1, round(0.01 * len(scores)))]
    found: dict[str, list[np.ndarray]] = {"random": [], "evolution": []} | {name: [] for name in makers}
    spent = dict.fromkeys(found, 0.0)
    for seed in range(arguments.seeds):
        found["random"].append(random_curve(scores, arguments.queries, seed))
        found["evolution"].append(evolution_curve(one_hot.features_MD, scores, arguments.queries, seed))
        for name, make in makers.items():
            started = time.perf_counter()
            found[name].append(curve(make(seed), evaluator.evaluate, arguments.queries))
            spent[name] += time.perf_counter() - started
        print(f"seed {seed} done", flush=True)
    header = " | ".join(f"regret at {n}" for n in CHECKPOINTS if n <= arguments.queries)
    print(
        f"\n| search | evaluations to the top 1 % (censored at {arguments.queries}) | found | {header} | s per search |"
    )
    print("|---|---|---|" + "---|" * (header.count("|") + 2))
    for name, curves in found.items():
        best = np.stack(curves)
        hit = best >= top
        first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, arguments.queries).astype(float)
        regrets = " | ".join(interval(scores.max() - best[:, n - 1]) for n in CHECKPOINTS if n <= arguments.queries)
        share = f"{int(hit.any(axis=1).sum())} of {len(best)}"
        print(f"| {name} | {interval(first)} | {share} | {regrets} | {spent[name] / len(best):.1f} |")


if __name__ == "__main__":
    main()
