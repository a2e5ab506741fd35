"""A run that makes a supernet of the user's own network: how it starts, and what its subnets cost.

Subnets are the network's first blocks, heads and units (``archsmith.supernet.elastic``), so nothing is a family with
code of its own: every delivered network is the user's, with a record of what was kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from archsmith.config import RunConfig, validated
from archsmith.core.errors import UserError
from archsmith.core.protocols import Logger
from archsmith.cost import measure_latency
from archsmith.run.costs import exact_costs
from archsmith.run.drive import Searcher
from archsmith.run.measured import Measured
from archsmith.run.own_model import OwnModel
from archsmith.space import Architecture, Budget, ProductSpace
from archsmith.supernet.elastic import Elastic
from archsmith.tasks.base import Task

LIMITS = ("macs", "params", "latency")


class ElasticFamily:
    """What a ``SupernetSearcher`` asks of a family, of one elastic network.

    Args:
        elastic: The network.
    """

    def __init__(self, elastic: Elastic) -> None:
        self.elastic = elastic

    @property
    def space(self) -> ProductSpace:
        """The space of the subnets."""
        return self.elastic.space

    def largest(self) -> Architecture:
        """Return the whole network."""
        return self.elastic.largest()

    def smallest(self) -> Architecture:
        """Return the subnet with every first option."""
        return self.elastic.smallest()

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" and "params" of the extracted subnet."""
        return self.elastic.costs(architecture)

    def supernet(self, *, seed: int | None = None) -> Elastic:
        """Return the network with the weights that it has; nothing is drawn."""
        return self.elastic


class SubnetCosts:
    """Costs of subnets and the budget over them.

    Args:
        elastic: The network, of which subnets are extracted to be measured.
        task: Its task.
        budget: As the user wrote it, or None.
        journal: Where measured latencies are recorded and found again, so that decisions repeat.

    Attributes:
        largest: Costs of the whole network: "macs", "params", "memory", and "latency" in ms where limited.
        measured: The latencies of the run.
        deployment: None: subnets are measured in torch on the CPU.
        limits: Absolute limits by cost name.
        budget_text: The budget, or empty.

    Raises:
        UserError: The budget limits something else, or no subnet keeps it.
    """

    def __init__(self, elastic: Elastic, task: Task, budget: Budget | None, journal: Logger) -> None:
        self.elastic, self.example = elastic, task.plain_inputs()
        self.calibration = self.example
        self.deployment = None
        self.measured = Measured(journal)
        names = [limit.cost for limit in budget.limits] if budget else []
        if foreign := [name for name in names if name not in LIMITS]:
            raise UserError("budget", str(budget), allowed=f"limits on {', '.join(LIMITS)}", hint=f"Drop {foreign[0]}.")
        self.largest: dict[str, Any] = exact_costs(elastic.model, self.example)
        smallest: dict[str, Any] = dict(elastic.costs(elastic.smallest()))
        if "latency" in names:
            self.largest["latency"] = self.latency_ms(elastic.largest())
            smallest["latency"] = self.latency_ms(elastic.smallest())
        self.limits: dict[str, float] = {}
        self.budget_text = ""
        if budget is not None:
            budget.check_feasible(smallest=smallest, largest=self.largest)
            self.limits = {limit.cost: limit.value for limit in budget.resolve(self.largest).limits}
            self.budget_text = str(budget)

    def latency_ms(self, architecture: Architecture) -> float:
        """Return the median latency in ms of the extracted subnet, measured once in the life of the run.

        Batch 1, torch, one thread; texts without padding.
        """
        network = self.elastic.extract(architecture).eval()
        return self.measured.ms(architecture.digest, lambda: measure_latency(network, self.example))

    def counted(self, architecture: Architecture) -> dict[str, Any]:
        """Return the exact costs of a subnet."""
        return dict(self.elastic.costs(architecture))


def prepare_supernet(
    config: RunConfig, model: OwnModel, task: Task, module: ModuleType, journal: Logger
) -> tuple[SubnetCosts, Searcher]:
    """Return the costs and the method at its beginning.

    Args:
        config: Of the run.
        model: Makes the network.
        task: Its task.
        module: Of a method with ``SUPERNET_OF_OWN`` and a function ``supernet_of(network, example_inputs, settings)``.
        journal: Of the run.
    """
    settings = validated(module.Settings, config.settings, field="settings")
    split = "train" if task.size("train") > 1 else "valid"
    elastic: Elastic = module.supernet_of(model.build(), task.examples(2, split), settings)
    budget = None if config.budget is None else Budget.parse(config.budget)
    costs = SubnetCosts(elastic, task, budget, journal)
    searcher: Searcher = module.Searcher(
        family=ElasticFamily(elastic), task=task, settings=settings, costs=costs, seed=config.seed
    )
    return costs, searcher
