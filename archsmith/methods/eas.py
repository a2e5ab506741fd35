"""EAS: a reinforcement learning controller grows a trained network by function-preserving transforms, again and again.

Cai, Chen, Zhang, Yu, Wang, "Efficient Architecture Search by Network Transformation", AAAI 2018, arXiv 1707.04873.

Instead of training every candidate from scratch, the current trained network is transformed: Net2Wider and Net2Deeper
give a larger network that computes the same function, so a short training tells what the growth is worth. The
controller reads the network as a string with a bidirectional LSTM. A wider actor decides for each layer whether it gets
the next larger width, a deeper actor says after which layer a new one is put, and both learn by REINFORCE from the
validation accuracies of ten networks at a time. The same transforms grow DenseNets, where every later layer reads what
a miniblock puts out. After fifteen episodes the best network is grown further with larger widths (this second stage is
a reconstruction), and what is best at the end is trained to convergence.

The transforms are ``archsmith.atoms.morphisms``, the spaces ``archsmith.families.plain`` and ``densenet``, the search
``archsmith.strategies.eas``. ``docs/systems/eas.md`` says what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.base import WeightStore
from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.evaluate.weights import FolderWeightStore, MemoryWeightStore
from archsmith.families.densenet import DenseFamily
from archsmith.families.densenet_space import DenseSpace
from archsmith.families.plain import PlainFamily
from archsmith.families.plain_space import LARGE_WIDTHS, SMALL_WIDTHS, PlainSpace
from archsmith.run.study import StudyOutcome, run_study
from archsmith.run.study_store import JournalStore
from archsmith.space import Objective, Result, Space, Trial
from archsmith.strategies import Eas, GrowthStage
from archsmith.tasks.base import Task
from archsmith.train.recipe import TrainingRecipe

SYSTEM = {
    "slug": "eas",
    "title": "EAS: Efficient Architecture Search by Network Transformation",
    "year": 2018,
    "arxiv": "1707.04873",
    "kind": "search",
    "aliases": ["network-transformation"],
}


class Recipes(NamedTuple):
    """How the start network, the candidates and the final network are trained."""

    start: TrainingRecipe
    candidate: TrainingRecipe
    final: TrainingRecipe


RECIPES = {
    "published": Recipes(
        start=TrainingRecipe(epochs=20, batch_size=64, lr=0.1, weight_decay=1e-4),
        candidate=TrainingRecipe(epochs=20, batch_size=64, lr=0.02, weight_decay=1e-4),
        final=TrainingRecipe(epochs=300, batch_size=64, lr=0.1, weight_decay=1e-4),
    ),
    "cpu": Recipes(
        start=TrainingRecipe(epochs=8, batch_size=64, lr=0.1, weight_decay=1e-4),
        candidate=TrainingRecipe(epochs=1, batch_size=64, lr=0.02, weight_decay=1e-4),
        final=TrainingRecipe(epochs=10, batch_size=64, lr=0.05, weight_decay=1e-4),
    ),
}
"""The released configuration (how long its start network was trained is not in it), and ours for one CPU."""

PUBLISHED_ERRORS = {
    "CIFAR-10+, plain, depth 20": 4.23,
    "CIFAR-10+, DenseNet, depth 76": 3.44,
    "CIFAR-10, DenseNet, depth 70": 4.66,
    "SVHN, plain, depth 20": 1.73,
}
"""Published test errors in percent; "+" is with augmentation."""


class Settings(BaseModel):
    """Hyper-parameters of the search; the defaults are those of the released configuration.

    Attributes:
        space: "plain", or "dense" for DenseNets.
        policy: "controller", or "random" (the baseline: random actions on the same network).
        nets: Networks of an episode.
        episodes: Episodes that grow the start network.
        large_episodes: Episodes that then grow the best one with the large widths; 0 for none. Plain networks only.
        wider: Actions of the wider actor for each network; by default 4, for DenseNets 10.
        deeper: Actions of the deeper actor.
        learning_rate: Of the controller.
        entropy_weight: Factor of the entropy.
        baseline_decay: How far the baseline moves to an episode's mean reward.
        widen_noise: Noise on copied units, in standard deviations of the weights.
        deepen_noise: Noise on the weights of new layers.
        recipe: Name of the recipes in ``RECIPES``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: Literal["plain", "dense"] = "plain"
    policy: Literal["controller", "random"] = "controller"
    nets: int = Field(default=10, ge=1)
    episodes: int = Field(default=15, ge=1)
    large_episodes: int = Field(default=15, ge=0)
    wider: int | None = Field(default=None, ge=0)
    deeper: int = Field(default=5, ge=0)
    learning_rate: float = Field(default=2e-3, ge=0)
    entropy_weight: float = Field(default=1e-5, ge=0)
    baseline_decay: float = Field(default=0.95, ge=0, le=1)
    widen_noise: float = Field(default=0.01, ge=0)
    deepen_noise: float = Field(default=0.001, ge=0)
    recipe: Literal["published", "cpu"] = "published"

    @property
    def stages(self) -> tuple[GrowthStage, ...]:
        """The stages of the search, each with its widths."""
        if self.space == "dense":
            return (GrowthStage(self.episodes),)
        large = (GrowthStage(self.large_episodes, LARGE_WIDTHS),) if self.large_episodes else ()
        return (GrowthStage(self.episodes, SMALL_WIDTHS), *large)


