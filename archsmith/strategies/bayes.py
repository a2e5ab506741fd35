"""Bayesian optimisation by Optuna's samplers: TPE and Gaussian processes, on any space.

Every decision of the walk is a parameter that an Optuna trial suggests when it is asked for (define by run), so
conditions and repeats need no translation. Counts and ordinals become integers, real numbers floats, all else a
categorical; a decision under another mask is another parameter, because Optuna wants one list of choices for a name.

Exact resume: Optuna keeps its state in a study, which is rebuilt from the trials that this class recorded, and in the
sampler's random stream. Here each trial gets a sampler of its own, seeded by (seed, number of the trial): so there is
no stream to restore, nothing is pickled, and a resumed search equals an uninterrupted one. The price: the Gaussian
process starts each fit from its prior instead of the last fit.

TPE: Bergstra et al. 2011 and Watanabe 2023 (arXiv 2304.11127). GP: expected improvement on a Matern kernel, Optuna's
defaults. Needs the ``optuna`` extra.
"""

from __future__ import annotations

import hashlib
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import numpy as np

from archsmith.core.errors import MissingExtra, UserError
from archsmith.core.rng import seed_of
from archsmith.space import (
    Architecture,
    DeadEnd,
    Decision,
    Interval,
    Mask,
    Objective,
    Options,
    Recording,
    Replay,
    Result,
    Space,
    Trial,
    Uniform,
)
from archsmith.space import Value as SpaceValue
from archsmith.space.deciders import option_index
from archsmith.space.options import Subsets, option_count
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.density import is_ordered
from archsmith.strategies.parts import LISTED, Part, choose_value, parts_of

STRATEGIES = (
    {
        "name": "gp",
        "class": "GaussianProcessSearch",
        "title": "Gaussian process with expected improvement, by Optuna",
        "paper": "Jones et al. 1998",
        "extra": "optuna",
    },
    {
        "name": "tpe",
        "class": "TpeSearch",
        "title": "Tree-structured Parzen estimator, by Optuna",
        "paper": "Bergstra et al. 2011; arXiv 2304.11127",
        "extra": "optuna",
    },
)

REPAIRS = 20
"""Walks that draw more and more decisions of a dead suggestion again, before the space samples."""

Ask = Callable[[str, Any], Any]
"""Returns the value of a named parameter of an Optuna distribution."""


