"""SimQ-NAS: the architecture and the precision of each of its layers, searched together.

"SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture Search", 2023, arXiv 2312.13301.

A genotype is a child of a trained supernet and, for every layer of that child, whether it is quantised to int8 and by
which scheme, so that the search can trade depth and width against precision. Policies are applied after training:
nothing is retrained for a candidate. The child is taken out, its batch statistics are taken anew, its activations are
calibrated on training images, the policy is applied to its exported file, and accuracy, size and latency are those of
the quantised file. LINAS does the search (measure a batch, refit predictors, search on them, repeat), on encodings in
which layers that a child does not have are masked; the size is computed, not predicted.

What differs: the paper searches released supernets (ImageNet, SST-2); here one is trained first by BigNAS's step, or
brought along with ``QuantisedEvaluator(network=...)``. Quantised files are run by ONNX Runtime (published: torch's
static quantisation). The paper's text beyond its abstract could not be read: what is built follows the abstract and the
behaviour of the released code. There, a one-hot vocabulary comes of the training rows; here of the space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.cost import Latency
from archsmith.evaluate.quantised import QuantisedEvaluator
from archsmith.families.bignas_layers import layer_elements
from archsmith.run.costs import CostModel
from archsmith.run.drive import Delivered
from archsmith.run.measured import steadiest
from archsmith.run.supernet_search import EXACT, Evaluated, SupernetSearcher
from archsmith.space import Architecture, Objective, Result, pareto_front, policy_bytes
from archsmith.space.joint import JointSpace, sites_of
from archsmith.space.quantisation import LayerPolicy
from archsmith.strategies import Strategy
from archsmith.strategies.inner_search import Evolution
from archsmith.strategies.linas import DRAWS, MeasureRefitSearch
from archsmith.supernet.sampling import Sandwich
from archsmith.tasks.base import Task
from archsmith.train.children import ChildrenStep
from archsmith.train.compute import Compute
from archsmith.train.single_stage import single_stage_rate, single_stage_step

SYSTEM = {
    "slug": "simq-nas",
    "title": "SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture Search",
    "year": 2023,
    "arxiv": "2312.13301",
    "kind": "search",
    "aliases": ["simq"],
}

WORKS_ON = ("bignas",)
"""Families with a sliced supernet whose layers can be named."""

LATENCY_DEVICES = ("onnxruntime",)
"""Where latency can be measured: what runs quantised files."""

TASK_OPTIONS = {"label_smoothing": 0.1}
"""For the largest child; the others see its predictions only."""

QUANTISED = "model-quantised.onnx"
"""The quantised file of an outcome, beside its network in fp32."""

OBJECTIVES = {
    "accuracy": Objective("valid_accuracy"),
    "size": Objective("size", "minimize"),
    "latency": Objective("latency", "minimize"),
}


class Settings(BaseModel):
    """Hyper-parameters; those of the search are published, those of the supernet's training are BigNAS's.

    Attributes:
        epochs: Epochs of the supernet's training.
        batch_size: Images for one step.
        lr: Largest learning rate (SGD with Nesterov's momentum).
        momentum: Of the optimiser.
        decay: Factor of each stair of the learning rate; there are 150 of them.
        floor: Part of the largest rate at which it stays constant.
        weight_decay: L2 in the largest child's pass.
        children: Children for each step: the largest, random ones, and the smallest.
        clip_value: Largest absolute entry of the gradient, 0 for none.
        calibration_batches: Training batches for a child's batch statistics.
        objectives: Of "accuracy", "size" (bytes, analytic) and "latency" (ms, of the quantised file, measured here).
        precisions: What every layer chooses from.
        schemes: What the weights of an int8 layer choose from.
        calibration_images: Training images for the ranges of activations.
        ranges: "minmax", "percentile" or "entropy" (published: Kullback-Leibler).
        population: Of LINAS, trials between two fits and the inner search's population.
        inner_evaluations: Predictions of one inner search.
        evaluations: Candidates that are quantised and measured.
        start: Policies of the first batch: "random" as published, or "uniform": half of its children get one policy for
            all layers, each of the choices in turn (no better in what we measured).
        points: Largest number of networks that are delivered.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(360, ge=1)
    batch_size: int = Field(4096, ge=2)
    lr: float = Field(0.256, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    decay: float = Field(0.97, gt=0, le=1)
    floor: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(1e-5, ge=0)
    children: int = Field(4, ge=2)
    clip_value: float = Field(1.0, ge=0)
    calibration_batches: int = Field(64, ge=1)
    objectives: tuple[Literal["accuracy", "size", "latency"], ...] = Field(("accuracy", "size"), min_length=1)
    precisions: tuple[Literal["int8", "fp32", "bf16"], ...] = Field(("int8", "fp32"), min_length=1)
    schemes: tuple[Literal["symmetric", "asymmetric"], ...] = Field(("symmetric", "asymmetric"), min_length=1)
    calibration_images: int = Field(100, ge=1)
    ranges: Literal["minmax", "percentile", "entropy"] = "entropy"
    population: int = Field(50, ge=2)
    inner_evaluations: int = Field(10_000, ge=2)
    evaluations: int = Field(500, ge=2)
    start: Literal["random", "uniform"] = "random"
    points: int = Field(4, ge=1)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "epochs": 30,
        "batch_size": 64,
        "lr": 0.1,
        "calibration_batches": 8,
        "population": 20,
        "inner_evaluations": 1_000,
        "evaluations": 100,
    },
}


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "small" below 96 pixels, which one CPU can do, else the paper's."""
    return dict(PRESETS["small" if min(image[1:]) < 96 else "paper"])


