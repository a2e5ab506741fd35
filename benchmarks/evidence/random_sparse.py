"""Searched against random node masks on real images, at the size of one CPU core.

Parents are perceptrons 192-256-256-10 on the balanced subset of CIFAR-10, average-pooled to 8x8 pixels, or with --cnn
convolutional chains on 16x16. On every parent several ways of choosing a sub-network compete: the published random
search, an evolution of the same untrained loss, zero-cost scores, and the search for the *largest* loss (does the
untrained loss say anything?). Without --parents a first impression of a few seconds.

    python benchmarks/evidence/random_sparse.py --data FOLDER --parents 20 --draws 60 --epochs 6
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from archsmith.core.rng import seed_of
from archsmith.evaluate.masked_parent import MaskedEvaluator, scoring_batch
from archsmith.evaluate.zero_cost import Batch, ZeroCostEvaluator
from archsmith.families.subnetworks import SubnetworkFamily
from archsmith.methods.random_sparse import Contender, Settings, protocol, random_mask, search, untrained_search
from archsmith.space import Architecture, Objective
from archsmith.strategies import RandomSearch, RegularizedEvolution, Strategy
from archsmith.tasks.vision import ImageClassification

ZERO_COST_EXAMPLES = 64


def cifar10_subset(folder: Path, side: int) -> ImageClassification:
    """Return the task of the subset: 4,000 training and 1,000 test images, average-pooled to ``side``."""
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        with lzma.open(folder / f"{part}.npy.xz") as stream:
            # Stored as the planes (G, R - G, B - G), differenced along both image axes, modulo 256.
            planes = np.load(stream).cumsum(2, dtype="u1").cumsum(3, dtype="u1")
        images = np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], 1).astype(np.float32) / 255
        cell = 32 // side
        arrays[f"x_{part}"] = images.reshape(len(images), 3, side, cell, side, cell).mean(axis=(3, 5))
        arrays[f"y_{part}"] = np.load(folder / f"{part}_labels.npy")
    return ImageClassification.from_arrays(**arrays, name="cifar10-pooled", valid_fraction=0.0)


def convolutional(seed: int) -> nn.Sequential:
    """Return a freshly initialised chain of three convolutions for images (3, 16, 16)."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 10))


def contenders(task: ImageClassification, settings: Settings) -> dict[str, Contender]:
    """Return by name who competes."""
    batch = scoring_batch(task, settings.examples, seed=seed_of(settings.seed, "score"))
    few = Batch(batch.inputs[:ZERO_COST_EXAMPLES], batch.targets[:ZERO_COST_EXAMPLES])

    def masked(strategy: Callable[..., Strategy], objective: Objective, *, lanes: int, **options: Any) -> Contender:
        def choose(family: SubnetworkFamily, seed: int) -> Architecture:
            asked = strategy(family.space, objectives=(objective,), seed=seed, **options)
            return search(asked, MaskedEvaluator(family, batch, lanes=lanes), draws=settings.draws)

        return choose

    def zero_cost(name: str) -> Contender:
        def choose(family: SubnetworkFamily, seed: int) -> Architecture:
            asked = RandomSearch(family.space, objectives=(Objective(name),), seed=seed)
            return search(asked, ZeroCostEvaluator(family, few, scores=[name]), draws=settings.draws)

        return choose

    def rescaled(family: SubnetworkFamily, seed: int) -> nn.Module:
        """Give the random mask's weights the variance that torch draws for as many inputs as are left."""
        network = family.build(random_mask(family, seed))
        for (_, whole), (_, part) in zip(family.parent.named_parameters(), network.named_parameters(), strict=True):
            if part.dim() > 1:
                part.data *= math.sqrt(whole.shape[1] / part.shape[1])
        return network

    return {
        "search": untrained_search(task, settings),
        "evolution": masked(RegularizedEvolution, Objective("loss", "minimize"), lanes=1, population=10, tournament=5),
        "largest loss": masked(RandomSearch, Objective("loss", "maximize"), lanes=8),
        **{name: zero_cost(name) for name in ("naswot", "synflow", "grad_norm")},
        "rescaled": rescaled,
    }


def main() -> None:
    """Run the comparison and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(os.environ.get("ARCHSMITH_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=beside / "cifar10", help="folder of the CIFAR-10 subset")
    parser.add_argument("--cnn", action="store_true", help="convolutional parents, nodes are channels")
    parser.add_argument("--parents", type=int, default=2)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--only", nargs="*", help="contenders that take part; all when left out")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"no data at {given.data}: give --data")
        return
    torch.set_num_threads(1)
    task = cifar10_subset(given.data, 16 if given.cnn else 8)
    names = ("parents", "draws", "epochs", "seed")
    settings = Settings(
        hidden=(256, 256), sparsities=tuple(given.sparsities), **{name: getattr(given, name) for name in names}
    )
    chosen = {name: c for name, c in contenders(task, settings).items() if not given.only or name in given.only}
    began, worked = time.perf_counter(), time.process_time()
    parent = convolutional if given.cnn else None
    reports = protocol(task, settings, parent=parent, contenders=chosen)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, {time.process_time() - worked:.0f} s of CPU, ")
    print(f"{time.perf_counter() - began:.0f} s of wall time; {settings!r}")
    for sparsity, report in reports.items():
        kind = "channels" if given.cnn else "units"
        print(f"\n{sparsity:.0%} of the {kind} removed\n\n{report.to_markdown()}")
    if given.json:
        given.json.write_text(json.dumps({str(s): report.to_json() for s, report in reports.items()}, indent=1))


if __name__ == "__main__":
    main()
