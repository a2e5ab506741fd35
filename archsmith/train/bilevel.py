"""Training a relaxed supernet: weights on one half of the training images, architecture logits on the other.

Every step has the next batch of the first half and can draw a random one of the second. What it does with them is an
``Updater``: that of DARTS moves the logits by the gradient of the second batch's loss, then the weights by the first's.

Source: DARTS, arXiv 1806.09055, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.supernet.relaxed import RelaxedSupernet
from archsmith.supernet.updaters import InnerStep, Loss, Tensors, first_order, unrolled
from archsmith.tasks.base import Batch, Task
from archsmith.train.loop import Diverged, Position

Order = Literal["first", "second", "exact"]
"""How the gradient of the logits is taken: at the present weights, or through one unrolled step of the weights, by a
finite difference or by a second backward pass."""

BeforeStep = Callable[[torch.optim.Optimizer, str], None]
"""Called with an optimiser that is about to step, and the name of what it moves."""


@dataclass(frozen=True, kw_only=True)
class BilevelStep:
    """What a step does; all of it a function of the seed and the position.

    Attributes:
        weight_task: Its training part moves the weights.
        logit_task: Its training part moves the logits.
        batch_size: Images of both batches.
        seed: Seed of the run.
        clip_norm: Largest norm of the gradient of the weights; 0 for no limit.
        memory_format: Of the input batches.
    """

    weight_task: Task
    logit_task: Task
    batch_size: int
    seed: int
    clip_norm: float = 5.0
    memory_format: torch.memory_format = torch.contiguous_format


def halves(task: Task, seed: int) -> tuple[Task, Task]:
    """Return the task twice, with one random half of its training images each; all else is as it was.

    Raises:
        UserError: The task cannot be parted: its images are not arrays in memory.
    """
    part = getattr(task, "training_halves", None)
    if part is None:
        raise UserError(
            "task",
            task.name,
            allowed="a task over images in memory: weights and architecture learn from different halves of them",
        )
    first, second = part(seed)
    return first, second


def random_batch(step: BilevelStep, *names: str | int) -> Batch:
    """Return a random batch of the images that move the logits; ``names`` say which one."""
    order = seed_of(step.seed, "logit-order", *names)
    return next(iter(step.logit_task.batches("train", batch_size=step.batch_size, seed=order)))


def loss_of(
    supernet: RelaxedSupernet, task: Task, batch: Batch, step: BilevelStep, *names: str | int
) -> tuple[Loss, dict[str, Tensor]]:
    """Return a batch's loss as a function of weights and logits, and a place where its last metrics appear.

    Augmentation, samples of the relaxation and everything else random depend on ``names`` alone, so the function gives
    the same value for the same tensors.
    """
    metrics: dict[str, Tensor] = {}

    def loss(weights: Tensors, logits: Tensors) -> Tensor:
        augment = torch.Generator().manual_seed(seed_of(step.seed, "augment", *names))
        sample = torch.Generator().manual_seed(seed_of(step.seed, "relaxation", *names))
        with torch.random.fork_rng(devices=[]):  # operations that draw (noise, dropout) draw the same in every call
            torch.manual_seed(seed_of(step.seed, "operations", *names))
            value, found = task.loss(
                lambda inputs: supernet.functional(
                    inputs.contiguous(memory_format=step.memory_format), weights, logits, generator=sample
                ),
                batch,
                augment,
            )
        metrics.update(found)
        return value

    return loss, metrics


def logit_gradients(
    supernet: RelaxedSupernet, train: Loss, valid: Loss, order: Order, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the gradient of the logits, by group.

    Args:
        supernet: Read only.
        train: Loss on the batch that the weights learn from next.
        valid: Loss on the batch for the logits.
        order: See ``Order``.
        optimizer: Of the weights, momentum SGD; an unrolled step is its step.
    """
    weights, logits = supernet.weights(), dict(supernet.logits.items())
    if order == "first":
        return first_order(valid, weights, logits)
    how: Literal["difference", "exact"] = "exact" if order == "exact" else "difference"
    return unrolled(train, valid, weights, logits, inner_step(optimizer, supernet), how=how)