def joint_space(family: Any, settings: Settings) -> JointSpace:
    """Return the family's space with a policy for every convolution and linear layer."""
    sites = sites_of(family.space, family.largest(), lambda child: layer_elements(family, child))
    return JointSpace(family.space, sites, precisions=settings.precisions, schemes=settings.schemes)


def exact_size(family: Any, space: JointSpace, architecture: Architecture) -> int:
    """Return the analytic size of a candidate in bytes; nothing is built."""
    child = space.main_part(architecture)
    params = family.exact_costs(child)["params"]
    return policy_bytes(layer_elements(family, child), params, space.policy(architecture))


@final
class JointSearch(MeasureRefitSearch):
    """LINAS over a joint space, as published but for its first batch where ``start`` is "uniform".

    Independent genes never meet a network that is int8 throughout; there, half of the first batch are such networks.

    Args:
        space: The joint space.
        start: "random" or "uniform".
        settings: Of ``MeasureRefitSearch``.
    """

    def __init__(self, space: JointSpace, *, start: str = "random", **settings: Any) -> None:
        super().__init__(space, **settings)
        self.joint, self.start = space, start

    def _next_batch(self) -> list[Architecture]:
        first = not self._known
        if not first or self.start == "random":
            return super()._next_batch()
        rng = numpy_stream(self.seed, "uniform policies")
        choices = self.joint.choices
        policies = [
            LayerPolicy(precision, scheme=scheme)
            for precision in choices["precision"]
            for scheme in (choices["scheme"] if precision == "int8" else choices["scheme"][:1])
        ]
        wanted = self.initial // 2
        found: dict[str, Architecture] = {}
        for number in range(DRAWS * wanted):
            if len(found) == wanted:
                break
            child = self.joint.main_part(self.breeding.architectures(self.breeding.sample(rng, 1))[0])
            made = self.joint.with_policy(child, policies[number % len(policies)])
            found.setdefault(made.network_digest, made)
        self._digests.update(found)
        return [*found.values(), *super()._next_batch()[: self.initial - len(found)]]


