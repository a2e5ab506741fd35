"""The evaluation protocol of "NAS evaluation is frustratingly hard": is a search better than luck?

A search strategy is scored by its relative improvement over the *average random architecture* of its own space, trained
by its own final recipe: RI = 100 (Acc_m - Acc_r) / Acc_r, with eight searches (one seed each) against eight uniformly
sampled architectures. Sampling, not random search: the best of k samples is a search already.

What is implemented: the protocol for any space, strategy and evaluator, and the paper's diagnostics as ready-made
studies (training ladder, spread of the space, correlation of early and final accuracy, seed sensitivity, depth gap,
operation ablation, sweep over the number of cells). What differs: every comparison also carries n, spreads, a
bootstrap interval and two unpaired tests, because with eight runs most differences on CIFAR-10 are not significant;
accuracies are those of the last epoch (the paper's 214 networks are reported at their best test epoch).

Source: Yang, Esperança, Carlucci 2020, arXiv 1912.12522, Sec. 3 (protocol, Eq. 1), Sec. 4 and 5 (diagnostics).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream
from archsmith.run.statistics import Comparison, Summary, compare, kendall_tau, summarise
from archsmith.space import Architecture, Space

SYSTEM = {
    "slug": "nas-eval-protocol",
    "title": "NAS evaluation is frustratingly hard: relative improvement over random sampling",
    "year": 2020,
    "arxiv": "1912.12522",
    "kind": "protocol",
    "aliases": ["ri", "relative-improvement"],
}

Accuracy = Callable[[Architecture], float]
"""Trains an architecture by the final recipe with one fixed training seed, and returns its test accuracy."""


class Settings(BaseModel):
    """Settings of the protocol, with the paper's values.

    Attributes:
        runs: Searches, and as many random architectures (Sec. 3.1: 8).
        seed: Seed of the samples and the first search seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: int = Field(default=8, ge=2)
    seed: int = Field(default=0, ge=0)


DEFAULTS = Settings()


def protocol(
    space: Space,
    search: Callable[[int], Architecture],
    accuracy: Accuracy,
    settings: Settings = DEFAULTS,
) -> Comparison:
    """Return what a search gains over the average random architecture of its space.

    Args:
        space: The space of the search; samples are drawn as ``space.sample`` draws them, which for a flat product space
            is uniform over genotypes (not over functions).
        search: Runs one search with the given seed and returns its architecture.
        accuracy: The one final recipe for both groups.
        settings: Number of runs and seed.
    """
    searched = [accuracy(search(settings.seed + run)) for run in range(settings.runs)]
    return compare(searched, random_accuracies(space, accuracy, settings))


def random_accuracies(
    space: Space,
    accuracy: Accuracy,
    settings: Settings = DEFAULTS,
) -> list[float]:
    """Return the accuracies of ``settings.runs`` independent samples of the space."""
    rng = numpy_stream(settings.seed, "nas-eval-protocol", "random")
    return [accuracy(space.sample(rng)) for _ in range(settings.runs)]


def space_spread(space: Space, accuracy: Accuracy, *, samples: int = 214, seed: int = 0) -> Summary:
    """Return mean, spread and extremes of random architectures of a space (Sec. 4.2: 214 of the DARTS space).

    A narrow spread means that whatever is found, the space deserves the credit.
    """
    return summarise(random_accuracies(space, accuracy, Settings(runs=samples, seed=seed)))


def operation_ablation(
    space: Space, poorer: Space, accuracy: Accuracy, *, samples: int = 56, seed: int = 0
) -> Comparison:
    """Return what the full set of operations gains over a poorer one with the same wiring (Sec. 4.3)."""
    settings = Settings(runs=samples, seed=seed)
    return compare(random_accuracies(space, accuracy, settings), random_accuracies(poorer, accuracy, settings))


def epoch_correlation(curves: Sequence[Sequence[float]], *, window: int = 1) -> np.ndarray:
    """Return the Pearson correlation of the accuracy after each epoch with the final one (Sec. 4.2).

    Args:
        curves: One row per architecture, one accuracy per epoch, shape (N, T), N >= 2.
        window: Epochs of a centred moving average that smooths each curve, cut at the ends; 1 for raw curves.

    Returns:
        Float64 of shape (T,); the last entry is 1 for raw curves. NaN where all architectures have one accuracy.

    Raises:
        UserError: Not a table of at least two curves, or a window that is not positive.
    """
    table_NT = np.asarray(curves, dtype=np.float64)
    if table_NT.ndim != 2 or len(table_NT) < 2 or window < 1:
        raise UserError("curves", table_NT.shape, allowed="shape (N, T) with N >= 2, and a window of at least 1 epoch")
    smooth_NT = _moving_average(table_NT, window)
    final_N = table_NT[:, -1] - table_NT[:, -1].mean()
    centred_NT = smooth_NT - smooth_NT.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        norm_T = np.sqrt((centred_NT**2).sum(axis=0) * (final_N**2).sum())
        return np.asarray((centred_NT * final_N[:, None]).sum(axis=0) / norm_T)


