"""The training loop: one epoch of steps, deterministic in (seed, epoch, step), and resumable between steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from archsmith.core.errors import ArchsmithError
from archsmith.core.rng import seed_of
from archsmith.tasks.base import Batch, Forward, Task
from archsmith.train.average import MovingAverage
from archsmith.train.compute import Compute, part_of
from archsmith.train.noise import AnnealedNoise


class Diverged(ArchsmithError):
    """The loss became NaN or infinite; the model has not taken the step."""

    def __init__(self, loss: float, epoch: int, step: int) -> None:
        self.loss = loss
        self.epoch = epoch
        self.step = step
        super().__init__(
            f"the loss is {loss} at epoch {epoch + 1}, step {step + 1} (batch {step} of that epoch); the step was not "
            "taken. Lower the learning rate (--set lr=...), or look for NaN in the data."
        )


@dataclass
class Position:
    """Where a run stands: everything a checkpoint needs besides tensors.

    Attributes:
        epoch: Present epoch, from 0.
        step: Steps done in it.
        total: Steps done in all.
        sums: Running sums of this epoch's loss and metrics.
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``Position(**values)`` is the way back."""
        return {"epoch": self.epoch, "step": self.step, "total": self.total, "sums": dict(self.sums)}

    def means(self) -> dict[str, float]:
        """Return the means of the sums over the steps done in this epoch."""
        return {name: value / max(1, self.step) for name, value in self.sums.items()}


@dataclass(frozen=True, kw_only=True)
class LoopHooks:
    """What a method adds to an ordinary step.

    Attributes:
        rate: Learning rate for a number of steps done.
        after_backward: Called between backward and the optimiser step (penalty gradients).
        after_step: Called after the optimiser step (proximal steps).
        on_step: Called last, with the position and this step's loss (progress).
        should_stop: Asked after each step; True ends the epoch early, to be continued later.
        noise: Added to the gradients last of all before the optimiser step, once for each step however many parts or
            replicas made the gradient; its step is ``Position.total``.
    """

    rate: Callable[[int], float]
    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[float], None] = lambda rate: None
    on_step: Callable[[Position, float], None] = lambda position, loss: None
    should_stop: Callable[[], bool] = lambda: False
    noise: AnnealedNoise | None = None


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    position: Position,
    hooks: LoopHooks,
    *,
    batch_size: int,
    seed: int,
    average: MovingAverage | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    compute: Compute | None = None,
    forward: Forward | None = None,
) -> bool:
    """Train from ``position`` to the end of its epoch, or until asked to stop.

    Args:
        model: Network, changed in place.
        optimizer: Over its parameters.
        task: Owns batches and loss.
        position: Updated after every step. Batch order, augmentation and dropout depend on (seed, epoch, step) only, so
            a run that continues from a saved position does the same steps.
        hooks: The method's part.
        batch_size: Examples per step.
        seed: Seed of the run.
        average: Moving average, updated after every step.
        memory_format: Format of the input batches.
        compute: In which parts, where and how precisely a step is computed; plainly when None. With several parts the
            gradient, the running statistics, the loss and the metrics are means over the parts.
        forward: ``compute.forward(model)``, kept by the caller over epochs (compiling takes long); made here when None.

    Returns:
        True if the epoch is complete; False if ``should_stop`` ended it (``position`` says where).

    Raises:
        Diverged: The loss is NaN or infinite; the step is not taken.
    """
    compute = compute or Compute()
    run = compute.forward(model) if forward is None else forward
    model.train()
    steps = task.steps_per_epoch(batch_size)
    order = seed_of(seed, "order")
    batches = task.batches("train", batch_size=batch_size, seed=order, epoch=position.epoch, start=position.step)
    for batch in batches:
        where = (position.epoch, position.step)
        rate = hooks.rate(position.total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)

        def backward(
            part: slice, names: tuple[int, ...], batch: Batch = batch, where: tuple[int, int] = where
        ) -> dict[str, float]:
            """Add the gradient of one part; return its loss and metrics."""
            generator = torch.Generator().manual_seed(seed_of(seed, "augment", *where, *names))
            with torch.random.fork_rng(devices=compute.random_devices()):
                compute.seed_(seed_of(seed, "dropout", *where, *names))
                loss, metrics = task.loss(
                    lambda inputs: run(inputs.contiguous(memory_format=memory_format)), part_of(batch, part), generator
                )
            loss.backward()
            return {"loss": loss.item(), **{name: float(metric) for name, metric in metrics.items()}}

        figures = compute.combine_(model, compute.over_parts(model, len(batch), backward, together=False))
        value = figures["loss"]
        if not math.isfinite(value):
            raise Diverged(value, *where)
        hooks.after_backward()
        if hooks.noise is not None:
            trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
            hooks.noise.add_(trained, position.total)
        optimizer.step()
        hooks.after_step(rate)
        if average is not None:
            average.update(model)
        position.step += 1
        position.total += 1
        for name, figure in figures.items():
            position.sums[name] = position.sums.get(name, 0.0) + figure
        hooks.on_step(position, value)
        if hooks.should_stop():
            break
    return position.step >= steps


def next_epoch(position: Position) -> None:
    """Move the position to the start of the next epoch."""
    position.epoch += 1
    position.step = 0
    position.sums = {}
