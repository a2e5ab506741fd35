"""DARTS: a cell found by gradient descent on a softmax over the operations of every edge.

Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, arXiv 1806.09055.

Every edge of a cell computes the mixture of all candidate operations, weighted by the softmax of its logits, which all
cells of a kind share. The search is bilevel: the logits minimise the loss on one half of the training images, the
weights minimise it on the other. A step on the logits sees the weights as they are ("first" order), or looks through
one step of momentum SGD on them ("second" order, its mixed derivative a central difference). At the end every node
keeps its two strongest edges, each with its strongest operation other than ``none``; the network of these cells is
trained from scratch, wider and deeper, with an auxiliary classifier and dropped paths.

What differs: the initial logits are 1e-3 N(0, 1), as in the released code (zeros in the paper). The recurrent cell is
not here. ``order="exact"`` replaces the central difference by a second backward pass; with ReLU and max pooling the two
differ strongly, because the difference crosses kinks.
"""

from __future__ import annotations

from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from archsmith.families.darts import AUXILIARY_WEIGHT
from archsmith.run.costs import CostModel
from archsmith.run.relaxed_search import Phase, Plan, RelaxedSearcher
from archsmith.tasks.base import Task

SYSTEM = {
    "slug": "darts",
    "title": "DARTS: Differentiable Architecture Search",
    "year": 2019,
    "arxiv": "1806.09055",
    "kind": "search",
    "aliases": [],
}

WORKS_ON = ("darts",)
"""Families whose supernet this method can relax."""


class Settings(BaseModel):
    """Hyper-parameters; the defaults are those of the published CIFAR-10 runs.

    Attributes:
        order: Gradient of the logits: "first", "second", or "exact" (see the module).
        search_epochs: Epochs of the search.
        search_batch_size: Images of a batch for the weights and of one for the logits.
        search_channels: Channels of the search network's first cells.
        search_cells: Cells of the search network.
        search_lr: Learning rate of the weights in the search; a cosine takes it to ``search_lr_min``.
        search_lr_min: See above (the paper: 0, its code: this).
        logit_lr: Learning rate of the logits, by Adam.
        logit_decay: L2 on the logits.
        epochs: Epochs of the final training.
        batch_size: Images of a batch in it.
        lr: Its learning rate; a cosine takes it to zero.
        momentum: Of SGD, in both.
        weight_decay: L2 on the weights, in both.
        clip_norm: Largest norm of the gradient of the weights.
        drop_path: Probability of dropped paths at the end of the final training.
        auxiliary_weight: Weight of the auxiliary classifier; 0 for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Literal["first", "second", "exact"] = "second"
    search_epochs: int = Field(50, ge=1)
    search_batch_size: int = Field(64, ge=2)
    search_channels: int = Field(16, ge=2)
    search_cells: int = Field(8, ge=3)
    search_lr: float = Field(0.025, gt=0)
    search_lr_min: float = Field(0.001, ge=0)
    logit_lr: float = Field(3e-4, ge=0)
    logit_decay: float = Field(1e-3, ge=0)
    epochs: int = Field(600, ge=1)
    batch_size: int = Field(96, ge=2)
    lr: float = Field(0.025, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(3e-4, ge=0)
    clip_norm: float = Field(5.0, ge=0)
    drop_path: float = Field(0.2, ge=0, lt=1)
    auxiliary_weight: float = Field(AUXILIARY_WEIGHT, ge=0)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "order": "first",
        "search_epochs": 10,
        "search_channels": 4,
        "search_cells": 4,
        "logit_lr": 3e-3,
        "epochs": 30,
        "batch_size": 64,
        "lr": 0.05,
        "drop_path": 0.0,
        "auxiliary_weight": 0.0,
    },
}


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, which one CPU can do, else the paper's."""
    small = min(image[1:]) < 24
    fits = all(32 <= side < 44 or side == 224 for side in image[1:])
    return PRESETS["tiny"] if small else {**PRESETS["paper"], **({} if fits else {"auxiliary_weight": 0.0})}


def plan_of(s: Settings) -> Plan:
    """Return the search and the final training as phases."""
    shared: dict[str, Any] = {"momentum": s.momentum, "weight_decay": s.weight_decay, "clip_norm": s.clip_norm}
    search = Phase(
        name="search",
        epochs=s.search_epochs,
        batch_size=s.search_batch_size,
        lr=s.search_lr,
        lr_min=s.search_lr_min,
        logits=True,
        **shared,
    )
    training = Phase(
        name="final",
        epochs=s.epochs,
        batch_size=s.batch_size,
        lr=s.lr,
        drop_path=s.drop_path,
        auxiliary_weight=s.auxiliary_weight,
        **shared,
    )
    return Plan(
        search=(search,),
        final=(training,),
        channels=s.search_channels,
        cells=s.search_cells,
        order=s.order,
        logit_lr=s.logit_lr,
        logit_decay=s.logit_decay,
    )


@final
class Searcher(RelaxedSearcher):
    """One DARTS run: search, selection, training from scratch.

    Args:
        family: "darts"; its channels and cells are those of the final network.
        task: What is learned.
        settings: Hyper-parameters.
        costs: Costs of the final network, without a budget.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".
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
        super().__init__(
            family=family, task=task, plan=plan_of(settings), costs=costs, seed=seed, memory_format=memory_format
        )
