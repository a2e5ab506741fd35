"""The controller of NASNet against random search on NAS-Bench-201: real accuracies, no training here.

The reward is the validation accuracy after 12 epochs on CIFAR-10; at the end the cell of the best reward is looked up
after 200 epochs. Intervals are 95 % over seeds. One core, minutes.

    python benchmarks/evidence/controller_nb201.py --table NPZ --seeds 20 --samples 3000

``NPZ`` is the table as NumPy arrays: ``ops`` (15625, 6) with codes in the order of ``NB201_OPERATIONS``, and columns of
percentages.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Mapping

import numpy as np

from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS, nas_bench_201_space
from archsmith.methods.nasnet import Settings, strategy
from archsmith.run.statistics import summarise
from archsmith.space import Objective, Result
from archsmith.strategies import RegularizedEvolution, Reinforce, Strategy

REWARD, FINAL, TEST = "val_acc_12ep_cifar10", "val_acc_200ep_cifar10", "test_acc_200ep_cifar10"
POINTS = (100, 300, 1000, 3000)


class Rows:
    """The table by architecture."""

    def __init__(self, path: str) -> None:
        with np.load(path) as arrays:
            self.columns = {name: arrays[name].astype(np.float64) for name in (REWARD, FINAL, TEST)}
            weights = len(NB201_OPERATIONS) ** np.arange(6)
            self.row = np.empty(15_625, dtype=np.int64)
            self.row[arrays["ops"].astype(np.int64) @ weights] = np.arange(15_625)
        self.weights = weights

    def find(self, architecture: Mapping[str, object]) -> int:
        """Return the number of the architecture's row."""
        codes = [NB201_OPERATIONS.index(str(architecture[f"edge/{i}-{j}"])) for i, j in NB201_EDGES]
        return int(self.row[int(np.dot(codes, self.weights))])


def search(searcher: Strategy, rows: Rows, samples: int) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Return the reward of every sample, and at each of POINTS the cell of the best reward so far."""
    rewards, best, found = np.empty(samples), -1, []
    for number in range(samples):
        (trial,) = searcher.ask()
        row = rows.find(trial.architecture)
        rewards[number] = rows.columns[REWARD][row]
        searcher.tell(trial.id, Result(metrics={"valid_accuracy": rewards[number] / 100}))
        if best < 0 or rewards[number] > rows.columns[REWARD][best]:
            best = row
        if number + 1 in POINTS:
            found.append({name: column[best] for name, column in rows.columns.items()})
    return rewards, found


METHODS: dict[str, Callable[[int], Strategy]] = {
    "random": lambda seed: strategy(nas_bench_201_space(), Settings(policy="random"), seed),
    "ppo, as published, 1 update": lambda seed: strategy(nas_bench_201_space(), Settings(), seed),
    "ppo, as published, 10 updates": lambda seed: strategy(nas_bench_201_space(), Settings(updates_per_batch=10), seed),
    "reinforce, LSTM": lambda seed: strategy(nas_bench_201_space(), Settings(policy="reinforce"), seed),
    "reinforce, tables": lambda seed: Reinforce(
        nas_bench_201_space(), objectives=[Objective("valid_accuracy")], seed=seed, learning_rate=0.01
    ),
    "regularised evolution": lambda seed: RegularizedEvolution(nas_bench_201_space(), seed=seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    rows = Rows(options.table)
    print(f"{platform.machine()}, numpy {np.__version__}, seeds 0 to {options.seeds - 1}, {options.samples} samples")
    for name, column in rows.columns.items():
        print(
            f"  {name}: largest {column.max():.2f}, mean {column.mean():.2f}; "
            f"cell of the best reward {column[np.argmax(rows.columns[REWARD])]:.2f}"
        )
    for name in options.only:
        start = time.process_time()
        runs = [search(METHODS[name](seed), rows, options.samples) for seed in range(options.seeds)]
        spent = (time.process_time() - start) / options.seeds / options.samples
        print(f"\n{name}  ({spent * 1e3:.2f} ms of processor time for a sample)")
        rewards = np.stack([reward for reward, _ in runs])
        for index, point in enumerate(p for p in POINTS if p <= options.samples):
            recent = summarise(rewards[:, max(0, point - 100) : point].mean(axis=1).tolist())
            line = f"  {point:>5}: mean reward of the last 100 {recent.mean:6.2f} [{recent.low:.2f}, {recent.high:.2f}]"
            for column in (REWARD, FINAL, TEST):
                one = summarise([found[index][column] for _, found in runs])
                line += (
                    f"; {column.split('_')[0]} {column.split('_')[2]} {one.mean:.2f} [{one.low:.2f}, {one.high:.2f}]"
                )
            print(line)


if __name__ == "__main__":
    main()
