"""BigNAS: one big network is trained once, and its slices are deployed as they are.

Yu, Jin, Liu, Bender, Kindermans, Tan, Huang, Song, Pang, Le, "BigNAS: Scaling Up Neural Architecture Search with Big
Single-Stage Models", ECCV 2020, arXiv 2003.11142.

All children share the weights of the largest: a child is the first channels, the first blocks and the centres of the
kernels. They are good without retraining because of how the one training goes. Every step trains the largest child by
the labels, then some random children and the smallest by the largest one's predictions on the same images at their own
resolutions, and takes one optimiser step on the summed gradients (sandwich rule, in-place distillation). Every block
starts as its shortcut. The learning rate decays exponentially and ends constant. Only the largest child is regularised:
weight decay, dropout and drop-connect are on in its pass alone. A child's batch statistics are taken anew before it is
evaluated. Children are then selected from coarse to fine: a grid of tied choices, and small mutations of its best
within each of several budgets.

With latency among the objectives, the budgets are latencies in place of MACs: measured on every child that is
evaluated, and foretold by a predictor that learns from them for the many mutants that are not.

What differs: the paper's text could not be read beyond its abstract; space and hyper-parameters are those that public
reimplementations restate (AttentiveNAS, arXiv 2011.09011, for clipping and the number of children). Shorter trainings
keep the published proportions of warm-up, decay and constant tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from archsmith.core.rng import seed_of
from archsmith.run.costs import CostModel
from archsmith.run.foretold import Foretold
from archsmith.run.supernet_search import SupernetSearcher
from archsmith.space import Architecture, Budget, Limit, Objective, Trial
from archsmith.strategies.coarse_to_fine import CoarseToFine
from archsmith.supernet.sampling import Sandwich
from archsmith.tasks.base import Task
from archsmith.train.children import ChildrenStep
from archsmith.train.compute import Compute
from archsmith.train.optim import RMSprop
from archsmith.train.single_stage import PUBLISHED_EPOCHS, single_stage_rate, single_stage_step

SYSTEM = {
    "slug": "bignas",
    "title": "BigNAS: Scaling Up Neural Architecture Search with Big Single-Stage Models",
    "year": 2020,
    "arxiv": "2003.11142",
    "kind": "search",
    "aliases": ["single-stage"],
}

WORKS_ON = ("bignas",)
"""Families with a sliced supernet."""

LATENCY_DEVICES = ("cpu", "onnxruntime", "cuda")
"""Where latency can be measured."""

TASK_OPTIONS = {"label_smoothing": 0.1}
"""For the largest child; the others see its predictions only."""

OBJECTIVES = {
    "accuracy": Objective("valid_accuracy"),
    "macs": Objective("macs", "minimize"),
    "latency": Objective("latency", "minimize"),
}
"""What may be improved, by the name that settings and command line use."""


class Settings(BaseModel):
    """Hyper-parameters; the defaults are those of the published ImageNet training.

    Attributes:
        epochs: Epochs of the one training.
        batch_size: Images for one step.
        optimizer: "rmsprop" or "sgd" (Nesterov).
        lr: Largest learning rate.
        momentum: Of either optimiser.
        decay: Factor of each stair of the learning rate.
        decay_epochs: Width of a stair; 2.4 in 360 epochs, and in proportion in others, if None.
        warmup_epochs: Length of the linear rise; 5 in 360 epochs, and in proportion in others, if None.
        floor: Part of the largest rate at which it stays constant.
        weight_decay: L2 on convolutions and the classifier, in the largest child's pass.
        children: Children for each step: the largest, random ones, and the smallest.
        clip_value: Largest absolute entry of the gradient, 0 for none.
        clip_norm: Largest norm of the gradient, 0 for none.
        calibration_batches: Training batches for a child's statistics.
        objectives: "accuracy" and the cost of the budgets, "macs" (published) or "latency".
        points: Budgets of the selection, evenly spaced in the logarithm of that cost; the last is the run's budget.
        levels: Values of each kind of choice in the coarse grid.
        mutations: Evaluations of the fine phase.
        mutation_probability: With which a mutation changes each decision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(PUBLISHED_EPOCHS, ge=1)
    batch_size: int = Field(4096, ge=2)
    optimizer: Literal["rmsprop", "sgd"] = "rmsprop"
    lr: float = Field(0.256, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    decay: float = Field(0.97, gt=0, le=1)
    decay_epochs: float | None = Field(None, gt=0)
    warmup_epochs: float | None = Field(None, ge=0)
    floor: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(1e-5, ge=0)
    children: int = Field(4, ge=2)
    clip_value: float = Field(1.0, ge=0)
    clip_norm: float = Field(0.0, ge=0)
    calibration_batches: int = Field(64, ge=1)
    objectives: tuple[Literal["accuracy", "macs", "latency"], ...] = ("accuracy", "macs")
    points: int = Field(4, ge=1)
    levels: dict[str, int] = Field(default={"resolution": 4, "width": 3, "depth": 3, "kernel": 2, "expansion": 2})
    mutations: int = Field(500, ge=0)
    mutation_probability: float = Field(0.1, gt=0, le=1)

    @field_validator("objectives", mode="after")
    @classmethod
    def _accuracy_and_a_cost(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) != 2 or "accuracy" not in names or len(set(names)) != 2:
            raise ValueError("accuracy and one cost, 'macs' or 'latency'")
        return names


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "epochs": 30,
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.3,
        "calibration_batches": 8,
        "levels": {"resolution": 3, "width": 2, "depth": 2, "kernel": 2, "expansion": 2},
        "mutations": 60,
    },
}


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "small" below 96 pixels, which one CPU can do, else the paper's."""
    return dict(PRESETS["small" if min(image[1:]) < 96 else "paper"])


