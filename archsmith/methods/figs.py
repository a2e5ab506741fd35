"""FiGS: which channels and which operators stay, by learned Bernoulli gates that are charged for resources.

"Fine-Grained Stochastic Architecture Search", 2020 (ICLR NAS workshop), arXiv 2006.09581.

Every channel of every gated tensor carries log odds. Each step draws its gate from a logistic-sigmoid distribution, one
number for each channel, shared by batch and positions; weights and log odds learn together, on the training data, from

    loss + lambda * sum_v k_v * (alive_in * R_out + alive_out * R_in),

where R sums the sampled gates of a group and the alive counts carry no gradient: the pressure on a channel follows the
present size of its neighbours. When the penalty has levelled off, channels with log odds above zero are kept, and the
small network is trained again, from new weights (as published) or from those it has.

The paper's body could not be read; what is reconstructed: gates sit at the inputs of the layers that read a group, one
per group, instead of behind the activation of every layer (the same product for one reader, and exactly the cut network
when gates are closed, for any activation). Gates behind both sides of a residual sum are had by placing
``LogisticGate`` layers in the model; then a channel's regularisation is ``1 - prod(1 - r)`` and it lives while any gate
does. Log odds have an Adam of their own. Beyond the paper: a budget, enforced exactly at the end by keep probability.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from archsmith.atoms.declared import UnitSource, copy_without
from archsmith.atoms.gate_banks import LogisticGates
from archsmith.atoms.gate_cost import Device, GateCost, Resource
from archsmith.atoms.gates import TAU, GateOptions
from archsmith.atoms.transaction import CutOutcome, apply_
from archsmith.atoms.unit_budget import CutSchedule, plan_units
from archsmith.atoms.unit_costs import UnitCosts
from archsmith.run import shrink_model

SYSTEM = {
    "slug": "figs",
    "title": "Fine-Grained Stochastic Architecture Search",
    "year": 2020,
    "arxiv": "2006.09581",
    "kind": "shrink",
    "aliases": ["fine-grained-stochastic-architecture-search"],
}

TASK_OPTIONS: dict[str, Any] = {}


class Settings(shrink_model.Settings):
    """Hyper-parameters; ``penalty`` is lambda in units of one over the initial cost (the README scans it around 1)."""

    epochs_before: int = Field(0, ge=0)
    epochs_shrink: int = Field(10, ge=1, description="structure learning, at a constant rate")
    epochs_after: int = Field(15, ge=0, description="training of the network that was found")
    score: Literal["figs"] = "figs"
    schedule: Literal["dead"] = "dead"
    penalty: float | None = Field(1.0, ge=0)
    retrain: Literal["inherit", "scratch"] = "scratch"
    tau: float = Field(TAU, gt=0)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"tau": 0.1, "lr_shrink": 0.02, "gate_lr": 0.05},
}
"""Runs of minutes need a warmer temperature: at 0.001 nearly every step has no gradient."""


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "small" below 96 pixels, else the published values."""
    return PRESETS["small" if min(image[1:]) < 96 else "paper"]


class Searcher(shrink_model.Searcher):
    """FiGS with the library's training loop: structure learning, one cut, training of what was found."""

    def _cut_schedule(self) -> CutSchedule:
        """Cut once, when structure learning ends: closed gates go, and what the budget asks for besides."""
        end = self.settings.epochs_shrink * self.steps
        return CutSchedule(kind="dead", begin=end, end=end, every=1)

    def _method_figures(self, phase: shrink_model.Phase) -> dict[str, Any]:
        if phase != "shrink" or self.shrinker is None or not isinstance(self.shrinker.bank, LogisticGates):
            return {}
        bank = self.shrinker.bank
        kept = {name: int(bank.final(name).sum()) for name in bank.names}
        cost = GateCost(self.shrinker.costs, self.settings.resource)
        return {
            "penalty": self.shrinker.penalty(),
            "open": sum(kept.values()),
            "cost_fraction": cost.value(kept) / cost.value({}),  # of a > 0, not of the sampled masks
        }


