"""What a searched network has to beat: random architectures and the uniformly scaled one, at the same cost.

Each is trained by the method's own recipe without the search, as a run of its own in ``RUN/baselines/<name>/``: own
journal, resumable, its test split read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from archsmith.config import RunConfig
from archsmith.core.errors import UserError
from archsmith.core.files import read_json
from archsmith.core.rng import numpy_stream
from archsmith.families.widths import WidthFamily, random_within, uniform_within
from archsmith.run.costs import AtomFamily, CostModel
from archsmith.space import Architecture, Budget

FOLDER = "baselines"

_EXACT = {"macs", "params", "memory"}


class ScalableFamily(AtomFamily, WidthFamily, Protocol):
    """A family that baselines can be drawn from."""


@dataclass(frozen=True)
class Baseline:
    """One network trained for comparison.

    Attributes:
        name: "uniform", or "random-1" and so on; the name of its folder.
        result: Content of its ``result.json``.
    """

    name: str
    result: Mapping[str, Any]


def baseline_budget(config: RunConfig, result: Mapping[str, Any]) -> str:
    """Return the budget that baselines are held to: the run's own, or the MACs of what it found.

    The second where the run has no budget, or one on a measured latency: all networks must be held to exactly the same.

    Raises:
        UserError: The run removed nothing, so that every network of the family would do.
    """
    if config.budget is not None:
        budget = Budget.parse(config.budget)
        if {limit.cost for limit in budget.limits} <= _EXACT:
            return config.budget
    macs = result["outcomes"][0]["costs"]["macs"]
    if macs >= result["reference"]["macs"]:
        raise UserError(
            "--baselines",
            f"a run that found the whole supernet ({macs:,} MACs)",
            allowed="a run that ended below it",
            hint="There is no smaller cost to compare at; search with a --budget.",
        )
    return f"macs<={macs}"


def baseline_configs(
    config: RunConfig, family: ScalableFamily, costs: CostModel, budget: str, count: int
) -> dict[str, RunConfig]:
    """Return the configurations of the uniformly scaled network and of ``count`` random ones, by name.

    The first ``k`` random ones are the same for every ``count`` of at least ``k``.

    Args:
        config: Configuration of the run that searched.
        family: Its family.
        costs: Costs with ``budget``.
        budget: From ``baseline_budget``.
        count: Number of random architectures, at least 1.

    Raises:
        UserError: ``count`` is below 1, or no scaled network is within the budget.
    """
    if count < 1:
        raise UserError("--baselines", count, allowed="1 or more random architectures")

    def fits(architecture: Architecture) -> bool:
        with torch.device("meta"):
            atoms = family.atoms(family.build(architecture))
        return costs.fits(atoms, {group.name: torch.ones(group.size, dtype=torch.bool) for group in atoms})

    drawn = {"uniform": uniform_within(family, fits)}
    for number in range(1, count + 1):
        drawn[f"random-{number}"] = random_within(family, numpy_stream(config.seed, "baselines", number), fits)
    return {
        name: config.model_copy(update={"budget": budget, "architecture": dict(architecture)})
        for name, architecture in drawn.items()
    }


def read_baselines(run: Path) -> list[Baseline]:
    """Return the finished baselines of a run, the uniformly scaled network first, then by number."""
    found = []
    for file in (run / FOLDER).glob("*/result.json"):
        result = read_json(file)
        if result.get("status") == "finished":
            found.append(Baseline(file.parent.name, result))
    return sorted(found, key=lambda baseline: (baseline.name != "uniform", len(baseline.name), baseline.name))
