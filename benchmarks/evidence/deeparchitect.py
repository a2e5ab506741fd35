"""The four searchers of DeepArchitect on real images, at the size of one CPU core.

The space is tfref_convnet with all widths divided by 8 (2025 networks), trained for a few epochs on the balanced subset
of CIFAR-10 beside the checkout, reduced to 16x16 pixels. Every searcher trains the same number of networks for each
seed; a network that was trained before counts as trained (its result comes from a cache by network and is the same to
the last bit, because all trials share one training seed).

    python benchmarks/evidence/deeparchitect.py --data FOLDER --seeds 4 --models 30
"""

from __future__ import annotations

import argparse
import lzma
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.methods.deeparchitect import Settings, evaluator, strategy
from archsmith.run.statistics import summarise
from archsmith.space import Result, Trial
from archsmith.tasks.augment import Augment
from archsmith.tasks.vision import ImageClassification

SEARCHERS = ("random", "mcts", "mcts-bisected", "smbo")


def cifar10_subset(folder: Path) -> ImageClassification:
    """Return the task of the subset: 2,970 training and 990 validation images of 16x16; the test file is not read."""
    with lzma.open(folder / "train.npy.xz") as stream:
        # Stored as the planes (G, R - G, B - G), differenced along both image axes, modulo 256.
        planes = np.load(stream).cumsum(2, dtype="u1").cumsum(3, dtype="u1")
    images = np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], 1)
    return ImageClassification.from_arrays(
        images,
        np.load(folder / "train_labels.npy"),
        name="cifar10-subset",
        valid_fraction=0.25,
        test_fraction=0.01,
        augment=Augment(crop=2, flip=True),
        resolution=16,
    )


class Table:
    """Trains each network once, with one seed, and remembers what came of it."""

    def __init__(self, trainer: TrainedEvaluator) -> None:
        self.trainer = trainer
        self.known: dict[str, Result] = {}

    def evaluate(self, trial: Trial) -> Result:
        """Return the result of the trial's network."""
        key = trial.architecture.network_digest
        if key not in self.known:
            self.known[key] = self.trainer.evaluate(replace(trial, seed=0))
        return self.known[key]


def rewards(searcher: str, table: Table, seed: int, models: int) -> list[float]:
    """Return the validation accuracy of every network that one search trains, in percent."""
    search, found = strategy(table.trainer.family.space, Settings(searcher=searcher), seed), []  # type: ignore[arg-type]
    for _ in range(models):
        (trial,) = search.ask()
        result = table.evaluate(trial)
        search.tell(trial.id, result)
        found.append(100 * result.metrics.get("valid_accuracy", 0.0))
    return found


def interval(values: Any) -> str:
    """Return mean and 95 % interval."""
    summary = summarise(list(values))
    return f"{summary.mean:.2f} [{summary.low:.2f}, {summary.high:.2f}]"


def main() -> None:
    """Search, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npy.xz and train_labels.npy")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    settings = Settings(space="tfref_convnet", divisor=8, training="none", recipe="cpu")
    trainer = evaluator(cifar10_subset(given.data), settings, epochs=given.epochs, costs=())
    table, found = Table(trainer), {}
    started, cpu = time.perf_counter(), time.process_time()
    for seed in range(given.first, given.first + given.seeds):
        for searcher in SEARCHERS:
            found[searcher, seed] = rewards(searcher, table, seed, given.models)
            of_run, spent = found[searcher, seed], time.process_time() - cpu
            last = np.mean(of_run[-(given.models // 3) :])
            print(f"seed {seed} {searcher}: mean {np.mean(of_run):.2f}, last third {last:.2f}, best {max(of_run):.2f}")
            print(f"    {len(table.known)} networks so far, {spent:.0f} s of CPU", flush=True)
    accuracies = [100 * r.metrics["valid_accuracy"] for r in table.known.values() if r.status == "ok"]
    print(f"\ntorch {torch.__version__}, {platform.processor() or platform.machine()}, one thread")
    print(
        f"{len(table.known)} networks trained, accuracy {min(accuracies):.2f} to {max(accuracies):.2f}, "
        f"mean {np.mean(accuracies):.2f}; "
        f"{time.perf_counter() - started:.0f} s, {time.process_time() - cpu:.0f} s of CPU\n"
    )
    print(
        "| searcher | mean of all | mean of the last third | best | mean minus random, paired |\n|---|---|---|---|---|"
    )
    seeds = range(given.first, given.first + given.seeds)
    for searcher in SEARCHERS:
        runs = [found[searcher, seed] for seed in seeds]
        base = [np.mean(found["random", seed]) for seed in seeds]
        gain = [np.mean(run) - mean for run, mean in zip(runs, base, strict=True)]
        late = [np.mean(run[-(given.models // 3) :]) for run in runs]
        cells = [interval([np.mean(run) for run in runs]), interval(late), interval([max(run) for run in runs])]
        print(f"| {searcher} | {' | '.join(cells)} | {'' if searcher == 'random' else interval(gain)} |")


if __name__ == "__main__":
    main()