class Figs:
    """FiGS in the user's own loop, with the published single optimiser.

        figs = Figs(atoms, penalty=1.0, options=GateOptions(tau=0.1))
        optimizer.add_param_group({"params": figs.parameters(), "weight_decay": 0.0})
        for x, y in loader:
            (criterion(model(x), y) + figs.penalty()).backward()
            optimizer.step(); optimizer.zero_grad(); figs.sample()
        figs.cut_([optimizer])

    Args:
        atoms: The units of the model, found or declared; gates are put on the model.
        penalty: lambda, in units of one over the initial cost.
        resource: What is charged: "flops", "params", "activations" or "latency".
        device: For "latency": a name in ``archsmith.atoms.gate_cost.DEVICES``, or a ``Device``.
        options: Of the gates.
        regularise_on: The regularisation vector: the sampled "mask" or the "probability".
        alive_from: What the alive counts are read off, likewise.
        threshold: Smallest gate or probability that counts as alive.
        seed: Of the noise; the same on all ranks samples the same masks.

    Attributes:
        gates: The gates.
        costs: Exact costs of the model in its kept units.
        resource: The resource of the gated network.
    """

    def __init__(
        self,
        atoms: UnitSource,
        *,
        penalty: float = 1.0,
        resource: Resource = "flops",
        device: str | Device | None = None,
        options: GateOptions | None = None,
        regularise_on: Literal["mask", "probability"] = "mask",
        alive_from: Literal["mask", "probability"] = "mask",
        threshold: float = 0.1,
        seed: int = 0,
    ) -> None:
        self._atoms = atoms
        self._penalty = penalty
        self._on, self._alive_from, self._threshold = regularise_on, alive_from, threshold
        self.costs = UnitCosts(
            atoms.model,
            atoms.example_inputs,
            atoms.groups,
            shrunk=lambda removed: copy_without(atoms, removed, numbers=False),
            call=atoms.forward,
        )
        self.resource = GateCost(self.costs, resource, device)
        self._initial = self.resource.value({})
        open_groups = [group for group in atoms.groups if not group.frozen]
        generator = torch.Generator().manual_seed(seed)
        self.gates = LogisticGates(atoms.model, open_groups, options=options, generator=generator)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the log odds; those of ``LogisticGate`` layers are parameters of the model already and left out."""
        return list(self.gates.logits.values())

    def sample(self) -> None:
        """Draw the masks of the next step."""
        self.gates.sample()

    def regulariser(self) -> Tensor:
        """Return ``sum over operators of reg(v)`` in the units of the resource."""
        vectors = {name: self.gates.regularisation(name, self._on) for name in self.gates.names}
        alive: dict[str, int | Tensor] = {
            name: self.gates.alive(name, self._alive_from, self._threshold) for name in self.gates.names
        }
        return self.resource.regulariser(vectors, alive)

    def penalty(self) -> Tensor:
        """Return what is added to the loss of the task."""
        return self._penalty / self._initial * self.regulariser()

    def alive(self) -> dict[str, Tensor]:
        """Return which units are kept when the search ends now, boolean vectors by group name."""
        return {name: self.gates.final(name) for name in self.gates.names}

    def cost(self) -> float:
        """Return the resource of the network that would be kept: of ``a > 0``, no random number."""
        return self.resource.value(dict(self.alive()))

    def export(self) -> str:
        """Return the alive counts as JSON text: the number of channels left of every layer that makes some."""
        alive = self.alive()
        widths: dict[str, int] = {}
        for group in self._atoms.groups:
            share = float(alive[group.name].double().mean()) if group.name in alive else 1.0
            for place in group.places:
                if place.axes == (0,) and place.tensor.endswith("weight"):
                    name = place.tensor.removesuffix("weight").removesuffix(".")
                    widths[name] = widths.get(name, 0) + round(share * place.index.size)
        return json.dumps(widths, indent=1, sort_keys=True)

    def cut_(
        self, optimizers: Iterable[torch.optim.Optimizer] = (), *, limits: Mapping[str, float] | None = None
    ) -> CutOutcome | None:
        """End the search: fold the gates into the weights and cut closed units out of the model and its optimisers.

        Args:
            optimizers: What trains the model.
            limits: Absolute limits on "macs" and "params"; units go by keep probability until they hold.

        Returns:
            What was done, or None when nothing is closed.
        """
        alive = self.alive()
        groups = [g if g.name in alive else replace(g, frozen="it has no gate") for g in self._atoms.groups]
        scores = {
            g.name: self.gates.probability(g.name).double().cpu().numpy() if g.name in alive else np.zeros(g.size)
            for g in groups
        }
        dead = {name: torch.nonzero(~mask).flatten().tolist() for name, mask in alive.items()}
        plan = plan_units(groups, scores, self.costs, limits or {}, dead=dead)
        self.gates.fold_()
        self.gates.remove()
        if not plan.removed:
            return None
        return apply_(self._atoms.model, self._atoms.plan(plan.removed), optimizers=optimizers)


def levelled_off(penalties: Sequence[float], *, window: int = 5, tolerance: float = 0.02) -> bool:
    """Return whether the penalty has stopped falling: the published sign to end structure learning.

    Args:
        penalties: Penalty after every epoch.
        window: Epochs that are looked at.
        tolerance: Largest fall over the window, relative to the value before it.

    Example:
        >>> levelled_off([1.0, 0.8, 0.6, 0.5, 0.45, 0.41])
        False
        >>> levelled_off([1.0, 0.4, 0.4, 0.399, 0.398, 0.398, 0.398])
        True
    """
    if len(penalties) <= window:
        return False
    before, now = penalties[-window - 1], penalties[-1]
    return before - now <= tolerance * abs(before)
