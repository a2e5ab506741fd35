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
on the task itself, not pretrained. Refinement between levels is ``FlexiSpace.between`` and a second search.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream
from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.families.flexibert import FlexiBertFamily
from archsmith.families.flexibert_graph import encoder_graph, label_order
from archsmith.families.flexibert_space import FlexiSpace
from archsmith.predictors.graph_embedding import learned_embedding, library_distances
from archsmith.run.study import StudyOutcome, run_study
from archsmith.space import Architecture, Objective
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


def embedded_library(settings: FlexiSpace, size: int, *, dimensions: int = 16, seed: int = 0) -> CandidatePool:
    """Return random encoders of a space with the embedding of their graphs.

    Args:
        settings: The space.
        size: Encoders, at most; all, where the space has no more.
        dimensions: Of the embedding.
        seed: Of the encoders and the embedding.
    """
    space, rng = settings.space(), numpy_stream(seed, "flexibert library")
    members: dict[str, Architecture] = {}
    if space.size <= size:
        members = {each.digest: each for each in space.enumerate()}
    while len(members) < min(size, space.size):
        drawn = space.sample(rng)
        members.setdefault(drawn.digest, drawn)
    networks = list(members.values())
    graphs = [encoder_graph(settings.layers(each)) for each in networks]
    distances = library_distances(graphs, partial(edit_bound, order=label_order(settings)))
    rows = learned_embedding(distances, dimensions=dimensions, epochs=200, learning_rate=0.01, seed=seed)
    places = {each.digest: row for each, row in zip(networks, rows, strict=True)}
    return CandidatePool(networks, lambda each: places[each.digest])


def strategy(family: FlexiBertFamily, settings: Settings | None = None, seed: int = 0) -> Boshnas:
    """Return BOSHNAS over an embedded library of the family's encoders."""
    settings = Settings() if settings is None else settings
    return Boshnas(
        family.space,
        pool=embedded_library(family.settings, settings.library, dimensions=settings.dimensions, seed=seed),
        initial=settings.initial,
        overlap=family.overlap,
        threshold=settings.threshold,
        objectives=(Objective("valid_accuracy"),),
        seed=seed,
    )


def search(task: Task, settings: Settings | None = None, *, seed: int = 0, **options: Any) -> StudyOutcome:
    """Train ``settings.models`` encoders, one chosen after the other, and return how the study ended.

    Args:
        task: A text task.
        settings: Of the search.
        seed: Of everything.
        options: Of ``archsmith.run.study.run_study``.
    """
    settings = Settings() if settings is None else settings
    family = family_for(task, settings)
    trainer = TrainedEvaluator(family, task, RECIPE)
    return run_study(strategy(family, settings, seed), trainer, budget=settings.models, **options)
