"""Many children, one step: several subnets of a supernet learn from one batch, and the optimiser steps once.

The gradients of the children add up in the shared weights. Each child is run and differentiated before the next, so
one graph is alive at a time; what a child teaches is detached. Regularisation belongs to a child, not to the optimiser:
dropout is on, and weight decay is added to the gradient, in the passes that ask for it alone.

Sources: arXiv 1903.05134 (sandwich rule, in-place distillation), BigNAS 2003.11142, InstaTune 2308.15609.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.core.errors import UserError
from archsmith.cost.counts import is_normalisation
from archsmith.supernet import Supernet
from archsmith.supernet.sampling import Child
from archsmith.train.calibration import hold_statistics_
from archsmith.train.distill import soft_cross_entropy
from archsmith.train.loop import Diverged

Forward = Callable[..., Tensor]
LabelLoss = Callable[[Forward], Tensor]
"""The loss on the labels: calls what it is given with the inputs, once, and compares the logits with the labels."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance of a student's logits from a target's; the target is detached already."""


@dataclass(frozen=True)
class StepFigures:
    """What one step did.

    Attributes:
        losses: Loss of every child, in order.
        labels: Loss on the labels of every child; None for those that did not see them.
        norm: Norm of the summed gradient before clipping; None where nothing is clipped by norm.
    """

    losses: tuple[float, ...]
    labels: tuple[float | None, ...]
    norm: float | None = None


