"""Statistics of comparisons: groups of runs, differences between them, and how sure one can be.

Nothing here prints a mean without the number of runs and their spread. All intervals are 95 %, by percentile bootstrap
with a fixed stream, so that the same numbers give the same interval on any machine.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream

RESAMPLES = 10_000
"""Bootstrap resamples of an interval."""

_BLOCK = 1_000  # resamples that are in memory at once


@dataclass(frozen=True)
class Summary:
    """A group of runs: how many, their mean and their spread.

    Attributes:
        n: Number of runs.
        mean: Their mean.
        std: Sample standard deviation (n - 1 in the denominator); NaN for a single run.
        median: Their median.
        low: Lower end of the interval of the mean.
        high: Its upper end.
        smallest: Smallest value.
        largest: Largest value.
    """

    n: int
    mean: float
    std: float
    median: float
    low: float
    high: float
    smallest: float
    largest: float

    def text(self, digits: int = 2) -> str:
        """Return "mean ± standard deviation (n = 8)".

        Raises:
            UserError: A single run: its spread is not known, and a mean without one is no result.
        """
        if self.n < 2:
            raise UserError("runs", self.n, allowed="at least 2 runs: a mean is not printed without its spread")
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f} (n = {self.n})"


def summarise(values: Sequence[float]) -> Summary:
    """Return the summary of a group of runs.

    Raises:
        UserError: No run, or one whose value is NaN or infinite.
    """
    numbers = _finite(values, "values")
    low, high = bootstrap_interval(_mean, numbers)
    return Summary(
        n=len(numbers),
        mean=statistics.fmean(numbers),
        std=statistics.stdev(numbers) if len(numbers) > 1 else math.nan,
        median=statistics.median(numbers),
        low=low,
        high=high,
        smallest=min(numbers),
        largest=max(numbers),
    )


def relative_improvement(searched: Sequence[float], random: Sequence[float]) -> float:
    """Return RI = 100 (mean(searched) - mean(random)) / mean(random), in percent.

    Args:
        searched: Test accuracies of searched architectures, one for each search seed.
        random: Test accuracies of uniformly *sampled* architectures of the same space, trained alike; not the results
            of random *search*.

    Raises:
        UserError: An empty group, NaN, or random accuracies whose mean is not positive.

    Source: Yang et al. 2020, "NAS evaluation is frustratingly hard", arXiv 1912.12522, Sec. 3.1.
    """
    first, second = _finite(searched, "searched"), _finite(random, "random")
    base = statistics.fmean(second)
    if base <= 0:
        raise UserError("random", base, allowed="accuracies with a positive mean")
    return 100 * (statistics.fmean(first) - base) / base


@dataclass(frozen=True)
class Comparison:
    """Two independent groups of runs: what one gains over the other, and whether that can be chance.

    Attributes:
        searched: Summary of the searched architectures.
        random: Summary of the sampled ones.
        improvement: Relative improvement in percent.
        low: Lower end of its bootstrap interval.
        high: Upper end.
        welch_p: Two-sided p of Welch's t test; NaN when a group has a single run or neither varies.
        mannwhitney_p: Two-sided p of the Mann-Whitney U test (exact for small groups without ties).
    """

    searched: Summary
    random: Summary
    improvement: float
    low: float
    high: float
    welch_p: float
    mannwhitney_p: float


def compare(searched: Sequence[float], random: Sequence[float]) -> Comparison:
    """Return the relative improvement of ``searched`` over ``random`` with its interval and two unpaired tests.

    Raises:
        UserError: As for ``relative_improvement``.
    """
    from scipy.stats import mannwhitneyu, ttest_ind

    first, second = _finite(searched, "searched"), _finite(random, "random")
    low, high = bootstrap_interval(
        lambda ours, theirs: 100 * (ours.mean(axis=-1) / theirs.mean(axis=-1) - 1), first, second
    )
    enough = min(len(first), len(second)) > 1 and max(np.ptp(first), np.ptp(second)) > 0
    with warnings.catch_warnings():  # one of the groups may be constant, which the test can take
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        welch = float(ttest_ind(first, second, equal_var=False).pvalue) if enough else math.nan
    return Comparison(
        searched=summarise(first),
        random=summarise(second),
        improvement=relative_improvement(first, second),
        low=low,
        high=high,
        welch_p=welch,
        mannwhitney_p=float(mannwhitneyu(first, second, alternative="two-sided").pvalue),
    )


@dataclass(frozen=True)
class Paired:
    """Two contenders on the same seeds.

    Attributes:
        n: Number of pairs.
        difference: Mean of first minus second.
        low: Lower end of its bootstrap interval over pairs.
        high: Upper end.
        wins: Pairs in which the first is larger.
        ties: Pairs with equal values.
        losses: The others.
        wilcoxon_p: Two-sided p of the signed-rank test, zeros split (Pratt); 1.0 when all pairs are equal.
    """

    n: int
    difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    wilcoxon_p: float


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Return how ``first`` differs from ``second``, pair by pair.

    Args:
        first: One value for each seed.
        second: Values of the same seeds, in the same order.

    Raises:
        UserError: Groups of different lengths, an empty one, NaN.
    """
    from scipy.stats import wilcoxon

    ours, theirs = np.array(_finite(first, "first")), np.array(_finite(second, "second"))
    if len(ours) != len(theirs):
        raise UserError("second", f"{len(theirs)} values", allowed=f"one for each of the {len(ours)} of the first")
    gaps = ours - theirs
    low, high = bootstrap_interval(_mean, gaps)
    return Paired(
        n=len(gaps),
        difference=float(gaps.mean()),
        low=low,
        high=high,
        wins=int((gaps > 0).sum()),
        ties=int((gaps == 0).sum()),
        losses=int((gaps < 0).sum()),
        wilcoxon_p=float(wilcoxon(gaps, zero_method="pratt").pvalue) if gaps.any() else 1.0,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing all of them (Holm 1979): with m tests, the smallest counts m times."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two rankings; ties count as neither concordant nor discordant.

    Raises:
        UserError: Different lengths, fewer than two values, NaN.
    """
    from scipy.stats import kendalltau

    ours, theirs = _finite(first, "first"), _finite(second, "second")
    if len(ours) != len(theirs) or len(ours) < 2:
        raise UserError("second", f"{len(theirs)} values", allowed=f"as many as the first ({len(ours)}), at least 2")
    return float(kendalltau(ours, theirs).statistic)


def spearman_rho(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; ties share their mean rank. NaN where either does not vary.

    Raises:
        UserError: Different lengths, fewer than two values, NaN.
    """
    from scipy.stats import rankdata

    ours, theirs = _finite(first, "first"), _finite(second, "second")
    if len(ours) != len(theirs) or len(ours) < 2:
        raise UserError("second", f"{len(theirs)} values", allowed=f"as many as the first ({len(ours)}), at least 2")
    a, b = (rankdata(each) - (len(ours) + 1) / 2 for each in (ours, theirs))
    norm = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum()) / norm if norm else math.nan


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *groups: Sequence[float] | np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a statistic of independent groups.

    Args:
        statistic: Takes one array of shape (R, n_g) for each group, resampled R times, and returns (R,).
        groups: The observed values; each group is resampled on its own.
        resamples: Number of resamples.

    Returns:
        The 2.5 and 97.5 percentiles. A group of one value has no spread: the interval is then too narrow to mean
        anything, which ``Summary.text`` refuses to print.
    """
    rng = numpy_stream(0, "bootstrap")
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    found = []
    for start in range(0, resamples, _BLOCK):
        rows = min(_BLOCK, resamples - start)
        found.append(statistic(*(array[rng.integers(len(array), size=(rows, len(array)))] for array in arrays)))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def median_of(values: np.ndarray) -> np.ndarray:
    """Return the median over the last axis: a statistic for ``bootstrap_interval``."""
    return np.median(values, axis=-1)


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def _finite(values: Sequence[float] | np.ndarray, name: str) -> list[float]:
    numbers = [float(value) for value in values]
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise UserError(name, numbers[:8], allowed="at least one value, all of them finite")
    return numbers
