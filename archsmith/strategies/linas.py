"""Measure, refit, search: a few real measurements, predictors refitted on all of them, a whole search on those, repeat.

The loop behind LINAS, and, with other encodings, objectives and inner searches, behind FBNetV3's constrained iterative
optimisation, SimQ-NAS, InstaTune and BOSHNAS. Costs that can be computed are computed, not predicted, and limits on
them are hard; limited costs that must be measured are predicted like objectives. ``linas`` returns the published
setting. The default of ``MeasureRefitSearch`` measures fewer networks between two fits, predicts by Gaussian processes,
and picks those that together promise the largest hypervolume.

Sources: Sarah et al. 2022, "A Hardware-Aware System for Accelerating Deep Neural Network Optimization", arXiv
2202.12954; Cummings et al. 2022, arXiv 2205.10358.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.predictors import GaussianProcess, Predictor, Tuned
from archsmith.space import Architecture, Budget, Objective, Result, Space, Trial, non_dominated
from archsmith.space.pareto import losses
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.breeding import Key, breeding_of
from archsmith.strategies.candidates import Features
from archsmith.strategies.inner_search import Evolution, InnerSearch, Scored, order
from archsmith.strategies.promise import chosen_by_hypervolume

STRATEGIES = (
    {
        "name": "linas",
        "class": "MeasureRefitSearch",
        "title": "Batches of measurements between whole searches on refitted predictors, any number of objectives",
        "paper": "arXiv 2202.12954",
        "extra": None,
    },
)

# N architectures, M objectives

Selection = Literal["hypervolume", "rank"]

ExactCost = Callable[[Sequence[Architecture]], np.ndarray]
"""Computes a cost of architectures, float64 of shape (N,), without measuring anything."""

DRAWS = 50
"""Rounds of random architectures in which the first batch looks for new ones that keep the limits."""


class MeasureRefitSearch(Strategy):
    """Alternates between batches of real measurements and searches on predictors refitted on everything measured.

    The first ``initial`` trials are random. Then, for every batch: one predictor for each objective that must be
    measured learns from all results; ``inner`` searches on the predictions; of everything it looked at and that was not
    asked for before, ``batch`` architectures are chosen and asked for. The result of the search is what was measured,
    never what was predicted. No network is asked for twice (``network_digest``).

    Results that failed or are not finite count as the worst seen; so do infeasible ones, unless it was a measured limit
    that they broke: then only that cost is learned from them. While fewer than two results are finite,
    architectures are random. The strategy waits for the last result of a batch; the order of results does not matter.

    Args:
        space: Any space. Product spaces of listed dimensions are searched as rows of integers, others by their own
            sampling, crossover and mutation.
        objectives: One (a genetic algorithm inside), two (NSGA-II) or more (U-NSGA-III).
        seed: Seed of everything drawn.
        initial: Random trials in the beginning; ``batch`` if None.
        batch: P, trials between two fits.
        inner: The search on predictors; ``Evolution()`` by default.
        predictor: Makes the predictor of an objective from a seed; a Gaussian process by default.
        features: What predictors see of an architecture; the one-hot encoding with inactive decisions masked.
        exact: Costs that are computed. An objective of such a name is not predicted.
        constraints: Absolute limits on costs, exact or measured. Nothing that breaks an exact one, or is predicted to
            break a measured one, is asked for.
        measured: Costs with limits that must be measured: every result carries them, also one that is infeasible.
        select: "rank": the best by front and crowding distance, as published. "hypervolume": one after the other what
            adds most to the hypervolume of the measured front and those chosen before (up to three objectives).
        optimism: Predictions are improved by so many standard deviations of the predictor before they are compared.

    The reference of the hypervolume is each objective's own where it has one, else the worst value measured.

    Raises:
        UserError: A setting out of its range, a relative limit or one on a cost that is not exact, or limits that no
            architecture was found to keep (said with the nearest).
    """

    objectives_allowed = None
    repeats = False

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        initial: int | None = None,
        batch: int = 10,
        inner: InnerSearch | None = None,
        predictor: Callable[[int], Predictor] | None = None,
        features: Features | None = None,
        exact: Mapping[str, ExactCost] | None = None,
        constraints: Budget | None = None,
        measured: Collection[str] = (),
        select: Selection = "hypervolume",
        optimism: float = 0.0,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        self.batch = _count("batch", batch)
        self.initial = self.batch if initial is None else _count("initial", initial)
        if select not in get_args(Selection):
            raise UserError("select", select, allowed=f"one of {list(get_args(Selection))}")
        if isinstance(optimism, bool) or not math.isfinite(optimism):
            raise UserError("optimism", optimism, allowed="a finite number")
        self.inner: InnerSearch = Evolution() if inner is None else inner
        self.predictor = _gaussian_process if predictor is None else predictor
        self.exact = dict(exact or {})
        self.measured = tuple(measured)
        self.constraints = _checked_limits(constraints, {*self.exact, *self.measured})
        self.select: Selection = select
        self.optimism = optimism
        self.breeding = breeding_of(space, features)
        self._predictors: dict[str, Predictor] = {}
        self._known: list[Architecture] = []  # asked, in the order of ask
        self._digests: set[str] = set()
        self._losses: dict[int, tuple[float, ...]] = {}  # by position in _known
        self._refused: set[int] = set()  # positions of results that broke a measured limit
        self._costs: dict[str, dict[int, float]] = {name: {} for name in self.measured}  # by position
        self._queue: list[Architecture] = []  # chosen, not asked yet
        self._predicted: dict[str, dict[str, float]] = {}  # of what is in the queue, by digest
        self._rounds = 0
        self._exhausted = False

    @property
    def done(self) -> bool:
        """Whether every network of the space was asked for, as far as that is known."""
        return self._exhausted and not self._queue

    # ------------------------------------------------------------------------------------------------- proposing

    def _propose(self) -> Proposal | None:
        if not self._queue:
            if self.pending or self._exhausted:
                return None
            self._queue = self._next_batch()
            self._predicted = self._predictions(self._queue)
            if not self._queue:
                self._exhausted = True
                return None
        architecture = self._queue.pop(0)
        self._known.append(architecture)
        predicted = self._predicted.pop(architecture.digest, None)
        about = {} if predicted is None else {"predicted": predicted}
        return Proposal(architecture, info={"round": self._rounds, **about})

    def _next_batch(self) -> list[Architecture]:
        """Return the architectures of the next batch, all of them new; none when the space is through."""
        rng = numpy_stream(self.seed, "measure, refit, search", self._rounds)
        self._rounds += 1
        self._refit_costs()
        wanted = self.batch if self._known else self.initial
        finite = [row for row in self._losses.values() if all(map(math.isfinite, row))]
        chosen: list[Architecture] = []
        if len(finite) >= 2:
            self._take(chosen, self._searched(rng), wanted)
        for _ in range(DRAWS):
            if len(chosen) == wanted:
                return chosen
            drawn = self.breeding.sample(rng, 4 * wanted)
            kept = drawn[self._violations(self.breeding.architectures(drawn)) == 0]
            self._take(chosen, self.breeding.architectures(kept), wanted)
        if self.constraints is not None and len(chosen) < wanted:
            self._take(chosen, self._feasible(rng), wanted)
        if len(chosen) < wanted and self.space.size <= DRAWS * 4 * wanted:
            listed = list(self.space.enumerate())
            fits = self._violations(listed) == 0
            self._take(chosen, [each for each, fit in zip(listed, fits, strict=True) if fit], wanted)
        if not chosen and self._costs:
            # All that was looked at is predicted to break a measured limit. Predictions err: ask for the nearest.
            others = self.breeding.architectures(self.breeding.sample(rng, DRAWS * wanted))
            nearest = np.argsort(self._violations(others), kind="stable")
            self._take(chosen, [others[int(at)] for at in nearest], wanted)
        return chosen

    def _take(self, chosen: list[Architecture], candidates: Sequence[Architecture], wanted: int) -> None:
        """Add new networks to the chosen ones until there are as many as wanted."""
        for architecture in candidates:
            if len(chosen) == wanted:
                return
            if architecture.network_digest not in self._digests:
                self._digests.add(architecture.network_digest)
                chosen.append(architecture)

    def _searched(self, rng: np.random.Generator) -> list[Architecture]:
        """Refit, search on the predictors, and return the chosen architectures from the most promising on."""
        self.refit()
        measured = self._measured_losses()
        front = [self._known[at] for at, keep in zip(self._losses, non_dominated(measured), strict=True) if keep]
        front = [front[int(at)] for at in rng.permutation(len(front))]
        start = self.breeding.population(front)
        scored = self.inner(self.breeding, self._score, start, rng)
        new = self._unmeasured(scored)
        if not len(new.losses):
            return []
        wanted = self.batch
        if self.select == "hypervolume" and len(self.objectives) <= 3:
            feasible = np.flatnonzero(new.violations == 0)
            places = feasible[chosen_by_hypervolume(new.losses[feasible], measured, self._reference(measured), wanted)]
        else:
            ranked = order(new.losses, new.violations)
            places = ranked[new.violations[ranked] == 0][: 2 * wanted]
        return self.breeding.architectures(new.population[places])

    def _unmeasured(self, scored: Scored) -> Scored:
        """Return what was scored without what was asked for before."""
        known: set[Key] = set(self.breeding.keys(self.breeding.population(self._known)))
        new = [at for at, key in enumerate(self.breeding.keys(scored.population)) if key not in known]
        return Scored(scored.population[new], scored.losses[new], scored.violations[new])

    def _feasible(self, rng: np.random.Generator) -> list[Architecture]:
        """Return architectures that keep the limits, found by evolving towards them where random ones do not.

        Raises:
            UserError: None was found, and none was known before.
        """

        def excess(population: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            violations = self._violations(self.breeding.architectures(population))
            return violations[:, None], violations

        known = self.breeding.population([self._known[at] for at in self._losses])
        found = self.inner(self.breeding, excess, known, rng)
        kept = self.breeding.architectures(found.population[found.violations == 0])
        if not kept and not self._known:
            nearest = self.breeding.architectures(found.population[[int(np.argmin(found.violations))]])
            costs = {name: float(self._cost(name, nearest)[0]) for name in self._limited()}
            raise UserError(
                "constraints",
                Shown(str(self.constraints)),
                allowed=f"limits that some architecture keeps; the nearest that was found has {costs}",
            )
        return kept

    def _limited(self) -> list[str]:
        return [limit.cost for limit in self.constraints.limits] if self.constraints else []

    # ------------------------------------------------------------------------------------------------- predicting

    def refit(self) -> dict[str, Predictor]:
        """Fit one predictor for each objective that is not exact to all results; return them by objective."""
        self._refit_costs()
        measured = self._measured_losses()
        places = list(self._losses)
        for column, objective in enumerate(self.objectives):
            if objective.metric in self.exact or objective.metric in self._costs:
                continue
            sign = -1.0 if objective.direction == "maximize" else 1.0
            kept = [row for row, at in enumerate(places) if at not in self._refused]
            self._fit(objective.metric, [places[row] for row in kept], sign * measured[kept, column])
        return dict(self._predictors)

    def _refit_costs(self) -> None:
        """Fit one predictor for each limited cost that must be measured, once there are two measurements."""
        for name, known in self._costs.items():
            if len(known) >= 2:
                self._fit(name, list(known), np.array(list(known.values()), dtype=np.float64))

    def _fit(self, name: str, places: Sequence[int], values: np.ndarray) -> None:
        if name not in self._predictors:
            self._predictors[name] = self.predictor(seed_of(self.seed, name) >> 31)
        rows = self.breeding.features(self.breeding.population([self._known[at] for at in places]))
        self._predictors[name].fit(rows, values)

    def _predictions(self, architectures: Sequence[Architecture]) -> dict[str, dict[str, float]]:
        """Return what is predicted of architectures, by digest and by name; nothing before the first fit."""
        if not self._predictors or not architectures:
            return {}
        rows = self.breeding.features(self.breeding.population(architectures))
        found: dict[str, dict[str, float]] = {architecture.digest: {} for architecture in architectures}
        for name, predictor in sorted(self._predictors.items()):
            for architecture, mean in zip(architectures, predictor.predict(rows).mean, strict=True):
                found[architecture.digest][name] = float(mean)
        return found

    def _cost(self, name: str, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return a limited cost: computed, else predicted, else 0 as long as nothing is known of it."""
        if name in self.exact:
            return np.asarray(self.exact[name](architectures), dtype=np.float64)
        if name not in self._predictors:
            return np.zeros(len(architectures))
        rows = self.breeding.features(self.breeding.population(architectures))
        return np.asarray(self._predictors[name].predict(rows).mean, dtype=np.float64)

    def _score(self, population: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return predicted or computed losses, and by how much limits are broken."""
        architectures = self.breeding.architectures(population) if self.exact or self.constraints else []
        rows = self.breeding.features(population)
        columns = []
        for objective in self.objectives:
            sign = -1.0 if objective.direction == "maximize" else 1.0
            if objective.metric in self.exact:
                columns.append(sign * np.asarray(self.exact[objective.metric](architectures), dtype=np.float64))
            else:
                found = self._predictors[objective.metric].predict(rows)
                columns.append(sign * found.mean - self.optimism * found.std)
        violations = self._violations(architectures) if self.constraints else np.zeros(len(population))
        return np.stack(columns, axis=1), violations

    def _violations(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return the sum of the relative excesses over the limits, 0 where all are kept."""
        total = np.zeros(len(architectures))
        for limit in self.constraints.limits if self.constraints and len(architectures) else ():
            cost = self._cost(limit.cost, architectures)
            excess = cost - limit.value if limit.relation == "<=" else limit.value - cost
            total += np.maximum(0.0, excess / limit.value)
        return total

    def _measured_losses(self) -> np.ndarray:
        """Return the losses of all results, shape (N, M); what is not finite counts as the worst that is."""
        table = np.array(list(self._losses.values()), dtype=np.float64).reshape(-1, len(self.objectives))
        for column in table.T:
            finite = np.isfinite(column)
            column[~finite] = column[finite].max() if finite.any() else 0.0
        return table

    def _reference(self, measured: np.ndarray) -> np.ndarray:
        """Return the losses that bound the hypervolume."""
        worst = measured.max(axis=0)
        for column, objective in enumerate(self.objectives):
            if objective.reference is not None:
                worst[column] = -objective.reference if objective.direction == "maximize" else objective.reference
        return worst

    def front(self) -> list[tuple[Architecture, dict[str, float]]]:
        """Return what was measured and no other measurement dominates, with its measured objectives by name.

        The best by the first objective comes first; of equal measurements all are returned.
        """
        places = [at for at, row in self._losses.items() if all(map(math.isfinite, row))]
        table = np.array([self._losses[at] for at in places]).reshape(-1, len(self.objectives))
        signs = [-1.0 if objective.direction == "maximize" else 1.0 for objective in self.objectives]
        names = [objective.metric for objective in self.objectives]
        best = np.flatnonzero(non_dominated(table))
        return [
            (self._known[places[row]], dict(zip(names, (signs * table[row]).tolist(), strict=True)))
            for row in best[np.lexsort(table[best].T[::-1])].tolist()
        ]

    # -------------------------------------------------------------------------------------------- learning, state

    def _learn(self, trial: Trial, result: Result) -> None:
        at = trial.id - 1
        self._losses[at] = tuple(float(loss) for loss in losses([result], self.objectives)[0])
        self._losses = dict(sorted(self._losses.items()))
        for name, known in self._costs.items():
            if name in result.costs and math.isfinite(result.costs[name]):
                known[at] = float(result.costs[name])
                self._costs[name] = dict(sorted(known.items()))
                if result.status == "infeasible":
                    self._refused.add(at)

    def _state(self) -> dict[str, Any]:
        return {
            "known": [architecture.to_json() for architecture in self._known],
            "losses": [[at, [number_to_json(loss) for loss in row]] for at, row in self._losses.items()],
            "queue": [architecture.to_json() for architecture in self._queue],
            "predicted": [self._predicted.get(architecture.digest) for architecture in self._queue],
            "costs": {name: [[at, cost] for at, cost in known.items()] for name, known in self._costs.items()},
            "refused": sorted(self._refused),
            "rounds": self._rounds,
            "exhausted": self._exhausted,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._known = [self._architecture(data) for data in state["known"]]
        self._queue = [self._architecture(data) for data in state["queue"]]
        self._digests = {architecture.network_digest for architecture in (*self._known, *self._queue)}
        foretold = state.get("predicted", [None] * len(self._queue))  # older states know of no predictions
        pairs = zip(self._queue, foretold, strict=True)
        self._predicted = {each.digest: dict(values) for each, values in pairs if values is not None}
        costs = state.get("costs", {})
        self._costs = {name: {int(at): float(cost) for at, cost in costs.get(name, [])} for name in self.measured}
        self._refused = {int(at) for at in state.get("refused", [])}
        self._losses = {
            int(at): tuple(number_from_json(loss, "state.losses") for loss in row) for at, row in state["losses"]
        }
        self._rounds, self._exhausted = int(state["rounds"]), bool(state["exhausted"])
        self._predictors = {}


def linas(space: Space, *, population: int = 50, evaluations: int = 20_000, **settings: Any) -> MeasureRefitSearch:
    """Return LINAS as published: batches of 50, ridge or support vectors, and the best by front and crowding.

    Args:
        space: Any space.
        population: P, of the batches and of the inner evolution.
        evaluations: J, predictor evaluations of one inner search: 20,000 for MobileNetV3, BERT and ViT spaces, 5,000
            for ResNet50, 10,000 for the transformer.
        settings: Others of ``MeasureRefitSearch``, or these anew.

    Different from the released code: what was measured is not proposed again, inactive decisions are masked, the inner
    search begins with the measured front, and the last proposals are measured.
    """
    inner = Evolution(population=population, evaluations=evaluations)
    own: dict[str, Any] = {"batch": population, "inner": inner, "predictor": _tuned, "select": "rank"}
    return MeasureRefitSearch(space, **(own | settings))


def _gaussian_process(seed: int) -> Predictor:
    return GaussianProcess(seed=seed)


def _tuned(seed: int) -> Predictor:
    return Tuned(seed=seed)


def _count(name: str, given: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise UserError(name, given, allowed="an integer from 1")
    return given


def _checked_limits(constraints: Budget | None, known: Collection[str]) -> Budget | None:
    if constraints is None:
        return None
    if any(limit.relative for limit in constraints.limits):
        raise UserError("constraints", str(constraints), allowed="absolute limits", hint="Call resolve() first.")
    for limit in constraints.limits:
        if limit.cost not in known:
            raise UserError(
                "constraints",
                Shown(str(limit)),
                allowed=f"limits on costs that are computed beforehand or measured: {sorted(known)}",
            )
    return constraints
