"""BigNAS on small real images: calibration, the sandwich step, and whether shared weights rank children.

The subset of CIFAR-10 (2,000 training and 2,000 scored images of 16x16: the rest of the training file and the test
file), a small space, one core. For each seed two supernets are trained with equally many passes: by the published step
(the largest child by labels, two random ones and the smallest by its predictions), and by four random children and
their labels. Children are scored with statistics of their own unless said otherwise. Printed:

(a) random children of the first supernet with statistics of their own, with those of the largest child, and with those
    that training leaves (none);
(b) the smallest and the largest child of both supernets;
(c) Spearman's correlation between children inside the supernet and the same networks trained alone, from their own
    initial weights, for as many epochs; and the time of a step relative to the largest child's alone.

Without ``--data`` only (a) and (b), on the bundled digits (8x8 pixels), by the recipe of the command line.

Run: ``OMP_NUM_THREADS=1 python benchmarks/evidence/bignas.py --data CIFAR`` (the folder with train.npy.xz)
"""

from __future__ import annotations

import argparse
import lzma
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.core.rng import seed_of
from archsmith.families.bignas import BigNasFamily, bignas_family
from archsmith.methods.bignas import Searcher, Settings, preset_settings
from archsmith.run.intervals import mean_interval
from archsmith.space import Architecture
from archsmith.supernet.sampling import Uniform
from archsmith.tasks import open_task
from archsmith.tasks.augment import Augment
from archsmith.tasks.vision import ImageClassification
from archsmith.train.calibration import calibrate_
from archsmith.train.children import decayed_weights
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch

STAGES = (
    ((8, 16), (1, 2), (3,), (1,), 1, True),
    ((16, 24), (1, 2), (3, 5), (2, 4), 2, True),
    ((24, 32), (1, 2), (3, 5), (2, 4), 2, True),
)
CHILDREN = 8
"""Compared with networks trained alone: the two ends and random ones."""


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def subset(folder: Path, images: int) -> ImageClassification:
    """Return the task; "valid" are all images that are not learned from."""
    parts = []
    for part in ("train", "test"):
        with lzma.open(folder / f"{part}.npy.xz") as stream:
            # Stored as the planes (G, R - G, B - G), differenced along both image axes, modulo 256.
            planes = np.load(stream).cumsum(2, dtype="u1").cumsum(3, dtype="u1")
        parts.append(np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], 1))
    labels = [np.load(folder / f"{part}_labels.npy") for part in ("train", "test")]
    order = np.random.default_rng(0).permutation(len(labels[0]))
    learned, scored = order[:images], order[images : images + 1000]
    return ImageClassification.from_arrays(
        parts[0][learned],
        labels[0][learned],
        x_valid=np.concatenate([parts[0][scored], parts[1]]),
        y_valid=np.concatenate([labels[0][scored], labels[1]]),
        name="cifar10-subset",
        test_fraction=0.01,
        augment=Augment(crop=2, flip=True, label_smoothing=0.1),
        resolution=16,
        channels_last=True,
    )


def trained(searcher: Searcher) -> float:
    """Train the supernet, without the scores between epochs; return the seconds of a step."""
    begun = time.process_time()
    for epoch in range(searcher.training_epochs):
        order = seed_of(searcher.seed, "order")
        batches = searcher.task.batches("train", batch_size=searcher.batch_size, seed=order, epoch=epoch)
        for number, batch in enumerate(batches):
            for group in searcher.optimizer.param_groups:
                group["lr"] = searcher.rate(epoch * searcher.training_steps + number)
            searcher.train_step(batch, (epoch, number))
    return (time.process_time() - begun) / (searcher.training_epochs * searcher.training_steps)


def alone(searcher: Searcher, child: Architecture) -> tuple[float, float]:
    """Train a child alone by the same rate for as many epochs; return its accuracy and the seconds of a step."""
    network = searcher.family.build(child, seed=seed_of(searcher.seed, "alone")).to(memory_format=torch.channels_last)
    s = searcher.settings
    optimizer = torch.optim.SGD(network.parameters(), s.lr, s.momentum, nesterov=True)

    decayed = decayed_weights(network)

    def finish_gradients() -> None:
        for weight in decayed:
            assert weight.grad is not None
            weight.grad.add_(weight.detach(), alpha=s.weight_decay)
        nn.utils.clip_grad_value_(network.parameters(), s.clip_value)

    hooks, position = LoopHooks(rate=searcher.rate, after_backward=finish_gradients), Position()
    begun = time.process_time()
    for _ in range(s.epochs):
        train_epoch(network, optimizer, searcher.task, position, hooks, batch_size=s.batch_size, seed=searcher.seed)
        next_epoch(position)
    seconds = (time.process_time() - begun) / position.total
    calibrate_(network, searcher.calibration_inputs())
    return score(searcher, network), seconds


def score(searcher: Searcher, network: Callable[[Tensor], Tensor]) -> float:
    """Return the accuracy in percent on the images that are not learned from."""
    return 100 * float(searcher.task.evaluate(network, "valid")["accuracy"])


def without_calibration(searcher: Searcher, child: Architecture) -> dict[str, float]:
    """Return a child's accuracies with statistics of its own, of the largest child, and as training leaves them."""
    supernet: Any = searcher.supernet
    found = {"own": 100 * searcher.evaluate(child).accuracy}
    supernet.activate(searcher.family.largest())
    calibrate_(supernet, searcher.calibration_inputs())
    supernet.activate(child)
    found["of the largest"] = score(searcher, supernet)
    for module in supernet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    found["none"] = score(searcher, supernet)
    return found


