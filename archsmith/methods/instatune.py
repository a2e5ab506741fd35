"""InstaTune: fine-tuning a pre-trained transformer becomes the training of a supernet of its smaller selves.

Sarah, Cummings, Nittur Sridhar, Sundaresan, Szankin, Webb, Pablo Munoz, "InstaTune: Instantaneous Neural Architecture
Search During Fine-Tuning", ICCV workshops 2023, arXiv 2308.15609.

No supernet is pre-trained: elasticity is switched on for the fine-tuning alone, so that subnets are tuned for the task
itself. It only shrinks: the first layers of the network, in each layer the first heads and the first hidden units, at
most as many as there are, so the whole network keeps its pre-trained weights. Every step trains the whole network and
random subnets by the labels and by distillation:

    L = alpha (CE(S, y) + sum_i CE(S_i, y)) + (1 - alpha) (g KL(S, T) + sum_i ((1 - g) KL(S_i, S) + g KL(S_i, T)))

S is the whole network (detached where it is a target), T a strong teacher: the same network fine-tuned as usual. g is 1
in the first epochs, where there is a teacher, and 0 afterwards. Then LINAS searches for subnets by accuracy and MACs;
what it finds needs no further training.

The transformer is not rewritten: its heads, hidden units and layers are atoms (``archsmith.supernet.elastic``), so any
encoder or decoder in which they are found will do. What differs: optimiser and rates are ours (the paper does not give
them); any strategy with two objectives can search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from archsmith.atoms.trace import Forward
from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.evaluate.subnets import SubnetEvaluator
from archsmith.run.drive import Delivered
from archsmith.run.own_supernet import ElasticFamily, SubnetCosts
from archsmith.run.supernet_search import SupernetSearcher
from archsmith.space import Architecture, Objective, Result, pareto_front, sample_by_decisions
from archsmith.strategies.base import Strategy
from archsmith.strategies.linas import MeasureRefitSearch
from archsmith.supernet.elastic import Elastic
from archsmith.supernet.sampling import Child, Sampling
from archsmith.tasks.base import Task
from archsmith.train.calibration import called
from archsmith.train.children import ChildrenStep, StepFigures

SYSTEM = {
    "slug": "instatune",
    "title": "InstaTune: Instantaneous Neural Architecture Search During Fine-Tuning",
    "year": 2023,
    "arxiv": "2308.15609",
    "kind": "search",
    "aliases": ["instant-tuning"],
}

PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "vit-base": {"depth": (11, 12), "heads": (6, 8, 10, 12), "ffn": (2048, 2560, 3072)},
    "beit3-base": {"depth": (11, 12), "heads": (6, 8, 10, 12), "ffn": (2048, 2560, 3072)},
    "beit3-base-deep": {"depth": (9, 10, 11, 12), "heads": (6, 8, 10, 12), "ffn": (2048, 2560, 3072)},
    "bert-base": {"depth": tuple(range(6, 13)), "heads": (6, 8, 10, 12), "ffn": (1024, 2048, 3072)},
}
"""The elastic spaces of the paper, for 12 layers, 12 heads and 3,072 hidden units."""

OBJECTIVES = (Objective("valid_accuracy", "maximize"), Objective("macs", "minimize"))
"""What a strategy of ``search`` has."""

SUPERNET_OF_OWN = True
"""A run works on a network of the user's own (``--model``), of which ``supernet_of`` makes the supernet."""


