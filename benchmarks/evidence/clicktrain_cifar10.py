"""ClickTrain against pruning after training and against its own parts, on a CIFAR-10 subset at 16x16.

A network of four 3x3 convolutions (24, 32, 48, 48, batch normalisation), 4,000 training images, accuracy on 1,000 test
images that nothing is chosen by. Half of the kernels of three layers go and four of nine weights stay in the others
(4.5 times fewer weights in these layers). Every arm of a seed begins with the same weights and sees the same batches.

Run: ``python benchmarks/evidence/clicktrain_cifar10.py --data FOLDER [--seeds 5]`` with ``FOLDER/train.npy`` and
``test.npy`` (N, 3, 32, 32, bytes), ``train_labels.npy``, ``test_labels.npy``. One line of JSON for each arm and seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from archsmith.methods.clicktrain import PrunedTraining, Recipe, Settings
from archsmith.run.intervals import mean_interval
from archsmith.tasks.augment import Augment
from archsmith.tasks.vision import ImageClassification

EPOCHS, E1, E2, AFTER = 20, 8, 16, 10
RECIPE = Recipe(epochs=EPOCHS, batch_size=50, lr=0.05, drops=(7, 15), weight_decay=5e-4)
FINETUNE = Recipe(epochs=AFTER, batch_size=50, lr=0.005, drops=(7,), weight_decay=5e-4)
# The lasso moves the norm of a group by at most lr / (1 - momentum) * strength a step: 0.94 in all here; in the
# published training of VGG-11 it is 0.92 (66 epochs of 390 steps at lr 0.01, then 12 at 0.001, with 3.5e-4).
CLICK = Settings(regularise_from=E1, prune_from=E2, strength=0.033, kernels=50, patterns=4)
ARMS = {
    "clicktrain": CLICK,
    "frequent pool": CLICK.model_copy(update={"pool": "frequent"}),
    "without the lasso": CLICK.model_copy(update={"strength": 0.0}),
    "pruned at E1": CLICK.model_copy(update={"prune_from": E1}),
}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = 3
    for number, width in enumerate((24, 32, 48, 48)):
        layers += [nn.Conv2d(before, width, 3, 1 + number % 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def trained(
    net: nn.Module, task: ImageClassification, settings: Settings, recipe: Recipe, seed: int
) -> dict[str, float]:
    """Train to the end; return accuracies at the end and around the hard step, ratio and processor seconds."""
    training = PrunedTraining(net, task, settings, recipe, seed=seed)
    found: dict[str, float] = {}
    started = time.process_time()
    while training.position.epoch < recipe.epochs:
        if training.position.epoch == settings.prune_from and training.click.decision is not None:
            seconds = time.process_time() - started
            kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            found["before the hard step"] = training.scores()["accuracy"]
            training.click.prune_()
            found["after the hard step"] = training.scores()["accuracy"]
            net.load_state_dict(kept)
            started = time.process_time() - seconds
        training.epoch()
    found["seconds"] = time.process_time() - started
    found["accuracy"] = training.scores()["accuracy"]
    found["ratio_pruned"] = training.click.report()["ratio_pruned"]
    return found


def arms(task: ImageClassification, seed: int) -> Iterable[tuple[str, dict[str, float]]]:
    for name, settings in ARMS.items():
        yield name, trained(network(seed), task, settings, RECIPE, seed)
    net = network(seed)
    # The plain training is the first stage alone: its prune stage would begin after the last epoch.
    plain = PrunedTraining(net, task, CLICK, RECIPE, seed=seed)
    plain.click.phases = Settings(regularise_from=EPOCHS, prune_from=EPOCHS, kernels=50).phases()
    started = time.process_time()
    for _ in range(EPOCHS):
        plain.epoch()
    seconds = time.process_time() - started
    yield "dense", {"accuracy": plain.scores()["accuracy"], "seconds": seconds, "ratio_pruned": 1.0}
    after = trained(net, task, Settings(regularise_from=0, prune_from=0, strength=0, kernels=50), FINETUNE, seed)
    yield "pruned after training", {**after, "seconds": seconds + after["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = {
        part: np.load(arguments.data / f"{part}.npy").reshape(-1, 3, 16, 2, 16, 2).mean((3, 5)).round().astype(np.uint8)
        for part in ("train", "test")
    }
    labels = {part: np.load(arguments.data / f"{part}_labels.npy") for part in ("train", "test")}
    task = ImageClassification.from_arrays(
        images["train"],
        labels["train"],
        x_valid=images["test"],
        y_valid=labels["test"],
        x_test=images["test"],
        y_test=labels["test"],
        augment=Augment(crop=2, flip=True),
    )
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for name, found in arms(task, seed):
            rows.setdefault(name, []).append(found)
            print(json.dumps({"seed": seed, "arm": name, **found}), flush=True)
    for name, found_rows in rows.items():
        values = [100 * found["accuracy"] for found in found_rows]
        against = [a - 100 * b["accuracy"] for a, b in zip(values, rows["clicktrain"], strict=True)]
        seconds = float(np.mean([found["seconds"] for found in found_rows]))
        print(f"| {name} | {interval(values)} | {interval(against)} | {seconds:.0f} |")


def interval(values: list[float]) -> str:
    """Return the mean and its 95 % interval by Student's t."""
    found = mean_interval(values)
    return f"{values[0]:.2f}" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


if __name__ == "__main__":
    main()
