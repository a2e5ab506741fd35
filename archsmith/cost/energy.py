"""Energy of a network on this machine, where the machine tells: Intel's and AMD's RAPL counters under Linux.

Nothing is ever estimated. A machine without readable counters (virtual machines have none, and some systems let only
root read them) gives ``NotAvailable`` with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from archsmith.core.errors import UserError
from archsmith.cost.timing import Clock, Run

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class NotAvailable:
    """There is no measurement.

    Args:
        reason: Why not.
    """

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"not available ({self.reason})"


@dataclass(frozen=True)
class Energy:
    """Energy of one call.

    Args:
        joules_per_call: Of the whole processor package while the network ran, everything else on it included.
        idle_joules_per_call: What the package took in the same time while this process slept, measured before.
        calls: Calls behind the number.
        seconds: How long they took.
        domains: The counters that were added up.
    """

    joules_per_call: float
    idle_joules_per_call: float
    calls: int
    seconds: float
    domains: tuple[str, ...]

    @property
    def net_joules_per_call(self) -> float:
        """What the network added to the idle machine; may be negative where other work stopped meanwhile."""
        return self.joules_per_call - self.idle_joules_per_call


@dataclass(frozen=True)
class _Counter:
    """One package's counter of microjoules, which begins anew at its largest value."""

    name: str
    file: Path
    largest: int

    def read(self) -> int:
        return int(self.file.read_text())

    def between(self, before: int, after: int) -> float:
        """Return joules."""
        return ((after - before) if after >= before else (after - before + self.largest)) * 1e-6


def energy_counters(root: Path = POWERCAP) -> list[_Counter] | NotAvailable:
    """Return the counters of the processor packages, or why there are none.

    Args:
        root: Where the kernel shows them.
    """
    packages = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
    packages = [folder for folder in packages if folder.name.count(":") == 1]  # those with two are parts of a package
    if not packages:
        return NotAvailable(f"no RAPL counters under {root}: not Linux on bare metal, or a processor without them")
    counters = []
    for folder in packages:
        try:
            name = (folder / "name").read_text().strip()
            largest = int((folder / "max_energy_range_uj").read_text())
            counter = _Counter(name, folder / "energy_uj", largest)
            counter.read()
        except (OSError, ValueError) as error:
            return NotAvailable(f"{folder.name} cannot be read: {getattr(error, 'strerror', None) or error}")
        counters.append(counter)
    return counters


def measure_energy(
    run: Run,
    *,
    seconds: float = 2.0,
    root: Path = POWERCAP,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy | NotAvailable:
    """Measure the energy of one call of a run, idle consumption beside it.

    Args:
        run: Makes the given number of calls and returns when all are finished (``backends.torch_run``, ``onnx_run``).
        seconds: How long to run at least, and to idle before.
        root: Where the kernel shows the counters.
        clock: Monotonic clock in seconds; for tests.
        sleep: How to idle; for tests.

    Raises:
        UserError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise UserError("seconds", seconds, allowed="a positive number of seconds")
    counters = energy_counters(root)
    if isinstance(counters, NotAvailable):
        return counters
    run(1)
    before, start = [each.read() for each in counters], clock()
    sleep(seconds)
    idle, idle_seconds = _spent(counters, before), clock() - start
    before, start, calls = [each.read() for each in counters], clock(), 0
    block = 1
    while (elapsed := clock() - start) < seconds:
        run(block)
        calls += block
        block = block if elapsed > 0.1 * seconds else 2 * block
    spent, elapsed = _spent(counters, before), clock() - start
    power = idle / idle_seconds if idle_seconds > 0 else 0.0
    return Energy(spent / calls, power * elapsed / calls, calls, elapsed, tuple(each.name for each in counters))


def _spent(counters: list[_Counter], before: list[int]) -> float:
    return sum(each.between(value, each.read()) for each, value in zip(counters, before, strict=True))