@final
class Searcher(SupernetSearcher):
    """One SimQ-NAS run: a supernet's training, then LINAS over children and policies.

    Args:
        family: "bignas".
        task: What is learned.
        settings: Hyper-parameters.
        costs: Costs and budget of the run. A limit on latency holds for the quantised file (the smallest child must
            keep it in fp32), others for the child.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".
        compute: Device and precision of the training; quantised files run on the CPU.

    Attributes:
        joint: The joint space.
        evaluator: Quantises and measures candidates.

    Raises:
        UserError: A family whose layers cannot be named, or a precision beside the policy's.
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
        if not hasattr(family, "table"):
            raise UserError("family", type(family).__name__, allowed="'bignas': its layers can be named beforehand")
        self.settings = settings
        self.objectives = tuple(OBJECTIVES[name] for name in dict.fromkeys(settings.objectives))
        self.joint = joint_space(family, settings)
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
        if self.deployment.precision != "fp32":
            raise UserError("latency precision", self.deployment.precision, allowed="none: the policy has one by layer")
        self.evaluator = QuantisedEvaluator(
            self.joint,
            self.network_of,
            calibration=self._calibration_images(),
            score=lambda network: task.evaluate(network, "valid"),
            method=settings.ranges,
            latency=False,  # the run keeps what was measured
            threads=self.deployment.threads,
        )

    @property
    def space(self) -> JointSpace:
        """The joint space: what the strategy asks for."""
        return self.joint

    # ------------------------------------------------------------------ one training, as in BigNAS

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return SGD; weight decay belongs to the largest child's pass."""
        s = self.settings
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
        )

    def make_rule(self) -> Sandwich:
        """Return the sandwich rule."""
        return Sandwich(self.family, self.settings.children)

    def make_step(self) -> ChildrenStep:
        """Return the step with in-place distillation."""
        s = self.settings
        return single_stage_step(self.supernet, self.optimizer, weight_decay=s.weight_decay, clip_value=s.clip_value)

    # ------------------------------------------------------------------ the joint search

    def make_strategy(self) -> Strategy:
        """Return LINAS over the joint space; sizes, MACs and parameters are computed."""
        s, budget = self.settings, self.limits()
        return JointSearch(
            self.joint,
            start=s.start,
            batch=s.population,
            inner=Evolution(population=s.population, evaluations=s.inner_evaluations),
            select="rank",
            objectives=self.objectives,
            exact={"size": self.sizes, **{name: partial(self.exact_column, name) for name in EXACT}},
            constraints=budget if budget.limits else None,
            measured=sorted(self.limited - set(EXACT)),
            seed=seed_of(self.seed, "search"),
        )

    def make_parts(self) -> dict[str, int]:
        """Return the number of candidates."""
        return {"search": self.settings.evaluations}

    def sizes(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return the analytic sizes of candidates, shape (N,)."""
        return np.array([exact_size(self.family, self.joint, each) for each in architectures], dtype=np.float64)

    def exact_column(self, name: str, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return MACs or parameters of the children of candidates, shape (N,)."""
        costs = (self.family.exact_costs(self.joint.main_part(each)) for each in architectures)
        return np.array([each[name] for each in costs], dtype=np.float64)

    def main_part(self, architecture: Architecture) -> Architecture:
        """Return the child of a candidate."""
        return self.joint.main_part(architecture) if architecture.space == self.joint.name else architecture

    def key(self, architecture: Architecture) -> str:
        """Return the same for candidates that are the same network."""
        return architecture.network_digest

    def measure(self, architecture: Architecture) -> Latency:
        """Return the latency of a candidate's quantised file, measured now."""
        return self.evaluator.measured(self.evaluator.file(architecture))

    def evaluate(self, architecture: Architecture) -> Evaluated:
        """Return a candidate's quantised file, measured."""
        result = self.evaluator.result(architecture)
        if not self.selecting:
            self.evaluator.forget()  # the weights are going to change
        metrics = result.metrics or {"valid_accuracy": 0.0, "valid_loss": float("inf")}
        return Evaluated(architecture, metrics, self.costs_of(architecture))

    def counted_costs(self, architecture: Architecture) -> dict[str, float]:
        """Return the costs of the child in fp32, and the size under the policy."""
        size = float(exact_size(self.family, self.joint, architecture))
        return {**super().counted_costs(self.joint.main_part(architecture)), "size": size}

    def front(self) -> list[Evaluated]:
        """Return the candidates that no other beats in all objectives, by falling accuracy; equal ones once."""
        fitting = [each for each in self.evaluated if not self.limits().violations(each.costs)]
        results = [Result(metrics=each.metrics, costs=each.costs) for each in fitting]
        best: dict[tuple[float, ...], Evaluated] = {}
        for at in pareto_front(results, self.objectives):
            best.setdefault(tuple(each.value(results[at]) for each in self.objectives), fitting[at])
        return sorted(best.values(), key=lambda each: (-each.accuracy, each.costs["size"]))

    def chosen(self) -> Sequence[tuple[str, Architecture]]:
        """Return the most accurate point of the front, then others evenly over it; before, the largest child.

        The smallest in place of the largest where there are limits.
        """
        front = self.front()
        if not front:
            child = self.family.smallest() if self.limited else self.family.largest()
            return [("final", self.joint.with_policy(child, self._first_policy()))]
        count = min(self.settings.points, len(front))
        places = dict.fromkeys(round(at) for at in np.linspace(0, len(front) - 1, count))
        first, *others = (front[at].architecture for at in places)
        return [("final", first), *((f"point-{number}", each) for number, each in enumerate(others, start=1))]

    def _first_policy(self) -> LayerPolicy:
        """Return the first choice; where latency is limited fp32, which the smallest child was found to keep it in."""
        precisions = self.settings.precisions
        precision = "fp32" if "latency" in self.limited and "fp32" in precisions else precisions[0]
        return LayerPolicy(precision, scheme=self.settings.schemes[0])

    def _calibration_images(self) -> list[torch.Tensor]:
        """Return training images without augmentation, ``calibration_images`` of them."""
        images, left = [], self.settings.calibration_images
        for batch in self.calibration_inputs():
            images.append(batch[:left].cpu().float().contiguous())
            left -= len(images[-1])
            if left <= 0:
                break
        return images

    # ------------------------------------------------------------------ the result

    def delivered_as(self, label: str, architecture: Architecture) -> Delivered:
        """Return the child in fp32 as the network, and beside it the quantised file that was measured."""
        found = self.known(architecture) or self.evaluate(architecture)
        file = self.evaluator.file(architecture)
        child = self.joint.main_part(architecture)
        record = {
            "policy": {layer: each.to_json() for layer, each in file.policy.items()},
            "how": file.note,
            "metrics": dict(found.metrics),
            "costs": {"size_bytes": found.costs["size"], "file_bytes": file.file_bytes},
            "latency": steadiest(lambda: self.evaluator.measured(file)).to_dict(),
            "layers": [asdict(each) for each in self.evaluator.layers(architecture)],
        }
        written = {QUANTISED: file.content, "quantised.json": json.dumps(record, indent=1).encode()}
        network = self.network_of(child)
        return Delivered(network, child, label=label, files=written, record=record, deployed=QUANTISED)
