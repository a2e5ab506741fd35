"""Training a supernet along sampled paths, and its logits every few steps by another batch.

A step on the weights draws one path: a candidate on every edge. Nothing else of the supernet runs, so parameters off
the path have no gradient, and neither momentum nor weight decay moves them. A step on the logits draws anew; what it
does with the sample is the relaxation's affair (straight-through gradients, binary gates).

Sources: ProxylessNAS, arXiv 1812.00332; ST-NAS, arXiv 2011.05649; single paths: Guo et al., arXiv 1904.00420.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.supernet.relaxed import Tensors
from archsmith.tasks.base import Batch, Task
from archsmith.train.bilevel import StepContext, Updater, random_batch


class SampledAlternation(Updater):
    """Steps on the weights along sampled paths; behind or in front of every n-th of them, one on the logits.

    The supernet's relaxation samples: without a gradient its weights are one-hot (``StraightThrough``,
    ``BinaryGates``), else the weights' step runs every candidate. A method overrides ``logit_loss`` to add to what the
    logits minimise, ``moved_`` for what comes behind their step, or ``move_logits`` for another gradient.

    Args:
        logits_every: A step on the logits comes with every step whose number in the epoch, counted from 1, is a
            multiple of this.
        first: Which of the two comes first in such a step.

    Raises:
        UserError: A number below 1, or an unknown order.
    """

    def __init__(self, *, logits_every: int = 1, first: Literal["logits", "weights"] = "logits") -> None:
        if logits_every < 1:
            raise UserError("logits_every", logits_every, allowed="an integer from 1")
        if first not in ("logits", "weights"):
            raise UserError("first", first, allowed="'logits' or 'weights'")
        self.logits_every, self.first = logits_every, first

    def step(self, context: StepContext) -> dict[str, float]:
        """Move the weights, and the logits when it is their turn and they learn."""
        due = context.logit_optimizer is not None and (context.where[1] + 1) % self.logits_every == 0
        if due and self.first == "logits":
            self.move_logits(context)
        figures = self.move_weights(context)
        if due and self.first == "weights":
            self.move_logits(context)
        return figures

    def path_logits(self, context: StepContext) -> dict[str, Tensor]:
        """Return the logits by which the path of the weights' step is drawn; here the supernet's."""
        return context.fixed_logits()

    def logit_batch(self, context: StepContext) -> Batch:
        """Return the batch that the logits learn from; here a random one."""
        return random_batch(context.step, *context.where)

    def move_weights(self, context: StepContext) -> dict[str, float]:
        """Take a step on the weights along one sampled path; return the loss and the metrics."""
        mixing = context.supernet.mixing(self.path_logits(context), named_stream(context, "path"))
        loss, metrics = sampled_loss(context, context.step.weight_task, context.batch, mixing, "weights")
        value = context.move_weights(loss)
        return {"loss": value, **{name: float(metric) for name, metric in metrics.items()}}

    def move_logits(self, context: StepContext) -> None:
        """Take a step on the logits by the loss of one sample on a batch of the examples for them."""
        supernet = context.supernet
        # Copies: the optimiser moves the parameters in place, and ``moved_`` is told where they were.
        logits = {name: tensor.detach().clone().requires_grad_() for name, tensor in supernet.logits.items()}
        mixing = supernet.mixing(logits, named_stream(context, "gates"))
        batch = self.logit_batch(context)
        loss, _ = sampled_loss(context, context.step.logit_task, batch, mixing, "logits", constant=True)
        loss = self.logit_loss(context, loss, logits, mixing)
        found = torch.autograd.grad(loss, list(logits.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(tensor) if gradient is None else gradient
            for (name, tensor), gradient in zip(logits.items(), found, strict=True)
        }
        context.move_logits(self.logit_gradients(context, gradients, mixing))
        self.moved_(context, {name: tensor.detach() for name, tensor in logits.items()}, mixing)

    def logit_loss(self, context: StepContext, loss: Tensor, logits: Tensors, mixing: Tensors) -> Tensor:
        """Return what the logits minimise; here the loss on the batch.

        Args:
            context: The step.
            loss: Loss of the sample.
            logits: Leaves that the gradient is taken by.
            mixing: The sample.
        """
        return loss

    def logit_gradients(self, context: StepContext, gradients: dict[str, Tensor], mixing: Tensors) -> dict[str, Tensor]:
        """Return the gradients that the optimiser is given; here as they are."""
        return gradients

    def moved_(self, context: StepContext, before: Tensors, mixing: Tensors) -> None:
        """Do what comes behind a step on the logits; here nothing.

        Args:
            context: The step; its supernet has the new logits.
            before: The logits before it.
            mixing: The sample that it was made for.
        """


def named_stream(context: StepContext, *names: str | int) -> torch.Generator:
    """Return the stream of these names for the step at hand."""
    return torch.Generator().manual_seed(seed_of(context.step.seed, *names, *context.where))


def sampled_loss(
    context: StepContext, task: Task, batch: Batch, mixing: Tensors, purpose: str, *, constant: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch under given mixing weights, and its metrics.

    Args:
        context: The step; its supernet computes.
        task: Gives the loss.
        batch: What it is computed on.
        mixing: Weights that want no gradient run only what they do not make zero.
        purpose: Names the stream of the augmentation.
        constant: Whether the network's weights are constants: no gradient is to reach them.
    """
    supernet = context.supernet
    weights: Tensors = supernet.weights()
    if constant:
        weights = {name: weight.detach() for name, weight in weights.items()}
    devices = sorted({tensor.device.index or 0 for tensor in weights.values() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):  # dropout takes its numbers from the global streams
        torch.manual_seed(seed_of(context.step.seed, "dropout", purpose, *context.where))
        return task.loss(
            lambda inputs: supernet.functional(
                inputs.contiguous(memory_format=context.step.memory_format), weights, mixing=mixing
            ),
            batch,
            named_stream(context, "augment", purpose),
        )
