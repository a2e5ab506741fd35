"""FlexiBERT: text encoders whose every layer is its own, searched by BOSHNAS over an embedding of their graphs.

Tuli, Dedhia, Tuli, Jha, "FlexiBERT: Are Current Transformer Architectures too Homogeneous and Rigid?", 2022,
arXiv 2205.11656.

Layers choose their operator, hidden size, heads and feed-forward layers. A library of such encoders is embedded so that
distances in the embedding are graph edit distances; a surrogate with noise and uncertainty is fitted to what was
trained, and second-order descent on its input proposes what to train next, with the weights of a trained neighbour
where most leading layers agree.

What differs: distances are the bound ``edit_bound`` (5 % above the exact ones on average, as the paper's are
approximate too), all of them instead of 1 % interpolated; the surrogate takes all examples in one update, about a
hundred times faster than one by one; the library is a random part of one level of the hierarchy; encoders are trained
on the task itself, not pretrained. With ``levels`` the search is refined: the best encoders of a level and their
neighbours span the library of the next one, between each and its neighbours and between every two of the best.
Weights pass on within a level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream
from archsmith.evaluate.base import Evaluator
from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.families.flexibert import FlexiBertFamily
from archsmith.families.flexibert_graph import encoder_graph, label_order, leading_overlap
from archsmith.families.flexibert_space import FlexiSpace
from archsmith.predictors.graph_embedding import learned_embedding, library_distances
from archsmith.run.costs import CostModel
from archsmith.run.study import StudyOutcome, recorded_trials, run_study
from archsmith.run.study_store import JournalStore
from archsmith.run.trained_search import TrainedSearcher
from archsmith.space import Architecture, Objective, Result, Trial
from archsmith.space.labelled_graph import edit_bound
from archsmith.strategies.boshnas import Boshnas
from archsmith.strategies.candidates import CandidatePool
from archsmith.tasks.base import Task
from archsmith.train.recipe import TrainingRecipe

SYSTEM = {
    "slug": "flexibert",
    "title": "FlexiBERT: Are Current Transformer Architectures too Homogeneous and Rigid?",
    "year": 2022,
    "arxiv": "2205.11656",
    "kind": "search",
    "aliases": ["boshnas"],
}

WORKS_ON = ("flexibert",)
"""The family whose graphs are embedded."""

DRAWS = 100
"""Draws for each encoder of a library, at most, until it is new and keeps the budget."""


class Settings(BaseModel):
    """Settings of the search.

    Attributes:
        models: Networks to train.
        level: Of the hierarchy: 1 stacks of two layers, 2 single layers, 3 feed-forward sizes of their own.
        hidden: Hidden sizes.
        heads: Numbers of heads.
        sizes: Feed-forward sizes.
        counts: Numbers of feed-forward layers.
        depths: Numbers of layers.
        library: Encoders among which the search chooses.
        dimensions: Of the embedding.
        initial: Random networks at the start.
        threshold: Overlap from which weights are taken over.
        kept: Best networks whose weights are kept, for the result and to start from; in a run.
        epochs: Of each training.
        batch_size: Sequences of a step.
        lr: Largest learning rate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: int = Field(default=50, ge=1)
    level: int = Field(default=1, ge=1, le=3)
    hidden: tuple[int, ...] = (128, 256)
    heads: tuple[int, ...] = (2, 4)
    sizes: tuple[int, ...] = (512, 1024)
    counts: tuple[int, ...] = (1, 3)
    depths: tuple[int, ...] = (2, 4)
    library: int = Field(default=500, ge=2)
    dimensions: int = Field(default=16, ge=1)
    initial: int = Field(default=10, ge=2)
    threshold: float = Field(default=0.8, ge=0, le=1)
    kept: int = Field(default=10, ge=1)
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=5e-4, gt=0)


def preset_settings(image: tuple[int, ...]) -> dict[str, Any]:
    """Return what one CPU does in some minutes: 20 encoders of width 32 and 64, chosen among 200."""
    return {"models": 20, "hidden": (32, 64), "sizes": (64, 128), "library": 200}


RECIPE = TrainingRecipe(epochs=10, batch_size=32, optimizer="adam", lr=5e-4, momentum=0.9, schedule="cosine")
"""Training on the task itself, for one CPU."""


def family_for(task: Task, settings: Settings) -> FlexiBertFamily:
    """Return the encoders for a text task's sequences and vocabulary.

    Raises:
        UserError: The task has no texts, or another number for padding than 0.
    """
    if task.kind != "text" or getattr(task, "pad_id", None) != 0:
        raise UserError("task", task.name, allowed="a text task whose padding is token 0")
    fields = {name: getattr(settings, name) for name in ("hidden", "heads", "sizes", "counts", "depths")}
    return FlexiBertFamily(
        image=task.input_shape,
        num_classes=task.num_classes,
        vocabulary=int(getattr(task, "vocab_size")),  # noqa: B009 - tasks of other kinds have none
        settings=FlexiSpace(**fields).level(settings.level),
        embedding=settings.hidden[0],
    )