class _Optuna(Strategy):
    """A study that lives as long as the strategy, and a sampler for each trial; subclasses make the sampler."""

    objectives_allowed = None

    walks: ClassVar[int] = 5
    """Suggested walks that may end dead before the last of them is repaired."""

    def __init__(
        self, space: Space, *, objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,), seed: int = 0, startup: int = 10
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        if not isinstance(startup, int) or isinstance(startup, bool) or startup < 1:
            raise UserError("startup", startup, allowed="an integer from 1")
        self.startup = startup
        self.records: list[_Record] = []  # one for each trial of the study, in its order
        self._number: dict[int, int] = {}  # pending trial: its number in the study
        self._study = self._new_study()

    @abstractmethod
    def _sampler(self, seed: int) -> Any:
        """Return a fresh sampler; it may depend on nothing but the seed and the settings."""

    def _new_study(self) -> Any:
        optuna = _optuna()
        with _quiet():
            return optuna.create_study(directions=["minimize"] * len(self.objectives))

    def _propose(self) -> Proposal:
        optuna = _optuna()
        for attempt in range(self.walks):
            self._study.sampler = self._sampler(seed_of(self.seed, "sampler", self.asked + 1, attempt) >> 31)
            try:
                with _quiet():
                    suggested = self._study.ask()
                    recording = Recording(_Suggesting(self.space, suggested))
                    return self._asked(self.space.walk(recording))
            except DeadEnd:
                self._study.tell(suggested.number, state=optuna.trial.TrialState.FAIL)
                self.records.append(_Record(None, None))
        architecture = self._repaired({decision.path: decision.choice for decision in recording.decisions})
        self._study.add_trial(self._frozen(_Record(architecture, None), {}))
        return self._asked(architecture)

    def _repaired(self, decisions: Mapping[str, SpaceValue]) -> Architecture:
        """Return a valid architecture that keeps as many of the decisions as a few walks find."""
        for attempt in range(1, REPAIRS + 1):
            kept = {path: value for path, value in decisions.items() if self.rng.random() >= attempt / REPAIRS}
            with suppress(DeadEnd):
                return self.space.walk(Replay(kept, Uniform(self.rng)))
        return self.space.sample(self.rng)

    def _asked(self, architecture: Architecture) -> Proposal:
        self._number[self.asked + 1] = len(self.records)
        self.records.append(_Record(architecture, None))
        return Proposal(architecture)

    def _learn(self, trial: Trial, result: Result) -> None:
        values = [self._loss(result, objective) for objective in self.objectives]
        number = self._number.pop(trial.id)
        record = self.records[number]
        record.values = values if all(map(math.isfinite, values)) else [math.nan] * len(values)
        if record.is_failed:
            self._study.tell(number, state=self._failed_state)
        else:
            self._study.tell(number, values)

    @property
    def _failed_state(self) -> Any:
        """How a failed trial enters the study: as a pruned one, worse than all others, where Optuna allows it."""
        states = _optuna().trial.TrialState
        return states.PRUNED if len(self.objectives) == 1 else states.FAIL

    def _frozen(self, record: _Record, attributes: Mapping[str, Any]) -> Any:
        """Return a record as a trial that a study takes."""
        optuna = _optuna()
        states = optuna.trial.TrialState
        if record.architecture is None:
            return optuna.trial.create_trial(state=states.FAIL)
        decisions = self.space.trace(record.architecture)
        parameters = [each for decision in decisions for each in _parameters(self.space, decision)]
        state = states.COMPLETE
        if record.values is None:
            state = states.RUNNING
        elif record.is_failed:
            state = self._failed_state
        return optuna.trial.create_trial(
            state=state,
            values=record.values if state == states.COMPLETE else None,
            params={name: value for name, _, value in parameters},
            distributions={name: distribution for name, distribution, _ in parameters},
            system_attrs=dict(attributes),
        )

    def _state(self) -> dict[str, Any]:
        # Of a pending trial Optuna also remembers what was sampled jointly; other trials learn from it.
        trials = self._study.get_trials(deepcopy=False)
        attributes = {str(number): dict(trials[number].system_attrs) for number in self._number.values()}
        return {
            "records": [record.to_json() for record in self.records],
            "numbers": [[trial, number] for trial, number in self._number.items()],
            "attributes": attributes,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._number = {int(trial): int(number) for trial, number in state["numbers"]}
        self.records = []
        for architecture, values in state["records"]:
            found = None if architecture is None else self._architecture(architecture)
            numbers = None if values is None else [number_from_json(value, "state.values") for value in values]
            self.records.append(_Record(found, numbers))
        self._study = self._new_study()
        for number, record in enumerate(self.records):
            self._study.add_trial(self._frozen(record, state["attributes"].get(str(number), {})))


class TpeSearch(_Optuna):
    """Tree-structured Parzen estimator by Optuna's ``TPESampler``; decisions that all trials share modelled jointly.

    Args:
        space: Where to search.
        objectives: Any number.
        seed: Seed of the samplers.
        startup: Random trials before the model.
        candidates: Samples of the good density, of which the best is asked.
        joint: Whether decisions that all trials share are modelled jointly (``multivariate``), or each by itself.

    A failed trial counts as worse than all others (with several objectives, as nothing). Pending trials count as bad
    (constant liar). Memory grows with the search.

    Raises:
        UserError: A setting out of its range.
        MissingExtra: Optuna is not installed.
    """

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        startup: int = 10,
        candidates: int = 24,
        joint: bool = True,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed, startup=startup)
        if not isinstance(candidates, int) or isinstance(candidates, bool) or candidates < 1:
            raise UserError("candidates", candidates, allowed="an integer from 1")
        self.candidates, self.joint = candidates, joint

    def _sampler(self, seed: int) -> Any:
        return _optuna().samplers.TPESampler(
            seed=seed,
            n_startup_trials=self.startup,
            n_ei_candidates=self.candidates,
            multivariate=self.joint,
            constant_liar=True,
        )