def family_for(
    settings: Settings, *, image: tuple[int, int, int], num_classes: int, **space: Any
) -> PlainFamily | DenseFamily:
    """Return the family whose networks grow.

    Args:
        settings: Which space, whose widths, how much noise.
        image: (C, H, W).
        num_classes: Number of classes.
        space: Arguments of ``PlainSpace`` or ``DenseSpace`` that differ.
    """
    shared: dict[str, Any] = {
        "image": image,
        "num_classes": num_classes,
        "widen_noise": settings.widen_noise,
        "deepen_noise": settings.deepen_noise,
    }
    if settings.space == "dense":
        return DenseFamily(space=DenseSpace(**space), **shared)
    lists: dict[str, Any] = dict(SMALL_WIDTHS)
    if settings.large_episodes:
        lists = {name: sorted({*widths, *LARGE_WIDTHS[name]}) for name, widths in SMALL_WIDTHS.items()}
    return PlainFamily(space=PlainSpace(**{**lists, **space}), **shared)


def strategy(space: Space, settings: Settings | None = None, seed: int = 0) -> Eas:
    """Return the search: which actions grow the network.

    Args:
        space: Strings that grow, of the kind that ``settings.space`` names.
        settings: Hyper-parameters.
        seed: Seed of the controller's weights and of all actions.
    """
    settings = Settings() if settings is None else settings
    wider = settings.wider if settings.wider is not None else (10 if settings.space == "dense" else 4)
    names = ("nets", "deeper", "learning_rate", "entropy_weight", "baseline_decay", "policy", "stages")
    given = {name: getattr(settings, name) for name in names}
    return Eas(space, objectives=(Objective("valid_accuracy"),), seed=seed, wider=wider, **given)


