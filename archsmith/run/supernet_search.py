"""The run that methods with a sliced supernet share: one training, a selection among its children, no retraining.

``SupernetSearcher`` is a ``Searcher`` (see ``archsmith.run.drive``): it can be stopped after any step and any
evaluation, and goes on bit for bit. A method gives it the rule that draws a step's children, the step's settings, and
the strategy. Every evaluation activates a child, takes its batch statistics anew on training images, and scores it on
the validation part. MACs and parameters are exact. Where latency is an objective or limited, it is measured on the
child taken out of the supernet, made ready for the device of the run, before its accuracy; a child that breaks a limit
is not evaluated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.cost import Deployment, Latency
from archsmith.run.costs import CALIBRATION_IMAGES, LATENCY_MARGIN, CostModel
from archsmith.run.drive import Delivered, Monitor
from archsmith.run.measured import Measured
from archsmith.space import Architecture, Budget, Limit, Objective, ProductSpace, Result, Space, Trial
from archsmith.space.pareto import pareto_front
from archsmith.strategies import Strategy
from archsmith.supernet import Supernet
from archsmith.supernet.sampling import Child, Sampling
from archsmith.tasks.base import Batch, Task
from archsmith.train.calibration import calibrate_
from archsmith.train.children import ChildrenStep, Forward
from archsmith.train.compute import Compute
from archsmith.train.layout import use_memory_format_
from archsmith.train.loop import Diverged, Position, next_epoch
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

EXACT = ("macs", "params")
"""Costs that the family knows without building; the others are asked of the cost model."""

REPEATS = 8
"""Networks whose latency is measured a second time, for the repeat error."""


class SlicedFamily(Protocol):
    """A family with a supernet whose children are slices."""

    @property
    def space(self) -> ProductSpace:
        """The space of the children."""

    def largest(self) -> Architecture:
        """Return the child that is the whole supernet."""

    def smallest(self) -> Architecture:
        """Return the cheapest child."""

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" and "params"; nothing is built."""

    def supernet(self, *, seed: int | None = None) -> Any:
        """Return the supernet, an ``nn.Module`` and a ``Supernet``."""


@dataclass(frozen=True)
class Evaluated:
    """A child with what is known of it.

    Attributes:
        architecture: Its genotype.
        metrics: "valid_accuracy" and "valid_loss" with the supernet's weights; none for a child that breaks a limit.
        costs: "macs", "params", and what the budget limits or the search improves besides.
        predicted: What was predicted of metrics and costs before they were measured, by name.
        number: Its place in the order of the search.
    """

    architecture: Architecture
    metrics: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    number: int = 0

    @property
    def accuracy(self) -> float:
        """Validation accuracy, in [0, 1]."""
        return self.metrics["valid_accuracy"]


