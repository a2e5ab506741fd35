"""Width search with two copies of the weights: one factor for each unit is the architecture, and both halves teach it.

    search = WidthSearch(find(model, example_inputs), optimizer, "macs<=0.5x")
    for (x, y), (u, v) in zip(first_half, second_half):
        search.learn(lambda net: criterion(net(x), y), lambda net: criterion(net(u), v))
    search.finish()  # folds the factors into the weights and cuts the units with the smallest ones

The factors multiply a unit wherever it is read, so that a factor of zero is the cut network, whatever shift stands in
front of it. They are shared by the model, which learns from the first half, and its copy, which learns from the second;
an L1 penalty pushes them towards zero. One threshold for the whole network decides which units go.

Source: RARTS, arXiv 2008.03901, see ``archsmith.supernet.split``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.atoms.declared import UnitSource
from archsmith.atoms.fingerprint import unwrap
from archsmith.atoms.gate_banks import MagnitudeGates
from archsmith.atoms.gate_sites import SiteHooks
from archsmith.atoms.shrinker import Shrinker
from archsmith.atoms.unit_budget import CutSchedule, Order
from archsmith.atoms.unit_latency import Measure
from archsmith.core.errors import Shown, UserError
from archsmith.space import Budget
from archsmith.supernet.split import Moves, Passes, Relaxed, relaxed_step
from archsmith.supernet.updaters import Loss, Tensors
from archsmith.train.loop import Diverged
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors
from archsmith.train.two_copies import distance

ModelLoss = Callable[[Callable[..., Any]], Tensor]
"""The loss of one batch, given what is called as the model is called."""

Sparsity = Literal["gradient", "threshold"]
"""How the L1 penalty acts: "gradient": its sign is added to the factors' gradient. "threshold": factors are moved
towards zero by ``rate * penalty`` after their step, stopping there."""

COPY, FACTORS = "copy.", "factors."
"""Prefixes of tensors in a state."""


class WidthSearch(Shrinker):
    """Finds the widths of a model, and cuts it.

    It is a ``Shrinker`` whose units carry factors and whose step is ``learn``: everything that is said there of
    budgets, constraints and the cut holds. It cuts once, in ``finish``.

    Args:
        atoms: The units: what ``archsmith.atoms.find`` returned, or ``DeclaredAtoms``.
        optimizer: Of the model's weights; the copy gets one of the same kind, settings and rates.
        budget: Limits on macs, params and latency that hold after ``finish``, or None.
        relaxed: Weight of the training loss, and the spring between the copies.
        passes: "fused" (2 forward and backward passes a step) or "gauss-seidel" (4).
        penalty: rho, of the factors' absolute values.
        sparsity: How the penalty acts.
        rate: Learning rate of the factors (Adam).
        threshold: Units with smaller factors are cut, budget or not.
        ratio: In place of ``threshold``, the part of all units that is cut.
        order: Which further units a budget takes; by default those with the smallest factors.
        clip_norm: Largest norm of the gradient of a copy's loss, 0 for no limit; the spring is not clipped.
        seed: Of what is random in a shrinker.
        measure: Measures a network's latency in ms.

    Attributes:
        twin: The second network; None after ``finish``.

    Raises:
        UserError: As ``Shrinker``, or a value out of its range.
    """

    def __init__(
        self,
        atoms: UnitSource,
        optimizer: torch.optim.Optimizer,
        budget: str | Budget | None = None,
        *,
        relaxed: Relaxed | None = None,
        passes: Passes = "fused",
        penalty: float = 1e-3,
        sparsity: Sparsity = "gradient",
        rate: float = 3e-4,
        threshold: float = 1e-2,
        ratio: float | None = None,
        order: Order = "score",
        clip_norm: float = 5.0,
        seed: int = 0,
        measure: Measure | None = None,
    ) -> None:
        if sparsity not in ("gradient", "threshold"):
            raise UserError("sparsity", sparsity, allowed="'gradient' or 'threshold'")
        if ratio is not None and not 0 <= ratio < 1:
            raise UserError("ratio", ratio, allowed="a part of the units, from 0 to below 1")
        if not 0 <= penalty < math.inf:
            raise UserError("penalty", penalty, allowed="a finite number from 0")
        self.relaxed, self.passes = relaxed or Relaxed(), passes
        self.rho, self.sparsity, self.ratio, self.clip_norm = penalty, sparsity, ratio, clip_norm
        model = unwrap(atoms.model)
        self.twin: nn.Module | None = copy.deepcopy(model)
        self._weight_optimizer = optimizer
        self._twin_optimizer = _optimizer_like(optimizer, model, self.twin)
        super().__init__(
            atoms,
            optimizer,
            budget,
            score="factor",
            schedule=CutSchedule(kind="dead", begin=1, end=1, threshold=threshold),
            penalty=0.0,
            order=order,
            seed=seed,
            measure=measure,
        )
        self._twin_hooks = SiteHooks(self.twin, self.factors.sites, self.factors.multiplier)
        self._factor_optimizer = torch.optim.Adam(self.factors.parameters(), lr=rate)

    @property
    def factors(self) -> MagnitudeGates:
        """The factors; ``values`` has them by group name."""
        assert isinstance(self.bank, MagnitudeGates)
        return self.bank

    # ------------------------------------------------------------------ the step

    def learn(self, train: ModelLoss, valid: ModelLoss, where: tuple[int, int] | None = None) -> dict[str, float]:
        """Move the weights, their copy and the factors once.

        Args:
            train: The loss of a batch of the first half; what it is given runs the model. "gauss-seidel" calls it
                twice: then it draws the same random numbers in both calls, or none.
            valid: The loss of a batch of the second half; what it is given runs the copy.
            where: Epoch and step, named where the loss has no value.

        Returns:
            "loss" and "twin_loss" before they moved, and "distance" of the copies.

        Raises:
            Diverged: A gradient is NaN or infinite; that block is not moved.
            UserError: The search has ended.
        """
        if self.twin is None:
            raise UserError("learn", Shown("it after finish()"), allowed="a search that goes on")
        epoch_and_step = where or (0, self.steps)
        w, y = _trained(self.model), _trained(self.twin)
        for mine, theirs in zip(self._twin_optimizer.param_groups, self._weight_optimizer.param_groups, strict=True):
            mine["lr"] = theirs["lr"]
        losses = relaxed_step(
            self.relaxed,
            self._as_function(self.model, train),
            self._as_function(self.twin, valid),
            w,
            y,
            dict(self.factors.values),
            Moves(
                w=lambda gradient, pull: self._move(self._weight_optimizer, w, gradient, pull, epoch_and_step),
                y=lambda gradient, pull: self._move(self._twin_optimizer, y, gradient, pull, epoch_and_step),
                logits=lambda gradient: self._move_factors(gradient, epoch_and_step),
            ),
            self.passes,
        )
        self.steps += 1
        return {"loss": losses[0], "twin_loss": losses[1], "distance": self.distance()}

    def step(self, *, grad_scale: float = 1.0) -> bool:
        """Refuse: ``learn`` is the step here, because it needs both losses.

        Raises:
            UserError: Always.
        """
        raise UserError("step", Shown("that of a Shrinker"), allowed="learn(train, valid)")

    def _as_function(self, model: nn.Module, given: ModelLoss) -> Loss:
        """Return a loss as a function of weights and factors; running statistics are those of the network."""

        def loss(weights: Tensors, factors: Tensors) -> Tensor:
            with self.factors.using(factors):
                return given(lambda *inputs, **named: torch.func.functional_call(model, dict(weights), inputs, named))

        return loss

    def _move(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Tensors,
        gradient: Tensors,
        pull: Tensors,
        where: tuple[int, int],
    ) -> None:
        """Clip the loss's gradient, add the spring's, and step."""
        for name, weight in weights.items():
            weight.grad = gradient[name]
        norm = nn.utils.clip_grad_norm_(weights.values(), self.clip_norm or math.inf)
        if not bool(norm.isfinite()):
            raise Diverged(float("nan"), *where)
        for name, weight in weights.items():
            assert weight.grad is not None
            weight.grad = weight.grad + pull[name]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _move_factors(self, gradient: Tensors, where: tuple[int, int]) -> None:
        """Step down both losses, and the penalty."""
        for name, factor in self.factors.values.items():
            if not bool(gradient[name].isfinite().all()):
                raise Diverged(float("nan"), *where)
            factor.grad = gradient[name] + (self.rho * factor.sign() if self.sparsity == "gradient" else 0.0)
        self._factor_optimizer.step()
        self._factor_optimizer.zero_grad(set_to_none=True)
        if self.sparsity == "threshold":
            reach = float(self._factor_optimizer.param_groups[0]["lr"]) * self.rho
            for factor in self.factors.values.values():
                factor.copy_(factor.sign() * (factor.abs() - reach).clamp_min(0.0))

    # ------------------------------------------------------------------ what is known of it

    @torch.no_grad()
    def distance(self) -> float:
        """Return the norm of the copies' difference, over all trained weights."""
        assert self.twin is not None
        return distance(_trained(self.model), _trained(self.twin))

    @torch.no_grad()
    def penalty(self) -> float:
        """Return ``rho * sum |factor|``, for logging."""
        return self.rho * sum(float(factor.abs().sum()) for factor in self.factors.values.values())

    def going(self) -> dict[str, list[int]]:
        """Return the units that ``finish`` would cut without a budget, by group name.

        Of a group that would lose all of its units, the one with the largest factor stays in the end.
        """
        return self._dead()

    def _dead(self) -> dict[str, list[int]]:
        if self.ratio is None:
            return super()._dead()
        scores = self.scores()
        names = [g.name for g in self.groups if g.name not in self.ungated and not g.frozen]
        owners = np.concatenate([np.full(len(scores[name]), number) for number, name in enumerate(names)])
        places = np.concatenate([np.arange(len(scores[name])) for name in names])
        values = np.concatenate([scores[name] for name in names])
        first = np.argsort(values, kind="stable")[: math.floor(self.ratio * len(values))]
        return {name: sorted(places[first[owners[first] == number]].tolist()) for number, name in enumerate(names)}

    # ------------------------------------------------------------------ the end, and resume

    def finish(self) -> bool:
        """Fold the factors into the model's weights, cut the units that go, and let go of the model and its copy.

        Units go whose factors are below the threshold (or the ratio's part of all), and in the order of their factors
        what a budget asks for besides. The model computes what it did with the factors of these units at zero.

        Returns:
            True when units were cut.
        """
        self._twin_hooks.remove()
        cut = super().finish()
        self.twin = None
        return cut

    def tensors(self) -> dict[str, Tensor]:
        """Return the copy and the state of its optimiser and of the factors'.

        With ``state_dict``, which has the factors, this is all that ``load_tensors`` needs.
        """
        if self.twin is None:
            return {}
        found = {f"{COPY}{name}": tensor for name, tensor in self.twin.state_dict().items()}
        found |= {
            f"{COPY}{name}": tensor for name, tensor in optimizer_tensors(self._twin_optimizer, self.twin).items()
        }
        for name, factor in self.factors.values.items():
            for key, value in self._factor_optimizer.state.get(factor, {}).items():
                found[f"{FACTORS}{name}::{key}"] = value
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``tensors``, after ``load_state_dict``; a search that had ended lets go of its copy."""
        if self._finished:
            self._twin_hooks.remove()
            self.twin = None
            return
        assert self.twin is not None
        own = {name.removeprefix(COPY): tensor for name, tensor in tensors.items() if name.startswith(COPY)}
        for name, tensor in self.twin.state_dict().items():
            tensor.copy_(own[name])
        load_optimizer_tensors(self._twin_optimizer, self.twin, own)
        self._factor_optimizer.state.clear()
        for name, tensor in tensors.items():
            if name.startswith(FACTORS):
                group, key = name.removeprefix(FACTORS).rsplit("::", 1)
                self._factor_optimizer.state[self.factors.values[group]][key] = tensor.detach().clone()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer_like(optimizer: torch.optim.Optimizer, model: nn.Module, twin: nn.Module) -> torch.optim.Optimizer:
    """Return an optimiser of the twin, of the same kind, groups and settings.

    Raises:
        UserError: Not one optimiser that trains exactly the model's weights.
    """
    trained = _trained(model)
    held = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        if isinstance(optimizer, torch.optim.Optimizer)
        else set()
    )
    if held != {id(parameter) for parameter in trained.values()}:
        raise UserError("optimizer", optimizer, allowed="one optimiser of all trained parameters of the model")
    names, own = {id(parameter): name for name, parameter in trained.items()}, _trained(twin)
    groups: list[dict[str, Any]] = [
        {**group, "params": [own[names[id(parameter)]] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return cast(Any, type(optimizer))(groups, lr=optimizer.param_groups[0]["lr"])
