"""What all differentiable searches are set by: the hyper-parameters of DARTS, and the phases that follow from them.

A method's ``Settings`` is a subclass that changes defaults and adds what is its own.

Source of the defaults: Liu, Simonyan, Yang, "DARTS", arXiv 1806.09055, the CIFAR-10 runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from archsmith.families.darts import AUXILIARY_WEIGHT
from archsmith.train.noise import GAMMA


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a training, with its own momentum SGD.

    Attributes:
        name: As the method calls it.
        epochs: Its length; 0 leaves it out.
        batch_size: Images of a step.
        lr: Learning rate of the first epoch.
        lr_min: Where a cosine takes it.
        schedule: "cosine", or "constant" for ``lr`` in every epoch.
        momentum: Of the optimiser.
        weight_decay: L2 on all that is trained.
        clip_norm: Largest norm of the gradient; 0 for no limit.
        logits: Whether the architecture logits learn too (in the search).
        logits_from: Epoch of the phase, from 0, with which they begin to.
        drop_path: Probability of dropped paths at the end of the phase, rising linearly (behind the search).
        auxiliary_weight: Weight of the auxiliary classifier's loss; 0 for none (behind the search).
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    lr_min: float = 0.0
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip_norm: float = 5.0
    logits: bool = False
    logits_from: int = 0
    drop_path: float = 0.0
    auxiliary_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PerturbationPlan:
    """Selection by perturbation behind the search, see ``archsmith.supernet.perturbation``.

    Attributes:
        interval: Epochs of fine-tuning behind a decision.
        criterion: "acc" or "loss", for operations.
        edge_criterion: The same for edges.
        batch_size: Of the fine-tuning.
        lr: Of the fine-tuning, in all of its epochs.
        momentum: Likewise.
        weight_decay: Likewise.
        clip_norm: Likewise.
        logits: Whether the logits of undecided edges go on learning.
    """

    interval: int
    criterion: Literal["acc", "loss"]
    edge_criterion: Literal["acc", "loss"]
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float
    logits: bool = True


@dataclass(frozen=True, kw_only=True)
class SmoothingPlan:
    """Perturbed mixing weights while the weights learn, see ``archsmith.train.smoothed``.

    Attributes:
        kind: "random" or "adversarial".
        start: Epsilon in the first epoch of the search.
        end: Epsilon at its end.
    """

    kind: Literal["random", "adversarial"]
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """Gradient noise, see ``archsmith.train.noise``.

    Attributes:
        eta: Variance at step 0.
        gamma: Exponent with which it decays.
        weights: Whether gradients of weights get it, in the search and again, from step 0, in the final training.
        logits: Whether gradients of logits get it.
    """

    eta: float
    gamma: float
    weights: bool = True
    logits: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole search.

    Attributes:
        search: Phases on the supernet.
        final: Phases on the network that was selected, from fresh weights.
        channels: Channels of the first cells of the search network.
        cells: Its cells.
        order: How the gradient of the logits is taken, where the method leaves that open.
        logit_lr: Learning rate of the logits (Adam).
        logit_betas: Its decay rates.
        logit_decay: L2 on the logits.
        perturbation: How the selection is made by perturbation; None for the method's own rule.
        noise: Gradient noise; None for none.
        smoothing: Perturbed mixing weights in the search; None for none.
    """

    search: tuple[Phase, ...]
    final: tuple[Phase, ...]
    channels: int
    cells: int
    order: Literal["first", "second", "exact"] = "first"
    logit_lr: float = 3e-4
    logit_betas: tuple[float, float] = (0.5, 0.999)
    logit_decay: float = 1e-3
    perturbation: PerturbationPlan | None = None
    noise: NoisePlan | None = None
    smoothing: SmoothingPlan | None = None


