"""The run of methods that train one network after the other: a strategy chooses, ``TrainedEvaluator`` trains.

``TrainedSearcher`` is a ``Searcher`` (see ``archsmith.run.drive``). Every epoch of it is one whole training, and behind
every one there is a checkpoint: a run that is killed goes on with the training that was under way, from its beginning,
and ends as if it had not been killed. What may be chosen keeps the budget beforehand, so nothing is trained in vain.
The weights of the best few networks are kept, for the result and for networks that start from them. A wish to stop is
granted behind the training under way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.evaluate.weights import content_key
from archsmith.run.costs import CostModel
from archsmith.run.drive import Delivered, Monitor
from archsmith.space import Architecture, Result, Trial
from archsmith.strategies import Strategy
from archsmith.strategies.candidates import CandidatePool
from archsmith.tasks.base import Task
from archsmith.train.loop import Position, next_epoch
from archsmith.train.recipe import TrainingRecipe, result_weights

LIMITS = ("macs", "params", "memory")
"""Costs that a budget may limit here: those that are known before a network is trained."""


class ResultWeights:
    """A weight store in memory that keeps of a training the network's weights alone, not the optimiser's state."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self.kept

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep the weights of a training's result, and return their key."""
        small = {f"last.{name}": tensor.detach().clone() for name, tensor in result_weights(tensors).items()}
        small |= {name: tensor for name, tensor in tensors.items() if name == "training.network"}
        key = content_key(small)
        self.kept[key] = small
        return key

    def get(self, key: str) -> dict[str, Tensor]:
        """Return what is kept under a key.

        Raises:
            KeyError: Nothing is.
        """
        return dict(self.kept[key])


