"""A network of the user's own as a run sees it: how it is made, what it costs, and what its budget means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from archsmith.atoms.declared import copy_without
from archsmith.atoms.finding import FoundAtoms, find
from archsmith.atoms.records import Record, rebuild, record
from archsmith.atoms.unit_budget import plan_units
from archsmith.atoms.unit_costs import UnitCosts
from archsmith.core.errors import Shown, UserError
from archsmith.core.files import sha256_of
from archsmith.core.protocols import Logger
from archsmith.core.rng import seed_of
from archsmith.cost import load_target, measure_latency
from archsmith.families.pretrained import pretrained_classifier
from archsmith.run.costs import exact_costs
from archsmith.run.rebuild import read_weights
from archsmith.space import Budget
from archsmith.tasks.base import Task
from archsmith.tasks.text import TextClassification

FAMILY = "own"
"""Name of the family of a run whose network is the user's."""


class OwnModel:
    """Makes the user's network, whole or cut.

    Args:
        target: "module:factory", called without arguments; its code is executed. Or a Hugging Face folder: its encoder
            gets a classifier for the task.
        seed: Seed of the run; the factory is called under a stream of its own.
        weights: A safetensors file with the weights to begin with, or None for those of the factory.
        task: Whose classes and token ids a classifier of a Hugging Face folder has; not needed for a factory.
    """

    def __init__(self, target: str, seed: int, weights: str | None = None, task: Task | None = None) -> None:
        self.target, self._task = target, task
        self._seed = seed_of(seed, "own model")
        self._weights = weights

    def build(self, what: Record | None = None, *, fresh: bool = False) -> nn.Module:
        """Return the network.

        Args:
            what: Cut it as this record says.
            fresh: With the weights of the factory, not those of the file.

        Raises:
            UserError: The factory cannot be called or makes no network, or the weights do not fit.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            network = made_network(self.target, self._task)
        if not isinstance(network, nn.Module):
            raise UserError("model", self.target, allowed="module:factory that returns a torch.nn.Module")
        if self._weights is not None and not fresh:
            self._load(network, self._weights)
        return network if what is None else rebuild(network, what)

    def initialised(self, what: Record) -> nn.Module:
        """Return the cut network with new random weights, as if it had been built in this size.

        Layers that know how to draw their weights do it again (``reset_parameters``), because the scale of a weight
        depends on the width; what a factory did beyond that keeps its slices.
        """
        network = self.build(what, fresh=True)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self._seed, "retrain"))
            for module in network.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return network

    @staticmethod
    def _load(network: nn.Module, path: str) -> None:
        try:
            network.load_state_dict(read_weights(Path(path)), strict=True)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(
                "weights", Shown(f"{path}, which does not fit: {lines[-1]}"), allowed="the weights of this network"
            ) from error


def is_folder(target: str) -> bool:
    """Return whether a target is a folder of weights and configuration, of which no code is executed."""
    return Path(target).expanduser().is_dir()


def made_network(target: str, task: Task | None) -> object:
    """Return what a target makes: a factory's network, or a classifier on the encoder of a Hugging Face folder."""
    if not is_folder(target):
        if ":" not in target:
            raise UserError("model", target, allowed="module:factory, or a Hugging Face folder that exists")
        return load_target(target)
    if not isinstance(task, TextClassification):
        given = "no task" if task is None else f"the task {task.name}, of {task.kind}"
        raise UserError("task", Shown(f"{given} for {target}"), allowed="a text task: the encoder reads token ids")
    return pretrained_classifier(target, classes=task.num_classes, pad_id=task.pad_id, vocabulary=task.vocab_size)


class OwnCosts:
    """Costs of the user's network and the budget over them; what ``drive`` and ``finish_own`` ask for.

    Args:
        network: The whole network.
        task: Its task: inputs have the task's shape.
        budget: As the user wrote it, or None.
        constraints: "minimum" and "divisor" of every group.
        journal: Where measured latencies are recorded and found again.

    Attributes:
        atoms: Its units.
        largest: Costs of the whole network: "macs", "params", "memory" in bytes, and "latency" in ms where limited.
        limits: Absolute limits by cost name.
        budget_text: The budget, or empty.

    Raises:
        UserError: There is nothing to cut, or the budget cannot be reached, is kept already, or limits what cannot be
            limited here.
    """

    def __init__(
        self, network: nn.Module, task: Task, budget: Budget | None, constraints: Mapping[str, int], journal: Logger
    ) -> None:
        self._journal = journal
        self._constraints = dict(constraints)
        # Varied inputs, so that a unit that is constant on them is constant.
        generator = torch.Generator().manual_seed(0)
        self.example = torch.randn(2, *task.input_shape, generator=generator)
        self.image = task.input_shape
        self.atoms = self.find(network)
        names = [limit.cost for limit in budget.limits] if budget else []
        if foreign := [name for name in names if name not in ("macs", "params", "latency")]:
            raise UserError(
                "budget", str(budget), allowed="limits on macs, params, latency", hint=f"Drop {foreign[0]}."
            )
        self.largest = exact_costs(network, task.plain_inputs())
        if "latency" in names:
            self.largest["latency"] = self.measure(network)
        self.limits: dict[str, float] = {}
        self.budget_text = ""
        if budget is not None:
            self.limits = {limit.cost: limit.value for limit in budget.resolve(self.largest).limits}
            self.budget_text = str(budget)
            self._check(network)

    def find(self, network: nn.Module) -> FoundAtoms:
        """Return the units of a network, whole or cut."""
        return find(network, self.example, constraints={"": self._constraints})

    def _check(self, network: nn.Module) -> None:
        if all(self.largest[name] <= limit for name, limit in self.limits.items()):
            raise UserError(
                "budget",
                Shown(self.budget_text),
                allowed="less than the network has",
                hint="It keeps this budget already: there is nothing to shrink.",
            )
        costs = UnitCosts(
            network,
            self.example,
            self.atoms.groups,
            shrunk=lambda removed: copy_without(self.atoms, removed, numbers=False),
        )
        exact = {name: limit for name, limit in self.limits.items() if name != "latency"}
        plan_units(self.atoms.groups, {g.name: np.zeros(g.size) for g in self.atoms.groups}, costs, exact)

    def measure(self, network: nn.Module) -> float:
        """Return the median latency in ms of a network, measured once for each width in the life of the run."""
        what = record(network)
        digest = sha256_of(f"{what.original} {what.result}".encode())
        for event in self._journal.events("latency_measured"):
            if event["digest"] == digest:
                return float(event["median_ms"])
        latency = measure_latency(network.eval(), self.example[:1])
        self._journal.record("latency_measured", digest=digest, median_ms=latency.median_ms)
        return latency.median_ms

    def fits(self, costs: Mapping[str, float]) -> bool:
        """Return whether exact costs are within their limits."""
        return all(costs[name] <= limit for name, limit in self.limits.items() if name in costs)
