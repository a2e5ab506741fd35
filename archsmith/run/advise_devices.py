"""What to use where several things are improved at once, or one training has to serve several devices.

The figures are those of ``benchmarks/results/linas_cpu_202611.md`` (``benchmarks/evidence/linas.py``, ten seeds); where
nothing was measured, it says so.
"""

from __future__ import annotations

from importlib import import_module

from archsmith.core.errors import UserError
from archsmith.families import family_table

METHODS = ("hw_aware_system", "bignas", "simq_nas")
"""Files of the methods that search in one trained supernet."""

MEASURED = (
    "Measured (benchmarks/results/linas_cpu_202611.md, Once-for-All space with a surrogate, 10 seeds), mean hypervolume"
    " after 100 / 250 evaluations: random 2539 / 2622, nsga2 2570 / 2708, linas 2924 / 3102. linas was ahead of nsga2 "
    "with four times the evaluations in 9 / 10 of 10 seeds."
)


def sliced_families() -> dict[str, list[str]]:
    """Return the families that have an elastic supernet, each with the methods that search in it."""
    found: dict[str, list[str]] = {}
    for name in METHODS:
        module = import_module(f"archsmith.methods.{name}")
        for family in module.WORKS_ON:
            found.setdefault(family, []).append(module.SYSTEM["slug"])
    return found


def device_advice(*, objectives: int, devices: int, latency: bool, family: str | None, trained: bool) -> list[str]:
    """Return what to use, a paragraph each, the first the answer.

    Args:
        objectives: Things to improve at once.
        devices: Devices or budgets that need a network each.
        latency: Whether latency is improved or limited.
        family: Name of a family, or None when any will do.
        trained: Whether architectures can be evaluated one by one (a table, a surrogate, trainings).

    Raises:
        UserError: No such family, or no positive number of devices.
    """
    if devices < 1:
        raise UserError("--devices", devices, allowed="an integer from 1")
    known = [row["name"] for row in family_table()]
    if family is not None and family not in known:
        raise UserError("--family", family, allowed=", ".join(known), hint="archsmith families lists them.")
    sliced = sliced_families()
    if trained or (family is not None and family not in sliced):
        lines = []
        if family is not None and family not in sliced:
            lines.append(
                f"The family {family} has no elastic supernet (those that have: {', '.join(sorted(sliced))}): every "
                "architecture is trained, or looked up, by itself."
            )
        lines += ["Several objectives: strategy linas.", MEASURED]
        return [lines[-2], *lines[:-2], lines[-1]]
    name = family or "bignas"
    aim = " --objectives accuracy,latency" if latency else ""
    device = " --device onnxruntime" if latency else ""
    command = f"archsmith search --method {{}} --family {name}{device}{aim}"
    lines = [
        f"One supernet for {'several devices' if devices > 1 else 'all of the Pareto set'}: "
        + command.format("linas")
        + ".",
        MEASURED,
    ]
    if devices > 1:
        lines.append(
            "For the next device search in the same weights, without training: --set supernet=RUN, the folder of "
            "the first run, and its --device, --latency-precision and --latency-threads."
        )
    if "bignas" in sliced[name]:
        lines.append(
            f"For one network within each of several budgets: {command.format('bignas')}. On our small tasks its "
            "sandwich rule was not shown better than random children (docs/systems/bignas.md)."
        )
    if latency and "simq-nas" in sliced[name]:
        lines.append(
            f"With int8 chosen layer by layer: {command.format('simq-nas')}. Searching both together was not shown "
            "better than the architecture first and int8 afterwards (docs/systems/simq-nas.md)."
        )
    return lines