class Settings(BaseModel):
    """Hyper-parameters; weights and counts are the published ones.

    Attributes:
        epochs: Epochs of fine-tuning; 4 for BERT, 10 for ViT, 70 for BEiT-3 in the paper.
        teacher_epochs: Epochs in which the strong teacher teaches, from the first; 0 for none.
        subnets: Random subnets of each step, beside the whole network.
        alpha: Weight of the labels; the rest is that of distillation.
        temperature: Of distillation; no square of it multiplies the divergence.
        lr: Largest learning rate of AdamW, falling linearly to 0.
        warmup: Share of the steps in which the rate rises.
        weight_decay: Of AdamW, on weights with two and more axes.
        clip_norm: Largest norm of the gradient, 0 for none.
        batch_size: Examples of a step. This and what follows is for runs (``Searcher``).
        dims: What can be chosen: one of ``PUBLISHED``, in proportion, or options by kind.
        sort: Whether heads and hidden units with large weights come first, before the training.
        train_embeddings: Whether embeddings learn too.
        objectives: "accuracy" and the costs that the search weighs it against: "macs" (published), "params", or
            "latency", measured on the extracted subnet.
        evaluations: Subnets that the search measures.
        initial: Random ones among them, before the first predictor.
        batch: Measured subnets between two predictors.
        points: Networks to deliver at most, along the Pareto set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(4, ge=1)
    teacher_epochs: int = Field(0, ge=0)
    subnets: int = Field(1, ge=0)
    alpha: float = Field(0.3, gt=0, le=1)
    temperature: float = Field(1.0, gt=0)
    lr: float = Field(5e-5, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, ge=0)
    batch_size: int = Field(32, ge=1)
    dims: str | dict[str, list[int | float]] = "bert-base"
    sort: bool = False
    train_embeddings: bool = True
    objectives: tuple[Literal["accuracy", "macs", "params", "latency"], ...] = ("accuracy", "macs")
    evaluations: int = Field(100, ge=1)
    initial: int = Field(20, ge=1)
    batch: int = Field(10, ge=1)
    points: int = Field(4, ge=1)

    @field_validator("objectives", mode="after")
    @classmethod
    def _accuracy_and_a_cost(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if "accuracy" not in names or len(names) < 2 or len(set(names)) != len(names):
            raise ValueError("accuracy and at least one of macs, params, latency, each once")
        return names


def preset_settings(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the settings that differ for inputs of this shape: none."""
    return {}


# --------------------------------------------------------------------- what can be chosen


def elastic_transformer(
    model: nn.Module,
    example_inputs: Any,
    options: Mapping[str, Sequence[int | float]] | str = "bert-base",
    *,
    forward: Forward | None = None,
) -> Elastic:
    """Return a transformer of which layers, heads and hidden units can be chosen, each layer by itself.

    Args:
        model: Encoder or decoder with pre-trained weights; it stays the whole network.
        example_inputs: What it is called with.
        options: By kind ("depth", "heads", "ffn"): numbers, or shares (float) of what there is; or one of
            ``PUBLISHED``, in proportion where the network has another size.
        forward: How to get the logits, ``forward(model, *inputs)``; None for ``model(*inputs)``.

    Raises:
        UserError: The network has no heads, hidden units or layers that can go, or an option does not exist.
    """
    if isinstance(options, str):
        if options not in PUBLISHED:
            raise UserError("options", options, allowed=f"options by kind, or one of {', '.join(PUBLISHED)}")
        options = {kind: [n / max(given) for n in given] for kind, given in PUBLISHED[options].items()}
    return Elastic(model, example_inputs, options, forward=forward, name="instatune")


def transformer_macs(
    heads: Sequence[int],
    ffn: Sequence[int],
    *,
    tokens: int,
    hidden: int = 768,
    head_dim: int = 64,
    patch_size: int = 0,
    channels: int = 3,
    classes: int = 0,
) -> int:
    """Return the MACs of one example through an encoder: layers that are left out are not in the lists.

    ``sum over layers of 3 N D A + 2 N^2 A + N A D + 2 N D F`` with ``A = heads * head_dim``.

    Args:
        heads: Heads of every layer.
        ffn: Hidden units of every layer.
        tokens: N, the class token of a vision transformer included.
        hidden: D, width of the stream.
        head_dim: Features of a head.
        patch_size: Of a vision transformer: adds its patch embedding; 0 for text.
        channels: Of its images.
        classes: Adds the classifier behind one token.
    """
    n, d = tokens, hidden
    total = sum(
        3 * n * d * a + 2 * n * n * a + n * a * d + 2 * n * d * f
        for a, f in zip((h * head_dim for h in heads), ffn, strict=True)
    )
    if patch_size:
        total += (tokens - 1) * channels * patch_size**2 * d
    return total + d * classes


# --------------------------------------------------------------------- the loss