class TrainedSearcher(ABC):
    """Trains ``models`` networks that a strategy chooses one by one, and delivers the best.

    Args:
        family: Builds the networks.
        task: What is learned.
        recipe: How each is trained.
        models: Trainings.
        kept: Best networks whose weights are kept, from 1.
        costs: Costs and budget of the run; no budget if None.
        seed: Seed of the run.

    Attributes:
        trained: Trials and results, in order.

    Raises:
        UserError: A limit on a cost that is not known before the training.
    """

    steps = 1
    long_epochs = True
    """Asks ``drive`` for a checkpoint behind every epoch."""

    def __init__(
        self,
        *,
        family: Any,
        task: Task,
        recipe: TrainingRecipe,
        models: int,
        kept: int,
        costs: CostModel | None,
        seed: int,
    ) -> None:
        self.limits = {} if costs is None else dict(costs.limits)
        if unknown := sorted(set(self.limits) - set(LIMITS)):
            raise UserError("budget", Shown(f"a limit on {unknown[0]}"), allowed=f"limits on {', '.join(LIMITS)}")
        self.family, self.task, self.costs, self.seed = family, task, costs, seed
        self.models, self.keep = models, kept
        self.evaluator = TrainedEvaluator(family, task, recipe)
        self.weights = ResultWeights()
        self.trained: list[tuple[Trial, Result]] = []
        self.position = Position()
        self._pool: CandidatePool | None = None
        self._strategy: Strategy | None = None

    @abstractmethod
    def make_pool(self) -> CandidatePool:
        """Return what may be chosen; all of it keeps the budget (``fits``)."""

    @abstractmethod
    def make_strategy(self, pool: CandidatePool) -> Strategy:
        """Return the strategy at its beginning; its one objective is the validation accuracy."""

    def fits(self, architecture: Architecture) -> bool:
        """Return whether a network keeps every limit of the run."""
        if not self.limits:
            return True
        found = dict(self.family.exact_costs(architecture))
        if self.costs is not None and set(self.limits) - set(found):
            found = {**self.costs.counted(architecture), **found}
        return all(found[name] <= limit for name, limit in self.limits.items())

    @property
    def epochs(self) -> int:
        """Trainings of the whole run."""
        return self.models

    @property
    def done(self) -> bool:
        """Whether all are trained, or there is nothing left to choose."""
        return self.position.epoch >= self.models or (self._strategy is not None and self._strategy.done)

    def _chooser(self) -> Strategy:
        if self._strategy is None:
            self._pool = self.make_pool() if self._pool is None else self._pool
            self._strategy = self.make_strategy(self._pool)
        return self._strategy

    def advance(self, monitor: Monitor) -> dict[str, Any] | None:
        """Train the next network; the figures are those of the best one so far."""
        strategy = self._chooser()
        (trial,) = strategy.ask()
        result = self.evaluator.evaluate(trial, weights=self.weights)
        strategy.tell(trial.id, result)
        self.trained.append((trial, result))
        self._forget()
        best = self.best()
        figures: dict[str, Any] = {
            "epoch": self.position.epoch,
            "phase": "search",
            "loss": 0.0 if best is None else best[1].metrics["valid_loss"],
            "valid_accuracy": 0.0 if best is None else best[1].metrics["valid_accuracy"],
            "macs": self.family.exact_costs((best or (trial, result))[0].architecture)["macs"],
            "within_budget": best is not None,
            "axis": "macs",
            "trial": trial.id,
            "parent": trial.parent,
            "status": result.status,
            "evaluated": [self._point(result)] if result.status == "ok" else [],
            "refused": [],
            "front": self._front(),
            "predictions": {},
            "repeats": [],
        }
        self.position.step += 1
        self.position.total += 1
        monitor.step(self.position.total, loss=figures["loss"], accuracy=figures["valid_accuracy"])
        next_epoch(self.position)
        return figures

    def best(self) -> tuple[Trial, Result] | None:
        """Return the trained network of the highest validation accuracy, the first of equal ones; None before any."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def _ranked(self) -> list[tuple[Trial, Result]]:
        good = [each for each in self.trained if each[1].status == "ok"]
        return sorted(good, key=lambda each: -each[1].metrics["valid_accuracy"])

    def _forget(self) -> None:
        wanted = {result.weights for _, result in self._ranked()[: self.keep]}
        self.weights.kept = {key: each for key, each in self.weights.kept.items() if key in wanted}

    def _point(self, result: Result) -> list[float]:
        return [result.costs["macs"], result.metrics["valid_accuracy"]]

    def _front(self) -> list[list[float]]:
        front: list[list[float]] = []
        points = [self._point(result) for _, result in self.trained if result.status == "ok"]
        for macs, accuracy in sorted(points, key=lambda each: (each[0], -each[1])):
            if not front or accuracy > front[-1][1]:
                front.append([macs, accuracy])
        return front

    def deliver(self) -> Delivered:
        """Return the best network as it was trained; before any training the smallest, as it is initialised."""
        best = self.best()
        if best is None:
            smallest = self.family.smallest()
            return Delivered(self.family.build(smallest, seed=self.seed).eval(), smallest)
        trial, result = best
        network = self.family.build(trial.architecture)
        network.load_state_dict(result_weights(self.weights.get(str(result.weights))))
        return Delivered(network.eval(), trial.architecture)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs: tensors by name and plain JSON values."""
        tensors = {f"{key}.{name}": tensor for key, kept in self.weights.kept.items() for name, tensor in kept.items()}
        state: dict[str, Any] = {
            "position": self.position.to_json(),
            "trained": [[trial.to_json(), result.to_json()] for trial, result in self.trained],
            "library": None,
        }
        if self._pool is not None and self._strategy is not None:
            tensors["library"] = torch.from_numpy(self._pool.features_MD).clone()
            state["library"] = [each.to_json() for each in self._pool.architectures]
            state["strategy"] = self._strategy.state_dict()
        return tensors, state

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.position = Position(**state["position"])
        self.trained = [(Trial.from_json(trial), Result.from_json(result)) for trial, result in state["trained"]]
        self.weights.kept = {}
        for name, tensor in tensors.items():
            key, _, own = name.partition(".")
            if own:
                self.weights.kept.setdefault(key, {})[own] = tensor.clone()
        if state["library"] is not None:
            members = [self.family.space.validate(Architecture.from_json(each)) for each in state["library"]]
            rows = {each.digest: row for each, row in zip(members, tensors["library"].numpy(), strict=True)}
            self._pool = CandidatePool(members, lambda each: rows[each.digest])
            self._strategy = self.make_strategy(self._pool)
            self._strategy.load_state_dict(state["strategy"])
