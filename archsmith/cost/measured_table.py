"""Look-up tables measured on this machine: every distinct block once, alone.

Blocks with inputs of one shape are timed in the same interleaved rounds, and with them a network that does nothing. Its
time is the runtime's own: it is taken off every row, and is the table's overhead, which counts once for each network.

A row is the *fastest* of its rounds. Blocks last some tenths of a millisecond, and other work on the machine only ever
adds time: on a busy one the medians of equal blocks differ threefold, while their fastest rounds agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost.backends import Backend, Target
from archsmith.cost.latency import Latency, measure_many
from archsmith.cost.lookup import LookupTable, Row
from archsmith.cost.onnx_export import export_onnx
from archsmith.cost.timing import Clock

Parts = Mapping[str, tuple[nn.Module, tuple[int, ...]]]
"""Blocks by key, each with the shape of its input, batch included."""

_NOTHING = "nothing"


def measure_table(
    parts: Parts,
    *,
    backend: Backend = "torch",
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 20,
    warmup: int = 5,
    block_ms: float = 3.0,
    clock: Clock | None = None,
) -> LookupTable:
    """Measure blocks one by one, in evaluation mode and without gradients.

    Args:
        parts: Blocks by key, with the shapes of their inputs.
        backend: "torch" (eager), or "onnxruntime": every block is exported by itself, normalisations folded. The table
            must be of the backend that the networks will run in.
        device: "cpu" or "cuda".
        threads: Threads inside operators.
        rounds: Rounds behind every row, at least 10.
        warmup: Calls of every block before anything is timed.
        block_ms: Shortest block of calls, in milliseconds.
        clock: Monotonic clock in seconds, for tests; see ``measure_many``.

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
        blocks = {str(number): parts[key][0] for number, key in enumerate(keys)} | {_NOTHING: nn.Identity()}
        measured = measure_many(
            {name: _target(block, shape, backend) for name, block in blocks.items()},
            torch.zeros(shape),
            backend=backend,
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
    runtime = f"torch {where.torch}" if backend == "torch" else f"onnxruntime {where.onnxruntime}"
    return LookupTable(
        {key: rows[key] for key in parts},
        device=f"{where.cpu if where.device == 'cpu' else where.device}, {runtime}, {threads} thread(s)",
        overhead=statistics.median(nothing),
    )


def _target(block: nn.Module, shape: tuple[int, ...], backend: Backend) -> Target:
    """Return what the backend runs: the block, or its export for just this shape."""
    if backend == "torch":
        return block
    model = export_onnx(block, torch.zeros(shape), free_batch=False)
    return bytes(model.SerializeToString())
