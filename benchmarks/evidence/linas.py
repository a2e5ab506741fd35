"""LINAS against NSGA-II, random search and one-shot predictors, by hypervolume after equal numbers of evaluations.

Two landscapes over Once-for-All's MobileNetV3 space, neither of which needs training:

- ``surrogate``: kernel ridge regression through 1,482 real ImageNet evaluations (MACs and top-1), the published
  comparison's black box; reference point 600 MMACs and 70 %.
- ``phone``: the published accuracy predictor and the Note10 latency tables, five image sizes; reference point 70 ms and
  72 %. With ``--data``.

An evaluation is one network measured; both objectives count as measured and are predicted by the searches that predict
(``exact latency`` computes the latency instead). Settings of ``archsmith`` (batch 10, 20 random networks, Gaussian
process, hypervolume) were chosen on a few of the seeds below, so its figures are optimistic by that much; the published
setting was not tuned. One core, resumable: every search is a line of ``--records``.

Run: ``python benchmarks/evidence/linas.py --data DATA`` with DATA the folder that holds ``nas-benchmarks``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from archsmith.evaluate.ofa_predictor import OfaLatency, OfaPredictor, OfaPredictorEvaluator
from archsmith.evaluate.surrogate import KernelSurrogate
from archsmith.families.ofa_mobile_space import from_genes, ofa_mobile_space
from archsmith.predictors import Predictor
from archsmith.predictors.tuned import ridge_model
from archsmith.space import Architecture, Objective, ProductSpace, Result
from archsmith.space.hypervolume import hypervolume
from archsmith.strategies import Evolution, MeasureRefitSearch, Nsga2, RandomSearch, Strategy, linas

ROWS = Path(__file__).parents[2] / "tests" / "golden" / "hw-aware-system.json"

MARKS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1_000, 1_200, 1_600, 2_000)
COMPARED = (100, 150, 200, 250)
FACTORS = (2, 4, 8)


@dataclass(frozen=True)
class Landscape:
    """Where searches are compared.

    Attributes:
        space: The space.
        objectives: A cost that is minimised and the accuracy, with their references.
        measure: Returns both of several architectures, shape (N, 2).
        cost: Computes the cost alone.
    """

    space: ProductSpace
    objectives: tuple[Objective, Objective]
    measure: Callable[[Sequence[Architecture]], np.ndarray]
    cost: Callable[[Sequence[Architecture]], np.ndarray]


def surrogate() -> Landscape:
    """Return the published black box."""
    space, architectures = ofa_mobile_space(), []
    macs, top1 = [], []
    for row in json.loads(ROWS.read_text(encoding="utf-8"))["rows"]:
        *genes, _, cost, accuracy = row.split()
        architectures.append(space.validate(from_genes(*([int(digit) for digit in part] for part in genes))))
        macs.append(int(cost) / 1e6)
        top1.append(float(accuracy))
    box = KernelSurrogate(space, architectures, {"macs": macs, "valid_accuracy": top1})
    objectives = (Objective("macs", "minimize", 600.0), Objective("valid_accuracy", "maximize", 70.0))
    return Landscape(space, objectives, box.values, lambda rows: box.values(rows)[:, 0])


def phone(folder: Path) -> Landscape:
    """Return the published accuracy predictor with the phone's latency tables."""
    latency = OfaLatency(folder)
    known = OfaPredictorEvaluator(OfaPredictor(folder), latency)

    def cost(architectures: Sequence[Architecture]) -> np.ndarray:
        return np.array([latency.milliseconds(architecture) for architecture in architectures])

    objectives = (Objective("latency", "minimize", 70.0), Objective("valid_accuracy", "maximize", 72.0))
    return Landscape(known.space, objectives, lambda rows: np.stack([cost(rows), known.accuracy(rows)], axis=1), cost)


class PlainRidge(Predictor):
    """Ridge of penalty 1 with an unpenalised intercept: the predictor of the published comparison."""

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        self._model = ridge_model(features, targets, 1.0)

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._model(features), np.zeros(len(features))


def searches(where: Landscape) -> dict[str, tuple[int, Callable[[int], Strategy]]]:
    """Return, by name, how many evaluations a search gets and what makes it from a seed."""
    space, given = where.space, {"objectives": where.objectives}
    exact = {where.objectives[0].metric: where.cost}

    def one_shot(evaluations: int) -> Callable[[int], Strategy]:
        """All but 50 evaluations are random and train the predictors once; 50 validate the front they promise."""
        return lambda seed: linas(space, seed=seed, evaluations=5_000, initial=evaluations - 50, **given)

    return {
        "random": (2_000, lambda seed: RandomSearch(space, seed=seed, objectives=where.objectives[1:])),
        # Each of the 45 genes is resampled among three with probability 1/45: 0.63 is the chance that some gene moves.
        "NSGA-II": (
            2_000,
            lambda seed: Nsga2(space, seed=seed, crossover_probability=0.9, mutation_probability=0.63, **given),
        ),
        **{f"one-shot predictor, {n}": (n, one_shot(n)) for n in COMPARED},
        "LINAS, ridge": (
            500,
            lambda seed: linas(
                space, seed=seed, evaluations=5_000, predictor=lambda own: PlainRidge(seed=own), **given
            ),
        ),
        "LINAS, ridge or SVR": (250, lambda seed: linas(space, seed=seed, evaluations=5_000, **given)),
        "LINAS, P = 10, hypervolume": (
            250,
            lambda seed: MeasureRefitSearch(
                space, seed=seed, initial=20, predictor=lambda own: PlainRidge(seed=own), **given
            ),
        ),
        "archsmith": (250, lambda seed: MeasureRefitSearch(space, seed=seed, initial=20, **given)),
        "archsmith, exact cost": (
            250,
            lambda seed: MeasureRefitSearch(
                space, seed=seed, initial=20, exact=exact, inner=Evolution(evaluations=5_000), **given
            ),
        ),
    }