@final
class Searcher(SupernetSearcher):
    """One BigNAS run: one training, selection from coarse to fine, children taken out as they are.

    Args:
        family: "bignas".
        task: What is learned.
        settings: Hyper-parameters.
        costs: Costs and budget of the run.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".
        compute: Device and precision.
    """

    def __init__(
        self,
        *,
        family: Any,
        task: Task,
        settings: Settings,
        costs: CostModel | None = None,
        seed: int,
        memory_format: str = "contiguous",
        compute: Compute | None = None,
    ) -> None:
        self.settings = settings
        self.objectives = tuple(OBJECTIVES[name] for name in settings.objectives)
        super().__init__(
            family=family,
            task=task,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            calibration_batches=settings.calibration_batches,
            costs=costs,
            seed=seed,
            memory_format=memory_format,
            compute=compute,
        )

    # ------------------------------------------------------------------ one training

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser; weight decay is none of its business, it belongs to the largest child's pass."""
        s = self.settings
        if s.optimizer == "rmsprop":
            return RMSprop(self.supernet.parameters(), s.lr, momentum=s.momentum)
        return torch.optim.SGD(self.supernet.parameters(), s.lr, s.momentum, nesterov=s.momentum > 0)

    def rate(self, step: int) -> float:
        """Return the rate after ``step`` steps: linear rise, exponential stairs, constant tail."""
        s = self.settings
        return single_stage_rate(
            step,
            peak=s.lr,
            epochs=s.epochs,
            steps_per_epoch=self.training_steps,
            decay=s.decay,
            floor=s.floor,
            warmup_epochs=s.warmup_epochs,
            decay_epochs=s.decay_epochs,
        )

    def make_rule(self) -> Sandwich:
        """Return the sandwich rule: the largest by the labels, random ones and the smallest by its predictions."""
        return Sandwich(self.family, self.settings.children)

    def make_step(self) -> ChildrenStep:
        """Return the step: in-place distillation, decay and dropout for the largest child alone, one optimiser step."""
        s = self.settings
        return single_stage_step(
            self.supernet,
            self.optimizer,
            weight_decay=s.weight_decay,
            clip_value=s.clip_value,
            clip_norm=s.clip_norm,
        )

    # ------------------------------------------------------------------ selection from coarse to fine

    def make_strategy(self) -> CoarseToFine:
        """Return the selection, one best child for every budget."""
        s = self.settings
        self._foretold = Foretold(self.family.space)
        return CoarseToFine(
            self.family.space,
            seed=seed_of(self.seed, "selection"),
            limits=self.budgets(),
            costs=self.costs_beforehand,
            levels=s.levels,
            mutation_probability=s.mutation_probability,
            mutations=s.mutations,
        )

    def costs_beforehand(self, architecture: Architecture) -> dict[str, float]:
        """Return what is known of a child's costs before it is measured: exact ones, and the least likely latency."""
        if not self.measures_latency:
            return self.costs_of(architecture)
        if architecture.digest in self.measured:
            return self.costs_of(architecture)
        return {**self.counted_costs(architecture), "latency": self._foretold.least_ms(architecture, self._known_ms())}

    def foretold(self, trial: Trial) -> dict[str, float]:
        """Return the latency that the predictor expects of a trial's child."""
        if not self.measures_latency:
            return {}
        expected = self._foretold.ms(trial.architecture, self._known_ms())
        return {} if expected is None else {"latency": expected}

    def _known_ms(self) -> list[tuple[Architecture, float]]:
        return [(child.architecture, child.costs["latency"]) for child in self.in_order]

    def make_parts(self) -> dict[str, int]:
        """Return the evaluations of both phases."""
        assert isinstance(self.strategy, CoarseToFine)
        parts = {"coarse": len(self.strategy.coarse), "fine": self.settings.mutations}
        return {name: count for name, count in parts.items() if count}

    def budgets(self) -> list[Budget]:
        """Return the budgets by rising cost; all keep the run's limits, the last has no others."""
        axis = self.axis
        low = self.costs_of(self.family.smallest())[axis]
        whole = self.limits()
        given = {limit.cost: limit for limit in whole.limits}
        high = given[axis].value if axis in given else self.costs_of(self.family.largest())[axis]
        others = tuple(limit for limit in whole.limits if limit.cost != axis)
        points = self.settings.points
        values = [low * (high / low) ** (number / points) for number in range(1, points + 1)]
        unit = "ms" if axis == "latency" else ""
        return [Budget((Limit(axis, "<=", value, unit, False), *others)) for value in [*values[:-1], high]]

    def chosen(self) -> Sequence[tuple[str, Architecture]]:
        """Return the best child of every budget, that of the whole budget first; of equally good ones the cheapest.

        So all are children that no other beats. Before the selection: the costliest of the coarse grid, by its MACs;
        the smallest child where latency is limited, or nothing that was measured kept the budget.
        """
        assert isinstance(self.strategy, CoarseToFine)
        front = self.front()
        if not front and ("latency" in self.limited or self.refused):
            return [("final", self.family.smallest())]
        if not front:
            return [("final", max(self.strategy.coarse, key=lambda each: self.family.exact_costs(each)["macs"]))]
        smaller: list[Architecture] = []
        for budget in self.budgets()[:-1]:
            fitting = [child for child in front[:-1] if not budget.violations(child.costs)]
            if fitting and fitting[-1].architecture not in smaller:
                smaller.append(fitting[-1].architecture)
        points = [(f"point-{number}", child) for number, child in enumerate(smaller, start=1)]
        return [("final", front[-1].architecture), *points]
