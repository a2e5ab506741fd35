"""Look-up tables measured on this machine: every distinct block once, alone.

Blocks with inputs of one shape are timed in the same interleaved rounds, and with them a network that does nothing. Its
time is the runtime's own: it is taken off every row, and is the table's overhead, which counts once for each network.

A row is the *fastest* of its rounds. Blocks last some tenths of a millisecond, and other work on the machine only ever
adds time: on a busy one the medians of equal blocks differ threefold, while their fastest rounds agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost.latency import Latency, measure_many
from archsmith.cost.lookup import LookupTable, Row
from archsmith.cost.timing import Clock

Parts = Mapping[str, tuple[nn.Module, tuple[int, ...]]]
"""Blocks by key, each with the shape of its input, batch included."""

_NOTHING = "nothing"


def measure_table(
    parts: Parts,
    *,
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 20,
    warmup: int = 5,
    block_ms: float = 3.0,
    clock: Clock = time.perf_counter,
) -> LookupTable:
    """Measure blocks in eager torch, in evaluation mode and without gradients.

    Args:
        parts: Blocks by key, with the shapes of their inputs.
        device: "cpu" or "cuda".
        threads: Threads inside operators.
        rounds: Rounds behind every row, at least 10.
        warmup: Calls of every block before anything is timed.
        block_ms: Shortest block of calls, in milliseconds.
        clock: Monotonic clock in seconds; for tests.

    Returns:
        Rows in milliseconds, and the overhead of a call. The table's ``device`` says where and how it was measured.

    Raises:
        UserError: No parts, or what ``measure_many`` refuses.
    """
    if not parts:
        raise UserError("parts", {}, allowed="at least one block")
    shapes: dict[tuple[int, ...], list[str]] = {}
    for key, (_, shape) in parts.items():
        shapes.setdefault(shape, []).append(key)
    rows: dict[str, Row] = {}
    nothing: list[float] = []
    measured: dict[str, Latency] = {}
    for shape, keys in shapes.items():
        targets = {str(number): parts[key][0] for number, key in enumerate(keys)}
        measured = measure_many(
            {**targets, _NOTHING: nn.Identity()},
            torch.zeros(shape),
            device=device,
            threads=threads,
            rounds=rounds,
            warmup=warmup,
            block_ms=block_ms,
            clock=clock,
        )
        own = min(measured.pop(_NOTHING).samples_ms)
        nothing.append(own)
        for key, latency in zip(keys, measured.values(), strict=True):
            spread = statistics.stdev(latency.samples_ms)
            rows[key] = Row(max(0.0, min(latency.samples_ms) - own), spread, len(latency.samples_ms))
    where = next(iter(measured.values())).provenance
    return LookupTable(
        {key: rows[key] for key in parts},
        device=f"{where.cpu if where.device == 'cpu' else where.device}, torch {where.torch}, {threads} thread(s)",
        overhead=statistics.median(nothing),
    )