class GaussianProcessSearch(_Optuna):
    """Gaussian process with expected improvement by Optuna's ``GPSampler`` (which needs torch).

    Args:
        space: Where to search. Decisions that not all trials share are sampled at random: the process has a fixed set
            of inputs.
        objectives: Any number; with several, expected hypervolume improvement.
        seed: Seed of the samplers.
        startup: Random trials before the model.
        noisy: Whether equal architectures may have unequal results.

    A failed trial is left out of the model. Each proposal fits the process anew, which takes time of order n^3: for
    searches of a few hundred trials.

    Raises:
        UserError: A setting out of its range.
        MissingExtra: Optuna is not installed.
    """

    walks = 1  # each is a new fit

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        startup: int = 10,
        noisy: bool = True,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed, startup=startup)
        self.noisy = noisy

    @property
    def _failed_state(self) -> Any:
        return _optuna().trial.TrialState.FAIL

    def _sampler(self, seed: int) -> Any:
        samplers = _optuna().samplers
        return samplers.GPSampler(
            seed=seed,
            n_startup_trials=self.startup,
            deterministic_objective=not self.noisy,
            independent_sampler=samplers.RandomSampler(seed=seed + 1),
            warn_independent_sampling=False,
        )


# ------------------------------------------------------------------------------------------ decisions as parameters


class _Record:
    """One trial of the study: no architecture for a dead walk, no values while pending, NaN values when it failed."""

    def __init__(self, architecture: Architecture | None, values: list[float] | None) -> None:
        self.architecture, self.values = architecture, values

    @property
    def is_failed(self) -> bool:
        return self.values is not None and math.isnan(self.values[0])

    def to_json(self) -> list[Any]:
        architecture = None if self.architecture is None else self.architecture.to_json()
        return [architecture, None if self.values is None else [number_to_json(value) for value in self.values]]


class _Suggesting:
    """Answers the questions of a walk with what an Optuna trial suggests."""

    def __init__(self, space: Space, trial: Any) -> None:
        self.space, self.trial = space, trial

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> SpaceValue:
        return _answered(self.space, path, options, mask, group, self._suggest)

    def _suggest(self, name: str, distribution: Any) -> Any:
        kinds = _optuna().distributions
        if isinstance(distribution, kinds.CategoricalDistribution):
            return self.trial.suggest_categorical(name, distribution.choices)
        if isinstance(distribution, kinds.FloatDistribution):
            return self.trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
        return self.trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)


def _answered(space: Space, path: str, options: Options, mask: Mask, group: str, ask: Ask) -> SpaceValue:
    """Return the value of a decision, asking for its parameters: one, none if forced, several for a large subset."""
    kinds = _optuna().distributions
    if isinstance(options, Interval):
        if options.low == options.high:
            return options.low
        value = float(ask(path, kinds.FloatDistribution(options.low, options.high, log=options.log)))
        return min(max(value, options.low), options.high)
    count = int(option_count(options))
    if isinstance(options, range) and mask is None and count > 1:
        return int(ask(path, kinds.IntDistribution(options[0], options[-1], step=options.step)))
    if isinstance(options, Subsets) and count > LISTED and mask is None:

        def choose(part: Part) -> int:
            return int(ask(part.name, kinds.CategoricalDistribution((0, 1))))

        return choose_value(path, options, mask, group, choose, lambda: 0.5)
    allowed = range(count) if mask is None else [int(index) for index in np.flatnonzero(mask)]
    if len(allowed) == 1:
        return options[allowed[0]]
    if is_ordered(space, path, options):
        distribution = kinds.IntDistribution(0, len(allowed) - 1)
    else:
        distribution = kinds.CategoricalDistribution(tuple(range(len(allowed))))
    return options[allowed[int(ask(_name(path, count, mask), distribution))]]


def _parameters(space: Space, decision: Decision) -> list[tuple[str, Any, Any]]:
    """Return the parameters (name, distribution, value) that a decision was, or would have been, suggested by."""
    path, options, mask, group, choice = decision
    found: list[tuple[str, Any, Any]] = []

    def recorded(name: str, distribution: Any) -> Any:
        value: Any
        if isinstance(options, Interval) or (isinstance(options, range) and mask is None):
            value = choice
        elif name in flags:
            value = flags[name]
        else:
            index = option_index(choice, options)
            assert index is not None
            value = index if mask is None else int(mask[:index].sum())
        found.append((name, distribution, value))
        return value

    flags: dict[str, int] = {}
    if isinstance(options, Subsets) and option_count(options) > LISTED and mask is None:
        flags = {part.name: index for part, index in parts_of(decision)}
    _answered(space, path, options, mask, group, recorded)
    return found


def _name(path: str, count: int, mask: Mask) -> str:
    """Return the parameter's name: the path, and what else makes it another parameter."""
    if mask is None:
        return f"{path} of {count}"
    return f"{path} of {count} masked {hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=4).hexdigest()}"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("optuna", "optuna", "TPE and Gaussian processes") from error
    return optuna


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from logging that a study was created, or that a space is nearly through."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
