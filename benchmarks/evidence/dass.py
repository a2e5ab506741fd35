"""DASS against DARTS and random cells on real images, all pruned to the same fraction of weights by the same training.

For each seed: a DASS search and a DARTS search of as many architecture steps on the sparse and on the dense search
network; then the cells of both, and random cells of the same space, are trained as sparse networks by the same three
phases and seed. Prints test accuracy under the mask before and after finetuning, by batch statistics, with the number
of weights that are left, and 95 % intervals over seeds (t distribution). Every finished seed is kept: type the same
command again to go on; ``--read`` only prints.

Run: ``python benchmarks/evidence/dass.py --data CIFAR10.npz --out runs/evidence-dass``; the file has ``x_train``,
``y_train``, ``x_test``, ``y_test``, images (N, 3, 32, 32) of bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archsmith.core.files import write_json
from archsmith.core.rng import numpy_stream
from archsmith.families.darts import DartsFamily
from archsmith.families.darts_space import CELLS, Genotype, architecture_of, genotype_of
from archsmith.families.darts_supernet import FREE
from archsmith.layers.sparse import SparseLayers
from archsmith.methods import darts, dass
from archsmith.run.relaxed_search import RelaxedSearcher
from archsmith.supernet.relaxed import batch_statistics
from archsmith.tasks.vision import ImageClassification

SEARCH = {"search_channels": 4, "search_cells": 4, "search_batch_size": 32, "order": "first", "logit_lr": 0.01}
FINAL = dass.phases_of((6, 2, 4), (0.05, 0.1, 0.02), batch_size=64, momentum=0.9, weight_decay=4e-4)


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def task_of(file: Path, images: int) -> ImageClassification:
    """Return the images pooled to 16x16, the first ``images`` of the training part."""
    arrays = np.load(file)

    def pooled(x: np.ndarray) -> np.ndarray:
        return (x.reshape(len(x), 3, 16, 2, 16, 2).mean((3, 5)) / 255).astype("f4")

    train, labels = pooled(arrays["x_train"][:images]), arrays["y_train"][:images].astype("i8")
    test, test_labels = pooled(arrays["x_test"]), arrays["y_test"].astype("i8")
    return ImageClassification.from_arrays(
        train, labels, x_test=test, y_test=test_labels, name="cifar10-16", valid_fraction=0.05
    )


def searched(searcher: RelaxedSearcher) -> tuple[Genotype, list[dict[str, Any]]]:
    """Run the search part of a searcher; return its cells and the figures of its epochs."""
    figures = []
    while searcher.chosen is None:
        epoch = searcher.advance(Silent())
        assert epoch is not None
        figures.append(epoch)
    return genotype_of(searcher.chosen), figures


def accuracy(network: torch.nn.Module, task: ImageClassification) -> float:
    """Return test accuracy in percent by batch statistics."""
    with batch_statistics(network):
        return 100 * float(task.evaluate(network, "test", batch_size=250)["accuracy"])


def trained(
    genotype: Genotype, family: DartsFamily, task: ImageClassification, keep: float, seed: int
) -> dict[str, Any]:
    """Train cells as a sparse network and return what it reaches and keeps."""
    network = family.build(architecture_of(genotype), seed=seed, layers=SparseLayers())
    before = dass.train_sparse(network, task, FINAL[:2], keep, seed=seed)
    masked = accuracy(network, task)
    after = dass.train_sparse(network, task, FINAL[2:], keep, seed=seed + 1)
    return {
        "genotype": genotype.to_json(),
        "weightless": {c: sum(name in FREE for name, _ in getattr(genotype, c)) for c in CELLS},
        "masked": masked,
        "finetuned": accuracy(network, task),
        "train_loss": {**{k: v["loss"] for k, v in before.items()}, **{k: v["loss"] for k, v in after.items()}},
        **dass.nonzeros(network, family.image),
    }


def one_seed(seed: int, task: ImageClassification, keep: float, random: int) -> dict[str, Any]:
    """Search twice, train everything."""
    family = DartsFamily(image=(3, 16, 16), num_classes=10, channels=8, cells=5, nodes=2)
    lengths = {"search_pretrain_epochs": 3, "search_prune_epochs": 2, "search_finetune_epochs": 3}
    ours = dass.Settings(**SEARCH, **lengths, keep=keep, search_lr=0.1, search_score_lr=0.1)
    theirs = darts.Settings(
        **SEARCH, search_epochs=6, search_lr=0.1, momentum=0.0, weight_decay=1e-3, auxiliary_weight=0.0
    )
    result: dict[str, Any] = {"seed": seed, "keep": keep, "networks": {}}
    cells: dict[str, Genotype] = {}
    for name, searcher in (
        ("DASS", dass.Searcher(family=family, task=task, settings=ours, seed=seed)),
        ("DARTS", darts.Searcher(family=family, task=task, settings=theirs, seed=seed)),
    ):
        started = time.process_time()
        cells[name], figures = searched(searcher)
        result[f"{name} search"] = {
            "cpu_seconds": time.process_time() - started,
            "epochs": [{k: f[k] for k in ("phase", "loss", "valid_accuracy", "entropy")} for f in figures],
        }
    for number in range(random):
        point = family.space.sample(numpy_stream(seed, "random-cell", number))
        cells[f"random {number + 1}"] = genotype_of(point)
    for name, genotype in cells.items():
        result["networks"][name] = trained(genotype, family, task, keep, seed)
    return result


def interval(values: list[float]) -> str:
    """Return mean and half width of the 95 % interval of the mean (t distribution)."""
    from scipy.stats import t

    half = float("nan")
    if len(values) > 1:
        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def table(results: list[dict[str, Any]]) -> str:
    """Return the comparison as lines of a table."""
    lines = [
        "| cells | networks | test accuracy, % | each | before finetuning, % | kept weights | weightless operations |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("DASS", "DARTS", "random"):
        rows = [net for r in results for name, net in r["networks"].items() if name.startswith(kind)]
        if not rows:
            continue
        each = ", ".join(f"{net['finetuned']:.1f}" for net in rows)
        free = statistics.mean(sum(net["weightless"].values()) for net in rows)
        lines.append(
            f"| {kind} | {len(rows)} | {interval([net['finetuned'] for net in rows])} | {each} | "
            f"{interval([net['masked'] for net in rows])} | {statistics.mean(net['kept'] for net in rows):,.0f} of "
            f"{statistics.mean(net['weights'] for net in rows):,.0f} | {free:.1f} of 8 |"
        )
    for other in ("DARTS", "random"):
        differences = [
            r["networks"]["DASS"]["finetuned"]
            - statistics.mean(net["finetuned"] for name, net in r["networks"].items() if name.startswith(other))
            for r in results
            if any(name.startswith(other) for name in r["networks"])
        ]
        lines.append(
            f"DASS - {other}, by seed: {interval(differences)} ({', '.join(f'{d:+.1f}' for d in differences)})"
        )
    for kind in ("DASS", "DARTS"):
        operations = Counter(
            name for r in results for cell in ("normal", "reduce") for name, _ in r["networks"][kind]["genotype"][cell]
        )
        entropies = [r[f"{kind} search"]["epochs"][-1]["entropy"] for r in results]
        lines.append(f"{kind}: operations {dict(operations.most_common())}, entropies {entropies}")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--random", type=int, default=2)
    parser.add_argument("--read", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        file = options.out / f"seed-{seed}.json"
        if not file.exists() and not options.read:
            task = task_of(options.data, options.images)
            write_json(file, one_seed(seed, task, options.keep, options.random))
    files = [options.out / f"seed-{seed}.json" for seed in range(options.seeds)]
    print(table([json.loads(file.read_text()) for file in files if file.exists()]))


if __name__ == "__main__":
    main()
