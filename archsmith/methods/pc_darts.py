"""PC-DARTS: DARTS on a fraction of the channels, kept stable by weights of the edges.

Xu et al., "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search", ICLR 2020,
arXiv 1907.05737.

On every edge only C / K channels go through the candidate operations; the others go past them (max-pooled where the
edge halves the resolution), and all are shuffled, so that the next operation sees others. A mixed operation keeps one
K-th of the memory, so the batch can grow, and operations without weights lose their early advantage. Because the
channels differ from edge to edge, edges get weights of their own: one logit each, a softmax over the edges into a node
(edge normalisation). They scale the edges in the search, and an operation is as strong as its mixing weight times its
edge's. During the first epochs the weights of the network learn alone.

What differs: ``channel_divisor=1`` is DARTS with edge normalisation (the released code cannot run it); "shift" rotates
by C / K channels (the released code by C / 4, the same at its K = 4); "random" draws the channels of every edge anew
for every step and puts them back in their places, as the paper's formula says (the released drawing has no effect).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, final

from pydantic import Field
from torch import nn

from archsmith.core.errors import UserError
from archsmith.families.darts_space import Genotype
from archsmith.run import relaxed_settings
from archsmith.run.relaxed_search import ConfiguredSearcher
from archsmith.run.relaxed_settings import TINY, Phase, Plan, RelaxedSettings, recipe_for
from archsmith.supernet.partial import partial_edge, redraw_
from archsmith.supernet.relaxed import MakeEdge
from archsmith.train.bilevel import Bilevel, StepContext

SYSTEM = {
    "slug": "pc-darts",
    "title": "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search",
    "year": 2020,
    "arxiv": "1907.05737",
    "kind": "search",
    "aliases": [],
}

WORKS_ON = "relaxed"
"""It searches every family with a supernet that can be relaxed and whose candidates keep the number of channels."""


class Settings(RelaxedSettings):
    """Hyper-parameters; the defaults are those of the published CIFAR-10 runs. Others as of ``RelaxedSettings``.

    Attributes:
        channel_divisor: K: candidates see one K-th of the channels.
        mixing: How other channels get their turn: "shuffle", "shift" or "random".
        warmup_epochs: Epochs of the search, at its beginning, in which the logits stay as they are.
        search_lr_warmup: Epochs of the search in which the learning rate rises linearly to ``search_lr``.
        logit_clip_norm: Largest norm of the gradient of all logits together; 0 for no limit.
        lr_schedule: Of the final training: "cosine", or "linear", see ``linear_rate``.
        lr_warmup: Epochs of the final training in which the learning rate rises linearly to ``lr``.
        final_weight_decay: L2 on the weights in the final training; ``weight_decay`` if None.
    """

    channel_divisor: int = Field(4, ge=1)
    mixing: Literal["shuffle", "shift", "random"] = "shuffle"
    warmup_epochs: int = Field(15, ge=0)
    search_batch_size: int = Field(256, ge=2)
    search_lr: float = Field(0.1, gt=0)
    search_lr_min: float = Field(0.0, ge=0)
    search_lr_warmup: int = Field(0, ge=0)
    logit_lr: float = Field(6e-4, ge=0)
    logit_clip_norm: float = Field(0.0, ge=0)
    lr_schedule: Literal["cosine", "linear"] = "cosine"
    lr_warmup: int = Field(0, ge=0)
    final_weight_decay: float | None = Field(None, ge=0)
    drop_path: float = Field(0.3, ge=0, lt=1)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "imagenet": {
        "channel_divisor": 2,
        "warmup_epochs": 35,
        "search_batch_size": 1024,
        "search_lr": 0.5,
        "search_lr_warmup": 5,
        "logit_lr": 6e-3,
        "logit_clip_norm": 5.0,
        "epochs": 250,
        "batch_size": 1024,
        "lr": 0.5,
        "lr_schedule": "linear",
        "lr_warmup": 5,
        "final_weight_decay": 3e-5,
        "drop_path": 0.0,
    },
    "tiny": {
        **TINY,
        "channel_divisor": 2,  # candidates as wide as those of tiny DARTS: with K = 4 some would have a single channel
        "search_channels": 8,
        "warmup_epochs": 3,
        "search_lr": 0.1,
        "search_lr_min": 0.0,
        "logit_lr": 6e-3,
    },
}


LARGE = 96
"""Pixels from which on an image is searched as those of ImageNet were."""


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, "imagenet" from 96, else "paper" (CIFAR-10)."""
    return recipe_for(image, PRESETS["imagenet" if min(image[1:]) >= LARGE else "paper"], PRESETS["tiny"])


