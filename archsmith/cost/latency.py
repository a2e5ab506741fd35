"""Latency on this machine, measured so that somebody else can believe it, and the rule for claims about it.

One measurement is the median of at least 10 interleaved rounds against a fixed reference network; it carries all
samples, its spread, its interval, and where it comes from. Numbers of different backends, devices, thread counts,
precisions or batches are different quantities; ``Provenance`` tells them apart.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from archsmith.core.errors import Shown, UserError
from archsmith.cost.backends import (
    Backend,
    Precision,
    Target,
    cuda_clock,
    import_onnxruntime,
    onnx_run,
    threads_pinned,
    torch_run,
)
from archsmith.cost.onnx_layers import onnx_precision
from archsmith.cost.reference import REFERENCE_NAME, reference_inputs, reference_network, reference_onnx
from archsmith.cost.timing import NOISY_SPREAD, Clock, Run, interleave, median_interval, quartile_range
from archsmith.graph import Inputs

Verdict = Literal["holds", "violated", "not verifiable now"]
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Provenance:
    """Where a latency comes from.

    Args:
        backend: ``torch`` (eager) or ``onnxruntime``.
        device: ``cpu``, or the name of the GPU.
        threads: Threads inside operators.
        precision: ``fp32``, ``bf16``, or for an ONNX file ``as stored``, with what it holds where that is not all fp32
            ("as stored: fp32 2/5 + int8 3/5 weights").
        input_shapes: Shapes of the input tensors, batch included.
        reference: Name of the reference network, or ``given`` for the caller's own.
        warmup: Calls before anything was timed.
        block_ms: Shortest allowed block in milliseconds.
        torch: Version of torch.
        onnxruntime: Version of ONNX Runtime when it was the backend.
        python: Version of Python.
        cpu: Model of the processor.
        cpu_capability: Instruction set that torch uses on it, for example ``AVX2``.
        cores: Cores that this process may use.
        load_average: The machine's load over 1, 5 and 15 minutes, read before the first call.
        execution: ``eager``, ``cuda graph`` (captured once, then replayed), or ``session`` of ONNX Runtime.
        timer: ``wall clock``, or ``cuda events``.
    """

    backend: str
    device: str
    threads: int
    precision: str
    input_shapes: tuple[tuple[int, ...], ...]
    reference: str
    warmup: int
    block_ms: float
    torch: str
    onnxruntime: str | None
    python: str
    cpu: str
    cpu_capability: str
    cores: int
    load_average: tuple[float, ...]
    execution: str = "eager"
    timer: str = "wall clock"


@dataclass(frozen=True)
class Latency:
    """Time of one call of a network; all figures derive from the samples.

    Args:
        samples_ms: Milliseconds per call, one sample per round.
        reference_ms: The same for the reference network, round by round.
        repeats: Calls per block behind each sample.
        provenance: Where and how it was measured.
    """

    samples_ms: tuple[float, ...]
    reference_ms: tuple[float, ...]
    repeats: int
    provenance: Provenance

    @property
    def median_ms(self) -> float:
        """Median of the samples in milliseconds: the number to quote."""
        return statistics.median(self.samples_ms)

    @property
    def iqr_ms(self) -> float:
        """Distance between the quartiles in milliseconds."""
        return quartile_range(self.samples_ms)

    @property
    def interval_ms(self) -> tuple[float, float]:
        """95 % interval of the median in milliseconds, from order statistics."""
        return median_interval(self.samples_ms)

    @property
    def noisy(self) -> bool:
        """Whether IQR / median exceeds 0.1, or the median is not positive: too unsteady for a claim."""
        return not self.iqr_ms <= NOISY_SPREAD * self.median_ms or self.median_ms <= 0

    @property
    def ratio(self) -> float:
        """Median over the rounds of this latency divided by that of the reference network in the same round."""
        return statistics.median(s / r for s, r in zip(self.samples_ms, self.reference_ms, strict=True))

    @property
    def throughput_per_s(self) -> float:
        """Examples per second at this batch (first axis of the first input)."""
        return self.provenance.input_shapes[0][0] * 1e3 / self.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Return samples, provenance and (for readers) the derived figures as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "median_ms": self.median_ms,
            "iqr_ms": self.iqr_ms,
            "interval_ms": list(self.interval_ms),
            "noisy": self.noisy,
            "ratio": self.ratio,
            "throughput_per_s": self.throughput_per_s,
            "samples_ms": list(self.samples_ms),
            "reference_ms": list(self.reference_ms),
            "repeats": self.repeats,
            "provenance": {
                **asdict(self.provenance),
                "input_shapes": [list(shape) for shape in self.provenance.input_shapes],
                "load_average": list(self.provenance.load_average),
            },
        }

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Latency:
        """Return the latency that ``to_dict`` wrote; the derived figures are computed again.

        Raises:
            UserError: Another format version, or a field is missing or unknown.
        """
        if value.get("format_version") != FORMAT_VERSION:
            raise UserError("latency", value.get("format_version"), allowed=f"format_version {FORMAT_VERSION}")
        try:
            provenance = dict(value["provenance"])
            provenance["input_shapes"] = tuple(tuple(shape) for shape in provenance["input_shapes"])
            provenance["load_average"] = tuple(provenance["load_average"])
            return Latency(
                tuple(value["samples_ms"]), tuple(value["reference_ms"]), value["repeats"], Provenance(**provenance)
            )
        except (KeyError, TypeError) as error:
            raise UserError("latency", Shown(f"a record with {error}"), allowed="what Latency.to_dict wrote") from error


def claim(latency: Latency, limit_ms: float) -> Verdict:
    """Decide whether ``latency`` keeps a limit.

    Returns:
        ``not verifiable now`` when the measurement is noisy; else ``violated`` when even the lower end of the 95 %
        interval lies above the limit; else ``holds``.

    Raises:
        UserError: The limit is not a positive number.
    """
    if not limit_ms > 0:
        raise UserError("limit_ms", limit_ms, allowed="a positive number of milliseconds")
    if latency.noisy:
        return "not verifiable now"
    return "violated" if latency.interval_ms[0] > limit_ms else "holds"


def measure_latency(
    target: Target,
    inputs: Inputs,
    *,
    backend: Backend = "torch",
    precision: Precision = "fp32",
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 10,
    warmup: int = 10,
    block_ms: float = 5.0,
    reference: tuple[Target, Inputs] | None = None,
    cuda_graph: bool = False,
    clock: Clock | None = None,
) -> Latency:
    """Measure one target; see ``measure_many``, which this calls with that target alone.

    Example:
        >>> latency = measure_latency(nn.Linear(8, 8), torch.zeros(1, 8))
        >>> len(latency.samples_ms)
        10
    """
    return measure_many(
        {"target": target},
        inputs,
        backend=backend,
        precision=precision,
        device=device,
        threads=threads,
        rounds=rounds,
        warmup=warmup,
        block_ms=block_ms,
        reference=reference,
        cuda_graph=cuda_graph,
        clock=clock,
    )["target"]


def measure_many(
    targets: Mapping[str, Target],
    inputs: Inputs,
    *,
    backend: Backend = "torch",
    precision: Precision = "fp32",
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 10,
    warmup: int = 10,
    block_ms: float = 5.0,
    reference: tuple[Target, Inputs] | None = None,
    cuda_graph: bool = False,
    clock: Clock | None = None,
) -> dict[str, Latency]:
    """Measure several targets on the same inputs, interleaved: in every round the reference, then each target in turn.

    Networks run in evaluation mode without gradients, on ``threads`` threads; mode and thread count are restored.

    Args:
        targets: Name to ``nn.Module`` (backend ``torch``) or to path or content of an ONNX model (``onnxruntime``).
        inputs: One tensor or a tuple of arguments, batch included.
        backend: ``torch`` is eager execution and includes the overhead of Python; ``onnxruntime`` fuses operators.
        precision: ``fp32`` or ``bf16`` for torch; an ONNX file has the precision that it was stored with (int8, say,
            see ``quantise_onnx``), and its provenance tells it.
        device: ``cpu``, or ``cuda`` with torch.
        threads: Threads inside operators.
        rounds: Number of rounds, at least 10.
        warmup: Calls of each target before anything is timed.
        block_ms: Shortest block: the calls of one sample together last at least about this many milliseconds.
        reference: Another reference network and its inputs, in the same backend; None takes the fixed one.
        cuda_graph: Capture each network once as a CUDA graph and time its replay: kernels without Python in between.
        clock: Monotonic clock in seconds, for tests. By default events on the GPU for CUDA, else the wall clock.

    Returns:
        Latency per name.

    Raises:
        UserError: An option or target that does not fit the backend, no targets, or too few rounds.
        MissingExtra: onnxruntime (or onnx, for the reference network) is not installed.
    """
    _check_options(targets, backend, precision, device, cuda_graph)
    name = REFERENCE_NAME if reference is None else "given"
    if reference is None:
        reference = (reference_network() if backend == "torch" else reference_onnx(), reference_inputs())
    pairs: list[tuple[Target, Inputs]] = [reference, *((target, inputs) for target in targets.values())]
    timer = "cuda events" if device != "cpu" and clock is None else "wall clock"
    execution = "session" if backend == "onnxruntime" else "cuda graph" if cuda_graph else "eager"
    provenance = replace(
        _provenance(backend, precision, device, threads, inputs, name, warmup, block_ms),
        execution=execution,
        timer=timer,
    )
    if clock is None:
        clock = time.perf_counter if device == "cpu" else cuda_clock(device)
    with ExitStack() as stack:
        stack.enter_context(threads_pinned(threads))
        runs: dict[str, Run] = {}
        for position, (target, arguments) in enumerate(pairs):
            if isinstance(target, nn.Module):
                run = stack.enter_context(
                    torch_run(target, arguments, precision=precision, device=device, cuda_graph=cuda_graph)
                )
            else:
                run = onnx_run(target, arguments, threads=threads)
            # Positions as names: a caller's target may be called like the reference.
            runs[str(position)] = run
        samples = interleave(runs, rounds=rounds, warmup=warmup, block_ms=block_ms, clock=clock)
    return {
        key: Latency(
            samples[str(i)].milliseconds,
            samples["0"].milliseconds,
            samples[str(i)].repeats,
            replace(provenance, precision=_stored(target, provenance.precision)),
        )
        for i, (key, target) in enumerate(targets.items(), start=1)
    }


def _stored(target: Target, precision: str) -> str:
    """Return the precision with what an ONNX file holds, where that is not all fp32 and onnx is there to read it."""
    if isinstance(target, nn.Module) or importlib.util.find_spec("onnx") is None:
        return precision
    held = onnx_precision(target)
    return precision if held == "fp32" else f"{precision}: {held}"


def _check_options(targets: Mapping[str, Target], backend: str, precision: str, device: str, cuda_graph: bool) -> None:
    if backend not in get_args(Backend):
        raise UserError("backend", backend, allowed=" or ".join(get_args(Backend)))
    if precision not in get_args(Precision):
        raise UserError("precision", precision, allowed=" or ".join(get_args(Precision)))
    if backend == "onnxruntime" and (precision != "fp32" or device != "cpu"):
        raise UserError("backend", Shown(f"onnxruntime with {precision} on {device}"), allowed="fp32 on cpu")
    if device != "cpu" and not (re.fullmatch(r"cuda(:\d+)?", device) and torch.cuda.is_available()):
        raise UserError("device", device, allowed="cpu, or cuda where torch finds a GPU")
    if cuda_graph and device == "cpu":
        raise UserError("cuda_graph", True, allowed="False on the CPU", hint="Give device 'cuda'.")
    if not targets:
        raise UserError("targets", dict(targets), allowed="at least one network")
    for name, target in targets.items():
        wanted = nn.Module if backend == "torch" else (str, Path, bytes)
        if not isinstance(target, wanted):
            raise UserError(
                f"target '{name}'",
                Shown(f"a {type(target).__name__} for backend {backend}"),
                allowed="an nn.Module" if backend == "torch" else "path or content of an ONNX model",
            )


def _provenance(
    backend: str,
    precision: str,
    device: str,
    threads: int,
    inputs: Inputs,
    reference: str,
    warmup: int,
    block_ms: float,
) -> Provenance:
    return Provenance(
        backend=backend,
        device=torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        threads=threads,
        precision=precision if backend == "torch" else "as stored",
        input_shapes=tuple(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)),
        reference=reference,
        warmup=warmup,
        block_ms=block_ms,
        torch=torch.__version__,
        onnxruntime=str(import_onnxruntime().__version__) if backend == "onnxruntime" else None,
        python=platform.python_version(),
        cpu=_cpu_model(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else (),
    )


def _cpu_model() -> str:
    """Return the processor's name as Linux tells it, elsewhere what the platform knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