def divergence(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``KL(softmax(target / rho) || softmax(student / rho))``, the mean over the batch; the target is constant.

    Args:
        student: Logits (B, C); the gradient goes here alone.
        target: Logits (B, C).
        temperature: rho. No square of it multiplies the result.
    """
    own = (student / temperature).log_softmax(-1)
    return F.kl_div(own, (target.detach() / temperature).log_softmax(-1), reduction="batchmean", log_target=True)


def instatune_loss(
    whole: Tensor,
    subnets: Sequence[Tensor],
    labels: Tensor,
    teacher: Tensor | None = None,
    *,
    alpha: float = 0.3,
    gamma: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return the loss of one step in one piece; ``fine_tune_`` adds up the same gradients child by child.

    Args:
        whole: Logits (B, C) of the whole network.
        subnets: Of the random subnets.
        labels: Classes (B,).
        teacher: Of the strong teacher; needed for ``gamma`` above 0.
        alpha: Weight of the labels.
        gamma: Share of the strong teacher.
        temperature: Of the divergences.
    """
    kl = partial(divergence, temperature=temperature)
    hard = F.cross_entropy(whole, labels) + sum(F.cross_entropy(each, labels) for each in subnets)
    soft = whole.new_zeros(())
    if gamma:
        if teacher is None:
            raise UserError("teacher", None, allowed="logits of a teacher where gamma is above 0")
        soft = soft + gamma * (kl(whole, teacher) + sum(kl(each, teacher) for each in subnets))
    if gamma < 1:
        soft = soft + (1 - gamma) * sum(kl(each, whole) for each in subnets)
    return alpha * hard + (1 - alpha) * soft


class InstaTuneChildren(Sampling):
    """The whole network and random subnets, every elastic dimension independent, with the weights of the loss.

    Args:
        elastic: The transformer.
        settings: Hyper-parameters.
        gamma: Share of the strong teacher.
    """

    def __init__(self, elastic: Elastic, settings: Settings, gamma: float = 0.0) -> None:
        self.elastic, self.settings, self.gamma = elastic, settings, gamma

    def children(self, rng: np.random.Generator, progress: float = 0.0) -> list[Child]:
        """See ``Sampling``."""
        alpha, gamma = self.settings.alpha, self.gamma
        drawn = [sample_by_decisions(self.elastic.space, rng) for _ in range(self.settings.subnets)]
        soft, strong = (1 - alpha) * (1 - gamma), (1 - alpha) * gamma
        return [
            Child(architecture=self.elastic.largest(), labels=alpha, teacher=strong, teaches=True, regularised=True),
            *(Child(architecture=a, labels=alpha, inplace=soft, teacher=strong, regularised=True) for a in drawn),
        ]


# --------------------------------------------------------------------- fine-tuning

Batches = Callable[[int], Iterable[tuple[Any, Tensor]]]
"""Inputs (a tensor, a tuple of arguments or a mapping by name) and classes of an epoch, by its number from 0."""


def fine_tune_(
    elastic: Elastic,
    batches: Batches,
    settings: Settings,
    *,
    steps_per_epoch: int,
    seed: int,
    teacher: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int, StepFigures], None] = lambda step, figures: None,
) -> list[float]:
    """Fine-tune a transformer as a supernet, in place.

    Args:
        elastic: From ``elastic_transformer``.
        batches: Training batches of an epoch.
        settings: Hyper-parameters.
        steps_per_epoch: Batches of an epoch, for the learning rate.
        seed: Of the subnets that are drawn.
        teacher: Frozen strong teacher, called with the same inputs, returns logits; needed for ``teacher_epochs``.
        optimizer: None for AdamW with the rates of ``settings``; of another one the rate is the caller's affair.
        on_step: Called after every step with its number from 0.

    Returns:
        The whole network's mean loss on the labels, by epoch.

    Raises:
        UserError: Epochs with a teacher and no teacher, or an epoch without batches.
        Diverged: A loss is not finite.
    """
    if settings.teacher_epochs and teacher is None:
        raise UserError("teacher", None, allowed="a teacher where teacher_epochs is above 0")
    if isinstance(teacher, nn.Module):
        teacher.eval()
    total = settings.epochs * steps_per_epoch
    scheduler = None
    if optimizer is None:
        optimizer = adamw(elastic, settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(linear_rate, total=total, warmup=settings.warmup)
        )
    distance = partial(divergence, temperature=settings.temperature)
    step = ChildrenStep(elastic, optimizer, distance=distance, teacher=teacher, clip_norm=settings.clip_norm)
    means = []
    for epoch in range(settings.epochs):
        rule = InstaTuneChildren(elastic, settings, gamma=float(epoch < settings.teacher_epochs))
        losses = []
        for number, (inputs, labels) in enumerate(batches(epoch)):
            children = rule.children(numpy_stream(seed, "subnets", epoch, number))
            figures = step(children, partial(_labels_loss, inputs, labels))
            if scheduler is not None:
                scheduler.step()
            assert figures.labels[0] is not None
            losses.append(figures.labels[0])
            on_step(step.steps - 1, figures)
        if not losses:
            raise UserError("batches", f"none in epoch {epoch}", allowed="at least one batch for every epoch")
        means.append(float(np.mean(losses)))
    return means


