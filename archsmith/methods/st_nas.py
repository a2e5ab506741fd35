"""ST-NAS: architectures sampled one path at a time, and learned by straight-through gradients.

Zheng, An, Ou, "Efficient Neural Architecture Search for End-to-end Speech Recognition via Straight-Through Gradients",
SLT 2021, arXiv 2011.05649.

The objective is that of SNAS, the expected loss over architectures drawn from the softmax of the logits, with a true
sample forwards and the straight-through gradient backwards (``archsmith.supernet.straight_through``): no Gumbel noise,
no temperature, the memory of one path. Three stages:

1. Warm-up: each batch trains one path of the supernet, drawn uniformly; the logits stay zero.
2. Search: before each training batch the next validation batch moves the logits by the gradient of one sample; then the
   weights of a *new* sample learn from the training batch.
3. The most probable candidates are trained from scratch on all training examples.

Every stage ends by the same rule of plateaus (``archsmith.train.milestones``) and hands over its best state, by the
loss on validation examples with fresh samples. Validation examples are those of the task, filled up from its training
part to a share of all; for stage 3 the moved ones are training examples again.

What differs: the published system retrains with CTC-CRF, here all stages have the task's own loss; stages have a
largest number of epochs. The paper's text could not be read: stages and settings are those of its released code.
"""

from __future__ import annotations

from typing import Any, final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from archsmith.core.rng import seed_of
from archsmith.run.costs import CostModel
from archsmith.run.relaxed_search import RelaxedSearcher
from archsmith.run.relaxed_settings import Phase, Plan
from archsmith.supernet.straight_through import StraightThrough
from archsmith.tasks.base import Batch, Task
from archsmith.train.bilevel import StepContext
from archsmith.train.milestones import Milestones, Rule
from archsmith.train.parts import filled_up
from archsmith.train.sampled import SampledAlternation

SYSTEM = {
    "slug": "st-nas",
    "title": "ST-NAS: architecture search for speech recognition via straight-through gradients",
    "year": 2021,
    "arxiv": "2011.05649",
    "kind": "search",
    "aliases": [],
}

WORKS_ON = "relaxed"
"""It searches every family with a supernet that can be relaxed."""

KEPT = "kept."
"""Prefix, in a checkpoint, of the best state of the present stage."""


class Settings(BaseModel):
    """Hyper-parameters; the defaults are those of the released code's speech recipe.

    Attributes:
        warmup_epochs: Largest number of epochs of the warm-up; 0 leaves it out.
        search_epochs: Largest number of epochs of the search.
        epochs: Largest number of epochs of the final training.
        warmup_batch_size: Examples of a batch in the warm-up.
        search_batch_size: Examples of a batch for the weights and of one for the logits.
        batch_size: Examples of a batch in the final training.
        search_lr: First learning rate of the weights in warm-up and search, by Adam.
        logit_lr: Learning rate of the logits, by Adam; it never decays.
        lr: First learning rate of the final training, by Adam.
        valid_fraction: Share of the examples that the validation part must have in the search.
        warmup_free: Epochs of the warm-up that only note the loss.
        search_look_ahead: Epochs without improvement that end the warm-up, and lower the rate in the search.
        search_improve: Improvement of the loss that counts, in warm-up and search.
        free: Epochs of the final training that only note the loss.
        look_ahead: Epochs without improvement that lower its rate.
        lr_stop: It ends where its rate would fall below this.
        gamma: Factor of every decay.
        search_channels: Channels of the search network, for families with a smaller one.
        search_cells: Its cells, likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup_epochs: int = Field(100, ge=0)
    search_epochs: int = Field(100, ge=1)
    epochs: int = Field(200, ge=1)
    warmup_batch_size: int = Field(128, ge=1)
    search_batch_size: int = Field(64, ge=1)
    batch_size: int = Field(128, ge=1)
    search_lr: float = Field(1e-3, gt=0)
    logit_lr: float = Field(5e-3, gt=0)
    lr: float = Field(1e-3, gt=0)
    valid_fraction: float = Field(0.1, gt=0, lt=1)
    warmup_free: int = Field(10, ge=0)
    search_look_ahead: int = Field(3, ge=1)
    search_improve: float = Field(0.5, ge=0)
    free: int = Field(10, ge=0)
    look_ahead: int = Field(1, ge=1)
    lr_stop: float = Field(1e-5, gt=0)
    gamma: float = Field(0.1, gt=0, lt=1)
    search_channels: int = Field(16, ge=1)
    search_cells: int = Field(8, ge=1)


SMALL: dict[str, Any] = {
    "warmup_epochs": 10,
    "search_epochs": 10,
    "epochs": 40,
    "warmup_batch_size": 64,
    "batch_size": 64,
    "search_lr": 3e-3,
    "logit_lr": 0.02,
    "lr": 3e-3,
    "warmup_free": 5,
    "search_improve": 0.02,
    "look_ahead": 4,
    "search_channels": 4,
    "search_cells": 4,
}
"""Settings for small examples, which one CPU can do in minutes."""

SMALL_SIDE, SMALL_LENGTH = 24, 200


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for a shape of examples.

    Args:
        image: Of pictures below 24 pixels, and of features with at most 200 frames, "small"; else the published one.
    """
    speech = image[1] != image[2]
    small = image[2] <= SMALL_LENGTH if speech else min(image[1:]) < SMALL_SIDE
    return SMALL if small else {}


