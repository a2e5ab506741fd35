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
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from archsmith.atoms.absorb import Absorber
from archsmith.atoms.declared import UnitSource, copy_without
from archsmith.atoms.fingerprint import fingerprint, first_names, unwrap
from archsmith.atoms.gate_banks import LogisticGates, MagnitudeGates
from archsmith.atoms.gate_cost import Resource
from archsmith.atoms.gates import GateOptions
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.shrink_penalty import Gating, UnitPenalty
from archsmith.atoms.shrink_setup import (
    all_shapes,
    checked_optimizers,
    found_anew,
    rng_state,
    set_rng_state,
    translated,
)
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
    scale_scores,
    weight_scores,
)
from archsmith.atoms.units import Cut, UnitGroup
from archsmith.atoms.wrappers import rewrap as renewed
from archsmith.core.errors import ArchsmithError, Shown, UserError
from archsmith.cost import measure_latency
from archsmith.space import Budget

ScoreKind = Literal["scale", "factor", "l1", "l2", "taylor", "figs", "random"]

FORMAT_VERSION = 1

DEFAULT_RHO = 1e-4
"""Default penalty of scales and factors, that of AtomNAS."""

_GATING: dict[str, Gating] = {"scale": "magnitude", "factor": "factors", "figs": "logistic"}

