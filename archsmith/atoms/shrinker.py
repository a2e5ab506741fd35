"""Shrink a model inside the user's own training loop.

    atoms = archsmith.atoms.find(model, example_inputs)
    shrink = archsmith.Shrinker(atoms, optimizer, budget="macs<=0.5x")
    for x, y in loader:
        criterion(model(x), y).backward()
        optimizer.step(); optimizer.zero_grad()
        if shrink.step():                # penalty, and now and then a cut
            model = shrink.rewrap(model) # only under DDP or torch.compile

What a step does: the penalty pushes scales or gates towards zero, in proportion to what their units cost; and when the
schedule says so, the units with the smallest score for what they save are cut out of the model, its optimiser and every
table, so that at the end the budget holds. The penalty is a proximal step ``lr * rho * c_i`` taken outside of the
optimiser: as a gradient it would lose its weighting in Adam, which normalises gradients. Units without a normalisation
scale get gates that belong to the shrinker and are folded into the weights at every cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from archsmith.atoms.declared import DeclaredAtoms, UnitSource, copy_without
from archsmith.atoms.fingerprint import fingerprint, first_names, shapes_of, unwrap
from archsmith.atoms.gate_banks import LogisticGates, MagnitudeGates
from archsmith.atoms.gate_cost import GateCost, Resource
from archsmith.atoms.gates import GateOptions
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.transaction import apply_
from archsmith.atoms.unit_budget import CutSchedule, Order, Removed, UnitPlan, plan_units
from archsmith.atoms.unit_costs import UnitCosts
from archsmith.atoms.unit_latency import LatencyTable, Measure, plan_with_latency
from archsmith.atoms.unit_remap import groups_after, kept_units
from archsmith.atoms.unit_scores import (
    Normalisation,
    Scores,
    TaylorScores,
    normalised,
    random_scores,
    scale_places,
    scale_scores,
    weight_scores,
)
from archsmith.atoms.units import IntArray, UnitGroup
from archsmith.atoms.wrappers import rewrap as renewed
from archsmith.core.errors import ArchsmithError, Shown, UserError
from archsmith.cost import measure_latency
from archsmith.space import Budget

ScoreKind = Literal["scale", "l1", "l2", "taylor", "figs", "random"]

FORMAT_VERSION = 1

DEFAULT_RHO = 1e-4
"""Default penalty of ``score="scale"``, that of AtomNAS."""

_NORMALISATION: dict[str, Normalisation] = {
    "scale": "none",
    "l1": "mean",
    "l2": "mean",
    "taylor": "mean",
    "figs": "none",
    "random": "none",
}


@dataclass(frozen=True)
class CutEvent:
    """One cut of a shrinker.

    Attributes:
        step: Optimiser steps before it.
        removed: Units removed by group name.
        costs: Costs afterwards: "macs" and "params" counted anew, "latency" as measured for the plan.
        fraction: MACs left, of those at the beginning.
    """

    step: int
    removed: Mapping[str, int]
    costs: Mapping[str, float]
    fraction: float


class Shrinker:
    """Cuts a model down to a budget while the user's own loop trains it.

    Args:
        atoms: The units: what ``archsmith.atoms.find`` returned, or ``DeclaredAtoms``.
        optimizer: What trains the model, or several of them. It is cut along; learning rates are read from it.
        budget: Limits on macs, params and latency ("macs<=0.5x, latency<=4ms"; x = of the model as given), or None:
            then only dead units are cut.
        score: "scale", "l1", "l2", "taylor", "figs" or "random"; see ``archsmith.atoms.unit_scores``. "figs":
            stochastic gates on everything, charged for ``resource``.
        schedule: When cuts are made; by default cubic from step 100 to 1,000, every 100.
        penalty: rho of the proximal step on scales and gates (default 1e-4 for "scale", else 0); for "figs" lambda in
            units of one over the initial cost (default 1).
        normalise: How scores of different groups are compared; by default what suits the score.
        order: "score_per_cost" or "score"; see ``plan_units``.
        seed: Of everything random here; the same on all ranks.
        gate_lr: Learning rate of the gates: by default the optimiser's for magnitude gates, 0.05 for "figs" (Adam).
        gates: Behaviour of the stochastic gates of "figs"; by default temperature 0.1.
        resource: What the gates of "figs" are charged for.
        measure: Measures a network's latency in ms; by default the median of ``archsmith.cost.measure_latency``.
        averages: Modules that hold averaged weights, cut along.
        tables: Further tensors by name, cut along.
        on_cut: Called with a ``CutEvent`` after each cut.

    Attributes:
        groups: The present groups.
        steps: Optimiser steps seen.
        history: All cuts.
        limits: Absolute limits of the budget.
        start: Costs at the beginning.
        ungated: Why some groups are never cut under this score, by name.
        bank: The gates, or None where every unit has a scale or the score needs none.

    Raises:
        UserError: There are no units, the optimiser does not train them, or the budget cannot be reached, is kept
            already, or limits what a shrinker does not know.
    """

    def __init__(
        self,
        atoms: UnitSource,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        budget: str | Budget | None = None,
        *,
        score: ScoreKind = "scale",
        schedule: CutSchedule | None = None,
        penalty: float | None = None,
        normalise: Normalisation | None = None,
        order: Order = "score_per_cost",
        seed: int = 0,
        gate_lr: float | None = None,
        gates: GateOptions | None = None,
        resource: Resource = "flops",
        measure: Measure | None = None,
        averages: Iterable[nn.Module] = (),
        tables: Iterable[MutableMapping[str, Tensor]] = (),
        on_cut: Callable[[CutEvent], None] | None = None,
    ) -> None:
        if score not in get_args(ScoreKind):
            raise UserError("score", score, allowed=", ".join(get_args(ScoreKind)))
        if penalty is not None and not penalty >= 0:
            raise UserError("penalty", penalty, allowed="a number from 0")
        self.model = unwrap(atoms.model)
        self.groups: list[UnitGroup] = list(atoms.groups)
        self.optimizers = _optimizers(optimizer, self.model, self.groups)
        self.schedule = schedule or CutSchedule()
        self.score: ScoreKind = score
        self.steps = 0
        self.history: list[CutEvent] = []
        self.ungated: dict[str, str] = {}
        self._atoms = atoms
        self._fingerprint = fingerprint(self.model)
        self._origin = {group.name: np.arange(group.size) for group in self.groups}
        self._normalise = normalise or _NORMALISATION[score]
        self._order: Order = order
        self._seed = seed
        self._averages, self._tables = list(averages), list(tables)
        self._on_cut = on_cut
        self._finished = False
        self._stepped = False

        self.costs = UnitCosts(
            self.model,
            atoms.example_inputs,
            self.groups,
            shrunk=lambda removed: copy_without(atoms, removed, numbers=False),
            call=atoms.forward,
        )
        self._refused: dict[str, str] = dict(self.costs.refused)
        self.start: dict[str, float] = dict(self.costs.of())
        self._table = LatencyTable(lambda removed: copy_without(self._atoms, removed), measure or self._default_measure)
        self.limits = self._resolved(budget)

        self.bank: MagnitudeGates | LogisticGates | None = None
        self._gate_cost: GateCost | None = None
        self._penalty = penalty if penalty is not None else {"scale": DEFAULT_RHO, "figs": 1.0}.get(score, 0.0)
        self._make_gates(gates, resource)
        self._check_feasible()
        self._gate_lr = gate_lr if gate_lr is not None or score != "figs" else 0.05
        self._gate_optimizer = self._new_gate_optimizer()
        self._rng = np.random.default_rng(seed)
        self._taylor = TaylorScores() if score == "taylor" else None
        mean = self.costs.polynomials["macs"]
        per_unit = self.costs.compile(mean).gradient(np.array(self.costs.sizes, dtype=np.float64))
        average = float((per_unit * np.array(self.costs.sizes)).sum() / max(1, sum(self.costs.sizes)))
        self._charge = {
            name: float(c) / average if average else 1.0 for name, c in zip(self.costs.names, per_unit, strict=True)
        }
        self._handles = [self.optimizers[0].register_step_pre_hook(self._before_optimizer)]
        self._handles.append(self.optimizers[0].register_step_post_hook(self._after_optimizer))

    # ------------------------------------------------------------------ set-up

    def _resolved(self, budget: str | Budget | None) -> dict[str, float]:
        if budget is None:
            return {}
        parsed = Budget.parse(budget) if isinstance(budget, str) else budget
        names = [limit.cost for limit in parsed.limits]
        if foreign := [name for name in names if name not in ("macs", "params", "latency")]:
            raise UserError(
                "budget", str(parsed), allowed="limits on macs, params, latency", hint=f"Drop {foreign[0]}."
            )
        if "latency" in names:
            self.start["latency"] = self._table.of({})
        return {limit.cost: float(limit.value) for limit in parsed.resolve(self.start).limits}

    def _check_feasible(self) -> None:
        """Refuse, before anything is trained, a budget that is kept already or out of reach."""
        if not self.limits:
            return
        if all(self.start[name] <= limit for name, limit in self.limits.items()):
            shown = ", ".join(f"{name}<={limit:g}" for name, limit in self.limits.items())
            raise UserError("budget", Shown(shown), allowed="less than the model has: it keeps these limits already")
        exact = {name: limit for name, limit in self.limits.items() if name != "latency"}
        plan_units(self._open_groups(), {g.name: np.zeros(g.size) for g in self.groups}, self.costs, exact)

    def _default_measure(self, network: nn.Module) -> float:
        return measure_latency(network.eval(), self._atoms.example_inputs).median_ms

    def _make_gates(self, options: GateOptions | None, resource: Resource) -> None:
        """Put gates where the score needs them, and note which groups cannot have any."""
        if self.score == "figs":
            generator = torch.Generator().manual_seed(self._seed)
            options = options or GateOptions(tau=0.1)
            self.bank = LogisticGates(self.model, self._alive_groups(), options=options, generator=generator)
            self._gate_cost = GateCost(self.costs, resource)
        elif self.score == "scale":
            places = scale_places(self.model, self.groups)
            bare = [group for group in self._alive_groups() if not places[group.name]]
            if bare:
                self.bank = MagnitudeGates(self.model, bare)
        if self.bank is not None:
            self.ungated = dict(self.bank.refused)

    def _alive_groups(self) -> list[UnitGroup]:
        return [group for group in self.groups if not group.frozen]

    def _new_gate_optimizer(self) -> torch.optim.Optimizer | None:
        if self.bank is None or not self.bank.parameters():
            return None
        rate = self._gate_lr if self._gate_lr is not None else float(self.optimizers[0].param_groups[0]["lr"])
        adaptive = self.score == "figs" or not isinstance(self.optimizers[0], torch.optim.SGD)
        parameters = self.bank.parameters()
        in_model = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        own = [p for p in parameters if id(p) not in in_model]  # gate layers of the user's model may be trained there
        if not own:
            return None
        if adaptive:
            return torch.optim.Adam(own, lr=rate, weight_decay=0.0)
        return torch.optim.SGD(own, lr=rate, momentum=float(self.optimizers[0].param_groups[0]["momentum"]))

    # ------------------------------------------------------------------ the loop

    def _before_optimizer(self, *_: Any) -> None:
        if self._taylor is not None:
            self._taylor.observe(self.model, self.groups)

    def _after_optimizer(self, *_: Any) -> None:
        self._stepped = True

    def step(self, *, grad_scale: float = 1.0) -> bool:
        """Do the shrinker's part of a training step; call it after ``optimizer.step()``.

        Calls without an optimiser step in between (gradient accumulation) do nothing.

        Args:
            grad_scale: What a ``GradScaler`` multiplied the loss with in this step; for gates, which it does not know.

        Returns:
            True after a cut; under DDP or ``torch.compile`` use ``rewrap`` then.

        Raises:
            UserError: The budget cannot be reached with what may be cut.
        """
        if not self._stepped or self._finished:
            return False
        self._stepped = False
        self.steps += 1
        self._train_gates(grad_scale)
        self._proximal_step()
        cut = self._cut_when_due()
        if isinstance(self.bank, LogisticGates) and not self._finished:
            self.bank.sample()
        return cut

    def finish(self) -> bool:
        """End now: bring the model within its budget if it is not, fold all gates into its weights and let go of it.

        Returns:
            True when units were cut.
        """
        cut = False
        if not self._finished:
            cut = self._cut(self._decided(self.limits, self._dead()))
            self._let_go()
        return cut

    def rewrap(self, model: nn.Module) -> nn.Module:
        """Return a wrapper (DDP, ``torch.compile``) that fits the model after a cut; others as they are."""
        if model._modules.get("_orig_mod") is not None:
            # Code compiled for the old shapes would fill the cache until torch falls back to eager.
            torch.compiler.reset()
        return renewed(model)

    def penalty(self) -> float:
        """Return the present penalty term, for logging: ``rho * sum c_i |g_i|``, or ``lambda * reg`` of the gates."""
        if isinstance(self.bank, LogisticGates):
            with torch.no_grad():
                return float(self._regulariser())
        total = 0.0
        for name, magnitude in self._magnitudes().items():
            total += self._charge[name] * float(magnitude.sum())
        return self._penalty * total

    @property
    def has_scores(self) -> bool:
        """Whether scores can be computed now; "taylor" needs a step since the start or the last cut."""
        return self._taylor is None or self._taylor.steps > 0

    def cost(self) -> dict[str, int]:
        """Return the present "macs" and "params"."""
        return self.costs.of({group.name: group.size for group in self.groups})

    # ------------------------------------------------------------------ penalties

    def _rate(self, parameter: Tensor) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(p is parameter for p in group["params"]):
                    return float(group["lr"])
        return float(self.optimizers[0].param_groups[0]["lr"])

    def _scale_parameters(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return group, scale vector and positions for all normalisation scales of groups without gates."""
        tensors = tensors_of(self.model)
        found = []
        gated = set(self.bank.values) if isinstance(self.bank, MagnitudeGates) else set()
        for name, places in scale_places(self.model, self.groups).items():
            for place in places if name not in gated else ():
                index = torch.from_numpy(place.index.reshape(-1).copy())
                found.append((name, tensors[place.tensor], index.to(tensors[place.tensor].device)))
        return found

    def _magnitudes(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, scale, index in self._scale_parameters():
            found[name] = found.get(name, torch.zeros(())) + scale.detach()[index].abs().sum().cpu()
        if isinstance(self.bank, MagnitudeGates):
            found.update({name: value.detach().abs().cpu() for name, value in self.bank.values.items()})
        return found

    @torch.no_grad()
    def _proximal_step(self) -> None:
        """Shrink scales and gates by ``lr * rho * c_i`` towards zero, stopping there."""
        if self.score != "scale" or not self._penalty:
            return
        for name, scale, index in self._scale_parameters():
            step = self._rate(scale) * self._penalty * self._charge[name]
            values = scale[index]
            scale[index] = torch.sign(values) * (values.abs() - step).clamp_min_(0.0)
        if isinstance(self.bank, MagnitudeGates):
            for name, gate in self.bank.values.items():
                step = self._current_gate_rate() * self._penalty * self._charge[name]
                gate.copy_(torch.sign(gate) * (gate.abs() - step).clamp_min_(0.0))

    def _current_gate_rate(self) -> float:
        return self._gate_lr if self._gate_lr is not None else float(self.optimizers[0].param_groups[0]["lr"])

    def _regulariser(self) -> Tensor:
        """Return ``lambda * sum of reg(v)``, lambda in units of one over the initial cost."""
        assert isinstance(self.bank, LogisticGates) and self._gate_cost is not None
        names = self.bank.names
        vectors = {name: self.bank.regularisation(name) for name in names}
        alive: dict[str, int | Tensor] = {g.name: g.size for g in self.groups}
        alive.update({name: self.bank.alive(name) for name in names})
        scale = self._penalty / self._gate_cost.value({})
        return scale * self._gate_cost.regulariser(vectors, alive)

    def _train_gates(self, grad_scale: float) -> None:
        if self.bank is None:
            return
        parameters = self.bank.parameters()
        for parameter in parameters:
            if parameter.grad is not None and grad_scale != 1.0:
                parameter.grad.div_(grad_scale)
        if dist.is_available() and dist.is_initialized():  # DDP knows nothing of gates outside the model
            for parameter in parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(gradient)
                parameter.grad = gradient.div_(dist.get_world_size())
        if isinstance(self.bank, LogisticGates) and self._penalty:
            self._regulariser().backward()
        if self._gate_optimizer is not None:
            for group in self._gate_optimizer.param_groups:
                group["lr"] = self._current_gate_rate()
            self._gate_optimizer.step()
            self._gate_optimizer.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------ cuts

    def _open_groups(self, refused: Mapping[str, str] | None = None) -> list[UnitGroup]:
        """Return the groups, those that may not be cut here marked as frozen."""
        closed = {**self.ungated, **self._refused, **(refused or {})}
        return [dataclasses.replace(g, frozen=closed[g.name]) if g.name in closed else g for g in self.groups]

    def scores(self) -> Scores:
        """Return the present score of every unit, before normalisation."""
        names = {
            group.name: np.zeros(group.size) for group in self.groups if group.name in self.ungated or group.frozen
        }
        rest = [group for group in self.groups if group.name not in names]
        if self.score == "figs":
            assert isinstance(self.bank, LogisticGates)
            return {**names, **{g.name: self.bank.probability(g.name).double().cpu().numpy() for g in rest}}
        if self.score == "scale":
            gates = self.bank.values if isinstance(self.bank, MagnitudeGates) else {}
            found = {g.name: gates[g.name].detach().abs().double().cpu().numpy() for g in rest if g.name in gates}
            found.update(scale_scores(self.model, [g for g in rest if g.name not in gates]))
            return {**names, **found}
        if self.score == "taylor":
            assert self._taylor is not None
            return {**names, **self._taylor.scores(rest)}
        if self.score == "random":
            return {**names, **random_scores(rest, self._rng)}
        return {**names, **weight_scores(self.model, rest, p=1 if self.score == "l1" else 2)}

    def _dead(self) -> dict[str, list[int]]:
        """Return the units whose scales are all at most the threshold, or whose gates are closed."""
        if self.schedule.kind != "dead":
            return {}
        open_groups = [g for g in self.groups if g.name not in self.ungated and not g.frozen]
        if isinstance(self.bank, LogisticGates):
            return {g.name: torch.nonzero(~self.bank.final(g.name)).flatten().tolist() for g in open_groups}
        if self.score != "scale":
            return {}
        gates = self.bank.values if isinstance(self.bank, MagnitudeGates) else {}
        found = scale_scores(self.model, [g for g in open_groups if g.name not in gates], reduction="max")
        found.update({name: value.detach().abs().cpu().numpy() for name, value in gates.items()})
        return {name: np.flatnonzero(v <= self.schedule.threshold).tolist() for name, v in found.items()}

    def _cut_when_due(self) -> bool:
        if not self.schedule.due(self.steps):
            return False
        last = self.steps >= self.schedule.end
        limits = self.schedule.limits(self.steps, self.start, self.limits)
        if self.schedule.kind == "dead" and not last:
            limits = {}
        cut = self._cut(self._decided(limits, self._dead(), trigger=not last))
        if last:
            self._let_go()
        return cut

    def _decided(
        self, limits: Mapping[str, float], dead: Mapping[str, Sequence[int]], *, trigger: bool = False
    ) -> tuple[Removed, Mapping[str, float]]:
        """Return what goes, decided by the first process, and the planned costs."""
        if not (dist.is_available() and dist.is_initialized()):
            return self._decision(limits, dead, trigger)
        payload: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                payload = [self._decision(limits, dead, trigger)]
            except UserError as error:
                payload = [error]
        dist.broadcast_object_list(payload, src=0)
        if isinstance(payload[0], UserError):
            raise payload[0]
        decision: tuple[Removed, Mapping[str, float]] = payload[0]
        return decision

    def _decision(
        self, limits: Mapping[str, float], dead: Mapping[str, Sequence[int]], trigger: bool
    ) -> tuple[Removed, Mapping[str, float]]:
        bank = self.bank
        if bank is not None:
            bank.remove()  # copies that are measured or checked must not carry hooks
        refused: dict[str, str] = {}
        scores = normalised(self.scores(), self._normalise)
        try:
            while True:
                plan = self._plan(scores, limits, dead, refused)
                if trigger and self.schedule.kind == "dead" and not self._worth(plan):
                    return {}, self.cost()
                try:
                    if plan.removed:
                        self._atoms.plan(self._translated(plan.removed))
                except CutRefused as error:
                    # Plan without it this time; another cut may find it possible.
                    closed = error.group if error.group in plan.removed else next(iter(plan.removed))
                    refused[closed] = error.reason
                    continue
                return plan.removed, plan.costs
        finally:
            if bank is not None:
                bank.follow(self.groups, {g.name: np.arange(g.size) for g in self.groups})

    def _plan(
        self,
        scores: Scores,
        limits: Mapping[str, float],
        dead: Mapping[str, Sequence[int]],
        refused: Mapping[str, str],
    ) -> UnitPlan:
        groups = self._open_groups(refused)
        if "latency" in limits:
            self._table.removed = self._removed_so_far()
            return plan_with_latency(groups, scores, self.costs, limits, self._table, order=self._order, dead=dead)
        return plan_units(groups, scores, self.costs, limits, order=self._order, dead=dead)

    def _removed_so_far(self) -> dict[str, int]:
        return {
            name: size - len(self._origin[name]) for name, size in zip(self.costs.names, self.costs.sizes, strict=True)
        }

    def _worth(self, plan: UnitPlan) -> bool:
        now = self.cost()["macs"]
        return bool(plan.removed) and now - plan.costs["macs"] >= self.schedule.worth * now

    def _cut(self, decision: tuple[Removed, Mapping[str, float]]) -> bool:
        removed, costs = decision
        if not removed:
            return False
        bank = self.bank
        if bank is not None:
            bank.remove()
        if isinstance(bank, MagnitudeGates):
            bank.fold_()
        shapes, ties = shapes_of_all(self.model), first_names(self.model)
        cut = self._atoms.plan(self._translated(removed))
        own = dataclasses.replace(cut, removed=removed)
        apply_(self.model, cut, optimizers=self.optimizers, averages=self._averages, tables=self._tables)
        kept = kept_units(self.groups, own)
        self.groups = groups_after(self.groups, own, shapes, ties)
        self._origin = {name: self._origin[name][units] for name, units in kept.items()}
        self._atoms = _refreshed(self._atoms, self.groups)
        if self._taylor is not None:
            self._taylor.keep(kept)
        if bank is not None:
            old = {id(p): len(p) for p in bank.parameters()}
            bank.follow(self.groups, kept)
            self._cut_gate_state(bank, kept, old)
        self._check_counts()
        event = CutEvent(
            self.steps,
            {name: len(units) for name, units in removed.items()},
            {**costs, **self.cost()},
            self.cost()["macs"] / self.start["macs"],
        )
        self.history.append(event)
        if self._on_cut is not None:
            self._on_cut(event)
        return True

    def _cut_gate_state(
        self, bank: MagnitudeGates | LogisticGates, kept: Mapping[str, IntArray], old: Mapping[int, int]
    ) -> None:
        if self._gate_optimizer is None:
            return
        named = bank.values if isinstance(bank, MagnitudeGates) else bank.logits
        for name, parameter in named.items():
            state: dict[str, Any] = self._gate_optimizer.state.get(parameter, {})
            index = torch.from_numpy(kept[name])
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() == 1 and len(value) == old[id(parameter)]:
                    state[key] = value[index.to(value.device)]

    def _check_counts(self) -> None:
        """Insist that the network costs exactly what the plan said."""
        bank = self.bank
        if bank is not None:
            bank.remove()
        found, expected = self.costs.recount(self.model), self.cost()
        if bank is not None:
            bank.follow(self.groups, {g.name: np.arange(g.size) for g in self.groups})
        if found != expected:
            raise ArchsmithError(f"after a cut the network costs {found}, planned were {expected}.")

    def _translated(self, removed: Removed) -> dict[str, list[int]]:
        """Return ``removed`` in the names and positions of the present source of units."""
        if (
            isinstance(self._atoms, DeclaredAtoms)
            or tuple(self._atoms.groups) == tuple(self.groups)  # the very groups: nothing was found anew
        ):
            return {name: units.tolist() for name, units in removed.items()}
        where = {}
        for group in self._atoms.groups:
            for place in group.places:
                for unit, row in enumerate(place.index):
                    where[place.tensor, place.axes, tuple(row.tolist())] = (group.name, unit)
        found: dict[str, list[int]] = {}
        by_name = {group.name: group for group in self.groups}
        for name, units in removed.items():
            place = by_name[name].places[0]
            for unit in units.tolist():
                their_name, their_unit = where[place.tensor, place.axes, tuple(place.index[unit].tolist())]
                found.setdefault(their_name, []).append(their_unit)
        return found

    def _let_go(self) -> None:
        """Fold the gates, take all hooks off: from here on the model is the user's alone."""
        if self.bank is not None:
            self.bank.fold_()
            self.bank.remove()
        for handle in self._handles:
            handle.remove()
        self._finished = True

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict[str, Any]:
        """Return everything that ``load_state_dict`` continues from.

        Tensors, numbers, texts and lists only, so that torch reads it back with ``weights_only=True``.
        """
        gates = {}
        generator = None
        noise: dict[str, Tensor] = {}
        if isinstance(self.bank, LogisticGates):
            gates = {name: value.detach().clone() for name, value in self.bank.logits.items()}
            generator, noise = self.bank.state()
        elif self.bank is not None:
            gates = {name: value.detach().clone() for name, value in self.bank.values.items()}
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self._fingerprint,
            "score": self.score,
            "limits": dict(self.limits),
            "steps": self.steps,
            "finished": self._finished,
            "origin": {name: units.tolist() for name, units in self._origin.items()},
            "history": [dataclasses.asdict(event) for event in self.history],
            "gates": gates,
            "gate_optimizer": self._gate_optimizer.state_dict() if self._gate_optimizer is not None else None,
            "generator": generator,
            "noise": noise,
            "bank_steps": self.bank.steps if isinstance(self.bank, LogisticGates) else 0,
            "taylor": None
            if self._taylor is None
            else {
                "steps": self._taylor.steps,
                "sums": {k: torch.from_numpy(v.copy()) for k, v in self._taylor.sums.items()},
            },
            "rng": _rng_state(self._rng),
            "latency": dict(self._table.measured),
            "refused": dict(self._refused),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: cut the model and its optimiser to the shapes it had.

        Call it on a shrinker that was just made for the whole model, and load the states of the model and of the
        optimiser *afterwards*: only then do they fit.

        Raises:
            UserError: The state is of another network, score or budget, or this shrinker has already cut.
        """
        if state.get("format_version") != FORMAT_VERSION:
            raise UserError(
                "state", Shown(f"format version {state.get('format_version')}"), allowed=str(FORMAT_VERSION)
            )
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "state",
                Shown(f"that of a network with fingerprint {state['fingerprint']}"),
                allowed=f"that of this one, {self._fingerprint}",
                hint="Make the shrinker for the same whole model as then, before anything is loaded into it.",
            )
        for name, mine in (("score", self.score), ("limits", self.limits)):
            if state[name] != mine:
                raise UserError(f"state.{name}", state[name], allowed=f"{mine}, as this shrinker was made")
        if self.history or self.steps:
            raise UserError(
                "state", Shown(f"it after {self.steps} steps of this shrinker"), allowed="it before any step"
            )
        removed = {}
        for name, units in state["origin"].items():
            gone = np.setdiff1d(self._origin[name], np.array(units, dtype=np.int64))
            if len(gone):
                removed[name] = gone
        self._cut((removed, {}))
        self.history = [CutEvent(**event) for event in state["history"]]
        self.steps = int(state["steps"])
        self._refused = dict(state["refused"])
        self._table.measured.update(state["latency"])
        _set_rng_state(self._rng, state["rng"])
        if self._taylor is not None and state["taylor"] is not None:
            self._taylor.steps = int(state["taylor"]["steps"])
            self._taylor.sums = {name: value.numpy().copy() for name, value in state["taylor"]["sums"].items()}
        named = {}
        if isinstance(self.bank, LogisticGates):
            named = self.bank.logits
            self.bank.load(state["generator"], state["noise"], int(state["bank_steps"]))
        elif self.bank is not None:
            named = self.bank.values
        with torch.no_grad():
            for name, value in state["gates"].items():
                named[name].copy_(value)
        if self._gate_optimizer is not None and state["gate_optimizer"] is not None:
            self._gate_optimizer.load_state_dict(state["gate_optimizer"])
        if state["finished"]:
            if self.bank is not None:
                self.bank.remove()
            for handle in self._handles:
                handle.remove()
            self._finished = True


def shapes_of_all(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer, those that are not saved included."""
    return {**{name: tuple(t.shape) for name, t in tensors_of(model).items()}, **shapes_of(model)}


def _optimizers(
    given: torch.optim.Optimizer | Iterable[torch.optim.Optimizer], model: nn.Module, groups: Sequence[UnitGroup]
) -> list[torch.optim.Optimizer]:
    """Return the optimisers after checking that they train what would be cut."""
    if not groups or all(group.frozen for group in groups):
        raise UserError(
            "atoms",
            Shown(f"{len(groups)} groups, none of which may be cut"),
            allowed="a model with removable units",
            hint="atoms.explain() says what is pinned, and by which operator.",
        )
    found = [given] if isinstance(given, torch.optim.Optimizer) else list(given)
    if not found or not all(isinstance(each, torch.optim.Optimizer) for each in found):
        raise UserError("optimizer", given, allowed="a torch.optim.Optimizer, or several")
    held = {id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    touched = {place.tensor for group in groups if not group.frozen for place in group.places}
    trained = [name for name in touched if name in parameters and parameters[name].requires_grad]
    if trained and not any(id(parameters[name]) in held for name in trained):
        raise UserError(
            "optimizer",
            Shown("one that holds none of the parameters that would be cut"),
            allowed="the optimiser of this very model",
            hint=f"It must be built on model.parameters() of the same object, '{sorted(trained)[0]}' for instance.",
        )
    return found


def _refreshed(atoms: UnitSource, groups: Sequence[UnitGroup]) -> UnitSource:
    """Return a source of units for the network after a cut."""
    if isinstance(atoms, DeclaredAtoms):
        return dataclasses.replace(atoms, groups=groups)
    from archsmith.atoms.find import find

    again: UnitSource = find(atoms.model, atoms.example_inputs, forward=atoms.forward)
    return again


def _rng_state(rng: np.random.Generator) -> dict[str, Any]:
    state = rng.bit_generator.state
    return {"name": state["bit_generator"], **{k: str(v) for k, v in state["state"].items()}}


def _set_rng_state(rng: np.random.Generator, saved: Mapping[str, Any]) -> None:
    state: Any = rng.bit_generator.state
    state["state"] = {key: int(value) for key, value in saved.items() if key != "name"}
    rng.bit_generator.state = state
