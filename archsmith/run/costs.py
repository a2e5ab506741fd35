"""What candidates of one run cost, and whether they are within its budget.

MACs, parameters and memory are exact. Latency is measured on the candidate itself, built and timed alone where it is
going to run (``Deployment``); each measurement goes to the journal and is read from there when the run is resumed, so
that every decision that rests on it repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from archsmith.atoms.groups import Atoms
from archsmith.atoms.score import cost_of
from archsmith.core.errors import Shown, UserError
from archsmith.core.protocols import Logger
from archsmith.cost import Deployment, Latency, LookupTable, count, measure_table, peak_activation_bytes, weight_bytes
from archsmith.cost.measured_table import Parts
from archsmith.run.measured import Measured
from archsmith.space import Architecture, Budget, ProductSpace

LATENCY_MARGIN = 0.95
"""Part of a latency limit that the search aims at; the rest is for the spread of the measurement."""

CALIBRATION_IMAGES = 100
"""Training images for the ranges of int8 activations; SimQ-NAS's number (arXiv 2312.13301)."""

COSTS = ("macs", "params", "memory", "latency")


class BuildableFamily(Protocol):
    """What every family can say of its points."""

    @property
    def image(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""

    @property
    def space(self) -> ProductSpace:
        """The space whose points it builds."""

    def largest(self) -> Architecture:
        """Return the architecture with every atom."""

    def smallest(self) -> Architecture:
        """Return the cheapest valid architecture."""

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
        """Return its network."""


class AtomFamily(BuildableFamily, Protocol):
    """A family whose networks are cut atom by atom."""

    def atoms(self, network: Any) -> Atoms:
        """Return the removable units of a network."""

    def kept(self, atoms: Atoms, keep: Mapping[str, Tensor]) -> Architecture:
        """Return the architecture that is left of a network when only ``keep`` stays."""


class CostModel:
    """Costs of a family's networks and the budget over them.

    Args:
        family: The family; its largest network is the reference of relative limits ("0.4x").
        budget: Budget as the user wrote it, or None.
        journal: Where latency measurements are recorded and found again.
        deployment: Where networks are measured; torch on the CPU in fp32 with one thread if None.
        calibration: Training inputs for the ranges of int8 activations; zeros if None.

    Attributes:
        deployment: See above; None where nothing was asked for.
        measured: The latencies of the run.
        largest: Costs of the largest network by name: "macs", "params", "memory" (weights and peak activations in
            bytes, batch 1, float32), and "latency" (ms, batch 1) when the budget names it.
        smallest: The same of the smallest.
        limits: Absolute limits by cost name; empty without a budget.
        base: MACs and parameters of the largest network outside its atoms; all of them in a family of choices only.
        additive: Whether every limit is on MACs or parameters, which need no network to be built.

    Raises:
        UserError: A cost that cannot be limited here, a limit that the largest network keeps anyway, or one that the
            smallest does not reach (its costs, the nearest that exist, are said).
    """

    def __init__(
        self,
        family: BuildableFamily,
        budget: Budget | None,
        journal: Logger,
        *,
        deployment: Deployment | None = None,
        calibration: Tensor | None = None,
    ) -> None:
        self.family = family
        self.deployment = deployment
        self.calibration = torch.zeros(2, *family.image) if calibration is None else calibration
        self._journal = journal
        self.measured = Measured(journal)
        self._known: dict[str, dict[str, Any]] = {}
        names = [limit.cost for limit in budget.limits] if budget else []
        if foreign := [name for name in names if name not in COSTS]:
            raise UserError("budget", str(budget), allowed=f"limits on {', '.join(COSTS)}", hint=f"Drop {foreign[0]}.")
        self._latency = "latency" in names
        self.largest = self.of(family.largest())
        self.smallest = self.of(family.smallest())
        self.base = {name: self.largest[name] for name in ("macs", "params")}
        if hasattr(family, "atoms"):
            atoms = family.atoms(family.build(family.largest()))
            self.base = {name: self.largest[name] - atoms.cost(name) for name in self.base}
        self.limits: dict[str, float] = {}
        self.budget_text = ""
        if budget is not None:
            budget.check_feasible(smallest=self.smallest, largest=self.largest)
            self.limits = {limit.cost: limit.value for limit in budget.resolve(self.largest).limits}
            self._require_aim(budget)
            self.budget_text = str(budget)
        self.additive = bool(self.limits) and set(self.limits) <= {"macs", "params"}

    def _require_aim(self, budget: Budget) -> None:
        """Refuse a latency limit that the smallest network keeps, but not with the margin that a search aims at."""
        limit, nearest = self.limits.get("latency"), self.smallest.get("latency")
        if limit is not None and nearest is not None and nearest > LATENCY_MARGIN * limit:
            raise UserError(
                "budget",
                Shown(f"{budget}, latency {limit:.4g} ms"),
                allowed=f"latency at least {nearest / LATENCY_MARGIN:.4g} ms: the nearest that exists, the smallest "
                f"network, takes {nearest:.4g} ms, and a search aims at {LATENCY_MARGIN} of a limit",
            )

    @property
    def target_fraction(self) -> float:
        """The tightest limit relative to the largest network; what a search plans its way down by."""
        return min((limit / self.largest[name] for name, limit in self.limits.items()), default=1.0)

    def of(self, architecture: Architecture) -> dict[str, Any]:
        """Return the costs of an architecture by name (see ``largest``); each is counted and measured once."""
        costs = self.counted(architecture)
        return {**costs, "latency": self.latency_ms(architecture)} if self._latency else costs

    def counted(self, architecture: Architecture) -> dict[str, Any]:
        """Return the exact costs of an architecture by name; nothing is measured."""
        if architecture.digest not in self._known:
            with torch.device("meta"):
                network = self.family.build(architecture)
            self._known[architecture.digest] = exact_costs(network, self.family.image)
        return dict(self._known[architecture.digest])

    def fits(self, atoms: Atoms, keep: Mapping[str, Tensor]) -> bool:
        """Return whether the network that ``keep`` leaves of ``atoms`` is within every limit."""
        for name, limit in self.limits.items():
            if name in ("macs", "params") and self._additive_cost(atoms, keep, name) > limit:
                return False
        if self.additive or not self.limits:
            return True
        costs = self.of(cast(AtomFamily, self.family).kept(atoms, keep))
        margin = {"latency": LATENCY_MARGIN}
        return all(costs[name] <= limit * margin.get(name, 1.0) for name, limit in self.limits.items())

    def _additive_cost(self, atoms: Atoms, keep: Mapping[str, Tensor], name: str) -> int:
        dead = sum(
            block.cost.get(name, 0)
            for block in atoms.blocks
            if not any(bool(keep[group].any()) for group in block.groups)
        )
        return int(self.base[name] + cost_of(atoms, keep, name) - dead)

    def lookup_table(self, parts: Parts) -> LookupTable:
        """Return a latency table of these parts in ms (torch, one thread), measured once in the life of the run.

        Args:
            parts: Blocks by key, with the shapes of their inputs.
        """
        for event in self._journal.events("latency_table"):
            if set(event["table"]["entries"]) == set(parts):
                return LookupTable.from_json(event["table"])
        table = measure_table(parts)
        self._journal.record("latency_table", table=table.to_json())
        return table

    def latency_ms(self, architecture: Architecture, network: Callable[[], nn.Module] | None = None) -> float:
        """Return the median latency in ms, measured once for each architecture in the life of the run.

        Args:
            architecture: What is measured.
            network: Returns its trained network; a new one of the family is as fast, and is built if None.
        """
        return self.measured.ms(architecture.digest, lambda: self.measure(architecture, network))

    def measure(self, architecture: Architecture, network: Callable[[], nn.Module] | None = None) -> Latency:
        """Return a latency that is measured now; see ``latency_ms``."""
        made = self.family.build(architecture) if network is None else network()
        deployed = (self.deployment or Deployment()).ready(made.eval(), self.calibration)
        return deployed.measure(torch.zeros(1, *self.family.image))


def exact_costs(network: nn.Module, example: Tensor | tuple[int, ...]) -> dict[str, Any]:
    """Return "macs", "params" and "memory" (weights and peak activations in bytes) of a network for one example.

    Args:
        network: What is counted.
        example: One input, as ``Task.plain_inputs`` gives it, or the shape of an image.
    """
    device = next(network.parameters()).device
    example = (example if isinstance(example, Tensor) else torch.zeros(1, *example)).to(device)
    counts = count(network, example)
    memory = peak_activation_bytes(network, example) + weight_bytes(network)
    return {"macs": counts.macs, "params": counts.params, "memory": memory}