def plan_of(s: Settings) -> Plan:
    """Return the search and the final training as one phase each."""
    plan = relaxed_settings.plan_of(s)
    if s.final_weight_decay is None:
        return plan
    return replace(plan, final=tuple(replace(phase, weight_decay=s.final_weight_decay) for phase in plan.final))


def linear_rate(epoch: int, *, epochs: int, peak: float, tail: int = 5) -> float:
    """Return the learning rate of an epoch of the published trainings on ImageNet.

    It falls linearly towards zero at ``tail`` epochs before the end; the last value but zero is then stretched over
    these. In trainings that are no longer than the tail it falls evenly.

    Args:
        epoch: From 0.
        epochs: Length of the training.
        peak: Rate of epoch 0.
        tail: Epochs of the slow end.
    """
    left = epochs - epoch
    if epochs <= tail:
        return peak * left / epochs
    if left > tail:
        return peak * (left - tail) / (epochs - tail)
    return peak * left / ((epochs - tail) * tail)


class RedrawnBilevel(Bilevel):
    """The step of DARTS; edges whose channels are random draw them anew before it."""

    def step(self, context: StepContext) -> dict[str, float]:
        """Draw, then move logits and weights."""
        redraw_(context.supernet, context.step.seed, *context.where)
        return super().step(context)


@final
class Searcher(ConfiguredSearcher[Settings]):
    """One PC-DARTS run: search, selection, training of an ordinary network from scratch.

    Arguments as of ``ConfiguredSearcher``.

    Raises:
        UserError: K does not divide the channels of the search network, or the logits would never learn.
    """

    edge_weights = True

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        settings = self.settings
        if settings.logit_clip_norm:
            logits = [logits for group in self.logit_optimizer.param_groups for logits in group["params"]]

            def clip(*_: Any) -> None:
                nn.utils.clip_grad_norm_(logits, settings.logit_clip_norm)

            self.logit_optimizer.register_step_pre_hook(clip)

    def planned(self, settings: Settings) -> Plan:
        """Return the phases, if the logits learn in any."""
        if settings.warmup_epochs >= settings.search_epochs:
            raise UserError(
                "warmup_epochs",
                settings.warmup_epochs,
                allowed=f"fewer than the {settings.search_epochs} epochs of the search; in the others the logits learn",
            )
        return plan_of(settings)

    def make_edge(self) -> MakeEdge:
        """Return what makes edges of partial channels."""
        return partial(partial_edge, divisor=self.settings.channel_divisor, mixing=self.settings.mixing)

    def make_updater(self) -> RedrawnBilevel:
        """Return the step of DARTS, on channels of its own where these are random."""
        return RedrawnBilevel(self.plan.order)

    def rate(self, phase: Phase, epoch: int) -> float:
        """Return the learning rate of an epoch (from 0) of a phase."""
        s = self.settings
        warmup = s.search_lr_warmup if phase.logits else s.lr_warmup
        if epoch < warmup:
            return phase.lr * (epoch + 1) / warmup
        if s.lr_schedule == "linear" and not phase.logits:
            return linear_rate(epoch, epochs=phase.epochs, peak=phase.lr)
        return super().rate(phase, epoch)


PC_DARTS_CIFAR = Genotype(
    normal=(
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("sep_conv_3x3", 0),
        ("dil_conv_3x3", 1),
        ("sep_conv_5x5", 0),
        ("sep_conv_3x3", 1),
        ("avg_pool_3x3", 0),
        ("dil_conv_3x3", 1),
    ),
    reduce=(
        ("sep_conv_5x5", 1),
        ("max_pool_3x3", 0),
        ("sep_conv_5x5", 1),
        ("sep_conv_5x5", 2),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 3),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 2),
    ),
)
"""The published cells of the search on CIFAR-10."""

PC_DARTS_IMAGE = Genotype(
    normal=(
        ("skip_connect", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 0),
        ("skip_connect", 1),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 3),
        ("sep_conv_3x3", 1),
        ("dil_conv_5x5", 4),
    ),
    reduce=(
        ("sep_conv_3x3", 0),
        ("skip_connect", 1),
        ("dil_conv_5x5", 2),
        ("max_pool_3x3", 1),
        ("sep_conv_3x3", 2),
        ("sep_conv_3x3", 1),
        ("sep_conv_5x5", 0),
        ("sep_conv_3x3", 3),
    ),
)
"""The published cells of the search on ImageNet."""
