"""The measuring protocol: interleaved rounds of blocks, and what their times say. No framework in here, any clock.

Targets take turns (A, B, A, B, ...), so that a slow minute of the machine hits all of them. One turn is a *block* of as
many calls as it takes to last some milliseconds, far above the resolution and the overhead of the clock. The samples
are block times divided by calls; the number that is claimed is their median.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, comb

from archsmith.core.errors import UserError

Clock = Callable[[], float]
Run = Callable[[int], None]

MINIMUM_ROUNDS = 10
NOISY_SPREAD = 0.1
_MAXIMUM_REPEATS = 100_000  # reached only where the clock does not move


@dataclass(frozen=True)
class Samples:
    """Times of one target.

    Args:
        milliseconds: Time of one call per round, in the order of the rounds.
        repeats: Calls per block.
    """

    milliseconds: tuple[float, ...]
    repeats: int


def interleave(
    targets: Mapping[str, Run], *, rounds: int, warmup: int, block_ms: float, clock: Clock
) -> dict[str, Samples]:
    """Time every target in every round, in the order of ``targets``.

    Args:
        targets: Name to a function that makes the given number of calls and returns when all of them are finished.
        rounds: Number of rounds, at least 10.
        warmup: Calls of each target before anything is timed, at least 1.
        block_ms: Shortest allowed block, in milliseconds; the calls per block are found by doubling.
        clock: Monotonic clock in seconds.

    Raises:
        UserError: Fewer rounds or warm-up calls than allowed, or a block length that is not positive.
    """
    if rounds < MINIMUM_ROUNDS:
        raise UserError("rounds", rounds, allowed=f"at least {MINIMUM_ROUNDS}, fewer give no 95 % interval")
    if warmup < 1:
        raise UserError("warmup", warmup, allowed="at least 1 call")
    if not block_ms > 0:
        raise UserError("block_ms", block_ms, allowed="a positive number of milliseconds")
    repeats = {}
    for name, run in targets.items():
        run(warmup)
        repeats[name] = _calibrated(run, block_ms, clock)
    times: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(rounds):
        for name, run in targets.items():
            times[name].append(_block_ms(run, repeats[name], clock) / repeats[name])
    return {name: Samples(tuple(times[name]), repeats[name]) for name in targets}


def _block_ms(run: Run, calls: int, clock: Clock) -> float:
    start = clock()
    run(calls)
    return (clock() - start) * 1e3


def _calibrated(run: Run, block_ms: float, clock: Clock) -> int:
    """Return the number of calls that last ``block_ms``: doubled, or more where the time so far foretells more."""
    calls = 1
    while (elapsed := _block_ms(run, calls, clock)) < block_ms and calls < _MAXIMUM_REPEATS:
        foretold = ceil(calls * block_ms / elapsed) if elapsed > 0 else 10 * calls
        calls = min(max(2 * calls, min(foretold, 10 * calls)), _MAXIMUM_REPEATS)
    return calls


def quartile_range(samples: Sequence[float]) -> float:
    """Return the distance between the first and the third quartile (linear interpolation between samples)."""
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of the median of the distribution behind independent ``samples``.

    It assumes nothing about that distribution: the true median lies between the k-th smallest and the k-th largest of
    n samples with probability ``1 - 2 * P(Binomial(n, 1/2) < k)``; the largest k that reaches ``confidence`` is used.

    Args:
        samples: At least 6 of them for 95 %.
        confidence: Probability that the interval must have at least.

    Raises:
        ValueError: Too few samples for any interval of that confidence.

    Example:
        >>> median_interval(range(1, 11))
        (2, 9)
    """
    ordered, n = sorted(samples), len(samples)
    below, k = 0.0, 0
    while k < n // 2 and 1 - 2 * (below + comb(n, k) / 2**n) >= confidence:
        below += comb(n, k) / 2**n
        k += 1
    if k == 0:
        raise ValueError(f"{n} samples give no interval of confidence {confidence}; take more rounds.")
    return ordered[k - 1], ordered[n - k]