def family_options(task: Task, settings: Settings) -> dict[str, Any]:
    """Return the family's options for a task and settings, those that a run's configuration does not name."""
    family = family_for(task, settings)
    own = {name: getattr(family, name) for name in ("vocabulary", "embedding")}
    return own | {name: value for name, value in asdict(family.settings).items() if name != "name"}


def recipe_for(settings: Settings) -> TrainingRecipe:
    """Return how each encoder is trained."""
    return RECIPE.changed({name: getattr(settings, name) for name in ("epochs", "batch_size", "lr")})


def embedded_library(
    settings: FlexiSpace,
    size: int,
    *,
    dimensions: int = 16,
    seed: int = 0,
    fits: Callable[[Architecture], bool] | None = None,
) -> CandidatePool:
    """Return random encoders of a space with the embedding of their graphs.

    Args:
        settings: The space.
        size: Encoders, at most; all, where the space has no more.
        dimensions: Of the embedding.
        seed: Of the encoders and the embedding.
        fits: Says which encoders may be in it; all if None.

    Raises:
        UserError: Fewer than two encoders were found that fit.
    """
    space, rng = settings.space(), numpy_stream(seed, "flexibert library")
    drawn = space.enumerate() if space.size <= size else (space.sample(rng) for _ in range(DRAWS * size))
    return embedded(settings, _distinct(drawn, size, fits), dimensions=dimensions, seed=seed)


def _distinct(
    drawn: Iterable[Architecture], size: int, fits: Callable[[Architecture], bool] | None
) -> list[Architecture]:
    """Return the first ``size`` different architectures that fit."""
    members: dict[str, Architecture] = {}
    for each in drawn:
        if each.digest not in members and (fits is None or fits(each)):
            members[each.digest] = each
        if len(members) == size:
            break
    if len(members) < 2:
        raise UserError(
            "budget", Shown(f"one that {len(members)} of the encoders drawn keep"), allowed="one that two keep at least"
        )
    return list(members.values())


def embedded(
    settings: FlexiSpace, networks: Sequence[Architecture], *, dimensions: int = 16, seed: int = 0
) -> CandidatePool:
    """Return encoders of a space with an embedding whose distances are those of their graphs."""
    graphs = [encoder_graph(settings.layers(each)) for each in networks]
    distances = library_distances(graphs, partial(edit_bound, order=label_order(settings)))
    rows = learned_embedding(distances, dimensions=dimensions, epochs=200, learning_rate=0.01, seed=seed)
    places = {each.digest: row for each, row in zip(networks, rows, strict=True)}
    return CandidatePool(networks, lambda each: places[each.digest])


def refined_library(
    before: FlexiSpace,
    pool: CandidatePool,
    best: Sequence[Architecture],
    after: FlexiSpace,
    size: int,
    *,
    neighbours: int = 5,
    dimensions: int = 16,
    seed: int = 0,
) -> CandidatePool:
    """Return the library of the next level: what lies between the best of a level, and between each and its neighbours.

    Neighbours are those of most equal leading layers, of equal ones the nearest in the embedding. The best themselves
    are in it; the others are drawn from these parts in turn, whose choices are the unions of both networks' choices,
    layer by layer.

    Args:
        before: Space of the level that was searched.
        pool: Its library.
        best: Its best encoders, the best first; 5 are published.
        after: Space of the next level.
        size: Encoders, at most.
        neighbours: Of each of the best.
        dimensions: Of the embedding.
        seed: Of the draws and the embedding.
    """
    layers = [before.layers(each) for each in pool.architectures]
    rows, pairs = pool.features_MD, []
    at = {each.digest: place for place, each in enumerate(pool.architectures)}
    places = [at[each.digest] for each in best]
    for place in places:
        gaps = np.linalg.norm(rows - rows[place], axis=1)
        near = sorted(
            (other for other in range(len(layers)) if other != place),
            key=lambda other: (-leading_overlap(layers[other], layers[place]), gaps[other]),
        )
        pairs += [(place, other) for other in near[:neighbours]]
    pairs += list(combinations(places, 2))
    spaces = [after.between(layers[a], layers[b]).space() for a, b in pairs]
    whole, rng = after.space(), numpy_stream(seed, "flexibert refined library")

    def drawn() -> Iterator[Architecture]:
        yield from (after.architecture(layers[place]) for place in places)
        for number in range(DRAWS * size):
            yield whole.validate(dict(spaces[number % len(spaces)].sample(rng)))

    return embedded(after, _distinct(drawn(), size, None), dimensions=dimensions, seed=seed)