def _labels_loss(inputs: Any, labels: Tensor, forward: Callable[..., Tensor]) -> Tensor:
    return F.cross_entropy(called(forward, inputs), labels)


def adamw(elastic: Elastic, settings: Settings) -> torch.optim.AdamW:
    """Return the optimiser of all weights that require a gradient; biases and scales do not decay."""
    parameters = [p for p in elastic.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr)


def linear_rate(step: int, *, total: int, warmup: float) -> float:
    """Return the share of the largest rate: a linear rise, then linear to 0."""
    rise = warmup * total
    return (step + 1) / rise if step + 1 <= rise else max(0.0, (total - step) / max(1.0, total - rise))


# --------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Measured:
    """A subnet that was measured.

    Attributes:
        architecture: Which.
        result: Its accuracy and loss (``metrics``), its MACs and parameters (``costs``).
    """

    architecture: Architecture
    result: Result


def search(elastic: Elastic, strategy: Strategy, evaluator: SubnetEvaluator, evaluations: int) -> list[Measured]:
    """Let a strategy measure subnets of a fine-tuned supernet.

    Args:
        elastic: The fine-tuned supernet.
        strategy: Over ``elastic.space`` with ``OBJECTIVES``; the paper's is LINAS with NSGA-II inside.
        evaluator: Scores on validation data; the subnets that a strategy asks for at once are scored together.
        evaluations: Subnets to measure.

    Returns:
        All that were measured, in order; ``front`` picks the best.

    Raises:
        UserError: The strategy has another space.
    """
    if strategy.space is not elastic.space:
        raise UserError("strategy.space", strategy.space.name, allowed="the space of the supernet, elastic.space")
    found: list[Measured] = []
    while len(found) < evaluations and not strategy.done:
        trials = strategy.ask(evaluations - len(found))
        if not trials:
            break
        scores = evaluator.metrics_of([trial.architecture for trial in trials])
        for trial, metrics in zip(trials, scores, strict=True):
            result = Result(metrics=metrics, costs=evaluator.costs(trial.architecture))
            strategy.tell(trial.id, result)
            found.append(Measured(trial.architecture, result))
    return found


def front(measured: Sequence[Measured]) -> list[Measured]:
    """Return the subnets that no other beats in accuracy and MACs, from the cheapest to the costliest."""
    best = pareto_front([each.result for each in measured], OBJECTIVES)
    chosen = [measured[i] for i in best]
    return sorted(chosen, key=lambda each: each.result.costs["macs"])


# --------------------------------------------------------------------- one run, by the command line too


def supernet_of(network: nn.Module, example_inputs: Tensor, settings: Settings) -> Elastic:
    """Return the supernet of a run: ``elastic_transformer`` with what the settings say."""
    elastic = elastic_transformer(network, example_inputs, settings.dims)
    if settings.sort:
        elastic.sort_("l2")
    if not settings.train_embeddings:
        for module in network.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    return elastic


