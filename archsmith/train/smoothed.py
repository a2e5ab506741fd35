"""Weights that learn under perturbed mixing weights, so that the loss is smooth around the architecture: SDARTS.

After the step on the logits the weights take theirs with mixing weights from a ball around the present ones: a random
point (SDARTS-RS) or the worst one that a few steps of ascent find (SDARTS-ADV). The logits are never perturbed.

Source: Chen and Hsieh, "Stabilizing Differentiable Architecture Search via Perturbation-based Regularization", ICML
2020, arXiv 2002.05283.
"""

# E edges, O candidates

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.supernet.relaxed import RelaxedSupernet
from archsmith.train.bilevel import Bilevel, Order, StepContext, logit_gradients

Kind = Literal["random", "adversarial"]
Mixing = dict[str, Tensor]

ASCENT_STEPS = 7
"""Published steps of the adversary, each of ``2 eps / 7``."""


def onto_simplex(moved_EO: Tensor, around_EO: Tensor) -> Tensor:
    """Return rows cut to [0, 1] and divided by their sums; a row of zeros gets 1 where ``around_EO`` is largest."""
    cut = moved_EO.clamp(0.0, 1.0)
    total = cut.sum(dim=-1, keepdim=True)
    largest = torch.zeros_like(cut).scatter_(-1, around_EO.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(total > 0, cut / total.clamp_min(torch.finfo(cut.dtype).tiny), largest)


class Ball:
    """The mixing weights within ``epsilon`` of given ones, in the largest difference before they are normalised.

    Args:
        supernet: Tells padding and decided edges, whose weights stay as they are.
        mixing: The centre, by group; what is no group of edges (edge weights) stays as it is.
        epsilon: From 0.
        generator: Of the random points, on the CPU.
    """

    def __init__(
        self, supernet: RelaxedSupernet, mixing: Mapping[str, Tensor], epsilon: float, generator: torch.Generator
    ) -> None:
        self.mixing = {name: weights.detach() for name, weights in mixing.items()}
        self.epsilon, self._generator = epsilon, generator
        self._free: dict[str, Tensor] = {}
        for group in supernet.options:
            free = ~supernet.get_buffer(f"absent_{group}")
            decided = list(supernet.fixed.get(group, {}))
            self._free[group] = (
                free.index_fill(0, torch.tensor(decided, device=free.device), False) if decided else free
            )

    def random(self) -> Mixing:
        """Return a point whose weights are each moved by a uniform amount."""
        noise = {
            group: self.epsilon * (2 * torch.rand(free.shape, generator=self._generator).to(self.mixing[group]) - 1)
            for group, free in self._free.items()
        }
        return self._moved({group: self.mixing[group] + noise[group] for group in noise})

    def worst(self, loss: Callable[[Mixing], Tensor], steps: int = ASCENT_STEPS) -> Mixing:
        """Return where ascent along the signs of the gradient ends; the centre if the loss is no larger there.

        Args:
            loss: Of mixing weights.
            steps: Each of ``2 epsilon / steps``, from a random point, projected into the ball after each.
        """
        point = self.random()
        for _ in range(steps):
            leaves = {group: point[group].detach().requires_grad_() for group in self._free}
            gradients = torch.autograd.grad(loss({**self.mixing, **leaves}), list(leaves.values()))
            moved = {}
            for (group, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                step = leaf.detach() + 2 * self.epsilon / steps * gradient.sign() - self.mixing[group]
                moved[group] = self.mixing[group] + step.clamp(-self.epsilon, self.epsilon)
            point = self._moved(moved)
        with torch.no_grad():
            return point if float(loss(point)) > float(loss(self.mixing)) else dict(self.mixing)

    def _moved(self, points: Mapping[str, Tensor]) -> Mixing:
        """Return points with rows that are weights again, and what is not free as it was."""
        result = dict(self.mixing)
        for group, free in self._free.items():
            inside = onto_simplex(torch.where(free, points[group], torch.zeros_like(points[group])), self.mixing[group])
            result[group] = torch.where(free, inside, self.mixing[group])
        return result


class Smoothed(Bilevel):
    """The step of DARTS whose weights learn under perturbed mixing weights.

    Args:
        order: How the gradient of the logits is taken; it sees no perturbation.
        kind: "random" or "adversarial".
        epochs: Epochs of the search, over which epsilon rises linearly from ``start`` towards ``end``; later epochs
            (fine-tuning) have no perturbation.
        start: Epsilon in the first epoch.
        end: Epsilon that the epoch behind the last would have.

    Raises:
        UserError: Another kind, or an epsilon below 0.
    """

    def __init__(
        self, order: Order = "first", *, kind: Kind = "random", epochs: int, start: float = 0.03, end: float = 0.3
    ) -> None:
        super().__init__(order)
        if kind not in ("random", "adversarial"):
            raise UserError("kind", kind, allowed="'random' or 'adversarial'")
        if not (start >= 0 and end >= 0):
            raise UserError("epsilon", (start, end), allowed="numbers from 0")
        self.kind, self.epochs, self.start, self.end = kind, epochs, start, end

    def epsilon(self, epoch: int) -> float:
        """Return the radius in an epoch, counted from 0."""
        return self.start + (self.end - self.start) * epoch / self.epochs if epoch < self.epochs else 0.0

    def step(self, context: StepContext) -> dict[str, float]:
        """Move the logits, if they learn, then the weights under perturbed mixing weights."""
        epsilon = self.epsilon(context.where[0])
        if not epsilon:
            return super().step(context)
        supernet = context.supernet
        train, _ = context.weight_loss()
        if context.logit_optimizer is not None:
            valid, _ = context.logit_loss()
            context.move_logits(logit_gradients(supernet, train, valid, self.order, context.optimizer))
        names = ("smoothed", *context.where)
        sample = torch.Generator().manual_seed(seed_of(context.step.seed, "relaxation", *names))
        with torch.no_grad():
            mixing = supernet.mixing(generator=sample)
        ball = Ball(supernet, mixing, epsilon, torch.Generator().manual_seed(seed_of(context.step.seed, *names)))
        metrics: dict[str, Tensor] = {}

        def loss(point: Mixing) -> Tensor:
            augment = torch.Generator().manual_seed(seed_of(context.step.seed, "augment", "weights", *context.where))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(context.step.seed, "operations", "weights", *context.where))
                value, found = context.step.weight_task.loss(
                    lambda inputs: supernet.functional(
                        inputs.contiguous(memory_format=context.step.memory_format), supernet.weights(), mixing=point
                    ),
                    context.batch,
                    augment,
                )
            metrics.update(found)
            return value

        point = ball.random() if self.kind == "random" else ball.worst(loss)
        value = context.move_weights(self.weight_loss(context, loss(point)))
        return {"loss": value, **{name: float(metric) for name, metric in metrics.items()}}