@dataclass(frozen=True)
class RankChange:
    """How a ranking changes between two ways of training the same architectures.

    Attributes:
        tau: Kendall's tau-b.
        mean_change: Mean absolute change of accuracy.
        largest_change: Largest absolute change.
        largest_shift: Largest change of rank.
        n: Number of architectures.
    """

    tau: float
    mean_change: float
    largest_change: float
    largest_shift: int
    n: int


def rank_change(first: Sequence[float], second: Sequence[float]) -> RankChange:
    """Return how much two trainings of the same architectures agree.

    With two seeds of the same training this is the paper's seed sensitivity (Sec. 5.2), with 8 and 20 cells its depth
    gap (Sec. 5.3): below the tau of two seeds no proxy can be asked for more.
    """
    tau = kendall_tau(first, second)
    gaps = np.abs(np.subtract(first, second))
    shifts = np.abs(np.argsort(np.argsort(first, kind="stable")) - np.argsort(np.argsort(second, kind="stable")))
    return RankChange(tau, float(gaps.mean()), float(gaps.max()), int(shifts.max()), len(gaps))


def seed_sensitivity(
    architectures: Sequence[Architecture],
    accuracy: Callable[[Architecture, int], float],
    seeds: tuple[int, int] = (0, 1),
) -> RankChange:
    """Train the same architectures with two seeds and return how their ranking changes (Sec. 5.2)."""
    first, second = ([accuracy(each, seed) for each in architectures] for seed in seeds)
    return rank_change(first, second)


def depth_gap(
    architectures: Sequence[Architecture],
    accuracy: Callable[[Architecture, int], float],
    depths: tuple[int, int] = (8, 20),
) -> RankChange:
    """Train the same cells stacked ``depths`` times and return how their ranking changes (Sec. 5.3)."""
    first, second = ([accuracy(each, depth) for each in architectures] for depth in depths)
    return rank_change(first, second)


def number_of_cells(
    architectures: Sequence[Architecture], accuracy: Callable[[Architecture, int], float], depths: Sequence[int]
) -> dict[int, Summary]:
    """Return the accuracies of the same cells at each number of cells (Sec. 5.4)."""
    return {depth: summarise([accuracy(each, depth) for each in architectures]) for depth in depths}


LADDER: Mapping[str, Mapping[str, object]] = {
    "base": {},
    "auxiliary": {"auxiliary": 0.4},
    "drop path": {"drop_path": 0.2},
    "cutout": {"cutout": 16},
    "C+D": {"cutout": 16, "drop_path": 0.2},
    "C+D+A": {"cutout": 16, "drop_path": 0.2, "auxiliary": 0.4},
    "+ 50 channels": {"cutout": 16, "drop_path": 0.2, "auxiliary": 0.4, "channels": 50},
    "+ AutoAugment": {"cutout": 16, "drop_path": 0.2, "auxiliary": 0.4, "augment": "autoaugment"},
    "+ 1500 epochs": {"cutout": 16, "drop_path": 0.2, "auxiliary": 0.4, "epochs": 1500},
    "all": {
        "cutout": 16, "drop_path": 0.2, "auxiliary": 0.4, "channels": 50, "augment": "autoaugment", "epochs": 1500,
    },
}  # fmt: skip
"""The rungs of the training ladder (Sec. 4.1): what each changes in the base recipe.

The three rungs before the last are read as single additions to C+D+A, since "all" is a rung of its own.
"""


def training_ladder(
    architectures: Sequence[Architecture],
    accuracy: Callable[[Architecture, Mapping[str, object]], float],
    rungs: Mapping[str, Mapping[str, object]] = LADDER,
) -> dict[str, Summary]:
    """Return what the training recipe alone is worth: the same random architectures on every rung (Sec. 4.1).

    Args:
        architectures: The k random architectures.
        accuracy: Trains one of them by the base recipe with the rung's changes.
        rungs: Name to changes; the paper's by default, pass those that your recipe knows.
    """
    return {name: summarise([accuracy(each, changes) for each in architectures]) for name, changes in rungs.items()}


def _moving_average(table_NT: np.ndarray, window: int) -> np.ndarray:
    """Smooth each row; at the ends the window is cut, not padded."""
    before, after = (window - 1) // 2, window // 2
    total = np.concatenate([np.zeros((len(table_NT), 1)), table_NT.cumsum(axis=1)], axis=1)
    steps = np.arange(table_NT.shape[1])
    low = np.maximum(steps - before, 0)
    high = np.minimum(steps + after + 1, table_NT.shape[1])
    return np.asarray((total[:, high] - total[:, low]) / (high - low))
