"""DASS: a cell search that measures architectures by what is left of them after extreme pruning.

Mousavi, Loni, Alibeigi, Daneshtalab, "DASS: Differentiable Architecture Search for Sparse Neural Networks", ACM TECS
2023, arXiv 2207.06968.

Pruning a cell that was found for dense weights is not the same as finding the cell that is best when pruned. So every
convolution and the classifier of the DARTS search network become sparse: a weight and a score of the same shape, of
which the forward pass keeps, in every layer, the fraction of weights with the largest scores. The search has three
phases. *Pretrain*: all weights, with architecture steps, is DARTS. *Prune*: weights are frozen, scores start at the
weights' magnitudes and learn which weights to keep. *Finetune*: the masks are fixed, the kept weights learn, and so
does the architecture; this is where it sees sparsity. The selected cells are then trained by the same three phases.

What differs: three disjoint sets of parameters (weights, scores, logits), each with its own optimiser, where the
released code lets the weights' optimiser move all of them. What a mask has dropped keeps its value bit for bit; decay
and momentum do not move it. Scores draw no random numbers, so with ``keep=1`` and no prune phase the search is DARTS
itself. The published one-step variant, all phases merged, is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from archsmith.cost import count
from archsmith.families.darts_space import Genotype
from archsmith.layers.darts import DartsNetwork
from archsmith.layers.sparse import SparseLayers, dense_state, kept_counts, reset_scores_, set_keep_
from archsmith.run.costs import CostModel
from archsmith.run.drive import Delivered
from archsmith.run.relaxed_search import RelaxedSearcher, phase_hooks
from archsmith.run.relaxed_settings import Phase, Plan, noise_plan
from archsmith.space import Architecture
from archsmith.supernet.relaxed import SearchSupernet, batch_statistics
from archsmith.tasks.base import Task
from archsmith.train.loop import Position, next_epoch, train_epoch
from archsmith.train.noise import GAMMA
from archsmith.train.schedules import cosine_by_epoch
from archsmith.train.sparse import hold_dropped_, learn_scores_, learn_weights_

SYSTEM = {
    "slug": "dass",
    "title": "DASS: Differentiable Architecture Search for Sparse Neural Networks",
    "year": 2023,
    "arxiv": "2207.06968",
    "kind": "search",
    "aliases": ["pr-darts"],
}

WORKS_ON = ("darts",)
"""Families whose supernet this method can relax."""

Kind = Literal["pretrain", "prune", "finetune"]


class Settings(BaseModel):
    """Hyper-parameters; the defaults are the published ones where there are any.

    Attributes:
        keep: Fraction of its weights that every layer keeps.
        order: Gradient of the logits: "first", "second" or "exact", see ``archsmith.methods.darts``.
        search_pretrain_epochs: Epochs of the dense weights of the supernet, with architecture steps.
        search_prune_epochs: Epochs of its scores.
        search_finetune_epochs: Epochs of its weights under the masks, with architecture steps.
        search_lr: First learning rate of weights in the search; cosines take it to ``search_lr_min`` in every phase.
        search_score_lr: First learning rate of scores.
        search_lr_min: See above.
        search_batch_size: Images of a batch for the weights and of one for the logits.
        search_momentum: Of SGD in the search.
        search_weight_decay: L2 on what is trained in the search.
        search_channels: Channels of the search network's first cells.
        search_cells: Its cells.
        logit_lr: Learning rate of the logits, by Adam.
        logit_decay: L2 on the logits.
        pretrain_epochs: Epochs of the dense weights of the final network. (The released configurations name 600, 20 and
            200 epochs, and rates of 0.1, 0.025 and 0.01; that they belong to the phases in this order is inferred.)
        prune_epochs: Epochs of its scores.
        finetune_epochs: Epochs of its weights under the masks.
        lr: First learning rate of the dense weights; cosines take every rate to zero.
        score_lr: First learning rate of the scores.
        finetune_lr: First learning rate under the masks.
        batch_size: Images of a batch in them.
        momentum: Of SGD in them.
        weight_decay: L2 in them.
        clip_norm: Largest norm of a gradient, everywhere.
        freeze_norms: Whether scales and shifts of normalisations are frozen in prune phases too.
        gradient_noise: Variance at step 0 of annealed Gaussian noise on the gradients; 0 for none.
        gradient_noise_decay: Exponent with which it decays with the steps.
        gradient_noise_on: Gradients of "weights" (and scores), of "logits", or of "both".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: float = Field(0.01, gt=0, le=1)
    order: Literal["first", "second", "exact"] = "second"
    search_pretrain_epochs: int = Field(100, ge=0)
    search_prune_epochs: int = Field(50, ge=0)
    search_finetune_epochs: int = Field(100, ge=0)
    search_lr: float = Field(0.025, gt=0)
    search_score_lr: float = Field(0.1, gt=0)
    search_lr_min: float = Field(0.001, ge=0)
    search_batch_size: int = Field(32, ge=2)
    search_momentum: float = Field(0.0, ge=0, lt=1)
    search_weight_decay: float = Field(1e-3, ge=0)
    search_channels: int = Field(16, ge=2)
    search_cells: int = Field(8, ge=3)
    logit_lr: float = Field(3e-4, ge=0)
    logit_decay: float = Field(1e-3, ge=0)
    pretrain_epochs: int = Field(600, ge=0)
    prune_epochs: int = Field(20, ge=0)
    finetune_epochs: int = Field(200, ge=0)
    lr: float = Field(0.1, gt=0)
    score_lr: float = Field(0.025, gt=0)
    finetune_lr: float = Field(0.01, gt=0)
    batch_size: int = Field(128, ge=2)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(4e-4, ge=0)
    clip_norm: float = Field(5.0, ge=0)
    freeze_norms: bool = False
    gradient_noise: float = Field(0.0, ge=0, allow_inf_nan=False)
    gradient_noise_decay: float = Field(GAMMA, ge=0, allow_inf_nan=False)
    gradient_noise_on: Literal["weights", "logits", "both"] = "weights"


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "keep": 0.1,
        "order": "first",
        "search_pretrain_epochs": 4,
        "search_prune_epochs": 2,
        "search_finetune_epochs": 4,
        "search_lr": 0.1,
        "search_channels": 4,
        "search_cells": 4,
        "logit_lr": 3e-3,
        "pretrain_epochs": 16,
        "prune_epochs": 4,
        "finetune_epochs": 10,
        "lr": 0.05,
        "score_lr": 0.1,
        "finetune_lr": 0.02,
        "batch_size": 64,
    },
}

