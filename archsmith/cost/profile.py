"""Where a network spends its parameters, MACs and time: one row per layer.

For a module the rows are its layers, timed by hooks while it runs eagerly; for an ONNX file the rows are the kernels
that ONNX Runtime runs *after* its fusions, and the file's nodes are assigned to them. Rows never sum exactly to the
whole, which is measured by itself, without hooks or profiler.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from archsmith.cost.backends import Target, onnx_feed, onnx_session, threads_pinned, torch_run
from archsmith.cost.counts import Convention, Counts, count
from archsmith.cost.latency import Latency, measure_latency
from archsmith.cost.onnx_counts import count_onnx
from archsmith.cost.timing import MINIMUM_ROUNDS, Clock
from archsmith.graph import Inputs

TABLE_COLUMNS = ("layer", "kind", "output", "params", "MACs", "latency ms", "% of time")


@dataclass(frozen=True)
class LayerProfile:
    """One row of a profile.

    Args:
        name: Qualified name of the module (empty for the network itself), or name of the kernel.
        kind: Class of the module, or operator of the kernel.
        params: Own parameters.
        macs: Own MACs for one example.
        output_shape: Shape of the first output for one example; None where unknown.
        latency_ms: Median over the rounds of its own time per call of the network, with the batch given; None where
            it never ran by itself.
    """

    name: str
    kind: str
    params: int
    macs: int
    output_shape: tuple[int, ...] | None
    latency_ms: float | None


@dataclass(frozen=True)
class Profile:
    """Rows and totals.

    Args:
        layers: Rows: modules in the order of ``named_modules``, or kernels in the order of execution.
        counts: Exact totals for one example, with their convention.
        latency: Whole network, measured without hooks, with the batch given.
        note: What a reader must know about the rows.
    """

    layers: tuple[LayerProfile, ...]
    counts: Counts
    latency: Latency
    note: str

    def to_table(self) -> list[tuple[str, ...]]:
        """Return the rows as text for ``TABLE_COLUMNS``, without layers that cost nothing, the total last."""
        timed = sum(row.latency_ms or 0.0 for row in self.layers)
        rows = [_table_row(row, timed) for row in self.layers if row.params or row.macs or row.latency_ms]
        total = f"{self.latency.median_ms:.3f}"
        return [*rows, ("total", "", "", f"{self.counts.params:,}", f"{self.counts.macs:,}", total, "")]


def _table_row(row: LayerProfile, timed: float) -> tuple[str, ...]:
    shape = "x".join(map(str, row.output_shape)) if row.output_shape is not None else ""
    known = row.latency_ms is not None
    return (
        row.name or "(network)",
        row.kind,
        shape,
        f"{row.params:,}",
        f"{row.macs:,}",
        f"{row.latency_ms:.3f}" if known else "",
        f"{100 * (row.latency_ms or 0.0) / timed:.1f}" if known and timed else "",
    )


def profile(
    target: Target,
    inputs: Inputs,
    *,
    convention: Convention = "standard",
    threads: int = 1,
    rounds: int = MINIMUM_ROUNDS,
    block_ms: float = 5.0,
    reference: tuple[Target, Inputs] | None = None,
    clock: Clock = time.perf_counter,
) -> Profile:
    """Profile a network on the CPU, layer by layer.

    Args:
        target: ``nn.Module`` with real weights (eager torch), or path or content of an ONNX model (ONNX Runtime).
        inputs: One tensor or a tuple of arguments. Counts are for one example, times for the whole batch.
        convention: What counts as a MAC, see ``count``.
        threads: Threads inside operators.
        rounds: Timed runs behind each row, and rounds of the measurement of the whole, at least 10.
        block_ms: Shortest block of the measurement of the whole.
        reference: Another reference network and its inputs, see ``measure_many``.
        clock: Monotonic clock in seconds; for tests.

    Raises:
        UserError: The target does not run with these inputs, or an option is out of range.
        MissingExtra: An ONNX model was given and onnx or onnxruntime is not installed.
    """
    if isinstance(target, nn.Module):
        counts = count(target, inputs, convention=convention)
        times = _module_times(target, inputs, threads=threads, rounds=rounds, clock=clock)
        layers = tuple(
            LayerProfile(n.name, n.kind, n.params, n.macs, n.output_shape, times.get(n.name)) for n in counts.layers
        )
        note = "Times are of eager torch, each layer's own; hooks add a little to every row."
    else:
        counts = count_onnx(target, _one_example_shapes(inputs), convention=convention)
        kernels = _kernel_times(target, inputs, threads=threads, rounds=rounds)
        layers = _kernel_rows(target, counts, kernels)
        note = (
            "Times are of the kernels that ONNX Runtime runs after its fusions; a kernel may stand for several nodes."
        )
    latency = measure_latency(
        target,
        inputs,
        backend="torch" if isinstance(target, nn.Module) else "onnxruntime",
        threads=threads,
        rounds=rounds,
        block_ms=block_ms,
        reference=reference,
        clock=clock,
    )
    return Profile(layers, counts, latency, note)


def _one_example_shapes(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    """Return the input shapes with batch 1 where the first axis is the batch."""
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return tuple((1, *shape[1:]) if shape and shape[0] == shapes[0][0] else shape for shape in shapes)


def _module_times(module: nn.Module, inputs: Inputs, *, threads: int, rounds: int, clock: Clock) -> Mapping[str, float]:
    """Return the median of every module's own milliseconds per run of the network, its submodules' time taken off."""
    samples: dict[str, list[float]] = defaultdict(list)
    with threads_pinned(threads), torch_run(module, inputs, precision="fp32", device="cpu") as run:
        run(1)
        for _ in range(rounds):
            with _own_times(module, clock) as own:
                run(1)
            for name, seconds in own.items():
                samples[name].append(seconds * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


@contextmanager
def _own_times(module: nn.Module, clock: Clock) -> Iterator[dict[str, float]]:
    """Collect seconds per module name: a running module's time minus that of the modules it calls."""
    own: dict[str, float] = defaultdict(float)
    running: list[list[float]] = []  # per module that is running: [start, seconds of the modules it called]

    with ExitStack() as stack:
        for name, submodule in module.named_modules():

            def enter(m: nn.Module, args: Any) -> None:
                running.append([clock(), 0.0])

            def leave(m: nn.Module, args: Any, out: Any, name: str = name) -> None:
                start, called = running.pop()
                whole = clock() - start
                own[name] += whole - called
                if running:
                    running[-1][1] += whole

            stack.callback(submodule.register_forward_pre_hook(enter).remove)
            stack.callback(submodule.register_forward_hook(leave).remove)
        yield own