def plan_of(s: Settings) -> Plan:
    """Return the three stages."""
    plain: dict[str, Any] = {"schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.0}
    warmup = Phase(
        name="warm-up", epochs=s.warmup_epochs, batch_size=s.warmup_batch_size, lr=s.search_lr, logits=False, **plain
    )
    search = Phase(
        name="search", epochs=s.search_epochs, batch_size=s.search_batch_size, lr=s.search_lr, logits=True, **plain
    )
    final = Phase(name="final", epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, **plain)
    return Plan(
        search=(warmup, search),
        final=(final,),
        channels=s.search_channels,
        cells=s.search_cells,
        logit_lr=s.logit_lr,
        logit_betas=(0.9, 0.999),
        logit_decay=0.0,
    )


def rules_of(s: Settings) -> dict[str, Rule]:
    """Return the rule of each stage: the warm-up stops without a decay, the search may decay once."""
    shared: dict[str, Any] = {
        "look_ahead": s.search_look_ahead,
        "gamma": s.gamma,
        "min_improve": s.search_improve,
        "lr": s.search_lr,
    }
    return {
        "warm-up": Rule(free_epochs=s.warmup_free, lr_stop=s.search_lr, **shared),
        "search": Rule(lr_stop=0.1 * s.search_lr, **shared),
        "final": Rule(
            lr=s.lr,
            free_epochs=s.free,
            look_ahead=s.look_ahead,
            gamma=s.gamma,
            lr_stop=min(s.lr_stop, s.lr),
            min_improve=0.0,
        ),
    }


@final
class StNasStep(SampledAlternation):
    """Logits first, by the next validation batch and a sample of their own; then the weights of another sample."""

    def __init__(self) -> None:
        super().__init__(first="logits")

    def path_logits(self, context: StepContext) -> dict[str, Tensor]:
        """Return zeros while the logits do not learn: the warm-up draws uniformly."""
        logits = context.fixed_logits()
        if context.logit_optimizer is not None:
            return logits
        return {name: torch.zeros_like(tensor) for name, tensor in logits.items()}

    def logit_batch(self, context: StepContext) -> Batch:
        """Return the next validation batch; behind the last one they begin again, in another order."""
        step = context.step
        done = context.where[0] * step.weight_task.steps_per_epoch(step.batch_size) + context.where[1]
        cycle, place = divmod(done, step.logit_task.steps_per_epoch(step.batch_size))
        order = seed_of(step.seed, "logit-order")
        batches = step.logit_task.batches("train", batch_size=step.batch_size, seed=order, epoch=cycle, start=place)
        return next(batches)


@final
class Searcher(RelaxedSearcher):
    """One ST-NAS run: warm-up, search, selection, training from scratch.

    Args:
        family: One that can be relaxed.
        task: What is learned.
        settings: Hyper-parameters.
        costs: Costs of the final network, without a budget.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".

    Attributes:
        milestones: Of the present stage.
        kept: Its best state so far, by name; empty before there is one.
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
        self.rules = rules_of(settings)
        super().__init__(
            family=family, task=task, plan=plan_of(settings), costs=costs, seed=seed, memory_format=memory_format
        )
        self.halves[1].steps_per_epoch(settings.search_batch_size)  # refuses a batch larger than the validation part

    def parts(self, task: Task, seed: int) -> tuple[Task, Task]:
        """Return what weights and logits learn from: training and validation examples."""
        return filled_up(task, self.settings.valid_fraction, seed)

    def relaxation(self) -> StraightThrough:
        """Return the straight-through sample."""
        return StraightThrough()

    def make_updater(self) -> StNasStep:
        """Return what a step of warm-up and search does."""
        return StNasStep()

    def begin_(self, network: nn.Module, phase: Phase, *, fresh: bool) -> None:
        """Begin a stage with its rule; the logits begin at zero."""
        self.milestones = Milestones(self.rules[phase.name])
        self.kept: dict[str, Tensor] = {}
        if self.supernet is not None and fresh and self.position.epoch == 0:
            with torch.no_grad():
                for logits in self.supernet.logits.values():
                    logits.zero_()

    def optimizer_for(self, network: nn.Module, phase: Phase) -> torch.optim.Optimizer:
        """Return Adam: candidates that were not drawn have no gradient, so it leaves them and their moments alone."""
        return torch.optim.Adam(network.parameters(), lr=phase.lr)

    def rate(self, phase: Phase, epoch: int) -> float:
        """Return the learning rate that the stage has come down to."""
        return self.milestones.lr

    def end_epoch_(self, phase: Phase, epoch: int, figures: dict[str, Any]) -> bool:
        """Judge the epoch by its validation loss, keep its state if it is the best, and return to that at the end."""
        model = self._judged()
        rate, verdict = self.milestones.lr, self.milestones.tell(float(figures["valid_loss"]))
        figures.update(rate=rate, verdict=verdict)
        if verdict == "new best":
            self.kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        over = verdict == "stop" or epoch + 1 == phase.epochs
        if over and self.kept:
            model.load_state_dict(self.kept)
        return over

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint needs: the stage's rule and its best state too."""
        tensors, values = super().state()
        kept = {f"{KEPT}{name}": tensor for name, tensor in self.kept.items()}
        return {**tensors, **kept}, {**values, "milestones": self.milestones.state()}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit and by the same rule."""
        super().load(tensors, state)
        self.milestones = Milestones.from_state(state["milestones"])
        self.kept = {name.removeprefix(KEPT): tensor for name, tensor in tensors.items() if name.startswith(KEPT)}

    def _judged(self) -> nn.Module:
        """Return what the present stage trains, with its logits if there are any."""
        return self._trained() if self.supernet is None else self.supernet