class GrowingEvaluator:
    """Trains the start network by one recipe and what grows from it by another, shorter one.

    Args:
        start: For trials without a parent.
        candidate: For all others.
    """

    def __init__(self, start: TrainedEvaluator, candidate: TrainedEvaluator) -> None:
        self.start, self.candidate = start, candidate

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Return what ``TrainedEvaluator.evaluate`` returns; without ``weights`` nothing is inherited."""
        trainer = self.start if trial.parent is None else self.candidate
        return trainer.evaluate(trial, weights=weights)


def evaluator(
    task: Task, settings: Settings | None = None, *, space: Mapping[str, Any] | None = None, **options: Any
) -> GrowingEvaluator:
    """Return who trains the networks.

    Args:
        task: Its training part is learned, its validation part gives the reward.
        settings: Space and recipes.
        space: Arguments of the space that differ.
        options: Of both ``TrainedEvaluator``s: ``costs``, ``device``, ``threads``.
    """
    settings = Settings() if settings is None else settings
    family = family_for(settings, image=task.image, num_classes=task.num_classes, **(space or {}))
    recipes = RECIPES[settings.recipe]
    return GrowingEvaluator(
        TrainedEvaluator(family, task, recipes.start, **options),
        TrainedEvaluator(family, task, recipes.candidate, **options),
    )


def search(
    task: Task,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    weights: WeightStore | None = None,
    costs: Sequence[str] = ("macs", "params"),
    device: str = "cpu",
    **options: Any,
) -> StudyOutcome:
    """Train the start network, then all episodes of all stages; equal strings are trained once.

    Args:
        task: What the networks learn.
        settings: Hyper-parameters.
        seed: Seed of the controller and, through the trials, of every network.
        weights: Where weights are kept and inherited from; by default in the folder of a ``JournalStore``, or else in
            memory.
        costs: Which costs to count.
        device: Where to train.
        options: Of ``archsmith.run.study.run_study``.

    Returns:
        How the study ended; ``outcome.best`` is for ``train_best``.

    Raises:
        UserError: An option that run_study does not take, ``budget``, which the settings state, or weights in memory
            together with other processes, which could not inherit them.
    """
    if "budget" in options:
        raise UserError("budget", options["budget"], allowed="nothing here", hint="Set Settings(episodes=...).")
    if weights is None:
        store = options.get("store")
        weights = FolderWeightStore(store.path / "weights") if isinstance(store, JournalStore) else MemoryWeightStore()
    apart = [name for name in ("executor", "isolate", "time_limit", "memory_limit") if options.get(name)]
    if isinstance(weights, MemoryWeightStore) and (apart or options.get("workers", 1) > 1):
        raise UserError(
            "weights",
            Shown(f"a store in memory with {' and '.join(apart) or 'several workers'}"),
            allowed="a FolderWeightStore where networks are trained in other processes",
        )
    settings = Settings() if settings is None else settings
    trainer = evaluator(task, settings, costs=costs, device=device)
    searcher = strategy(trainer.candidate.family.space, settings, seed)
    total = 1 + sum(settings.nets * int(stage.episodes or 0) for stage in settings.stages)
    return run_study(searcher, trainer, budget=total, weights=weights, **{"cache": True, **options})


def train_best(
    task: Task,
    outcome: StudyOutcome,
    weights: WeightStore,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Train the best network of a search to convergence, from the weights that it has.

    Args:
        task: What it learns.
        outcome: What ``search`` returned.
        weights: The store of that search; the trained weights are kept there, under ``Result.weights``.
        settings: Those of the search.
        seed: Seed of batches and augmentation.
        options: Of ``TrainedEvaluator``.

    Raises:
        UserError: No network of the search was trained.
    """
    if outcome.best is None:
        raise UserError("outcome.best", Shown("no trained network"), allowed="a search with at least one result")
    settings = Settings() if settings is None else settings
    trial, result = outcome.best
    family = family_for(settings, image=task.image, num_classes=task.num_classes)
    info: dict[str, Any] = {"weights": result.weights, "parent_architecture": trial.architecture.to_json(), "edits": []}
    last = Trial(id=trial.id + 1, architecture=trial.architecture, parent=trial.id, seed=seed, info=info)
    return TrainedEvaluator(family, task, RECIPES[settings.recipe].final, **options).evaluate(last, weights=weights)


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return what a single CPU can do in place of the published search, for images of any size."""
    return {"nets": 4, "episodes": 3, "large_episodes": 0, "recipe": "cpu"}