def strategy(
    family: FlexiBertFamily, settings: Settings | None = None, seed: int = 0, *, pool: CandidatePool | None = None
) -> Boshnas:
    """Return BOSHNAS over an embedded library of the family's encoders, ``pool`` if given."""
    settings = Settings() if settings is None else settings
    if pool is None:
        pool = embedded_library(family.settings, settings.library, dimensions=settings.dimensions, seed=seed)
    return Boshnas(
        family.space,
        pool=pool,
        initial=settings.initial,
        overlap=family.overlap,
        threshold=settings.threshold,
        objectives=(Objective("valid_accuracy"),),
        seed=seed,
    )


def search(
    task: Task,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    levels: Sequence[int] = (),
    folder: str | Path | None = None,
    evaluator: Evaluator | None = None,
    **options: Any,
) -> StudyOutcome:
    """Train ``settings.models`` encoders, one chosen after the other, and return how the study ended.

    Args:
        task: A text task.
        settings: Of the search.
        seed: Of everything.
        levels: Ascending levels of the hierarchy, each a study of ``settings.models`` encoders of its own; the library
            of every one but the first is ``refined_library`` of the five best of the level before. ``settings.level``
            alone if empty.
        folder: Where the studies of several levels are kept ("level-1", ...), to be gone on with; in memory if None.
        evaluator: In place of training.
        options: Of ``archsmith.run.study.run_study``; of one level, ``store`` too.

    Returns:
        How the study of the last level ended; ``best`` is the best of all levels.

    Raises:
        UserError: Levels that do not ascend, or a store for several of them.
    """
    settings = Settings() if settings is None else settings
    chosen = tuple(levels) or (settings.level,)
    if list(chosen) != sorted(set(chosen)):
        raise UserError("levels", list(levels), allowed="ascending levels, each once")
    if len(chosen) > 1 and "store" in options:
        raise UserError("store", Shown("one store for several levels"), allowed="folder=FOLDER with several levels")
    best: tuple[Trial, Result] | None = None
    before: tuple[FlexiSpace, CandidatePool, list[Architecture]] | None = None
    for level in chosen:
        family = family_for(task, settings.model_copy(update={"level": level}))
        if before is None:
            pool = embedded_library(family.settings, settings.library, dimensions=settings.dimensions, seed=seed)
        else:
            pool = refined_library(
                *before, family.settings, settings.library, dimensions=settings.dimensions, seed=seed
            )
        if folder is not None:
            options["store"] = JournalStore(Path(folder) / f"level-{level}")
        trainer = TrainedEvaluator(family, task, recipe_for(settings)) if evaluator is None else evaluator
        outcome = run_study(
            strategy(family, settings, seed, pool=pool), trainer, budget=min(settings.models, len(pool)), **options
        )
        if outcome.best is not None and (best is None or _accuracy(outcome.best) > _accuracy(best)):
            best = outcome.best
        if outcome.status != "finished" or level == chosen[-1]:
            break
        told = outcome.history if folder is None else recorded_trials(Path(folder) / f"level-{level}")
        good = [(trial, result) for trial, result in told if result is not None and result.status == "ok"]
        if not good:
            break
        ranked = sorted(good, key=lambda each: -_accuracy(each))
        before = (family.settings, pool, [trial.architecture for trial, _ in ranked[:5]])
    return replace(outcome, best=best)


def _accuracy(each: tuple[Trial, Result]) -> float:
    return float(each[1].metrics["valid_accuracy"])


@final
class Searcher(TrainedSearcher):
    """One run at one level: a library within the budget, BOSHNAS over it, the best encoder as it was trained.

    Args:
        family: "flexibert", with the choices of the settings unless its options say others.
        task: A text task.
        settings: Of the search.
        costs: Costs and budget of the run.
        seed: Seed of the run.
        memory_format: No influence: there are no images.
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
    ) -> None:
        self.settings = settings
        shared: dict[str, Any] = {"recipe": recipe_for(settings), "models": settings.models, "kept": settings.kept}
        super().__init__(family=family, task=task, costs=costs, seed=seed, **shared)

    def make_pool(self) -> CandidatePool:
        """Return the embedded library of encoders within the budget."""
        s = self.settings
        return embedded_library(
            self.family.settings, s.library, dimensions=s.dimensions, seed=self.seed, fits=self.fits
        )

    def make_strategy(self, pool: CandidatePool) -> Boshnas:
        """Return BOSHNAS over the library."""
        return strategy(self.family, self.settings, self.seed, pool=pool)
