"""Every differentiable search on the NAS-Bench-201 cell, judged by the real table, against random search.

Each method searches the cell in a network of C = 4 channels and N = 1 cell a stage on a CIFAR-10 subset (4,000 images
of 32x32, of which 3,000 train and 1,000 validate; searches that need two parts halve the 3,000). What it derives is
looked up in the table: the mean test accuracy on CIFAR-10 of that cell trained for 200 epochs at full size. Nothing of
the table is used before that, and no setting was chosen by it: all methods have their published settings for the small
recipe (``TINY``), the same number of epochs, and one thread.

Random search of the same seed trains sampled cells at the same size for ``--random-epochs`` epochs on all 3,000 images,
one after another, until it has taken the processor time of the method's search, and keeps the best by validation
accuracy. One random run for each seed, as long as the longest search, is cut where each method's time ends.

Every finished (method, seed) is kept in ``--out``: type the same command again to go on; ``--read`` only prints.

Run: ``python benchmarks/evidence/differentiable_nb201.py --data CIFAR10_SUBSET --table NPZ --out runs/evidence-nb201``
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archsmith.core.files import write_json
from archsmith.core.rng import numpy_stream
from archsmith.evaluate.tables import Table, open_table
from archsmith.families.cell_spaces import cell_from_string, cell_string
from archsmith.families.cells import NasBench201Family
from archsmith.methods import load_method
from archsmith.run.intervals import mean_interval
from archsmith.run.relaxed_settings import TINY
from archsmith.tasks.vision import ImageClassification
from archsmith.train.recipe import Training, TrainingRecipe

CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DARTS, first order": ("darts", {"order": "first"}),
    "DARTS, second order": ("darts", {"order": "second"}),
    "PC-DARTS": ("pc-darts", {}),
    "sharpDARTS": ("sharpdarts", {}),
    "SD-DARTS": ("sd-darts", {}),
    "RARTS": ("rarts", {}),
    "DARTS-PT": ("darts-pt", {}),
    "DARTS-PT, fixed logits": ("darts-pt", {"fixed_alpha": True}),
    "ProxylessNAS": ("proxylessnas", {"warmup_epochs": 5, "search_batch_size": 64}),
    "ST-NAS": ("st-nas", {"warmup_epochs": 5}),
    "DARTS with gradient noise": ("darts", {"order": "first", "gradient_noise": 0.01}),
}
"""Name to method and the settings that differ from its small recipe."""

RANDOM = "random"


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def subset(folder: Path) -> ImageClassification:
    """Return the task of the subset: 3,000 training and 1,000 validation images; its test file is not read."""
    with lzma.open(folder / "train.npy.xz") as stream:
        # Stored as the planes (G, R - G, B - G), differenced along both image axes, modulo 256.
        planes = np.load(stream).cumsum(2, dtype="u1").cumsum(3, dtype="u1")
    images = np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], 1)
    labels = np.load(folder / "train_labels.npy")
    order = np.argsort(labels, kind="stable").reshape(10, -1)
    valid, train = order[:, :100].ravel(), order[:, 100:].ravel()
    return ImageClassification.from_arrays(
        images[train],
        labels[train],
        x_valid=images[valid],
        y_valid=labels[valid],
        x_test=images[valid[:10]],
        y_test=labels[valid[:10]],
        name="cifar10-subset-32",
    )


def searched(name: str, task: ImageClassification, family: NasBench201Family, epochs: int, seed: int) -> dict[str, Any]:
    """Run the search part of a method; return its cell, processor seconds and figures."""
    slug, changes = CONTENDERS[name]
    _, module = load_method(slug)
    recipe = {**module.preset_settings((3, 16, 16)), "search_epochs": epochs, "epochs": 2}
    settings = module.Settings(**{**recipe, **changes})
    begun, wall = time.process_time(), time.perf_counter()
    searcher = module.Searcher(family=family, task=task, settings=settings, seed=seed, memory_format="channels_last")
    last: dict[str, Any] = {}
    entropies = []
    while searcher.chosen is None:
        last = searcher.advance(Silent())
        entropies.append(last["entropy"])
    cell = searcher.chosen
    return {
        "cell": cell_string(cell),
        "seconds": time.process_time() - begun,
        "wall": time.perf_counter() - wall,
        "entropy": [entropies[0], entropies[-1]],
        "epochs": len(entropies),
        "figures": searcher.figures,
        "settings": settings.model_dump(mode="json"),
    }


def random_search(
    task: ImageClassification, family: NasBench201Family, seconds: float, epochs: int, seed: int, known: list[Any]
) -> list[dict[str, Any]]:
    """Train sampled cells one after another until ``seconds`` are over; return cell, validation accuracy, time."""
    rng = numpy_stream(seed, "random-cells")
    recipe = TrainingRecipe(epochs=epochs, batch_size=64, lr=0.05, schedule="cosine", weight_decay=3e-4)
    rows: list[dict[str, Any]] = []
    total = 0.0
    while total < seconds:
        cell = family.space.sample(rng)
        if len(rows) < len(known):
            rows.append(known[len(rows)])
        else:
            begun = time.process_time()
            network = family.build(cell, seed=seed * 10_000 + len(rows))
            training = Training(network, task, recipe, seed=seed)
            training.run(epochs)
            found = float(training.finish()["accuracy"])
            rows.append({"cell": cell_string(cell), "valid": found, "seconds": time.process_time() - begun})
        total += rows[-1]["seconds"]
    return rows


def best_within(rows: list[dict[str, Any]], seconds: float) -> tuple[str, int]:
    """Return the best cell by validation among those that were trained within the time, and how many were."""
    within, total = [], 0.0
    for row in rows:
        total += row["seconds"]
        if total > seconds and within:
            break
        within.append(row)
    return max(within, key=lambda row: row["valid"])["cell"], len(within)


def accuracy(table: Table, cell: str) -> float:
    """Return the test accuracy of a cell in percent, full size, 200 epochs."""
    row = table.row(cell_from_string(cell))
    assert row is not None
    return float(table.values("test_accuracy", dataset="cifar10")[row])


def shown(values: list[float]) -> str:
    """Return mean and half the 95 % interval (t distribution)."""
    if len(values) < 2:
        return " ".join(f"{value:.2f}" for value in values)
    mean, low, _ = mean_interval(values) or (float("nan"),) * 3
    return f"{mean:.2f} ± {mean - low:.2f}"


def report(results: dict[str, dict[int, Any]], table: Table) -> None:
    """Print the comparison."""
    every = table.values("test_accuracy", dataset="cifar10")
    print(
        f"\nAll {len(every)} cells: mean {every.mean():.2f} %, median {np.median(every):.2f}, best {every.max():.2f}.\n"
    )
    print(
        "| method | seeds | table test accuracy, % | each | random, same time | networks | minus random, paired |",
        end="",
    )
    print(" weightless operations of 6 | supernet / path, % | processor s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in CONTENDERS:
        runs = results.get(name, {})
        if not runs:
            continue
        ours, others, networks, free, gaps = [], [], [], [], []
        for seed, run in sorted(runs.items()):
            ours.append(accuracy(table, run["cell"]))
            cell, count = best_within(results[RANDOM][seed], run["seconds"])
            others.append(accuracy(table, cell))
            networks.append(count)
            free.append(sum(run["cell"].count(part) for part in ("none", "skip", "avg_pool")))
            gaps.append((run["figures"]["supernet_accuracy"], run["figures"]["selected_path_accuracy"]))
        paired = [a - b for a, b in zip(ours, others, strict=True)]
        gap = " / ".join(f"{100 * statistics.fmean(column):.1f}" for column in zip(*gaps, strict=True))
        print(
            f"| {name} | {len(ours)} | {shown(ours)} | {', '.join(f'{value:.2f}' for value in ours)} | "
            f"{shown(others)} | "
            f"{statistics.fmean(networks):.1f} | {shown(paired)} | {', '.join(map(str, free))} | {gap} | "
            f"{statistics.fmean(run['seconds'] for run in runs.values()):.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the CIFAR-10 subset")
    parser.add_argument("--table", type=Path, required=True, help="the NAS-Bench-201 table")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=TINY["search_epochs"])
    parser.add_argument("--random-epochs", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="names of contenders")
    parser.add_argument("--no-random", action="store_true", help="leave random search to another call")
    parser.add_argument("--read", action="store_true", help="only print what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    task = subset(given.data)
    family = NasBench201Family(image=(3, 32, 32), num_classes=10, channels=4, cells=1)
    results: dict[str, dict[int, Any]] = {}

    def file_of(name: str, seed: int) -> Path:
        return Path(given.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json")

    for seed in range(given.seeds):
        for name in [*CONTENDERS, RANDOM]:
            file = file_of(name, seed)
            known = json.loads(file.read_text()) if file.exists() else None
            if (
                not (given.read or given.no_random)
                and name == RANDOM
                and seed in results.get(next(iter(results), ""), {})
            ):
                needed = max(runs[seed]["seconds"] for runs in results.values() if seed in runs)
                known = random_search(task, family, needed, given.random_epochs, seed, known or [])
                write_json(file, known)
            elif not given.read and known is None and name in given.only:
                known = searched(name, task, family, given.epochs, seed)
                write_json(file, known)
                print(f"{name}, seed {seed}: {known['cell']} in {known['seconds']:.0f} s", flush=True)
            if known is not None:
                results.setdefault(name, {})[seed] = known
    if all(seed in results.get(RANDOM, {}) for runs in results.values() for seed in runs):
        report(results, open_table("nas-bench-201", given.table))


if __name__ == "__main__":
    main()