_NORMALISATION: dict[str, Normalisation] = {
    "scale": "none",
    "factor": "none",
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
        atoms: The units: what ``archsmith.atoms.find`` returned, or ``DeclaredAtoms``. With example inputs that vary
            (real or random ones, no zeros), what dead units still say is moved into the biases behind them.
        optimizer: What trains the model, or several of them. It is cut along; learning rates are read from it.
        budget: Limits on macs, params and latency ("macs<=0.5x, latency<=4ms"; x = of the model as given), or None:
            then only dead units are cut.
        score: "scale", "factor", "l1", "l2", "taylor", "figs" or "random"; see ``archsmith.atoms.unit_scores``.
            "factor": one trained factor for every unit, beside whatever scales the model has; "figs": stochastic gates
            on everything, charged for ``resource``.
        schedule: When cuts are made; by default cubic from step 100 to 1,000, every 100.
        penalty: rho of the proximal step on scales and gates (default 1e-4 for "scale" and "factor", else 0); for
            "figs" lambda in units of one over the initial cost (default 1).
        normalise: How scores of different groups are compared; by default what suits the score.
        order: "share_per_cost", "score_per_cost" or "score"; see ``plan_units``.
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
        penalties: What pushes units towards zero, with the gates.

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
        order: Order = "share_per_cost",
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
        self.optimizers = checked_optimizers(optimizer, self.model, self.groups)
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

        defaults = {"scale": DEFAULT_RHO, "factor": DEFAULT_RHO, "figs": 1.0}
        self.penalties = UnitPenalty(
            self.model,
            self.groups,
            self.costs,
            self.optimizers,
            gating=_GATING.get(score, "none"),
            strength=defaults.get(score, 0.0) if penalty is None else penalty,
            rate=gate_lr,
            options=gates,
            resource=resource,
            seed=seed,
        )
        self.ungated = self.penalties.refused
        self._check_feasible()
        self._rng = np.random.default_rng(seed)
        self._taylor = TaylorScores() if score == "taylor" else None
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

    # ------------------------------------------------------------------ the loop

    def _before_optimizer(self, *_: Any) -> None:
        self.penalties.before_optimizer()
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
        self.penalties.after_optimizer(grad_scale)
        cut = self._cut_when_due()
        if not self._finished:
            self.penalties.sample()
        return cut

    def finish(self) -> bool:
        """End now: bring the model within its budget if it is not, fold all gates into its weights and let go of it.

        Warns when the budget was not met before, because what is cut here is not trained afterwards.

        Returns:
            True when units were cut.
        """
        cut = False
        if not self._finished:
            early, before = self.steps < self.schedule.end, self.cost()["macs"]
            cut = self._cut(self._decided(self.limits, self._dead()))
            self._let_go()
            if early and cut and self.limits:
                share = 100 * (1 - self.cost()["macs"] / before)
                warnings.warn(
                    f"finish() after {self.steps} steps cut {share:.0f} % of the MACs, and nothing trains the model "
                    f"after it; the schedule ends at step {self.schedule.end}. Pass schedule=archsmith.CutSchedule("
                    "begin=..., end=...) that ends well before the loop does.",
                    stacklevel=2,
                )
        return cut

    def rewrap(self, model: nn.Module) -> nn.Module:
        """Return a wrapper (DDP, ``torch.compile``) that fits the model after a cut; others as they are."""
        if model._modules.get("_orig_mod") is not None:
            # Code compiled for the old shapes would fill the cache until torch falls back to eager.
            torch.compiler.reset()
        return renewed(model)

    def penalty(self) -> float:
        """Return the present penalty term, for logging: ``rho * sum c_i |g_i|``, or ``lambda * reg`` of the gates."""
        return self.penalties.value()

    @property
    def bank(self) -> MagnitudeGates | LogisticGates | None:
        """The gates, or None where every unit has a scale or the score needs none."""
        return self.penalties.bank

    @property
    def has_scores(self) -> bool:
        """Whether scores can be computed now; "taylor" needs a step since the start or the last cut."""
        return self._taylor is None or self._taylor.steps > 0

    def cost(self) -> dict[str, int]:
        """Return the present "macs" and "params"."""
        return self.costs.of({group.name: group.size for group in self.groups})

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
        if self.score in ("scale", "factor"):
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
        if self.score not in ("scale", "factor"):
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
        refused: dict[str, str] = {}
        scores = normalised(self.scores(), self._normalise)
        self.penalties.suspend()  # copies that are measured or checked must not carry hooks
        try:
            while True:
                plan = self._plan(scores, limits, dead, refused)
                if trigger and self.schedule.kind == "dead" and not self._worth(plan):
                    return {}, self.cost()
                try:
                    if plan.removed:
                        self._atoms.plan(translated(plan.removed, self.groups, self._atoms))
                except CutRefused as error:
                    # Plan without it this time; another cut may find it possible.
                    closed = error.group if error.group in plan.removed else next(iter(plan.removed))
                    refused[closed] = error.reason
                    continue
                return plan.removed, plan.costs
        finally:
            self.penalties.resume()

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
        self.penalties.suspend()
        self.penalties.fold_()
        shapes, ties = all_shapes(self.model), first_names(self.model)
        cut = self._atoms.plan(translated(removed, self.groups, self._atoms))
        own = dataclasses.replace(cut, removed=removed)
        apply_(
            self.model,
            cut,
            optimizers=self.optimizers,
            averages=self._averages,
            tables=self._tables,
            absorb=self._absorber(cut),
        )
        kept = kept_units(self.groups, own)
        self.groups = groups_after(self.groups, own, shapes, ties)
        self._origin = {name: self._origin[name][units] for name, units in kept.items()}
        self._atoms = found_anew(self._atoms, self.groups)
        if self._taylor is not None:
            self._taylor.keep(kept)
        self._check_counts()
        self.penalties.follow(self.groups, kept)
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

    def _absorber(self, cut: Cut) -> Absorber | None:
        """Return what moves the constants of dead units to the layers behind them; None where no unit can be dead.

        A unit is known to be constant by its activations on the example inputs, which must vary for that: on zeros
        everything looks constant.
        """
        varied = any(
            isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 1 and bool(leaf.std() > 0)
            for leaf in tree_leaves(self._atoms.example_inputs)
        )
        if self.score != "scale" or not varied:
            return None
        return Absorber(self.model, cut, self._atoms.example_inputs, self._atoms.forward)

    def _check_counts(self) -> None:
        """Insist that the network costs exactly what the plan said."""
        found, expected = self.costs.recount(self.model), self.cost()
        if found != expected:
            raise ArchsmithError(f"after a cut the network costs {found}, planned were {expected}.")

    def _let_go(self) -> None:
        """Fold the gates, take all hooks off: from here on the model is the user's alone."""
        self.penalties.let_go()
        for handle in self._handles:
            handle.remove()
        self._finished = True

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict[str, Any]:
        """Return everything that ``load_state_dict`` continues from.

        Tensors, numbers, texts and lists only, so that torch reads it back with ``weights_only=True``.
        """
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self._fingerprint,
            "score": self.score,
            "limits": dict(self.limits),
            "steps": self.steps,
            "finished": self._finished,
            "origin": {name: units.tolist() for name, units in self._origin.items()},
            "history": [dataclasses.asdict(event) for event in self.history],
            "penalties": self.penalties.state(),
            "taylor": None
            if self._taylor is None
            else {
                "steps": self._taylor.steps,
                "sums": {k: torch.from_numpy(v.copy()) for k, v in self._taylor.sums.items()},
            },
            "rng": rng_state(self._rng),
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
        set_rng_state(self._rng, state["rng"])
        if self._taylor is not None and state["taylor"] is not None:
            self._taylor.steps = int(state["taylor"]["steps"])
            self._taylor.sums = {name: value.numpy().copy() for name, value in state["taylor"]["sums"].items()}
        self.penalties.load(state["penalties"])
        if state["finished"]:
            self.penalties.suspend()
            for handle in self._handles:
                handle.remove()
            self._finished = True
