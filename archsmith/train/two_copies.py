"""A search step with two copies of the weights, one for each half of the images, and logits that learn from both.

The supernet's own weights learn from the images of the weights, a second network of the same make from those of the
logits. Each copy has its own optimiser and its own running statistics; the logits are shared.

Source: RARTS, arXiv 2008.03901, see ``archsmith.supernet.split``.
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.supernet.relaxed import RelaxedSupernet
from archsmith.supernet.split import Moves, Passes, Relaxed, relaxed_step
from archsmith.supernet.updaters import Loss, Tensors
from archsmith.train.bilevel import StepContext, Updater
from archsmith.train.loop import Diverged
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

MODEL = "copy."
"""Prefix of the second network's tensors in a checkpoint; its optimiser's have that of all optimisers."""


class TwoCopies(Updater):
    """The relaxed single-level step.

    The loss's gradient of each copy is clipped, the spring's is then added as it is. The second copy's optimiser is of
    the kind of the first, with its settings and its learning rate.

    Args:
        relaxed: Weight of the training loss, and the spring.
        passes: "fused" (2 forward and backward passes a step) or "gauss-seidel" (4).

    Attributes:
        twin: The second network, once a phase has begun.
    """

    def __init__(self, relaxed: Relaxed, passes: Passes = "fused") -> None:
        self.relaxed, self.passes = relaxed, passes
        self.twin: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def begin_(self, supernet: RelaxedSupernet, optimizer: torch.optim.Optimizer, *, fresh: bool) -> None:
        """Copy the network at the first phase; give the copy an optimiser of its own at each.

        Raises:
            UserError: The optimiser has several settings, or other parameters than the supernet's weights.
        """
        if self.twin is None:
            self.twin = copy.deepcopy(supernet.network)
            self.twin.zero_grad(set_to_none=True)
        (group, *others) = optimizer.param_groups
        if others or {id(p) for p in group["params"]} != {id(p) for p in supernet.weights().values()}:
            raise UserError("optimizer", optimizer, allowed="one group that holds what is trained of the supernet")
        for mine, theirs in zip(self.twin.parameters(), supernet.network.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        settings = {name: value for name, value in group.items() if name != "params"}
        own: dict[str, Any] = {"params": list(self._weights().values()), **settings}
        self._optimizer = cast(Any, type(optimizer))([own], lr=group["lr"])

    def _weights(self) -> dict[str, nn.Parameter]:
        """Return what is trained of the second network."""
        assert self.twin is not None
        return {name: parameter for name, parameter in self.twin.named_parameters() if parameter.requires_grad}

    def step(self, context: StepContext) -> dict[str, float]:
        """Move both copies and, if they learn, the logits; the figures have the copies' distance, too."""
        assert self._optimizer is not None
        self._optimizer.param_groups[0]["lr"] = context.optimizer.param_groups[0]["lr"]
        train, metrics = context.weight_loss()
        valid, _ = context.logit_loss()
        w, y = context.supernet.weights(), self._weights()
        moves = Moves(
            w=lambda gradient, pull: _move(context, context.optimizer, "weights", w, gradient, pull),
            y=lambda gradient, pull: _move(context, self._require_optimizer(), "copy", y, gradient, pull),
            logits=None if context.logit_optimizer is None else context.move_logits,
        )
        logits = dict(context.supernet.logits.items())
        losses = relaxed_step(self.relaxed, train, self._with_statistics(valid), w, y, logits, moves, self.passes)
        return {
            "loss": losses[0],
            "twin_loss": losses[1],
            "distance": self.distance(context.supernet),
            **{name: float(metric) for name, metric in metrics.items()},
        }

    def _require_optimizer(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None
        return self._optimizer

    def _with_statistics(self, loss: Loss) -> Loss:
        """Return a loss that is computed with all that the second network has, running statistics included."""
        assert self.twin is not None
        rest = {**dict(self.twin.named_parameters()), **dict(self.twin.named_buffers())}
        return lambda weights, logits: loss({**rest, **weights}, logits)

    @torch.no_grad()
    def distance(self, supernet: RelaxedSupernet) -> float:
        """Return the norm of the copies' difference, over all trained weights."""
        return distance(supernet.weights(), self._weights())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the second network with its running statistics, and its optimiser's state."""
        assert self.twin is not None and self._optimizer is not None
        tensors = {f"{MODEL}{name}": tensor for name, tensor in self.twin.state_dict().items()}
        return {**tensors, **optimizer_tensors(self._optimizer, self.twin)}, {}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a ``state``; a phase has begun."""
        assert self.twin is not None and self._optimizer is not None
        for name, tensor in self.twin.state_dict().items():
            tensor.copy_(tensors[f"{MODEL}{name}"])
        load_optimizer_tensors(self._optimizer, self.twin, tensors)


@torch.no_grad()
def distance(first: Tensors, second: Tensors) -> float:
    """Return the norm of the difference of tensors by name; all of them at once, because a step asks for it."""
    gaps = torch._foreach_sub([first[name] for name in first], [second[name] for name in first])
    return float(torch.stack(torch._foreach_norm(gaps)).double().norm())


def _move(
    context: StepContext,
    optimizer: torch.optim.Optimizer,
    moved: str,
    weights: Tensors,
    gradient: Tensors,
    pull: Tensors,
) -> None:
    """Clip the loss's gradient, add the spring's, and step.

    Raises:
        Diverged: A gradient is NaN or infinite; the step is not taken.
    """
    for name, weight in weights.items():
        weight.grad = gradient[name]
    norm = nn.utils.clip_grad_norm_(weights.values(), context.step.clip_norm or math.inf)
    if not bool(norm.isfinite()):
        raise Diverged(float("nan"), *context.where)
    for name, weight in weights.items():
        assert weight.grad is not None
        weight.grad = weight.grad + pull[name]
    context.before_step(optimizer, moved)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
