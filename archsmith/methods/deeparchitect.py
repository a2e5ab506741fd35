"""DeepArchitect: a small language of modules whose expressions are search spaces, walked as a tree of decisions.

Negrinho, Gordon, "DeepArchitect: Automatically Designing and Training Deep Architectures", 2017, arXiv 1704.08792.

Modules with open hyper-parameters (Conv2D, Affine, Dropout, ...) are composed (Concat, Or, Repeat, Residual, ...) into
an expression: a set of networks. Specifying one is a sequence of choices, so any expression is a tree, and algorithms
for trees search it: random search, Monte Carlo tree search (UCT), the same on a tree that is restructured by bisecting
every choice, so that neighbouring values share statistics, and surrogate-based search, where a ridge regression on
n-grams of the module names ranks random networks. Every network is trained until patience or time ends, and its
validation accuracy is the reward. Training hyper-parameters can be part of the same space.

The language is ``archsmith.space.modules``, its networks are ``archsmith.families.modules``. What differs: the option
lists of the three spaces are reconstructions of the published sizes, and the children may share one recipe for one CPU.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import UserError
from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.families.modules import ModuleFamily, open_family
from archsmith.run.study import StudyOutcome, run_study
from archsmith.space import Objective, Space
from archsmith.strategies import MonteCarloTreeSearch, RandomSearch, Strategy, SurrogateSearch
from archsmith.tasks.base import Task
from archsmith.train.patience import Patience
from archsmith.train.recipe import TrainingRecipe

SYSTEM = {
    "slug": "deeparchitect",
    "title": "DeepArchitect: Automatically Designing and Training Deep Architectures",
    "year": 2017,
    "arxiv": "1704.08792",
    "kind": "search",
    "aliases": ["module-language"],
}

RECIPES = {
    "published": TrainingRecipe(
        epochs=10_000,
        batch_size=64,
        optimizer="adam",
        lr=1e-3,
        momentum=0.99,
        schedule="constant",
        patience=Patience(rate_patience=8, rate_mult=0.5, rate_min=1e-9, stop_patience=64, seconds=1_800),
    ),
    "cpu": TrainingRecipe(
        epochs=30,
        batch_size=64,
        optimizer="adam",
        lr=3e-3,
        momentum=0.99,
        schedule="constant",
        patience=Patience(rate_patience=2, rate_mult=0.3, stop_patience=5, seconds=20),
    ),
}
"""Half an hour for each model, as published (the optimiser, its rate and decay are tuned there: ``training="heavy"``);
and ours for one CPU, 20 seconds."""

PUBLISHED_COMPARISON = {"models": 64, "minutes_per_model": 30, "task": "CIFAR-10, padded by 4 and cropped, flipped"}
"""The comparison of the four searchers; MCTS and SMBO outperform random search in it."""


class Settings(BaseModel):
    """Hyper-parameters of the search; the defaults are those of the published experiments.

    Attributes:
        searcher: "random", "mcts", "mcts-bisected" (the restructured tree) or "smbo".
        models: Networks to train.
        exploration: c of UCT.
        candidates: Random networks that SMBO ranks for each one it trains.
        explore: Probability that SMBO ignores the ranking.
        ridge: Penalty of its regression.
        longest_ngram: Longest n-gram of its features (the published maximum 5 is exclusive).
        ngram_threshold: Occurrences that make an n-gram a feature.
        space: "tfref_convnet", "deepconv" or "resnet".
        divisor: Divides all widths.
        training: Training hyper-parameters in the space: "none", "light" (128) or "heavy" (4096 combinations).
        recipe: Name of the children's recipe in ``RECIPES``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    searcher: Literal["random", "mcts", "mcts-bisected", "smbo"] = "mcts-bisected"
    models: int = Field(default=64, ge=1)
    exploration: float = Field(default=0.5, ge=0)
    candidates: int = Field(default=50, ge=1)
    explore: float = Field(default=0.25, ge=0, le=1)
    ridge: float = Field(default=1_000.0, gt=0)
    longest_ngram: int = Field(default=4, ge=1)
    ngram_threshold: int = Field(default=3, ge=1)
    space: Literal["tfref_convnet", "deepconv", "resnet"] = "deepconv"
    divisor: int = Field(default=1, ge=1)
    training: Literal["none", "light", "heavy"] = "heavy"
    recipe: Literal["published", "cpu"] = "published"


def family_for(settings: Settings, *, image: tuple[int, int, int], num_classes: int) -> ModuleFamily:
    """Return the family of the space that ``settings`` name, for images (C, H, W)."""
    return open_family(
        "deeparchitect",
        image=image,
        num_classes=num_classes,
        space=settings.space,
        divisor=settings.divisor,
        training=settings.training,
    )


def strategy(space: Space, settings: Settings | None = None, seed: int = 0) -> Strategy:
    """Return the searcher: how the tree of decisions is walked.

    Args:
        space: Any space of finitely many options; SMBO looks at its ``tokens`` where it has such.
        settings: Hyper-parameters.
        seed: Seed of samples, ties and rollouts.
    """
    settings = Settings() if settings is None else settings
    reward = (Objective("valid_accuracy"),)
    if settings.searcher == "random":  # uniform at every decision, hence not over networks
        return RandomSearch(space, objectives=reward, seed=seed)
    if settings.searcher == "smbo":
        return SurrogateSearch(
            space,
            objectives=reward,
            seed=seed,
            candidates=settings.candidates,
            explore=settings.explore,
            penalty=settings.ridge,
            longest=settings.longest_ngram,
            threshold=settings.ngram_threshold,
        )
    return MonteCarloTreeSearch(
        space,
        objectives=reward,
        seed=seed,
        exploration=settings.exploration,
        bisect=settings.searcher == "mcts-bisected",
    )


def evaluator(task: Task, settings: Settings | None = None, **changes: Any) -> TrainedEvaluator:
    """Return who trains the networks, by the recipe's patience and the space's published hyper-parameters.

    Args:
        task: Its training part is learned, its validation part gives the reward.
        settings: Space and recipe.
        changes: Fields of the recipe that differ, and options of ``TrainedEvaluator``.
    """
    settings = Settings() if settings is None else settings
    family = family_for(settings, image=task.image, num_classes=task.num_classes)
    return TrainedEvaluator(family, task, RECIPES[settings.recipe], **changes)


def search(task: Task, settings: Settings | None = None, *, seed: int = 0, **options: Any) -> StudyOutcome:
    """Train ``settings.models`` networks, one chosen after the other, and return how the study ended.

    Args:
        task: What the networks learn.
        settings: Hyper-parameters.
        seed: Seed of the searcher and, through the trials, of every network.
        options: Of ``archsmith.run.study.run_study``: ``store=JournalStore(folder)`` survives a kill, ``workers``.

    Raises:
        UserError: An option that run_study does not take, or ``budget``, which the settings state.
    """
    if "budget" in options:
        raise UserError("budget", options["budget"], allowed="nothing here", hint="Set Settings(models=...).")
    settings = Settings() if settings is None else settings
    trainer = evaluator(task, settings)
    return run_study(strategy(trainer.family.space, settings, seed), trainer, budget=settings.models, **options)


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return what a single CPU can do in place of the published search, for images of any size."""
    return {"models": 30, "space": "tfref_convnet", "divisor": 8, "training": "none", "recipe": "cpu"}
