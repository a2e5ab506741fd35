"""Interleaved timing: A, B, A, B ... in one process, medians with their spread, and the machine they came from."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 10

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds on the wall, and processor seconds of this process: the second does not see that it waited for a core."""


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS, warmup: int = 2
) -> dict[str, list[float]]:
    """Return seconds of every round by name; each round calls every run once, in order."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> str:
    """Return "median ms (IQR)"."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"{1e3 * statistics.median(seconds):8.1f} ms (IQR {1e3 * (high - low):.1f})"


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Return the median over rounds of a/b, and its quartiles: rounds are paired, so load that hits both cancels."""
    pairs = sorted(x / y for x, y in zip(a, b, strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4)
    return middle, low, high


def machine(threads: int, rounds: int = ROUNDS) -> str:
    """Return one line about where the figures come from."""
    load = os.getloadavg()[0]
    capability = torch.backends.cpu.get_cpu_capability()
    where = f"torch {torch.__version__}, {platform.machine()} {capability}"
    return f"{where}, {threads} thread(s), load {load:.1f}, {rounds} rounds"
