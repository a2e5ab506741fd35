"""Selection by perturbation as a phase of a differentiable search, behind whatever trained the supernet.

``archsmith.supernet.perturbation`` decides; here is what it needs from a run: the supernet's scores under given mixing
weights on the images that the logits learn from, the phase of fine-tuning, and the state for a checkpoint.

Source: Wang et al., "Rethinking Architecture Selection in Differentiable NAS", arXiv 2108.04392.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from archsmith.core.rng import seed_of
from archsmith.run.relaxed_settings import PerturbationPlan, Phase
from archsmith.supernet.perturbation import Mixing, Perturbation
from archsmith.supernet.relaxed import SearchSupernet, batch_statistics
from archsmith.tasks.base import Task

SELECTION = "selection"
"""Name of the phase."""


class PerturbedSelection:
    """Decides the edges of a supernet while a run trains it on.

    Args:
        supernet: Its ``fixed`` rows are set, nothing else of it is changed.
        plan: Interval, criteria, fine-tuning.
        task: Its training images are what every perturbation is scored on, all of them, without augmentation. A task
            that cannot score on those (it has no ``scored_on_training``) does on its validation part.
        seed: Seed of the run.

    Attributes:
        machine: What is decided.
    """

    def __init__(self, supernet: SearchSupernet, plan: PerturbationPlan, task: Task, *, seed: int) -> None:
        self.supernet, self.plan, self.seed = supernet, plan, seed
        scored = getattr(task, "scored_on_training", None)
        self.task: Task = task if scored is None else scored()
        self.machine = Perturbation(
            supernet.options,
            targets=supernet.targets,
            per_node=supernet.per_node,
            interval=plan.interval,
            criterion=plan.criterion,
            edge_criterion=plan.edge_criterion,
            # A node that keeps some of its edges leaves others out: nothing at all is not a choice for those it keeps.
            never=() if supernet.per_node is None else ("none",),
            seed=seed_of(seed, "perturbation"),
        )

    @property
    def phase(self) -> Phase:
        """Fine-tuning between the decisions."""
        plan = self.plan
        return Phase(
            name=SELECTION,
            epochs=self.machine.epochs,
            batch_size=plan.batch_size,
            lr=plan.lr,
            schedule="constant",
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
            clip_norm=plan.clip_norm,
            logits=plan.logits,
        )

    def decide(self, epoch: int, should_stop: Callable[[], bool]) -> bool:
        """Finish what is to be decided before an epoch (from 0) of the phase; False if asked to stop on the way."""
        while self.machine.due(epoch):
            if not self.machine.decide(self._mixing(), self._score, should_stop):
                return False
            self.supernet.fixed = self.machine.fixed()
        return True

    def figures(self) -> dict[str, Any]:
        """Return what is decided, for the journal: operations of edges, None where open or left out."""
        return {
            "decided": {group: list(names) for group, names in self.machine.operations().items()},
            "evaluations": self.machine.evaluations,
        }

    def state(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self.machine.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``."""
        self.machine.load(state)
        if any(self.machine.chosen.values()):
            self.supernet.fixed = self.machine.fixed()

    def _mixing(self) -> dict[str, list[list[float]]]:
        """Return the supernet's mixing weights without any sampling."""
        with torch.no_grad():
            mixing = self.supernet.probabilities()
        return {group: mixing[group].tolist() for group in self.supernet.options}

    def _score(self, asked: Mixing) -> tuple[float, float]:
        """Return accuracy and loss under mixing weights, by batch statistics, on all images."""
        supernet = self.supernet
        with torch.no_grad():
            mixing = supernet.probabilities()
        for group, rows in asked.items():
            mixing[group] = mixing[group].new_tensor(rows)
            if f"{group}_edges" in mixing:  # an edge without any operation has no weight either
                mixing[f"{group}_edges"] = mixing[f"{group}_edges"] * mixing[group].any(dim=-1)
        supernet.active = mixing
        try:
            # Every perturbation meets the same random numbers, where operations draw any.
            with torch.random.fork_rng(devices=[]), batch_statistics(supernet):
                torch.manual_seed(seed_of(self.seed, "perturbation", "operations"))
                scores = self.task.evaluate(supernet, "valid")
        finally:
            supernet.active = None
        return float(scores["accuracy"]), float(scores["loss"])
