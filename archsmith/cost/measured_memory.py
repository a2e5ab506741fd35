"""Peak memory as it was measured, beside the analytic peak of ``memory.py``.

``measured_peak`` follows torch's allocator through one forward pass: what the network's tensors really took at once,
scratch memory of the kernels included (the analytic peak leaves it out). On the CPU the allocator's own events are
read; on CUDA, its statistics. ``resident_peak`` asks the kernel how much memory a piece of work added to the process:
pages, libraries and freed blocks that were kept included, so an upper bound and approximate.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost.backends import torch_run
from archsmith.cost.energy import NotAvailable
from archsmith.graph import Inputs


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at once.

    Args:
        bytes: Largest sum of live blocks during the call, those that lived before it excluded (weights, inputs).
        source: ``allocator`` or ``resident set``.
        device: Where.
    """

    bytes: int
    source: str
    device: str


def measured_peak(module: nn.Module, inputs: Inputs, *, device: str = "cpu") -> PeakMemory:
    """Return the most bytes that torch's allocator had handed out at once during one forward pass.

    Args:
        module: Network; run in evaluation mode without gradients.
        inputs: One tensor or a tuple of arguments; they are not counted.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: CUDA without a GPU.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError("device", device, allowed="cpu, or cuda where torch finds a GPU")
    with torch_run(module, inputs, precision="fp32", device=device) as run:
        run(1)  # what is allocated once for all calls
        if device != "cpu":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run(1)
            return PeakMemory(torch.cuda.max_memory_allocated(device) - before, "allocator", device)
        return PeakMemory(_peak_of_events(lambda: run(1)), "allocator", device)


def _peak_of_events(work: Callable[[], None]) -> int:
    """Return the largest running sum of the allocations and releases during ``work``."""
    with tempfile.TemporaryDirectory(prefix="archsmith-") as folder:
        path = Path(folder, "trace.json")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    sizes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = peak = 0
    for _, _, size in sizes:
        now += size
        peak = max(peak, now)
    return peak


def resident_peak(work: Callable[[], None], *, process: Path = Path("/proc/self")) -> PeakMemory | NotAvailable:
    """Return by how much the peak of the process's resident memory rose above its start while ``work`` ran.

    Args:
        work: What to watch; a session's loading and first run, say.
        process: Where the kernel tells about this process.

    Only what is newly touched counts: run it in a fresh process for a number that means something.
    """
    try:
        (process / "clear_refs").write_text("5")  # resets the peak
        before = _kilobytes(process, "VmRSS")
        work()
        return PeakMemory(1024 * max(0, _kilobytes(process, "VmHWM") - before), "resident set", "cpu")
    except (OSError, ValueError) as error:
        if not process.joinpath("status").exists() or isinstance(error, ValueError | PermissionError):
            return NotAvailable(f"{process} does not tell: {error}")
        raise


def _kilobytes(process: Path, field: str) -> int:
    for line in (process / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(f"no {field}")