def searched(where: Landscape, strategy: Strategy, evaluations: int) -> dict[int, float]:
    """Return the hypervolume after each mark."""
    cost, accuracy = where.objectives
    losses: list[tuple[float, float]] = []
    found = {}
    while len(losses) < evaluations:
        trials = strategy.ask(min(50, evaluations - len(losses)))
        measured = where.measure([trial.architecture for trial in trials]).tolist()
        for trial, (spent, top1) in zip(trials, measured, strict=True):
            strategy.tell(trial.id, Result(metrics={"valid_accuracy": top1}, costs={cost.metric: spent}))
            losses.append((spent, -top1))
            if len(losses) in MARKS:
                assert cost.reference is not None and accuracy.reference is not None
                found[len(losses)] = hypervolume(np.array(losses), (cost.reference, -accuracy.reference)).value
    return found


def main() -> None:
    """Run what the records lack, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ARCHSMITH_DATA"), help="folder of the real data")
    parser.add_argument("--records", type=Path, default=Path("runs/linas.jsonl"), help="searches that were run")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    landscapes = {"surrogate": surrogate()}
    if options.data is not None:
        landscapes["phone"] = phone(Path(options.data) / "nas-benchmarks")
    options.records.parent.mkdir(parents=True, exist_ok=True)
    lines = options.records.read_text(encoding="utf-8").splitlines() if options.records.exists() else []
    known = {(row["where"], row["search"], row["seed"]): row for row in map(json.loads, lines)}
    for seed in range(options.seeds):
        for place, where in landscapes.items():
            for name, (evaluations, make) in searches(where).items():
                if (place, name, seed) in known:
                    continue
                started = time.process_time()
                values = searched(where, make(seed), evaluations)
                row = {"where": place, "search": name, "seed": seed, "values": {str(k): v for k, v in values.items()}}
                row["seconds"] = time.process_time() - started
                known[place, name, seed] = row
                with open(options.records, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(f"{place} {name} seed {seed}: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
    for place, where in landscapes.items():
        rows = {name: [known[place, name, seed] for seed in range(options.seeds)] for name in searches(where)}
        print_tables(place, rows)


def print_tables(place: str, rows: dict[str, list[dict]]) -> None:
    """Print mean hypervolumes, wins over NSGA-II with more evaluations, and evaluations to equal values."""
    shown = (50, 100, 150, 200, 250, 500, 1_000, 2_000)
    values = {name: {mark: column(runs, mark) for mark in MARKS} for name, runs in rows.items()}
    print(f"\n**{place}**: mean hypervolume ± standard error, {len(next(iter(rows.values())))} seeds\n")
    print("| search | " + " | ".join(map(str, shown)) + " | CPU s |")
    print("|---|" + "---|" * (len(shown) + 1))
    for name, runs in rows.items():
        cells = [
            f"{c.mean():.1f} ± {c.std(ddof=1) / len(c) ** 0.5:.1f}" if len(c := values[name][m]) else "-" for m in shown
        ]
        print(f"| {name} | " + " | ".join(cells) + f" | {np.mean([run['seconds'] for run in runs]):.1f} |")
    print("\nSeeds in which n evaluations are ahead of NSGA-II with 2n / 4n / 8n\n")
    print("| search | " + " | ".join(f"n = {n}" for n in COMPARED) + " |\n|---|" + "---|" * len(COMPARED))
    base = values["NSGA-II"]
    for name in rows:
        if name in ("NSGA-II", "random"):
            continue
        cells = []
        for n in COMPARED:
            own = values[name][n]
            wins = [str(int((own >= base[f * n]).sum())) for f in FACTORS] if len(own) and last(name, n) else ["-"]
            cells.append(" / ".join(wins))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nEvaluations until the mean hypervolume of the first column's search is reached (between marks: linear)\n")
    print("| of | n | NSGA-II | random | times fewer than NSGA-II |\n|---|---|---|---|---|")
    for name in ("LINAS, ridge", "LINAS, ridge or SVR", "LINAS, P = 10, hypervolume", "archsmith"):
        for n in (100, 250):
            goal = float(values[name][n].mean())
            needed = {other: reached(values[other], goal) for other in ("NSGA-II", "random")}
            texts = {k: "> 2000" if v is None else f"{v:.0f}" for k, v in needed.items()}
            ratio = needed["NSGA-II"]
            factor = f"more than {2_000 / n:.0f}" if ratio is None else f"{ratio / n:.1f}"
            print(f"| {name} | {n} | {texts['NSGA-II']} | {texts['random']} | {factor} |")


def last(name: str, n: int) -> bool:
    """Return whether a search is shown at n: the one-shot predictors each have one number of evaluations."""
    return not name.startswith("one-shot") or name.endswith(f", {n}")


def column(runs: Sequence[dict], mark: int) -> np.ndarray:
    """Return the hypervolumes of all seeds after a mark, empty where the search is shorter."""
    return np.array([run["values"][str(mark)] for run in runs if str(mark) in run["values"]])


def reached(values: dict[int, np.ndarray], goal: float) -> float | None:
    """Return after how many evaluations the mean reaches a goal; None if it never does."""
    before = (0, 0.0)
    for mark, column_ in values.items():
        if not len(column_):
            continue
        mean = float(column_.mean())
        if mean >= goal:
            return before[0] + (mark - before[0]) * (goal - before[1]) / (mean - before[1])
        before = (mark, mean)
    return None


if __name__ == "__main__":
    main()