class ChildrenStep:
    """Training steps of a supernet by several children each.

    Args:
        supernet: An ``nn.Module`` whose active path a call computes.
        optimizer: Over the whole weights, without weight decay of its own.
        distance: Of a child's logits from those that it learns from.
        teacher: Frozen teacher outside, called with the inputs of the supernet; None for none.
        weight_decay: L2 strength, added to the gradient in the regularised passes alone.
        decayed: Parameters it concerns; None for those of two and more axes that are not of a normalisation.
        clip_norm: Largest norm of the summed gradient; 0 for none.
        clip_value: Largest entry of the summed gradient; 0 for none.

    Raises:
        UserError: A negative number, or an optimiser that decays weights of all children.

    Batch normalisations use the statistics of their batch, for every child, and accumulate none (``calibrate_`` takes
    those of a child afterwards).
    """

    def __init__(
        self,
        supernet: Supernet,
        optimizer: torch.optim.Optimizer,
        *,
        distance: Distance = soft_cross_entropy,
        teacher: Forward | None = None,
        weight_decay: float = 0.0,
        decayed: Iterable[nn.Parameter] | None = None,
        clip_norm: float = 0.0,
        clip_value: float = 0.0,
    ) -> None:
        assert isinstance(supernet, nn.Module)
        for name, given in (("weight_decay", weight_decay), ("clip_norm", clip_norm), ("clip_value", clip_value)):
            if not given >= 0:
                raise UserError(name, given, allowed="a number from 0")
        if weight_decay and any(group.get("weight_decay", 0) for group in optimizer.param_groups):
            raise UserError(
                "optimizer.weight_decay",
                [group.get("weight_decay") for group in optimizer.param_groups],
                allowed="0: an optimiser decays for every child, weight_decay= only in the regularised passes",
            )
        self.supernet: Supernet = supernet
        self._network: nn.Module = supernet
        self.optimizer, self.distance, self.teacher = optimizer, distance, teacher
        self.weight_decay, self.clip_norm, self.clip_value = weight_decay, clip_norm, clip_value
        self.decayed = decayed_weights(supernet) if decayed is None else list(decayed)
        self.steps = 0
        hold_statistics_(supernet)

    def __call__(self, children: Sequence[Child], loss: LabelLoss) -> StepFigures:
        """Train the children on one batch and let the optimiser step.

        Args:
            children: In the order in which they are run, from a ``Sampling`` rule.
            loss: Closes over the batch, e.g. ``lambda forward: cross_entropy(forward(images), labels)``. It is called
                for every child with a weight on the labels; the others see the inputs of the first call.

        Raises:
            UserError: No child; the first does not see the labels; one learns from a teacher that is not there.
            Diverged: A loss is NaN or infinite; the step was not taken.
        """
        self._check(children)
        self.optimizer.zero_grad(set_to_none=True)
        losses, labels = self.backward(children, loss)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = None
        if self.clip_value:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm:
            norm = float(nn.utils.clip_grad_norm_(parameters, self.clip_norm))
        self.optimizer.step()
        self.steps += 1
        return StepFigures(tuple(losses), tuple(labels), norm)

    def backward(self, children: Sequence[Child], loss: LabelLoss) -> tuple[list[float], list[float | None]]:
        """Add the gradients of all children to what the parameters have; the losses of each, and those on the labels.

        The last child stays active.
        """
        seen = _Seen(self._network)
        targets: dict[str, Tensor] = {}
        losses: list[float] = []
        labels: list[float | None] = []
        for child in children:
            self.supernet.activate(child.architecture)
            train_mode_(self._network, regularised=child.regularised)
            found, labelled = self._pass(child, loss, seen, targets)
            losses.append(found)
            labels.append(labelled)
            if child.regularised and self.weight_decay:
                self._decay_()
        return losses, labels

    def _pass(
        self, child: Child, loss: LabelLoss, seen: _Seen, targets: dict[str, Tensor]
    ) -> tuple[float, float | None]:
        """Run and differentiate one child; its graph is gone with this call."""
        terms: list[Tensor] = []
        labelled: float | None = None
        if child.labels:
            value = loss(seen)
            labelled = float(value.detach())
            terms.append(child.labels * value)
            logits = seen.taken()
        else:
            logits = seen.again()
        if child.teacher and "outside" not in targets:
            assert self.teacher is not None
            with torch.no_grad():
                targets["outside"] = self.teacher(*seen.args, **seen.kwargs).detach()
        for weight, name in ((child.inplace, "inplace"), (child.teacher, "outside")):
            if weight:
                terms.append(weight * self.distance(logits, targets[name]))
        total = sum(terms[1:], start=terms[0])
        if not math.isfinite(found := float(total.detach())):
            raise Diverged(found, 0, self.steps)
        total.backward()
        if child.teaches:
            targets["inplace"] = logits.detach()
        return found, labelled

    @torch.no_grad()
    def _decay_(self) -> None:
        for parameter in self.decayed:
            if parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=self.weight_decay)

    def _check(self, children: Sequence[Child]) -> None:
        if not children:
            raise UserError("children", list(children), allowed="at least one child")
        if not children[0].labels:
            raise UserError("children[0].labels", 0.0, allowed="a weight above 0: the first child shows the inputs")
        taught = False
        for number, child in enumerate(children):
            if not (child.labels or child.inplace or child.teacher):
                raise UserError(f"children[{number}]", child, allowed="a weight above 0 on labels, inplace or teacher")
            if child.inplace and not taught:
                raise UserError(f"children[{number}].inplace", child.inplace, allowed="0 before a child that teaches")
            if child.teacher and self.teacher is None:
                raise UserError(f"children[{number}].teacher", child.teacher, allowed="0 without a teacher")
            taught = taught or child.teaches


class _Seen:
    """Calls the supernet and remembers what went in and came out."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.args: tuple[object, ...] = ()
        self.kwargs: dict[str, object] = {}
        self._logits: Tensor | None = None

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        self.args, self.kwargs = args, kwargs
        self._logits = self.network(*args, **kwargs)
        return self._logits

    def taken(self) -> Tensor:
        """Return the logits of the last call and let go of them."""
        if self._logits is None:
            raise UserError("loss", "no call", allowed="a loss that calls what it is given with the inputs, once")
        logits, self._logits = self._logits, None
        return logits

    def again(self) -> Tensor:
        """Return the active path's logits for the inputs of the last call."""
        return self.network(*self.args, **self.kwargs)


def train_mode_(network: nn.Module, *, regularised: bool) -> None:
    """Put a network into training mode; without regularisation only its batch normalisations.

    Dropout of any make asks for the mode, and a normalisation by batch statistics is no regularisation.
    """
    network.train(regularised)
    if not regularised:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.training = True


def decayed_weights(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of two and more axes outside normalisations: no biases, no scales."""
    kept: dict[nn.Parameter, None] = {}
    for module in network.modules():
        if not is_normalisation(module):
            kept |= {p: None for p in module.parameters(recurse=False) if p.dim() > 1}
    return list(kept)