def one_seed(task: ImageClassification, family: BigNasFamily, settings: Settings, seed: int) -> dict[str, Any]:
    """Return everything that is measured with one seed."""
    shared: dict[str, Any] = {"family": family, "task": task, "settings": settings, "seed": seed}
    sandwich, random = (Searcher(**shared, memory_format="channels_last") for _ in range(2))
    random.rule = Uniform(family, settings.children)
    step_seconds = trained(sandwich)
    trained(random)
    ends = {"smallest": family.smallest(), "largest": family.largest()}
    drawn = family.space.sample_many(np.random.default_rng(seed), CHILDREN - 2)
    children = [*ends.values(), *drawn]
    inside = [100 * sandwich.evaluate(child).accuracy for child in children]
    inside_random = [100 * random.evaluate(child).accuracy for child in children]
    separately = [alone(sandwich, child) for child in children]
    return {
        "statistics": [without_calibration(sandwich, child) for child in drawn],
        "ends": {
            name: {"sandwich": inside[n], "random": inside_random[n], "alone": separately[n][0]}
            for n, name in enumerate(ends)
        },
        "macs": [family.exact_costs(child)["macs"] for child in children],
        "inside": inside,
        "inside_random": inside_random,
        "alone": [accuracy for accuracy, _ in separately],
        "step": step_seconds / separately[1][1],
    }


def spearman(first: list[float], second: list[float]) -> float:
    """Return Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def shown(values: list[float]) -> str:
    """Return mean, half the 95 % interval (t distribution), and the values."""
    mean, low, _ = mean_interval(values) or (statistics.fmean(values), float("nan"), 0.0)
    return f"{mean:.2f} ± {mean - low:.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def show_statistics(found: list[list[dict[str, float]]]) -> None:
    """Print (a): means over the random children of each seed."""
    print("\n(a) random children, %")
    for name in ("own", "of the largest", "none"):
        print(f"  statistics {name}: {shown([statistics.fmean(row[name] for row in rows) for rows in found])}")


def on_digits(seeds: int) -> None:
    """Print (a) and (b) for the bundled digits."""
    task = open_task("digits", label_smoothing=0.1)
    family = bignas_family("tiny", image=task.input_shape, num_classes=task.num_classes)
    settings = Settings(**preset_settings(task.input_shape))
    scores: dict[str, dict[str, list[float]]] = {}
    statistics_of: list[list[dict[str, float]]] = []
    for seed in range(seeds):
        for kind in ("sandwich", "random"):
            searcher = Searcher(family=family, task=task, settings=settings, seed=seed, memory_format="channels_last")
            if kind == "random":
                searcher.rule = Uniform(family, settings.children)
            trained(searcher)
            for name, end in (("smallest", family.smallest()), ("largest", family.largest())):
                accuracy = 100 * searcher.evaluate(end).accuracy
                scores.setdefault(name, {}).setdefault(kind, []).append(accuracy)
            if kind == "sandwich":
                drawn = family.space.sample_many(np.random.default_rng(seed), CHILDREN - 2)
                statistics_of.append([without_calibration(searcher, child) for child in drawn])
        print(f"seed {seed}: {scores}", flush=True)
    show_statistics(statistics_of)
    print("(b) ends, %")
    for name, kinds in scores.items():
        for kind, values in kinds.items():
            print(f"  {name}, {kind}: {shown(values)}")
        gains = [a - b for a, b in zip(kinds["sandwich"], kinds["random"], strict=True)]
        print(f"  {name}, sandwich minus random: {shown(gains)}")


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.data is None:
        on_digits(given.seeds)
        return
    task = subset(given.data, given.images)
    widths: dict[str, Any] = {"stem_stride": 1, "stem_widths": (8, 16), "head_widths": (64, 96), "stages": STAGES}
    family = bignas_family("small", image=task.input_shape, num_classes=10, **widths)
    settings = Settings(**{**preset_settings(task.input_shape), "epochs": given.epochs, "lr": given.lr})
    ends = [family.exact_costs(end)["macs"] for end in (family.smallest(), family.largest())]
    print(f"{family.space.size} children, {ends[0]} to {ends[1]} MACs; {given.images} images, {given.epochs} epochs")
    found, begun = [], time.process_time()
    for seed in range(given.seeds):
        found.append(one_seed(task, family, settings, seed))
        print(f"seed {seed}: {time.process_time() - begun:.0f} s of one core", flush=True)
    show_statistics([each["statistics"] for each in found])
    print("(b) ends, %")
    for name in ("smallest", "largest"):
        rows = [each["ends"][name] for each in found]
        for kind in ("sandwich", "random", "alone"):
            print(f"  {name}, {kind}: {shown([row[kind] for row in rows])}")
        print(f"  {name}, sandwich minus random: {shown([row['sandwich'] - row['random'] for row in rows])}")
    print("(c) rank correlation with networks trained alone")
    for name in ("inside", "inside_random", "macs"):
        print(f"  {name}: {shown([spearman(each[name], each['alone']) for each in found])}")
    print(f"  a step takes {shown([each['step'] for each in found])} times the largest child's alone")


if __name__ == "__main__":
    main()