class RelaxedSettings(BaseModel):
    """Hyper-parameters of a differentiable search and of the training of what it selects.

    Attributes:
        order: Gradient of the logits: "first" at the present weights, "second" through one unrolled step of them by a
            finite difference, "exact" by a second backward pass.
        search_epochs: Epochs of the search.
        warmup_epochs: Of these, epochs at the beginning in which the logits stay as they are.
        search_batch_size: Examples of a batch for the weights and of one for the logits.
        search_channels: Channels of the search network's first cells, for families with a smaller search network.
        search_cells: Cells of the search network, likewise.
        search_lr: Learning rate of the weights in the search; a cosine takes it to ``search_lr_min``.
        search_lr_min: See above (the paper: 0, its code: this).
        logit_lr: Learning rate of the logits, by Adam.
        logit_decay: L2 on the logits.
        epochs: Epochs of the final training.
        batch_size: Examples of a batch in it.
        lr: Its learning rate; a cosine takes it to zero.
        momentum: Of SGD, in both.
        weight_decay: L2 on the weights, in both.
        clip_norm: Largest norm of the gradient of the weights.
        drop_path: Probability of dropped paths at the end of the final training, for networks that can drop them.
        auxiliary_weight: Weight of the auxiliary classifier, for networks that have one; 0 for none.
        selection: "magnitude", or whatever else the method's own rule is; or "perturbation": behind the search, edges
            are decided one by one by what the supernet loses without an operation, with fine-tuning in between.
        selection_interval: With "perturbation": epochs of fine-tuning behind a decision.
        selection_criterion: With "perturbation": "acc", or "loss", on all images that the logits learn from.
        selection_edge_criterion: The same for the choice of edges; None for the same as above.
        selection_lr: Learning rate of the fine-tuning; None for a tenth of ``search_lr``.
        smoothing: "none"; or under which perturbation of the mixing weights the weights learn in the search: "random"
            (SDARTS-RS) or "adversarial" (SDARTS-ADV).
        smoothing_start: Radius of the perturbation in the first epoch of the search.
        smoothing_end: Radius that it rises to.
        gradient_noise: Variance at step 0 of annealed Gaussian noise on the gradients; 0 for none.
        gradient_noise_decay: Exponent with which it decays with the steps.
        gradient_noise_on: Gradients of "weights", of "logits", or of "both".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Literal["first", "second", "exact"] = "first"
    search_epochs: int = Field(50, ge=1)
    warmup_epochs: int = Field(0, ge=0)
    search_batch_size: int = Field(64, ge=2)
    search_channels: int = Field(16, ge=1)
    search_cells: int = Field(8, ge=1)
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
    selection: Literal["magnitude", "perturbation"] = "magnitude"
    selection_interval: int = Field(5, ge=1)
    selection_criterion: Literal["acc", "loss"] = "acc"
    selection_edge_criterion: Literal["acc", "loss"] | None = None
    selection_lr: float | None = Field(None, gt=0)
    smoothing: Literal["none", "random", "adversarial"] = "none"
    smoothing_start: float = Field(0.03, ge=0, le=1)
    smoothing_end: float = Field(0.3, ge=0, le=1)
    gradient_noise: float = Field(0.0, ge=0, allow_inf_nan=False)
    gradient_noise_decay: float = Field(GAMMA, ge=0, allow_inf_nan=False)
    gradient_noise_on: Literal["weights", "logits", "both"] = "weights"


TINY: dict[str, Any] = {
    "order": "first",
    "search_epochs": 10,
    "search_batch_size": 64,
    "search_channels": 4,
    "search_cells": 4,
    "search_lr": 0.025,
    "logit_lr": 3e-3,
    "epochs": 30,
    "batch_size": 64,
    "lr": 0.05,
    "drop_path": 0.0,
    "auxiliary_weight": 0.0,
}
"""Settings for images below 24 pixels, which one CPU can do in minutes."""


def recipe_for(image: tuple[int, int, int], paper: Mapping[str, Any], tiny: Mapping[str, Any] = TINY) -> dict[str, Any]:
    """Return the settings that fit an image size.

    Args:
        image: (C, H, W).
        paper: What the paper's runs change of the method's defaults; without the auxiliary classifier for images that
            it does not fit.
        tiny: Settings for images below 24 pixels.
    """
    if min(image[1:]) < 24:
        return dict(tiny)
    fits = all(32 <= side < 44 or side == 224 for side in image[1:])
    return {**paper, **({} if fits else {"auxiliary_weight": 0.0})}


def plan_of(s: RelaxedSettings) -> Plan:
    """Return the search and the final training as one phase each."""
    shared: dict[str, Any] = {"momentum": s.momentum, "weight_decay": s.weight_decay, "clip_norm": s.clip_norm}
    search = Phase(
        name="search",
        epochs=s.search_epochs,
        batch_size=s.search_batch_size,
        lr=s.search_lr,
        lr_min=s.search_lr_min,
        logits=True,
        logits_from=s.warmup_epochs,
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
        perturbation=perturbation_of(s),
        noise=noise_plan(s.gradient_noise, s.gradient_noise_decay, s.gradient_noise_on),
        smoothing=None
        if s.smoothing == "none"
        else SmoothingPlan(kind=s.smoothing, start=s.smoothing_start, end=s.smoothing_end),
    )


def perturbation_of(s: RelaxedSettings, *, logits: bool = True) -> PerturbationPlan | None:
    """Return the selection by perturbation that settings ask for, None where they do not.

    Args:
        s: The settings.
        logits: Whether the logits of undecided edges go on learning.
    """
    if s.selection != "perturbation":
        return None
    return PerturbationPlan(
        interval=s.selection_interval,
        criterion=s.selection_criterion,
        edge_criterion=s.selection_edge_criterion or s.selection_criterion,
        batch_size=s.search_batch_size,
        lr=s.search_lr / 10 if s.selection_lr is None else s.selection_lr,
        momentum=s.momentum,
        weight_decay=s.weight_decay,
        clip_norm=s.clip_norm,
        logits=logits,
    )


def noise_plan(eta: float, gamma: float, on: Literal["weights", "logits", "both"]) -> NoisePlan | None:
    """Return the gradient noise that settings ask for, None where its variance is 0."""
    return NoisePlan(eta=eta, gamma=gamma, weights=on != "logits", logits=on != "weights") if eta else None