@dataclass(frozen=True)
class _Kernel:
    """A kernel in ONNX Runtime's own profile."""

    name: str
    operator: str
    latency_ms: float


def _kernel_times(model: str | Path | bytes, inputs: Inputs, *, threads: int, rounds: int) -> list[_Kernel]:
    """Return the kernels of one run in the order of execution, with median times over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        session = onnx_session(model, threads=threads, profile_prefix=str(Path(folder) / "profile"))
        feed = onnx_feed(session, inputs)
        for _ in range(rounds + 1):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    samples: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            details = event["args"]
            # Kernels that a fusion made may share a name (ReorderOutput), never an index.
            key = (name.removesuffix("_kernel_time"), str(details["op_name"]), str(details["node_index"]))
            samples[key].append(event["dur"] / 1e3)  # ONNX Runtime writes whole microseconds
    # The first run pays for allocations.
    return [
        _Kernel(name, operator, statistics.median(values[1:] or values))
        for (name, operator, _), values in samples.items()
    ]


def _kernel_rows(model: str | Path | bytes, counts: Counts, kernels: Sequence[_Kernel]) -> tuple[LayerProfile, ...]:
    """Assign the file's nodes, with their counts, to kernels; what fits none is a last row without a time."""
    import onnx

    graph = (onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(str(model))).graph
    nodes = dict(zip([layer.name for layer in counts.layers], graph.node, strict=True))
    makers = {output: name for name, node in nodes.items() for output in node.output}
    costly = {layer.name: layer for layer in counts.layers if layer.macs or layer.params}
    shapes = {layer.name: layer.output_shape for layer in counts.layers}
    rows = []
    for kernel in kernels:
        node = costly.pop(_node_of(kernel.name, nodes, makers, costly), None)
        params, macs, shape = (node.params, node.macs, node.output_shape) if node else (0, 0, shapes.get(kernel.name))
        rows.append(LayerProfile(kernel.name, kernel.operator, params, macs, shape, kernel.latency_ms))
    if costly:
        kinds = ", ".join(sorted({node.kind for node in costly.values()}))
        params, macs = sum(node.params for node in costly.values()), sum(node.macs for node in costly.values())
        rows.append(LayerProfile("(not assigned)", kinds, params, macs, None, None))
    return tuple(rows)


def _node_of(kernel: str, nodes: Mapping[str, Any], makers: Mapping[str, str], costly: Mapping[str, Any]) -> str:
    """Return the name of the costly node that ``kernel`` runs, or an empty string.

    A kernel is called like its node, like its node with something appended (``MatMulAddFusion``), or, in the blocked
    layout, like the value that it makes with ``_nchwc`` appended: then the node is found by walking back from that
    value over the cheap nodes (activations) that were fused behind it.
    """
    if kernel in costly:
        return kernel
    name = makers.get(kernel.removesuffix("_nchwc"), "")
    while name and name not in costly:
        name = makers.get(next(iter(nodes[name].input), ""), "")
    if kernel.endswith("_nchwc"):
        return name
    return max((name for name in costly if kernel.startswith(name)), key=len, default="")