SIZES = {"Tiny": (30, 16), "Small": (36, 20), "Medium": (86, 12), "Large": (108, 14)}
"""Published final networks: channels of the first cells, and cells."""


def preset_settings(image: tuple[int, int, int]) -> Mapping[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, which one CPU can do, else the published one."""
    return PRESETS["tiny" if min(image[1:]) < 24 else "paper"]


def phases_of(
    epochs: tuple[int, int, int],
    lrs: tuple[float, float, float],
    prefix: str = "",
    *,
    logits: bool = False,
    **same: Any,
) -> tuple[Phase, ...]:
    """Return pretrain, prune and finetune; the logits learn where the weights do.

    Args:
        epochs: Length of each.
        lrs: First learning rate of each.
        prefix: Put before their names.
        logits: Whether there are logits that learn.
        same: Further fields of every ``Phase``.
    """
    kinds: tuple[Kind, ...] = ("pretrain", "prune", "finetune")
    return tuple(
        Phase(name=prefix + kind, epochs=length, lr=lr, logits=logits and kind != "prune", **same)
        for kind, length, lr in zip(kinds, epochs, lrs, strict=True)
    )


def plan_of(s: Settings) -> Plan:
    """Return the three phases of the search and the three of the final network."""
    searching: dict[str, Any] = {
        "batch_size": s.search_batch_size,
        "momentum": s.search_momentum,
        "weight_decay": s.search_weight_decay,
        "lr_min": s.search_lr_min,
    }
    training: dict[str, Any] = {"batch_size": s.batch_size, "momentum": s.momentum, "weight_decay": s.weight_decay}
    clip: dict[str, Any] = {"clip_norm": s.clip_norm}
    search_rates = (s.search_lr, s.search_score_lr, s.search_lr)
    rates = (s.lr, s.score_lr, s.finetune_lr)
    return Plan(
        search=phases_of(_search_lengths(s), search_rates, "search/", logits=True, **searching, **clip),
        final=phases_of(_lengths(s), rates, "final/", **training, **clip),
        channels=s.search_channels,
        cells=s.search_cells,
        order=s.order,
        logit_lr=s.logit_lr,
        logit_decay=s.logit_decay,
        noise=noise_plan(s.gradient_noise, s.gradient_noise_decay, s.gradient_noise_on),
    )


def _search_lengths(s: Settings) -> tuple[int, int, int]:
    return s.search_pretrain_epochs, s.search_prune_epochs, s.search_finetune_epochs


def _lengths(s: Settings) -> tuple[int, int, int]:
    return s.pretrain_epochs, s.prune_epochs, s.finetune_epochs


def begin_(network: nn.Module, kind: Kind, keep: float, *, rank: bool, norms: bool = True) -> None:
    """Set what a phase trains, and what its layers keep.

    Args:
        network: With sparse layers; changed in place.
        kind: "pretrain": everything is kept, all but the scores learns. "prune": the scores learn. "finetune": all but
            the scores learns, under the mask.
        keep: Fraction that is kept from "prune" on.
        rank: Whether the scores are set to the weights' magnitudes: where they begin to learn.
        norms: Whether normalisations learn in "prune".
    """
    set_keep_(network, 1.0 if kind == "pretrain" else keep)
    if rank:
        reset_scores_(network)
    if kind == "prune":
        learn_scores_(network, norms=norms)
    else:
        learn_weights_(network)


def momentum_sgd(network: nn.Module, phase: Phase) -> torch.optim.Optimizer:
    """Return SGD over what learns at present; a weight that is dropped at present is never moved by it."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, phase.lr, phase.momentum, weight_decay=phase.weight_decay)
    if kind_of(phase) == "finetune":
        hold_dropped_(optimizer, network)
    return optimizer


def kind_of(phase: Phase) -> Kind:
    """Return which of the three phases it is."""
    kind = phase.name.rpartition("/")[2]
    assert kind in ("pretrain", "prune", "finetune"), phase
    return cast(Kind, kind)


def dense(network: DartsNetwork) -> DartsNetwork:
    """Return the same function as a network of ordinary layers, its dropped weights zero, no auxiliary classifier."""
    plain = DartsNetwork(**{**network.constructor(), "auxiliary": False, "layers": None})
    plain.load_state_dict({name: t for name, t in dense_state(network).items() if not name.startswith("auxiliary.")})
    return plain


def nonzeros(network: nn.Module, image: tuple[int, int, int]) -> dict[str, int]:
    """Return what a sparse network costs, exactly; nothing is computed.

    Args:
        network: With sparse layers, at the fraction that they keep now.
        image: Shape of one image, (C, H, W).

    Returns:
        "layers": sparse layers; "weights": their weights; "kept": those that are used; "macs": multiply-accumulates of
        a dense execution; "kept_macs": of one that skips zeros. No dense kernel skips any: a sparse one is needed for
        the second number to be time.
    """
    kept = kept_counts(network)
    by_layer = {layer.name: layer.macs for layer in count(network, torch.zeros(1, *image)).layers}
    return {
        "layers": len(kept),
        "weights": sum(total for _, total in kept.values()),
        "kept": sum(used for used, _ in kept.values()),
        "macs": sum(by_layer.values()),
        # Every weight is used once for each output pixel.
        "kept_macs": sum(by_layer[name] * used // total for name, (used, total) in kept.items()),
    }


def train_sparse(
    network: nn.Module, task: Task, phases: tuple[Phase, ...], keep: float, *, seed: int, norms: bool = True
) -> dict[str, dict[str, float]]:
    """Train any network of sparse layers by the three phases, and score it in between.

    Args:
        network: Changed in place; ends at ``keep`` with its final masks.
        task: What is learned.
        phases: From ``phases_of``.
        keep: Fraction that every layer keeps from "prune" on.
        seed: Seed of batches and augmentation.
        norms: Whether normalisations learn in "prune".

    Returns:
        Training "loss" and "accuracy" by batch statistics after each phase, and under "magnitude" those of the masks
        that the scores start with.
    """
    scores: dict[str, dict[str, float]] = {}
    position = Position()
    for phase in phases:
        kind = kind_of(phase)
        begin_(network, kind, keep, rank=kind == "prune", norms=norms)
        if kind == "prune":
            scores["magnitude"] = training_scores(network, task)
        optimizer = momentum_sgd(network, phase)
        for epoch in range(phase.epochs):
            rate = cosine_by_epoch(epoch, epochs=phase.epochs, peak=phase.lr, floor=phase.lr_min)
            hooks = phase_hooks(optimizer, phase, rate)
            train_epoch(network, optimizer, task, position, hooks, batch_size=phase.batch_size, seed=seed)
            next_epoch(position)
        scores[kind] = training_scores(network, task)
    return scores


def training_scores(network: nn.Module, task: Task, batch_size: int = 500) -> dict[str, float]:
    """Return loss and accuracy on all training images but an incomplete last batch, by batch statistics."""
    loss = right = 0.0
    images = 0
    with batch_statistics(network), torch.no_grad():
        for batch in task.batches("train", batch_size=min(batch_size, task.size("train"))):
            logits = network(batch.inputs)
            loss += float(nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
            right += float((logits.argmax(1) == batch.targets).sum())
            images += len(batch)
    return {"loss": loss / images, "accuracy": right / images}


@final
class Searcher(RelaxedSearcher):
    """One DASS run: three phases on the sparse supernet, selection, three phases on the sparse final network.

    What is delivered has ordinary layers whose dropped weights are zero.

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
        self.settings = settings
        super().__init__(
            family=family, task=task, plan=plan_of(settings), costs=costs, seed=seed, memory_format=memory_format
        )

    def layers(self) -> SparseLayers:
        """Return sparse layers that keep everything yet."""
        return SparseLayers(1.0)

    def begin_(self, network: nn.Module, phase: Phase, *, fresh: bool) -> None:
        """Freeze and keep what the phase says; scores begin at the magnitudes of the trained weights."""
        kind = kind_of(phase)
        lengths = _search_lengths(self.settings) if phase.name.startswith("search/") else _lengths(self.settings)
        first = kind == "prune" or (kind == "finetune" and lengths[1] == 0)
        begin_(network, kind, self.settings.keep, rank=fresh and first, norms=not self.settings.freeze_norms)

    def optimizer_for(self, network: nn.Module, phase: Phase) -> torch.optim.Optimizer:
        """Return SGD over what learns in the phase; dropped weights keep their values."""
        return momentum_sgd(network, phase)

    def finished(self, network: nn.Module) -> nn.Module:
        """Return the final network with ordinary layers; what its masks dropped is zero."""
        return dense(cast(DartsNetwork, network))

    def finished_path(self, supernet: SearchSupernet, architecture: Architecture) -> nn.Module:
        """Return a path of the supernet with ordinary layers, under its present masks."""
        return dense(cast(DartsNetwork, supernet.extract(architecture)))

    def deliver(self) -> Delivered:
        """Return the network as it would be delivered now, with the number of its weights that are not zero."""
        delivered = super().deliver()
        if self.network is None:
            return delivered
        figures = {name: float(value) for name, value in nonzeros(self.network, self.family.image).items()}
        return Delivered(delivered.network, delivered.architecture, {**delivered.figures, **figures})


DASS_99 = Genotype(
    normal=(
        ("avg_pool_3x3", 0),
        ("skip_connect", 1),
        ("dil_conv_5x5", 1),
        ("skip_connect", 2),
        ("avg_pool_3x3", 2),
        ("skip_connect", 1),
        ("skip_connect", 4),
        ("skip_connect", 3),
    ),
    reduce=(
        ("max_pool_3x3", 1),
        ("sep_conv_3x3", 0),
        ("max_pool_3x3", 1),
        ("dil_conv_3x3", 2),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
        ("max_pool_3x3", 1),
        ("skip_connect", 4),
    ),
)
"""The published cells for keeping 1 % of the weights: mostly operations without any."""

DASS_90 = Genotype(
    normal=(
        ("dil_conv_3x3", 1),
        ("dil_conv_5x5", 0),
        ("sep_conv_5x5", 0),
        ("dil_conv_5x5", 1),
        ("sep_conv_5x5", 0),
        ("sep_conv_3x3", 3),
        ("sep_conv_3x3", 2),
        ("dil_conv_5x5", 0),
    ),
    reduce=(
        ("skip_connect", 1),
        ("skip_connect", 0),
        ("dil_conv_5x5", 1),
        ("dil_conv_5x5", 2),
        ("dil_conv_5x5", 2),
        ("dil_conv_5x5", 3),
        ("dil_conv_5x5", 3),
        ("skip_connect", 0),
    ),
)
"""The published cells for keeping 10 %."""
