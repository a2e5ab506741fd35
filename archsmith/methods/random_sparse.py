"""Random search for sparse networks: are searched node masks of an untrained network better than random ones?

Farahani, "Random Search as a Baseline for Sparse Neural Network Architecture Search", 2024, arXiv 2403.08265.

One over-parameterised network is initialised and never changed: the parent. Its sub-networks keep some of the hidden
nodes (whole units or channels, not single weights) with the weights they have. Random search draws node masks at a
given sparsity, scores every masked parent untrained on a fixed set of training examples, and keeps the best: a
sub-network that starts at a better place. That one is cut out and trained by an ordinary recipe, and compared with the
first mask drawn, trained alike, and with the dense parent, over a range of sparsities. The published finding is
negative: searched initialisations are neither better nor faster than random ones. So this is a neutral yardstick, and
``protocol`` takes any other way of choosing a sub-network as a contender on the same parents.

What differs: only the abstract and the beginning of the paper could be read. The scorer, its examples, the recipe, the
sparsities and the rule for the number of kept nodes are reconstructions; intervals, the control with fresh weights and
the measure of convergence are additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from archsmith.atoms.chains import chain_groups
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import ArchsmithError, UserError
from archsmith.core.rng import seed_of
from archsmith.evaluate.base import Evaluator
from archsmith.evaluate.masked_parent import MaskedEvaluator, scoring_batch
from archsmith.families.subnetworks import SubnetworkFamily
from archsmith.run.paired_baseline import PairedBaseline, compare_with_random
from archsmith.space import Architecture, Objective
from archsmith.strategies import RandomSearch, Strategy
from archsmith.tasks.base import Task
from archsmith.train.recipe import Training, TrainingRecipe

SYSTEM = {
    "slug": "random-sparse",
    "title": "Random Search as a Baseline for Sparse Neural Network Architecture Search",
    "year": 2024,
    "arxiv": "2403.08265",
    "kind": "protocol",
    "aliases": ["random-masks", "node-masks"],
}

Parent = Callable[[int], nn.Sequential | tuple[nn.Module, list[UnitGroup]]]
"""From a seed to a freshly initialised parent: a chain, or any network with its units.

It is called with torch's global stream set to that seed, so layers may simply be made."""

Contender = Callable[[SubnetworkFamily, int], Architecture | nn.Module]
"""Chooses a sub-network of a family with the given seed, or makes an untrained network of its own out of the parent."""


class Settings(BaseModel):
    """Settings of the baseline; none of the values could be read in the paper.

    Attributes:
        sparsities: Shares of the hidden nodes that go.
        over: "layer": every layer loses that share. "network": all together do, and every layer keeps a node.
        draws: Masks that the search scores.
        score: What the search goes by, on the untrained network: "loss" (smallest) or "accuracy" (largest).
        examples: Fixed training examples for the score.
        parents: Parents, each with its own data order: the pairs of the comparison.
        hidden: Widths of the default parent, a perceptron with ReLU.
        epochs: Of every training, the dense parent's too.
        batch_size: Examples for one step.
        lr: Constant learning rate of SGD.
        momentum: Its momentum.
        share: Share of the final accuracy whose epoch measures convergence.
        split: Part of the task on which trained networks are compared; nothing is chosen by it.
        seed: Seed of everything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
    over: Literal["layer", "network"] = "layer"
    draws: int = Field(default=100, ge=1)
    score: Literal["loss", "accuracy"] = "loss"
    examples: int = Field(default=1_000, ge=1)
    parents: int = Field(default=8, ge=2)
    hidden: tuple[int, ...] = Field(default=(512, 512), min_length=1)
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=100, ge=2)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    share: float = Field(default=0.95, gt=0, le=1)
    split: Literal["test", "valid"] = "test"
    seed: int = Field(default=0, ge=0)

    @property
    def objective(self) -> Objective:
        """What the search improves."""
        return Objective(self.score, "minimize" if self.score == "loss" else "maximize")

    @property
    def recipe(self) -> TrainingRecipe:
        """The ordinary recipe, the same for all."""
        return TrainingRecipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer="sgd_mom",
            lr=self.lr,
            momentum=self.momentum,
            schedule="constant",
        )


DEFAULTS = Settings()


def perceptron(widths: tuple[int, ...], *, seed: int) -> nn.Sequential:
    """Return a multi-layer perceptron with ReLU in torch's own initialisation, drawn from ``seed``.

    Args:
        widths: Of the flattened input, the hidden layers and the output.
        seed: Seed of the weights.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def random_mask(family: SubnetworkFamily, seed: int) -> Architecture:
    """Return the control: the first mask that a search with this seed draws."""
    return RandomSearch(family.space, seed=seed).ask()[0].architecture


def fresh_weights(family: SubnetworkFamily, seed: int) -> nn.Module:
    """Return the control that tells the choice of nodes from the width: the shape of ``random_mask`` in new weights."""
    return family.fresh(random_mask(family, seed), seed=seed_of(seed, "fresh"))


