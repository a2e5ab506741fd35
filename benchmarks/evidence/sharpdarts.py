"""What the parts of sharpDARTS do on small real images: Max-W against softmax, in cells and in a grid; learning rates.

Three parts, each over seeds, with 95 % intervals (t distribution):

- ``cells``: a search over the eight names of DARTS with sharp operations, once by softmax and once by Max-W; prints the
  mean probability of ``none`` in the normal cell, the parameters of what is derived, and its weightless operations.
- ``grid``: a search of the HyperCuboid by either; the derived paths, a path made by hand (convolution, then pooling to
  twice the width) and random paths are trained alike; prints their test accuracies and sizes.
- ``schedule``: one chain, trained by a cosine and by cosine power annealing of powers 2 and 10.

Every finished seed is kept: type the same command again to go on; ``--read`` only prints.

Run: ``python benchmarks/evidence/sharpdarts.py cells --data CIFAR10.npz --out runs/evidence-sharpdarts``; the file has
``x_train``, ``y_train``, ``x_test``, ``y_test``, images (N, 3, 32, 32) of bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archsmith.core.files import write_json
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.families.darts import open_family as open_darts_family
from archsmith.families.hypercuboid import HyperCuboidFamily
from archsmith.methods import sharpdarts
from archsmith.space import Architecture
from archsmith.supernet.relaxed import batch_statistics
from archsmith.tasks.vision import ImageClassification
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.schedules import cosine_power

SEARCH = {"search_batch_size": 32, "search_lr": 0.05, "search_lr_warmup": 1, "logit_lr": 0.01, "auxiliary_weight": 0.0}
RANDOM_PATHS = 3


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def task_of(file: Path, images: int) -> ImageClassification:
    """Return the images pooled to 16x16, the first ``images`` of the training part, shuffled once."""
    arrays = np.load(file)
    chosen = np.random.default_rng(0).permutation(len(arrays["y_train"]))[:images]

    def pooled(x: np.ndarray) -> np.ndarray:
        return (x.reshape(len(x), 3, 16, 2, 16, 2).mean((3, 5)) / 255).astype("f4")

    train, labels = pooled(arrays["x_train"][chosen]), arrays["y_train"][chosen].astype("i8")
    test, test_labels = pooled(arrays["x_test"]), arrays["y_test"].astype("i8")
    return ImageClassification.from_arrays(
        train, labels, x_test=test, y_test=test_labels, name="cifar10-16", valid_fraction=0.1
    )


def searched(family: Any, task: ImageClassification, seed: int, epochs: int, *, max_w: bool) -> dict[str, Any]:
    """Return the last figures of a search, and what it derived."""
    settings = sharpdarts.Settings(
        **SEARCH, search_epochs=epochs, search_channels=4, search_cells=3, epochs=1, lr_warmup=0, max_w=max_w
    )
    started = time.process_time()
    searcher = sharpdarts.Searcher(family=family, task=task, settings=settings, seed=seed)
    figures: dict[str, Any] = {}
    while searcher.chosen is None:
        epoch = searcher.advance(Silent())
        assert epoch is not None
        figures = epoch
    return {
        "chosen": dict(searcher.chosen.decisions),
        "probabilities": figures["probabilities"],
        "entropy": figures["entropy"],
        "weightless": figures["weightless"],
        "costs": searcher.family.exact_costs(searcher.chosen),
        **searcher.figures,
        "cpu_seconds": time.process_time() - started,
    }


def of_cells(seed: int, task: ImageClassification, epochs: int) -> dict[str, Any]:
    """Search cells by softmax and by Max-W."""
    family = open_darts_family(
        "sharpdarts", image=task.input_shape, num_classes=10, channels=8, cells=5, nodes=2, operations="darts"
    )
    result: dict[str, Any] = {"seed": seed}
    for name, max_w in (("softmax", False), ("max-w", True)):
        found = searched(family, task, seed, epochs, max_w=max_w)
        found["none"] = statistics.mean(row[0] for row in found.pop("probabilities")["normal"])
        result[name] = found
    return result


def trained(
    family: HyperCuboidFamily, path: Architecture, task: ImageClassification, rates: tuple[float, ...], seed: int
) -> float:
    """Train a chain and return its test accuracy in percent, by batch statistics."""
    network = family.build(path, seed=seed_of(seed, "weights"))
    optimizer = torch.optim.SGD(network.parameters(), rates[0], 0.9, weight_decay=3e-4)
    position = Position()
    while position.epoch < len(rates):
        rate = rates[position.epoch]
        hooks = LoopHooks(rate=lambda step, rate=rate: rate)  # type: ignore[misc]
        train_epoch(network, optimizer, task, position, hooks, batch_size=32, seed=seed)
        next_epoch(position)
    network.eval()
    with batch_statistics(network):
        return 100 * float(task.evaluate(network, "test", batch_size=250)["accuracy"])


def grid_of(task: ImageClassification) -> HyperCuboidFamily:
    """Return the grid of the demonstration: two stages, three widths."""
    return HyperCuboidFamily(image=task.input_shape, num_classes=10, widths=(8, 16, 32), stages=2, filters=64)


def handmade(family: HyperCuboidFamily) -> Architecture:
    """Return the path that people would draw: convolutions, and poolings that double the width."""
    first, second, third = family.widths
    chain = ((first, "sep_conv_3x3"), (second, "max_pool_3x3"), (second, "sep_conv_3x3"), (third, "max_pool_3x3"))
    decisions: dict[str, Any] = {"stem/width": first}
    for step, (width, operation) in enumerate(chain, 1):
        decisions.update({f"{step}/operation": operation, f"{step}/width": width})
    return family.space.validate(decisions)


def of_grid(seed: int, task: ImageClassification, epochs: int) -> dict[str, Any]:
    """Search the grid by softmax and by Max-W; train what they derive, a path made by hand and random ones."""
    family = grid_of(task)
    paths = {"by hand": handmade(family)}
    result: dict[str, Any] = {"seed": seed, "paths": {}}
    for name, max_w in (("softmax", False), ("max-w", True)):
        found = searched(family, task, seed, epochs, max_w=max_w)
        found.pop("probabilities")
        result[name] = found
        paths[name] = family.space.validate(found["chosen"])
    for number in range(RANDOM_PATHS):
        paths[f"random {number + 1}"] = family.space.sample(numpy_stream(seed, "random-path", number))
    rates = cosine_power(epochs, peak=0.05, power=2, warmup=1)
    for name, path in paths.items():
        accuracy = trained(family, path, task, rates, seed)
        result["paths"][name] = {"accuracy": accuracy, "chosen": dict(path.decisions), **family.exact_costs(path)}
    return result


def of_schedule(seed: int, task: ImageClassification, epochs: int) -> dict[str, Any]:
    """Train the path made by hand by three learning rates."""
    family = grid_of(task)
    return {
        "seed": seed,
        **{
            f"power {power}": trained(
                family, handmade(family), task, cosine_power(epochs, peak=0.05, power=power, warmup=1), seed
            )
            for power in (1, 2, 10)
        },
    }


def interval(values: list[float]) -> str:
    """Return mean and half width of the 95 % interval of the mean (t distribution)."""
    from scipy.stats import t

    half = float("nan")
    if len(values) > 1:
        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4g} ± {half:.2g}"


def shown(part: str, results: list[dict[str, Any]]) -> str:
    """Return what a part found, as lines."""
    lines = [f"{part}: {len(results)} seeds {[r['seed'] for r in results]}"]
    if part == "cells":
        for name, value in (
            ("none, mean probability in the normal cell", lambda r: r["none"]),
            ("entropy of the normal cell, nats", lambda r: r["entropy"]["normal"]),
            ("parameters of the derived network", lambda r: float(r["costs"]["params"])),
            ("weightless operations of 8", lambda r: float(sum(r["weightless"].values()))),
            ("discretisation gap", lambda r: r["discretisation_gap"]),
        ):
            found = {kind: [value(r[kind]) for r in results] for kind in ("softmax", "max-w")}
            apart = [b - a for a, b in zip(*found.values(), strict=True)]
            lines.append(f"{name}: " + ", ".join(f"{kind} {interval(v)}" for kind, v in found.items()))
            lines.append(f"  max-w - softmax by seed: {interval(apart)}")
    elif part == "grid":
        for kind in ("softmax", "max-w", "by hand", "random"):
            rows = [
                statistics.mean(path["accuracy"] for name, path in r["paths"].items() if name.startswith(kind))
                for r in results
            ]
            macs = [path["macs"] / 1e6 for r in results for n, path in r["paths"].items() if n.startswith(kind)]
            params = [path["params"] for r in results for n, path in r["paths"].items() if n.startswith(kind)]
            sizes = f"{statistics.mean(macs):.2f} M MACs, {statistics.mean(params):,.0f} parameters"
            lines.append(f"{kind}: {interval(rows)} % ({', '.join(f'{a:.1f}' for a in rows)}); {sizes}")
        for kind in ("softmax", "max-w"):
            lines.append(f"{kind}: entropy {interval([r[kind]['entropy']['grid'] for r in results])} nats of a row")
    else:
        for power in ("power 1", "power 2", "power 10"):
            rows = [r[power] for r in results]
            apart = [r[power] - r["power 1"] for r in results]
            lines.append(f"{power}: {interval(rows)} %; less the cosine, by seed: {interval(apart)}")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("part", choices=("cells", "grid", "schedule"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--read", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = {"cells": of_cells, "grid": of_grid, "schedule": of_schedule}[given.part]
    name = f"{given.part}-{given.images}-{given.epochs}"
    if not given.read:
        task = task_of(given.data, given.images)
        for seed in range(given.seeds):
            file = given.out / f"{name}-{seed}.json"
            if not file.exists():
                started = time.process_time()
                found = run(seed, task, given.epochs)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {**found, "total_cpu_seconds": time.process_time() - started})
                print(f"{file.name}: {time.process_time() - started:.0f} s of CPU", flush=True)
    files = (given.out / f"{name}-{seed}.json" for seed in range(given.seeds))
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    if results:
        print(shown(given.part, results))


if __name__ == "__main__":
    main()