def inner_step(optimizer: torch.optim.Optimizer, supernet: RelaxedSupernet) -> InnerStep:
    """Return the step that momentum SGD would take on the supernet's weights now.

    Raises:
        UserError: Another optimiser, or one with several settings.
    """
    (group, *others) = optimizer.param_groups
    if not isinstance(optimizer, torch.optim.SGD) or others or group["nesterov"] or group["dampening"]:
        raise UserError("optimizer", optimizer, allowed="plain momentum SGD with one group, which can be unrolled")
    buffers = {
        name: state["momentum_buffer"]
        for name, weight in supernet.weights().items()
        if (state := optimizer.state.get(weight)) and state.get("momentum_buffer") is not None
    }
    return InnerStep(rate=group["lr"], momentum=group["momentum"], buffers=buffers, weight_decay=group["weight_decay"])


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What an updater has for one step.

    Attributes:
        supernet: Changed in place.
        optimizer: Over what is trained of its network.
        logit_optimizer: Over its logits; None while they stay as they are.
        step: What is learned from, and how.
        batch: The batch that the weights learn from.
        where: Epoch and step, from 0: they name everything random in the step.
        total: Steps done before, in all.
        before_step: Called after clipping with the optimiser about to step and the name of what it moves: "weights",
            "logits" or "copy" (gradient noise).
    """

    supernet: RelaxedSupernet
    optimizer: torch.optim.Optimizer
    logit_optimizer: torch.optim.Optimizer | None
    step: BilevelStep
    batch: Batch
    where: tuple[int, int]
    total: int = 0
    before_step: BeforeStep = lambda optimizer, moved: None

    def weight_loss(self) -> tuple[Loss, dict[str, Tensor]]:
        """Return the loss of the weights' batch, and where its last metrics appear; see ``loss_of``."""
        return loss_of(self.supernet, self.step.weight_task, self.batch, self.step, "weights", *self.where)

    def logit_loss(self) -> tuple[Loss, dict[str, Tensor]]:
        """Return the loss of a random batch of the images that move the logits."""
        batch = random_batch(self.step, *self.where)
        return loss_of(self.supernet, self.step.logit_task, batch, self.step, "logits", *self.where)

    def move_logits(self, gradients: Tensors) -> None:
        """Let the logits' optimiser step along these gradients.

        Raises:
            Diverged: One of them is NaN or infinite.
        """
        assert self.logit_optimizer is not None
        for gradient in gradients.values():
            if not bool(gradient.isfinite().all()):
                raise Diverged(float("nan"), *self.where)
        for name, logits in self.supernet.logits.items():
            logits.grad = gradients[name]
        self.before_step(self.logit_optimizer, "logits")
        self.logit_optimizer.step()
        self.logit_optimizer.zero_grad(set_to_none=True)

    def move_weights(self, loss: Tensor) -> float:
        """Let the weights' optimiser step down a loss whose graph reaches them; return the loss.

        Raises:
            Diverged: It is NaN or infinite; the step is not taken.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(value, *self.where)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.step.clip_norm:
            nn.utils.clip_grad_norm_(self.supernet.weights().values(), self.step.clip_norm)
        self.before_step(self.optimizer, "weights")
        self.optimizer.step()
        return value

    def fixed_logits(self) -> dict[str, Tensor]:
        """Return the logits as constants."""
        return {name: logits.detach() for name, logits in self.supernet.logits.items()}


class Updater:
    """What one step of a search does to logits and weights; here nothing is moved.

    A step is a function of the tensors and of (seed, epoch, step); what an updater carries from step to step is in its
    ``state``, so that a run goes on bit for bit.
    """

    def begin_(self, supernet: RelaxedSupernet, optimizer: torch.optim.Optimizer, *, fresh: bool) -> None:
        """Prepare for a phase; ``fresh`` is False when it is only continued and ``load`` follows."""

    def step(self, context: StepContext) -> dict[str, float]:
        """Take a step; return its figures: "loss", and metrics of the weights' batch."""
        raise NotImplementedError

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what it carries from step to step: tensors by name, and plain JSON values."""
        return {}, {}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a ``state``."""


class Bilevel(Updater):
    """The step of DARTS: logits by the validation loss, then weights by the training loss with the logits fixed.

    Args:
        order: How the gradient of the logits is taken.

    Source: arXiv 1806.09055, algorithm 1.
    """

    def __init__(self, order: Order = "first") -> None:
        self.order = order

    def step(self, context: StepContext) -> dict[str, float]:
        """Move the logits, if they learn, and then the weights."""
        train, metrics = context.weight_loss()
        if context.logit_optimizer is not None:
            valid, _ = context.logit_loss()
            context.move_logits(logit_gradients(context.supernet, train, valid, self.order, context.optimizer))
        loss = train(context.supernet.weights(), context.fixed_logits())
        value = context.move_weights(self.weight_loss(context, loss))
        return {"loss": value, **{name: float(metric) for name, metric in metrics.items()}}

    def weight_loss(self, context: StepContext, loss: Tensor) -> Tensor:
        """Return what the weights minimise, given their loss on the batch; here that loss."""
        return loss


def bilevel_epoch(
    supernet: RelaxedSupernet,
    optimizer: torch.optim.Optimizer,
    logit_optimizer: torch.optim.Optimizer | None,
    step: BilevelStep,
    position: Position,
    *,
    rate: float,
    updater: Updater | None = None,
    before_step: BeforeStep = lambda optimizer, moved: None,
    on_step: Callable[[Position, float], None] = lambda position, loss: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from ``position`` to the end of its epoch, or until asked to stop.

    Args:
        supernet: Changed in place.
        optimizer: Over what is trained of its network.
        logit_optimizer: Over its logits; None leaves them as they are.
        step: What is learned from, and how.
        position: Updated after every step.
        rate: Learning rate of ``optimizer`` in this epoch.
        updater: What a step does; ``Bilevel("first")`` if None.
        before_step: See ``StepContext``.
        on_step: Called after every step with the position and the loss on the batch for the weights.
        should_stop: Asked after every step.

    Returns:
        True if the epoch is complete.

    Raises:
        Diverged: A loss or a gradient of logits is NaN or infinite; the step is not taken.
    """
    updater = updater or Bilevel()
    supernet.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    order = seed_of(step.seed, "order")
    batches = step.weight_task.batches(
        "train", batch_size=step.batch_size, seed=order, epoch=position.epoch, start=position.step
    )
    for batch in batches:
        figures = updater.step(
            StepContext(
                supernet=supernet,
                optimizer=optimizer,
                logit_optimizer=logit_optimizer,
                step=step,
                batch=batch,
                where=(position.epoch, position.step),
                total=position.total,
                before_step=before_step,
            )
        )
        position.step += 1
        position.total += 1
        for name, figure in figures.items():
            position.sums[name] = position.sums.get(name, 0.0) + figure
        on_step(position, figures["loss"])
        if should_stop():
            break
    return position.step >= step.weight_task.steps_per_epoch(step.batch_size)