class SupernetSearcher(ABC):
    """Trains a supernet, selects children, and delivers them as networks of their own.

    Args:
        family: A family with a sliced supernet.
        task: What is learned.
        epochs: Epochs of the training.
        batch_size: Images for one step.
        evaluations: Evaluations of every part of the selection, by name, in order. A part ends early when the strategy
            is done.
        calibration_batches: Training batches from which a child takes its statistics.
        costs: Costs and budget of the run; no budget if None.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".
        compute: Device and precision; one process and whole batches alone.

    Attributes:
        supernet: The supernet.
        optimizer: Of its weights.
        rule: Draws the children of a step.
        step: Trains them.
        strategy: Selects children.
        evaluated: All children that the selection evaluated, in order.
        refused: Those that turned out to break a limit when they were measured, in order; not evaluated.
        measured: Latencies of the run.
        deployment: Where they are measured.

    Raises:
        UserError: A family without a sliced supernet, micro-batches, several processes, or a compiled forward pass.
    """

    def __init__(
        self,
        *,
        family: Any,
        task: Task,
        epochs: int,
        batch_size: int,
        calibration_batches: int,
        costs: CostModel | None,
        seed: int,
        memory_format: str = "contiguous",
        compute: Compute | None = None,
    ) -> None:
        if not hasattr(family, "supernet") or not hasattr(family, "exact_costs"):
            raise UserError("family", type(family).__name__, allowed="'bignas', say: one whose supernet is sliced")
        self.compute = compute or Compute()
        if self.compute.parts > 1 or self.compute.compile is not None:
            raise UserError(
                "runtime",
                Shown(f"{self.compute.parts} parts of a batch, compile={self.compute.compile}"),
                allowed="one process, whole batches and no compilation: every step runs several networks",
            )
        self.family: SlicedFamily = family
        self.task, self.costs, self.seed = task, costs, seed
        self.evaluated: list[Evaluated] = []
        self.refused: list[Evaluated] = []
        self.measured = Measured(None) if costs is None else costs.measured
        self.deployment = (None if costs is None else costs.deployment) or Deployment()
        self.training_epochs, self.batch_size = epochs, batch_size
        self.calibration_batches = min(calibration_batches, task.steps_per_epoch(batch_size))
        self.training_steps = task.steps_per_epoch(batch_size)
        self.supernet: Any = family.supernet(seed=seed_of(seed, "weights"))
        assert isinstance(self.supernet, nn.Module) and isinstance(self.supernet, Supernet)
        self.format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        use_memory_format_(self.supernet, self.format)
        self.supernet.to(self.compute.device)
        self.optimizer = self.make_optimizer()
        self.rule, self.step = self.make_rule(), self.make_step()
        self.strategy = self.make_strategy()
        self.parts = self.make_parts()
        self.position = Position()

    objectives: tuple[Objective, ...] = (Objective("valid_accuracy"), Objective("macs", "minimize"))
    """What the Pareto set is about."""

    # ------------------------------------------------------------------ what a method decides

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser of the supernet's weights."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """Return the learning rate after a number of steps."""

    @abstractmethod
    def make_rule(self) -> Sampling:
        """Return the rule that draws the children of a step."""

    @abstractmethod
    def make_step(self) -> ChildrenStep:
        """Return the training step of the supernet and the optimiser."""

    @abstractmethod
    def make_strategy(self) -> Strategy:
        """Return the strategy that selects children."""

    @abstractmethod
    def make_parts(self) -> dict[str, int]:
        """Return the number of evaluations of every part of the selection, by name."""

    @abstractmethod
    def chosen(self) -> Sequence[tuple[str, Architecture]]:
        """Return what is delivered now: labels and architectures, the most important first."""

    @property
    def space(self) -> Space:
        """The space that the strategy searches."""
        return self.family.space

    @property
    def axis(self) -> str:
        """The cost that reports show accuracy against: the first that is an objective, else the MACs."""
        return next((each.metric for each in self.objectives if each.direction == "minimize"), "macs")

    @property
    def measures_latency(self) -> bool:
        """Whether latency is an objective or limited."""
        return "latency" in self.limited or any(each.metric == "latency" for each in self.objectives)

    @property
    def limited(self) -> set[str]:
        """Names of the costs that the run limits."""
        return set() if self.costs is None else set(self.costs.limits)

    @property
    def in_order(self) -> list[Evaluated]:
        """Everything that was measured, evaluated or not, in the order of the search."""
        return sorted([*self.evaluated, *self.refused], key=lambda child: child.number)

    # ------------------------------------------------------------------ position

    @property
    def epochs(self) -> int:
        """Epochs of the whole run: those of the training, and one for each part of the selection."""
        return self.training_epochs + len(self.parts)

    @property
    def steps(self) -> int:
        """Mean number of steps and evaluations in an epoch, rounded up."""
        total = self.training_epochs * self.training_steps + sum(self.parts.values())
        return -(-total // self.epochs)

    @property
    def done(self) -> bool:
        """Whether training and selection are done."""
        return self.position.epoch >= self.epochs

    @property
    def selecting(self) -> bool:
        """Whether the training is over."""
        return self.position.epoch >= self.training_epochs

    def advance(self, monitor: Monitor) -> dict[str, Any] | None:
        """Go on to the end of an epoch or of a part of the selection; None when the monitor asked to stop before."""
        figures = self._select(monitor) if self.selecting else self._train(monitor)
        if figures is not None:
            next_epoch(self.position)
        return figures

    # ------------------------------------------------------------------ training

    def _train(self, monitor: Monitor) -> dict[str, Any] | None:
        position = self.position
        batches = self.task.batches(
            "train",
            batch_size=self.batch_size,
            seed=seed_of(self.seed, "order"),
            epoch=position.epoch,
            start=position.step,
        )
        for batch in batches:
            where = (position.epoch, position.step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(position.total)
            figures = self.train_step(batch, where)
            position.step += 1
            position.total += 1
            for name, figure in figures.items():
                position.sums[name] = position.sums.get(name, 0.0) + figure
            monitor.step(position.total, loss=figures["loss"], accuracy=position.means().get("accuracy", 0.0))
            if monitor.should_stop():
                break
        if position.step < self.training_steps:
            return None
        means = position.means()
        present = self.main_part(self.chosen()[0][1])
        ends = {"smallest": self.family.smallest(), "largest": self.family.largest()}
        return {
            "epoch": position.epoch,
            "phase": "training",
            **means,
            "train_accuracy": means.get("accuracy"),
            **self.scores_inside(present),
            "macs": self.family.exact_costs(present)["macs"],
            "within_budget": False,  # children of a supernet that still learns
            **{f"{name}_accuracy": self.scores_inside(end)["valid_accuracy"] for name, end in ends.items()},
        }

    def children(self, where: tuple[int, int]) -> list[Child]:
        """Return the children of a step (epoch, step in it)."""
        progress = (where[0] * self.training_steps + where[1]) / (self.training_epochs * self.training_steps)
        return self.rule.children(numpy_stream(self.seed, "children", *where), progress)

    def train_step(self, batch: Batch, where: tuple[int, int]) -> dict[str, float]:
        """Train a step's children on one batch; return the losses of the first and the last, and the task's metrics.

        All children see the same augmented images.

        Args:
            batch: Training examples.
            where: Epoch and step in it, names of the step's random streams.

        Raises:
            Diverged: A loss is NaN or infinite; the step is not taken.
        """
        metrics: dict[str, Tensor] = {}

        def by_labels(forward: Forward) -> Tensor:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "augment", *where))
            loss, found = self.task.loss(lambda inputs: forward(self._placed(inputs)).float(), batch, generator)
            metrics.update(found)
            return loss

        halved = self.compute.precision == "bf16"
        with (
            torch.random.fork_rng(devices=self.compute.random_devices()),
            torch.autocast(self.compute.device.type, torch.bfloat16, enabled=halved),
        ):
            self.compute.seed_(seed_of(self.seed, "dropout", *where))
            try:
                figures = self.step(self.children(where), by_labels)
            except Diverged as error:
                raise Diverged(error.loss, *where) from error
        first, *_, last = figures.losses
        return {"loss": first, "last_loss": last, **{name: float(metric) for name, metric in metrics.items()}}

    def _placed(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.compute.device).contiguous(memory_format=self.format)

    # ------------------------------------------------------------------ selection

    def _select(self, monitor: Monitor) -> dict[str, Any] | None:
        position = self.position
        name = list(self.parts)[position.epoch - self.training_epochs]
        while position.step < self.parts[name] and (trials := self.strategy.ask()):
            (trial,) = trials
            child = self._judged(trial)
            position.step += 1
            position.total += 1
            position.sums["refused"] = position.sums.get("refused", 0.0) + (not child.metrics)
            shown = child.metrics or {"valid_loss": 0.0, "valid_accuracy": 0.0}
            monitor.step(position.total, loss=shown["valid_loss"], accuracy=shown["valid_accuracy"])
            if monitor.should_stop() and position.step < self.parts[name]:
                return None
        (_, best), *_ = self.chosen()
        found = self.known(best) or self.evaluate(best)
        refused = int(position.sums.get("refused", 0))
        latest = self.evaluated[len(self.evaluated) - (position.step - refused) :]
        return {
            "epoch": position.epoch,
            "phase": name,
            "loss": found.metrics["valid_loss"],
            **found.metrics,
            "macs": found.costs["macs"],
            "within_budget": True,
            "axis": self.axis,
            "evaluated": [[child.costs[self.axis], child.accuracy] for child in latest],
            "refused": [child.costs.get(self.axis) for child in self.refused[len(self.refused) - refused :]],
            "front": sorted([child.costs[self.axis], child.accuracy] for child in self.front()),
            "predictions": self._predictions(latest),
            "repeats": self._measure_again(),
        }

    def _judged(self, trial: Trial) -> Evaluated:
        """Measure a trial's child, tell the strategy what came out, and keep it."""
        architecture, predicted = trial.architecture, self.foretold(trial)
        number = len(self.evaluated) + len(self.refused)
        costs = self.costs_of(architecture)
        if broken := self.limits().violations(costs):
            child = Evaluated(architecture, {}, costs, predicted, number)
            self.refused.append(child)
            self.strategy.tell(trial.id, Result.infeasible("; ".join(map(str, broken)), costs=costs))
            return child
        child = replace(self.evaluate(architecture), predicted=predicted, number=number)
        self.evaluated.append(child)
        self.strategy.tell(trial.id, Result(metrics=child.metrics, costs=child.costs))
        return child

    def foretold(self, trial: Trial) -> dict[str, float]:
        """Return what is predicted of a trial before it is measured, by name of the metric or cost; often nothing."""
        return dict(trial.info.get("predicted", {}))

    def _predictions(self, children: Sequence[Evaluated]) -> dict[str, list[list[float]]]:
        """Return pairs of what was predicted and what was measured, by name, for the report."""
        pairs: dict[str, list[list[float]]] = {}
        for child in children:
            for name, value in child.predicted.items():
                found = {**child.costs, **child.metrics}
                if name in found:
                    pairs.setdefault(name, []).append([value, found[name]])
        return pairs

    def _measure_again(self) -> list[list[float]]:
        """Measure some networks a second time, spread over their latencies; return both latencies of each."""
        if not self.measures_latency:
            return []
        every = sorted(self.in_order, key=lambda child: child.costs["latency"])
        places = dict.fromkeys(round(at) for at in np.linspace(0, len(every) - 1, min(REPEATS, len(every))))
        pairs = []
        for at in places:
            child = every[at]
            again = self.measured.again_ms(self.key(child.architecture), partial(self.measure, child.architecture))
            pairs.append([child.costs["latency"], again])
        return pairs

    def scores_inside(self, architecture: Architecture) -> dict[str, float]:
        """Return accuracy and loss of a child inside the supernet in fp32, its statistics taken anew."""
        self.supernet.activate(architecture)
        calibrate_(self.supernet, map(self._placed, self.calibration_inputs()))
        scores = self.task.evaluate(self.compute.evaluating(self.supernet), "valid")
        return {"valid_accuracy": float(scores["accuracy"]), "valid_loss": float(scores["loss"])}

    def evaluate(self, architecture: Architecture) -> Evaluated:
        """Return a child with the supernet's present weights, in the precision in which it is going to run.

        In fp32 it is scored inside the supernet, which is the same to 1e-5; else taken out and made ready.
        """
        if self.deployment.precision == "fp32":
            return Evaluated(architecture, self.scores_inside(architecture), self.costs_of(architecture))
        forward = self.deployment.ready(self.network_of(architecture), self._examples()).forward()
        scores = self.task.evaluate(forward, "valid")
        metrics = {"valid_accuracy": float(scores["accuracy"]), "valid_loss": float(scores["loss"])}
        return Evaluated(architecture, metrics, self.costs_of(architecture))

    def known(self, architecture: Architecture) -> Evaluated | None:
        """Return what the selection found of a child, None if it has not evaluated it."""
        return next((child for child in self.evaluated if child.architecture == architecture), None)

    def front(self) -> list[Evaluated]:
        """Return the evaluated children within the budget that no other beats, by rising cost; equal ones once."""
        axis = self.axis
        fitting = [child for child in self.evaluated if not self.limits().violations(child.costs)]
        results = [Result(metrics=child.metrics, costs=child.costs) for child in fitting]
        places = pareto_front(results, self.objectives)
        best = {(fitting[i].costs[axis], fitting[i].accuracy): fitting[i] for i in places}
        return [best[key] for key in sorted(best)]

    def costs_of(self, architecture: Architecture) -> dict[str, float]:
        """Return exact MACs and parameters, and measured or counted what else is limited or improved."""
        costs = self.counted_costs(architecture)
        if self.measures_latency:
            costs["latency"] = self.measured.ms(self.key(architecture), partial(self.measure, architecture))
        return costs

    def counted_costs(self, architecture: Architecture) -> dict[str, float]:
        """Return the costs of a child that need no measurement."""
        costs: dict[str, float] = dict(self.family.exact_costs(architecture))
        if self.limited - {*EXACT, "latency"}:
            assert self.costs is not None
            costs = {**self.costs.counted(architecture), **costs}
        return costs

    def measure(self, architecture: Architecture) -> Latency:
        """Return the latency of a child, taken out and made ready for the device, measured now."""
        network = self.network_of(architecture)
        return self.deployment.ready(network, self._examples()).measure(self.task.plain_inputs())

    def network_of(self, architecture: Architecture) -> nn.Module:
        """Return a child as a network of its own, batch statistics taken anew, on the CPU in the plain layout."""
        network = calibrate_(self.supernet.extract(architecture).to("cpu"), self.calibration_inputs())
        use_memory_format_(network, torch.contiguous_format)
        return network.eval()

    def _examples(self) -> Tensor:
        """Return training inputs for exports and for the ranges of int8 activations."""
        if self.costs is not None:
            return self.costs.calibration
        return self.task.examples(min(CALIBRATION_IMAGES, self.task.size("train")), "train")

    def limits(self) -> Budget:
        """Return the run's budget with absolute limits; the one on latency less the margin for its spread."""
        limits = {} if self.costs is None else dict(self.costs.limits)
        if "latency" in limits:
            limits["latency"] *= LATENCY_MARGIN
        units = {"memory": "B", "latency": "ms"}
        return Budget(tuple(Limit(cost, "<=", value, units.get(cost, ""), False) for cost, value in limits.items()))

    def key(self, architecture: Architecture) -> str:
        """Return the key of a child among the measured latencies."""
        return architecture.digest

    def main_part(self, architecture: Architecture) -> Architecture:
        """Return the child that an architecture of the strategy's space speaks of."""
        return architecture

    def calibration_inputs(self) -> Iterator[Tensor]:
        """Yield what statistics are taken from: training images without augmentation, always the same ones."""
        seed = seed_of(self.seed, "calibration")
        batches = self.task.batches("train", batch_size=self.batch_size, seed=seed)
        yield from (batch.inputs for batch in islice(batches, self.calibration_batches))

    # ------------------------------------------------------------------ the result

    def deliver(self) -> Delivered:
        """Return the chosen children as networks of their own, with the supernet's weights and own statistics."""
        first, *others = [self.delivered_as(label, architecture) for label, architecture in self.chosen()]
        return replace(first, others=others)

    def delivered_as(self, label: str, architecture: Architecture) -> Delivered:
        """Return a child as a network of its own, under a label."""
        network = calibrate_(self.supernet.extract(architecture).to("cpu"), self.calibration_inputs())
        child = self.known(architecture)
        figures = {} if child is None else {"one_shot_accuracy": child.accuracy}
        return Delivered(network.eval(), architecture, figures, label)

    # ------------------------------------------------------------------ exact resume

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs: tensors by name and plain JSON values."""
        tensors = {f"supernet.{name}": tensor for name, tensor in self.supernet.state_dict().items()}
        tensors.update(optimizer_tensors(self.optimizer, self.supernet))
        return tensors, {
            "position": self.position.to_json(),
            "strategy": self.strategy.state_dict(),
            "evaluated": [
                [each.architecture.to_json(), dict(each.metrics), dict(each.costs), dict(each.predicted)]
                for each in self.in_order
            ],
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.position = Position(**state["position"])
        with torch.no_grad():
            for name, tensor in self.supernet.state_dict().items():
                tensor.copy_(tensors[f"supernet.{name}"])
        load_optimizer_tensors(self.optimizer, self.supernet, tensors)
        self.strategy.load_state_dict(state["strategy"])
        children = [
            Evaluated(self.space.validate(Architecture.from_json(architecture)), metrics, costs, predicted, number)
            for number, (architecture, metrics, costs, predicted) in enumerate(state["evaluated"])
        ]
        self.evaluated = [child for child in children if child.metrics]
        self.refused = [child for child in children if not child.metrics]