@final
class Searcher(SupernetSearcher):
    """One run: fine-tuning as a supernet, the search, a Pareto set of extracted networks; stopped and resumed exactly.

    Args:
        family: The elastic network.
        task: What it is tuned for.
        settings: Hyper-parameters.
        costs: Costs of its subnets and the budget over them.
        seed: Seed of the run.

    Raises:
        UserError: ``teacher_epochs``: a strong teacher is a matter of ``fine_tune_``.
    """

    def __init__(self, *, family: ElasticFamily, task: Task, settings: Settings, costs: SubnetCosts, seed: int) -> None:
        if settings.teacher_epochs:
            raise UserError(
                "settings.teacher_epochs",
                settings.teacher_epochs,
                allowed="0 in a run",
                hint="From Python, fine_tune_(..., teacher=...) takes a strong teacher.",
            )
        self.settings, self.elastic = settings, family.elastic
        weighed = (Objective(name, "minimize") for name in settings.objectives if name != "accuracy")
        self.objectives = (OBJECTIVES[0], *weighed)
        super().__init__(
            family=family,
            task=task,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            calibration_batches=1,
            costs=cast(Any, costs),  # what a search asks of a cost model
            seed=seed,
        )

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return adamw(self.elastic, self.settings)

    def rate(self, step: int) -> float:
        """Return the rate after ``step`` steps: a linear rise, then linear to 0."""
        total = self.training_epochs * self.training_steps
        return self.settings.lr * linear_rate(step, total=total, warmup=self.settings.warmup)

    def make_rule(self) -> InstaTuneChildren:
        """Return the whole network and random subnets, by the labels and in-place distillation."""
        return InstaTuneChildren(self.elastic, self.settings)

    def make_step(self) -> ChildrenStep:
        """Return the step with the divergence of the paper."""
        distance = partial(divergence, temperature=self.settings.temperature)
        return ChildrenStep(self.elastic, self.optimizer, distance=distance, clip_norm=self.settings.clip_norm)

    def make_strategy(self) -> Strategy:
        """Return measuring and refitting in turn, over accuracy and the costs of the objectives."""
        s = self.settings
        seed = seed_of(self.seed, "selection")
        space = self.elastic.space
        return MeasureRefitSearch(space, objectives=self.objectives, seed=seed, initial=s.initial, batch=s.batch)

    def make_parts(self) -> dict[str, int]:
        """Return the one part of the selection."""
        return {"search": self.settings.evaluations}

    def scores_inside(self, architecture: Architecture) -> dict[str, float]:
        """Return accuracy and loss of a subnet with the supernet's present weights; there are no statistics to take."""
        self.elastic.activate(architecture)
        self.elastic.eval()
        scores = self.task.evaluate(self.compute.evaluating(self.elastic), "valid")
        return {"valid_accuracy": float(scores["accuracy"]), "valid_loss": float(scores["loss"])}

    def network_of(self, architecture: Architecture) -> nn.Module:
        """Return a subnet as a network of its own."""
        return self.elastic.extract(architecture).to("cpu").eval()

    def chosen(self) -> Sequence[tuple[str, Architecture]]:
        """Return the most accurate of the Pareto set, and up to ``points - 1`` more, evenly along it.

        Before anything was measured: the whole network, or the smallest subnet where a budget forbids it.
        """
        front = sorted(self.front(), key=lambda each: (each.accuracy, -each.costs[self.axis]))
        if not front:
            whole = self.elastic.largest()
            broken = self.limits().violations(self.costs_of(whole)) if self.limited else ()
            return [("final", self.elastic.smallest() if broken else whole)]
        places = np.linspace(len(front) - 1, 0, min(self.settings.points, len(front))).round().astype(int)
        first, *others = [front[int(place)].architecture for place in places]
        return [("final", first), *((f"point-{number}", child) for number, child in enumerate(others, start=1))]

    def delivered_as(self, label: str, architecture: Architecture) -> Delivered:
        """Return a subnet as a network of its own, under a label, with what was kept of the whole."""
        sizes = dict(self.elastic.canonical(architecture))
        known = {"blocks": self.elastic.kept_blocks(architecture), "sizes": sizes}
        child = self.known(architecture)
        figures = {} if child is None else {"one_shot_accuracy": child.accuracy}
        return Delivered(self.network_of(architecture), architecture, figures, label, record=known)
