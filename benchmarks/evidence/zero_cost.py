"""Zero-cost scores of NAS-Bench-201 cells against the accuracies and the published scores of the real tables.

Networks of C = 16 on one batch of real CIFAR-10 training images, one initialisation each, random cells. Prints for
every score Spearman's coefficient to the CIFAR-10 test accuracy (200 epochs) with a 95 % bootstrap interval over the
cells; to the published per-architecture values where there are any; and, as a reference, the coefficient of those
published values to the accuracy over all 15,625 cells. Infinite scores are the lowest ranks. Scores are turned so that
more is better by their authors' account.

Run: ``python benchmarks/evidence/zero_cost.py --data DATA`` with DATA the folder that holds ``cifar10`` and
``nas-benchmarks`` (the default is ``ARCHSMITH_DATA``); minutes on one core.
"""

from __future__ import annotations

import argparse
import lzma
import os
import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from archsmith.evaluate.zero_cost import SCORES, Batch, Score, ZeroCostEvaluator, ntk_condition, sensitivity
from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS
from archsmith.families.cells import NasBench201Family
from archsmith.space import Architecture, Trial

PUBLISHED = ("naswot", "synflow", "logsynflow", "nregions")
RESAMPLES = 2_000


def main() -> None:
    """Score, and print one table for each size of the networks."""
    options = parsed()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="An input array is constant")
    table = dict(np.load(options.data / "nas-benchmarks" / "nas-bench-201.npz"))
    published = published_scores(options.data)
    accuracy = table["test_acc_200ep_cifar10"].astype(np.float64)
    reference = {name: rank(values, accuracy) for name, values in published.items()}
    reference["macs"] = rank(table["flops_cifar10"], accuracy)
    reference["params"] = rank(table["params_cifar10"], accuracy)
    sensitivity.ZEN_REPEATS = options.zen_repeats
    shorten_ntk(options.ntk_images)
    batch = cifar10_batch(options.data, options.images, options.seed)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread; seed {options.seed};")
    print(f"{options.images} images, NTK {options.ntk_images}; zen with {options.zen_repeats} draws")
    for cells, count, names in (
        (1, options.cells, tuple(SCORES)),
        (5, options.deep_cells, PUBLISHED),
    ):
        rows = np.random.default_rng(options.seed).choice(len(accuracy), count, replace=False)
        family = NasBench201Family(image=(3, 32, 32), num_classes=10, cells=cells)
        found, seconds = scored(family, batch, names, table["ops"][rows], options.seed)
        print(f"\nC = 16, N = {cells}, {count} cells\n")
        print("| score | finite | to accuracy | 95 % interval | to published values | published to accuracy | CPU s |")
        print("|---|---|---|---|---|---|---|")
        for name in names:
            values = found[name] if SCORES[name].higher_is_better else -found[name]
            low, high = bootstrap(values, accuracy[rows], options.seed)
            agreement = f"{rank(values, published[name][rows]):.3f}" if name in published else "-"
            known = f"{reference[name]:.3f}" if name in reference else "-"
            print(
                f"| {name} | {int(np.isfinite(values).sum())} | {rank(values, accuracy[rows]):.3f} | "
                f"{low:.3f} to {high:.3f} | {agreement} | {known} | {seconds[name]:.2f} |",
                flush=True,
            )


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ARCHSMITH_DATA"), help="folder of the real data")
    parser.add_argument("--cells", type=int, default=100, help="cells scored at N = 1")
    parser.add_argument("--deep-cells", type=int, default=60, help="cells scored at N = 5")
    parser.add_argument("--images", type=int, default=32, help="images of the batch")
    parser.add_argument("--ntk-images", type=int, default=16, help="of them for the tangent kernel")
    parser.add_argument("--zen-repeats", type=int, default=4, help="draws of the Zen score")
    parser.add_argument("--seed", type=int, default=0, help="draws cells, images and weights")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data is needed: the folder with cifar10 and nas-benchmarks")
    return options


def shorten_ntk(images: int) -> None:
    """Let the tangent kernel see the first images only: its time grows with their square."""

    def shortened(network: torch.nn.Module, batch: Batch, generator: torch.Generator) -> float:
        return ntk_condition(network, Batch(batch.images[:images], batch.labels[:images]), generator)

    full = SCORES["ntk_condition"]
    SCORES["ntk_condition"] = Score(full.name, shortened, full.needs, full.higher_is_better, full.arxiv)


def scored(
    family: NasBench201Family, batch: Batch, names: Sequence[str], codes: np.ndarray, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return the scores by name, (n,), and the mean processor seconds of each."""
    found: dict[str, list[float]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    paths = [f"edge/{source}-{target}" for source, target in NB201_EDGES]
    evaluators = {name: ZeroCostEvaluator(family, batch, scores=[name]) for name in names}
    for number, row in enumerate(codes):
        decisions = {path: NB201_OPERATIONS[code] for path, code in zip(paths, row, strict=True)}
        trial = Trial(id=number, architecture=Architecture(decisions, space="nas-bench-201"), seed=seed)
        for name, evaluator in evaluators.items():  # apart, to time them
            start = time.process_time()
            result = evaluator.evaluate(trial)
            if result.status != "ok":
                raise SystemExit(f"cell {dict(decisions)}: {result.reason}")
            found[name].append(result.metrics[name])
            seconds[name] += (time.process_time() - start) / len(codes)
    return {name: np.asarray(values) for name, values in found.items()}, seconds


def rank(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's coefficient; infinite scores are the first or last in rank, ties share theirs."""
    return float(spearmanr(first, second).statistic)


def bootstrap(values: np.ndarray, accuracy: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of the coefficient over resampled cells."""
    rng = np.random.default_rng([seed, 1])
    drawn = [rank(values[rows], accuracy[rows]) for rows in rng.integers(0, len(values), (RESAMPLES, len(values)))]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def published_scores(data: Path) -> dict[str, np.ndarray]:
    """Return the published scores on CIFAR-10 by name, (15625,)."""
    from pyarrow import parquet

    columns = parquet.read_table(data / "nas-benchmarks" / "nas-bench-201-zero-cost.parquet")
    return {name: columns[f"{name}_cifar10"].to_numpy().astype(np.float64) for name in PUBLISHED}


def cifar10_batch(data: Path, size: int, seed: int) -> Batch:
    """Return random training images, normalised, with their labels."""
    with lzma.open(data / "cifar10" / "train.npy.xz") as stream:  # planes G, R - G, B - G, differenced, modulo 256
        planes = np.load(stream).cumsum(2, dtype="u1").cumsum(3, dtype="u1")
    images = np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], 1)
    labels = np.load(data / "cifar10" / "train_labels.npy")
    rows = np.random.default_rng([seed, 2]).choice(len(images), size, replace=False)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    pixels = torch.from_numpy(images[rows]).float() / 255
    return Batch((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.from_numpy(labels[rows]).long())


if __name__ == "__main__":
    main()