def search(strategy: Strategy, evaluator: Evaluator, *, draws: int) -> Architecture:
    """Return the best of ``draws`` sub-networks by the strategy's objective; the earlier of equals.

    Args:
        strategy: Any; ``RandomSearch`` is the published one.
        evaluator: Any scorer: the masked parent as it is, a zero-cost score, or accuracy after training.
        draws: How many it scores, fewer when the strategy has no more.

    Raises:
        ArchsmithError: No evaluation succeeded.
    """
    best: tuple[Architecture, float] | None = None
    left, reasons = draws, set[str]()
    while left and (trials := strategy.ask(left if not strategy.learns else 1)):
        left -= len(trials)
        if isinstance(evaluator, MaskedEvaluator):
            results = evaluator.evaluate_many([trial.architecture for trial in trials])
        else:
            results = [evaluator.evaluate(trial) for trial in trials]
        for trial, result in zip(trials, results, strict=True):
            strategy.tell(trial.id, result)
            value = strategy.objective.value(result)
            reasons |= {result.reason} if result.reason else set()
            if not math.isnan(value) and (best is None or strategy.objective.is_better(value, best[1])):
                best = trial.architecture, value
    if best is None:
        raise ArchsmithError(f"none of the {draws} sub-networks could be scored: {'; '.join(sorted(reasons)[:3])}")
    return best[0]


def untrained_search(task: Task, settings: Settings = DEFAULTS) -> Callable[[SubnetworkFamily, int], Architecture]:
    """Return the published search: the best of N random masks by the untrained score on fixed training examples."""
    batch = scoring_batch(task, settings.examples, seed=seed_of(settings.seed, "score"))

    def choose(family: SubnetworkFamily, seed: int) -> Architecture:
        strategy = RandomSearch(family.space, objectives=(settings.objective,), seed=seed)
        return search(strategy, MaskedEvaluator(family, batch), draws=settings.draws)

    return choose


def training_curve(network: nn.Module, task: Task, settings: Settings, *, seed: int) -> list[float]:
    """Train a network by the ordinary recipe and return its accuracy after every epoch.

    Args:
        network: Changed in place.
        task: What it learns; ``settings.split`` of it gives the accuracies.
        settings: The recipe.
        seed: Seed of the data order: the same for all networks of a pair.

    Raises:
        Diverged: The loss became NaN or infinite.
    """
    training = Training(network, task, settings.recipe, seed=seed)
    curve = []
    for epoch in range(settings.epochs):
        training.run(epoch + 1)
        network.eval()
        curve.append(float(task.evaluate(network, settings.split)[task.metric]))
    return curve


def protocol(
    task: Task,
    settings: Settings = DEFAULTS,
    *,
    parent: Parent | None = None,
    contenders: Mapping[str, Contender] | None = None,
) -> dict[float, PairedBaseline]:
    """Return by sparsity what each contender gains over random masks of the same parents.

    Beside the contenders stand "fresh" (the shape of the random mask with new weights, which tells the choice of nodes
    from the width) and "dense" (the parent); all are trained by one recipe in one data order for each parent.

    Args:
        task: What is learned.
        settings: Settings.
        parent: Makes the parents; a perceptron of the ``settings.hidden`` widths by default.
        contenders: By name who chooses sub-networks; {"search": untrained_search(task, settings)} by default.

    Raises:
        UserError: A contender has the name of a control, or task, parent and settings do not fit.
        Diverged: The loss of a training became NaN or infinite.
    """
    if contenders is not None and "fresh" in contenders:
        raise UserError("contenders", "fresh", allowed="other names; this is a control")
    contenders = {"search": untrained_search(task, settings)} if contenders is None else contenders
    pixels = task.input_shape[0] * task.input_shape[1] * task.input_shape[2]
    make = parent or (lambda seed: perceptron((pixels, *settings.hidden, task.num_classes), seed=seed))

    @cache
    def parent_of(pair: int) -> tuple[nn.Module, list[UnitGroup]]:
        seed = seed_of(settings.seed, "parent", pair)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = make(seed)
        return made if isinstance(made, tuple) else (made, chain_groups(made))

    def family(pair: int, sparsity: float) -> SubnetworkFamily:
        network, groups = parent_of(pair)
        shapes: dict[str, Any] = {"image": task.input_shape, "num_classes": task.num_classes}
        return SubnetworkFamily(network, groups, sparsity=sparsity, over=settings.over, **shapes)

    def curve(network: nn.Module, pair: int) -> list[float]:
        return training_curve(network, task, settings, seed=seed_of(settings.seed, "train", pair))

    def chosen(choose: Contender, sparsity: float) -> Callable[[int], list[float]]:
        def measure(pair: int) -> list[float]:
            candidates = family(pair, sparsity)
            found = choose(candidates, seed_of(settings.seed, "masks", pair))
            return curve(found if isinstance(found, nn.Module) else candidates.build(found), pair)

        return measure

    @cache
    def dense(pair: int) -> list[float]:
        whole = family(pair, 0.0)
        return curve(whole.build(random_mask(whole, 0)), pair)

    reports = {}
    for sparsity in settings.sparsities:
        reports[sparsity] = compare_with_random(
            {name: chosen(choose, sparsity) for name, choose in {**contenders, "fresh": fresh_weights}.items()},
            chosen(random_mask, sparsity),
            range(settings.parents),
            dense=dense,
            share=settings.share,
        )
    return reports
