"""Hardware-aware system (LINAS): the best sub-networks of one trained super-network for a device, by few measurements.

Sarah, Cummings, Nittur Sridhar et al., "A Hardware-Aware System for Accelerating Deep Neural Network Optimization",
2022, arXiv 2202.12954; details from its sister paper, arXiv 2205.10358.

A trained elastic super-network is given. Small batches of its sub-networks are really measured: taken out, batch
statistics anew, accuracy on the validation images, latency on this machine. Between two batches one predictor for each
objective learns from all measurements, and a whole evolutionary search runs on the predictions (a genetic algorithm,
NSGA-II or U-NSGA-III for one, two or more objectives); its best new sub-networks are the next batch. What is returned
is the set that no other measured sub-network dominates.

What differs: MACs and parameters are computed and never predicted; a measured network is never proposed again; inactive
decisions are masked; the last batch is measured too. ``method="archsmith"`` is the same loop with smaller batches,
Gaussian processes, and batches chosen by the hypervolume they promise. Where no weights are given, the super-network is
trained here first, by the sandwich rule with in-place distillation. ``search`` needs no network at all: any space, any
evaluator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.evaluate.base import Evaluator
from archsmith.run.costs import CostModel
from archsmith.run.study import StudyOutcome, run_study
from archsmith.run.supernet_search import EXACT, Evaluated, SupernetSearcher
from archsmith.space import Architecture, Budget, Objective, Result, Space, pareto_front
from archsmith.strategies import Evolution, MeasureRefitSearch, linas
from archsmith.strategies.linas import ExactCost
from archsmith.supernet.sampling import Sandwich
from archsmith.tasks.base import Task
from archsmith.train.children import ChildrenStep
from archsmith.train.compute import Compute
from archsmith.train.schedules import annealed

SYSTEM = {
    "slug": "hw-aware-system",
    "title": "A Hardware-Aware System for Accelerating Deep Neural Network Optimization",
    "year": 2022,
    "arxiv": "2202.12954",
    "kind": "search",
    "aliases": ["linas", "dynas-t"],
}

WORKS_ON = ("ofa-mobile", "bignas")
"""Families with a sliced super-network."""

LATENCY_DEVICES = ("cpu", "onnxruntime", "cuda")
"""Where latency can be measured."""

OBJECTIVES = {
    "accuracy": Objective("valid_accuracy"),
    "macs": Objective("macs", "minimize"),
    "params": Objective("params", "minimize"),
    "latency": Objective("latency", "minimize"),
}
"""What may be improved, by the name that settings and command line use."""

PUBLISHED_EVALUATIONS = {
    "MobileNetV3 0.810": {"LINAS": 100, "NSGA-II": 260, "random": 2_000},
    "MobileNetV3 0.955": {"LINAS": 346, "NSGA-II": 2_000},
    "ResNet50 0.800": {"LINAS": 57, "NSGA-II": 255, "random": 1_000},
    "ResNet50 0.925": {"LINAS": 155, "NSGA-II": 1_000},
    "Transformer 0.967": {"LINAS": 111, "NSGA-II": 191, "random": 600},
    "Transformer 0.997": {"LINAS": 465, "NSGA-II": 600},
    "NCF 0.965": {"LINAS": 87, "NSGA-II": 89, "random": 160},
    "NCF 0.989": {"LINAS": 148, "NSGA-II": 160},
}
"""Published numbers of measurements until a share of the largest hypervolume is reached, arXiv 2205.10358."""


class Settings(BaseModel):
    """Hyper-parameters; those of the search are the published ones.

    Attributes:
        objectives: What is improved, any of "accuracy", "macs", "params", "latency".
        evaluations: N, sub-networks that are measured.
        method: "linas" as published, or "archsmith": batches of 10 after 20 random ones, Gaussian processes, and the
            largest promised hypervolume.
        population: P of "linas": size of a batch and of the inner evolution.
        inner_evaluations: J, predictions of one inner search.
        points: Most networks that are delivered, spread over the measured Pareto set.
        calibration_batches: Training batches for a sub-network's statistics.
        supernet: Safetensors file with the weights of a trained super-network, or the folder of a run that trained one
            (for another device, say); None trains one first.
        epochs: Epochs of that training.
        batch_size: Images for one step.
        lr: Largest learning rate; a cosine takes it to zero.
        momentum: Nesterov's.
        weight_decay: L2 in the largest child's pass.
        children: Children for each step: the largest, random ones, the smallest.
        clip_norm: Largest norm of the gradient, 0 for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objectives: list[str] = Field(default=["accuracy", "macs"], min_length=1)
    evaluations: int = Field(default=250, ge=2)
    method: Literal["linas", "archsmith"] = "linas"
    population: int = Field(default=50, ge=2)
    inner_evaluations: int = Field(default=20_000, ge=2)
    points: int = Field(default=4, ge=1)
    calibration_batches: int = Field(default=16, ge=1)
    supernet: str | None = None
    epochs: int = Field(default=180, ge=1)
    batch_size: int = Field(default=256, ge=2)
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=3e-5, ge=0)
    children: int = Field(default=4, ge=2)
    clip_norm: float = Field(default=1.0, ge=0)

    @field_validator("objectives", mode="after")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names) or not set(names) <= set(OBJECTIVES):
            raise ValueError(f"any of {list(OBJECTIVES)}, each once")
        return names


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return what a single CPU can do with small images; the published settings from 96 pixels on."""
    if min(image[1:]) >= 96:
        return {}
    small = {"epochs": 30, "batch_size": 64, "calibration_batches": 8}
    return {**small, "evaluations": 100, "method": "archsmith", "inner_evaluations": 2_000}


def strategy(
    space: Space,
    settings: Settings | None = None,
    *,
    objectives: Sequence[Objective] | None = None,
    seed: int = 0,
    exact: Mapping[str, ExactCost] | None = None,
    constraints: Budget | None = None,
    measured: Collection[str] = (),
) -> MeasureRefitSearch:
    """Return the search as a strategy.

    Args:
        space: Any space.
        settings: Hyper-parameters.
        objectives: In place of those that the settings name.
        seed: Seed of everything drawn.
        exact: Costs that are computed.
        constraints: Limits on costs.
        measured: Costs with limits that are measured, see ``MeasureRefitSearch``.
    """
    s = Settings() if settings is None else settings
    wanted = tuple(OBJECTIVES[name] for name in s.objectives) if objectives is None else tuple(objectives)
    shared: dict[str, Any] = {"objectives": wanted, "seed": seed, "exact": exact}
    shared |= {"constraints": constraints, "measured": measured}
    if s.method == "linas":
        return linas(space, population=s.population, evaluations=max(s.inner_evaluations, s.population), **shared)
    inner = Evolution(population=min(50, s.inner_evaluations), evaluations=s.inner_evaluations)
    return MeasureRefitSearch(space, initial=min(20, s.evaluations), batch=10, inner=inner, **shared)


@dataclass(frozen=True)
class ParetoSet:
    """What a search ends with.

    Attributes:
        architectures: Those that no other measured one dominates, by the first objective from the best on.
        values: Their measured objectives by name.
        study: How the study ended.
    """

    architectures: tuple[Architecture, ...]
    values: tuple[Mapping[str, float], ...]
    study: StudyOutcome


def search(
    space: Space,
    evaluator: Evaluator,
    settings: Settings | None = None,
    *,
    objectives: Sequence[Objective] | None = None,
    seed: int = 0,
    exact: Mapping[str, ExactCost] | None = None,
    constraints: Budget | None = None,
    **options: Any,
) -> ParetoSet:
    """Measure ``settings.evaluations`` architectures and return those that none dominates.

    Args:
        space: Any space: a table's, a surrogate's, an elastic network's.
        evaluator: Measures architectures of it.
        settings: Hyper-parameters of the search; those of the training are not used.
        objectives: In place of those that the settings name.
        seed: Seed of the search and, through the trials, of the measurements.
        exact: Costs that are computed, not predicted.
        constraints: Limits on them.
        options: Of ``archsmith.run.study.run_study``: ``store=JournalStore(folder)`` survives a kill, ``workers``.

    Raises:
        UserError: A setting out of range, or an option that ``run_study`` does not take.
    """
    s = Settings() if settings is None else settings
    searcher = strategy(space, s, objectives=objectives, seed=seed, exact=exact, constraints=constraints)
    study = run_study(searcher, evaluator, budget=s.evaluations, **options)
    front = searcher.front()
    return ParetoSet(tuple(each for each, _ in front), tuple(values for _, values in front), study)


@final
class Searcher(SupernetSearcher):
    """One run: a super-network, given or trained, measurements and searches in turn, the measured Pareto set.

    Args:
        family: A family with a sliced super-network.
        task: What is learned.
        settings: Hyper-parameters.
        costs: Costs and budget of the run; limits on MACs and parameters are hard, others are predicted from
            measurements, and what turns out to break them is refused.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".
        compute: Device and precision.

    Raises:
        UserError: Latency without a cost model, or weights that do not fit.
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
        if "latency" in settings.objectives and costs is None:
            raise UserError("objectives", settings.objectives, allowed="without 'latency' where nothing measures it")
        super().__init__(
            family=family,
            task=task,
            epochs=0 if settings.supernet else settings.epochs,
            batch_size=settings.batch_size,
            calibration_batches=settings.calibration_batches,
            costs=costs,
            seed=seed,
            memory_format=memory_format,
            compute=compute,
        )
        if settings.supernet is not None:
            load_supernet_(self.supernet, Path(settings.supernet))

    # ------------------------------------------------------------------ the super-network, where none is given

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return Nesterov SGD without decay of its own: that belongs to the largest child's pass."""
        s = self.settings
        return torch.optim.SGD(self.supernet.parameters(), s.lr, s.momentum, nesterov=s.momentum > 0)

    def rate(self, step: int) -> float:
        """Return the rate after ``step`` steps: one cosine behind a rise of a twentieth."""
        total = self.training_epochs * self.training_steps
        return annealed(step, peak=self.settings.lr, total=total, warmup=total // 20, shape="cosine")

    def make_rule(self) -> Sandwich:
        """Return the sandwich rule."""
        return Sandwich(self.family, self.settings.children)

    def make_step(self) -> ChildrenStep:
        """Return the step of many children, all but the largest learning from its predictions."""
        s = self.settings
        return ChildrenStep(self.supernet, self.optimizer, weight_decay=s.weight_decay, clip_norm=s.clip_norm)

    # ------------------------------------------------------------------ measure, refit, search

    def make_strategy(self) -> MeasureRefitSearch:
        """Return the search; MACs and parameters are computed, accuracy and latency predicted from measurements."""

        def column(name: str) -> ExactCost:
            costs = self.family.exact_costs
            return lambda architectures: np.array([costs(each)[name] for each in architectures], dtype=np.float64)

        budget = self.limits()
        return strategy(
            self.family.space,
            self.settings,
            seed=seed_of(self.seed, "selection"),
            exact={name: column(name) for name in EXACT},
            constraints=budget if budget.limits else None,
            measured=sorted(self.limited - set(EXACT)),
        )

    def make_parts(self) -> dict[str, int]:
        """Return the evaluations of the search, its one part."""
        return {"search": self.settings.evaluations}

    def front(self) -> list[Evaluated]:
        """Return the measured sub-networks that no measured one dominates, by rising accuracy; equal ones once."""
        results = [_result(child) for child in self.evaluated]
        front = [self.evaluated[at] for at in pareto_front(results, self.objectives)]
        unique = {tuple(objective.value(_result(child)) for objective in self.objectives): child for child in front}
        return sorted(unique.values(), key=lambda child: (child.accuracy, -child.costs["macs"]))

    def chosen(self) -> Sequence[tuple[str, Architecture]]:
        """Return the most accurate of the measured Pareto set, and up to ``points - 1`` more, evenly along it.

        Before anything was measured, or where nothing that was measured keeps the budget: the largest sub-network, or
        the smallest where there is a budget that the largest breaks or that must be measured.
        """
        front = self.front()
        if not front:
            largest = self.family.largest()
            return [("final", largest if self.fits_exactly(largest) else self.family.smallest())]
        count = min(self.settings.points, len(front))
        places = np.unique(np.linspace(len(front) - 1, 0, count).round().astype(int))[::-1]
        first, *others = [front[int(place)].architecture for place in places]
        return [("final", first), *((f"point-{number}", child) for number, child in enumerate(others, start=1))]

    def fits_exactly(self, architecture: Architecture) -> bool:
        """Return whether a sub-network keeps the limits of the run, as far as no measurement is needed to know."""
        if self.limited - set(EXACT):
            return False
        return not self.limits().violations(dict(self.family.exact_costs(architecture)))


def _result(child: Evaluated) -> Result:
    return Result(metrics=child.metrics, costs=child.costs)


@torch.no_grad()
def load_supernet_(supernet: nn.Module, file: Path) -> None:
    """Give a super-network the weights of a safetensors file: those of its ``state_dict``.

    Args:
        supernet: The super-network.
        file: The file, or the folder of a run: then the newest of its checkpoints.

    Raises:
        UserError: No such file, or tensors that are missing, unknown or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.is_dir():
        found = sorted((file / "checkpoints").glob("*.safetensors"))
        file = found[-1] if found else file
    try:
        tensors = load_file(file)
        inside = "supernet."
        if any(name.startswith(inside) for name in tensors):  # a checkpoint, which has the optimiser's as well
            tensors = {name.removeprefix(inside): each for name, each in tensors.items() if name.startswith(inside)}
    except (OSError, SafetensorError) as error:
        raise UserError(
            "settings.supernet", str(file), allowed="a safetensors file with the weights of the super-network"
        ) from error
    own = supernet.state_dict()
    wrong = [name for name in {**own, **tensors} if name not in own or name not in tensors]
    wrong += [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if wrong:
        raise UserError(
            "settings.supernet",
            str(file),
            allowed=f"exactly the {len(own)} tensors of this family's super-network",
            hint=f"Missing, unknown or of another shape: {', '.join(sorted(wrong)[:4])}.",
        )
    supernet.load_state_dict(tensors)


def latency_steps(batch: int) -> tuple[int, int]:
    """Return the published numbers of warm-up steps and of timed steps for a batch size.

    Example:
        >>> latency_steps(1), latency_steps(128)
        ((100, 500), (5, 25))
    """
    examples = max(25 * batch, 500)
    return examples // batch // 5, examples // batch


def published_latency_ms(run: Callable[[], object], batch: int) -> tuple[float, float]:
    """Return mean and standard deviation in milliseconds by the published protocol, for comparison with its figures.

    The library's own figure is the median of interleaved rounds, see ``archsmith.cost.latency``.

    Args:
        run: One forward pass that is finished when it returns (synchronised, on a GPU).
        batch: Examples that it computes.
    """
    warmup, steps = latency_steps(batch)
    for _ in range(warmup):
        run()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        run()
        times.append(1_000 * (time.perf_counter() - started))
    return float(np.mean(times)), float(np.std(times))
