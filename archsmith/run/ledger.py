"""The state of a study as its record tells it: who was asked, what came back, what may be asked next.

A ledger knows no processes and no files. It calls the strategy, and says every call to a ``Record`` before anybody
acts on it; the same sequence of entries, replayed, gives the same ledger and the same strategy. Local studies and
studies shared by several machines are two ways to feed one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.core.journal import Event
from archsmith.core.rng import numpy_stream
from archsmith.space import Architecture, DeadEnd, Interval, Recording, Result, Space, Trial, Uniform
from archsmith.space.values import digest_of
from archsmith.strategies.base import Strategy

Order = Literal["synchronous", "asynchronous"]
Feasible = Callable[[Architecture], Result | None]

FREE_IN_A_ROW = 10_000
"""Trials without an evaluation (infeasible, or known from the cache) after which a study ends: nothing new comes."""

_FINGERPRINT_WALKS = 64
_LONG_OPTIONS = 1_000


@dataclass(frozen=True, kw_only=True)
class StudyBudget:
    """When a study asks for no further trial; whichever limit is reached first. Trials under way are still finished.

    Args:
        evaluations: Evaluations carried out, failed ones included; infeasible trials that were never evaluated and
            answers from the cache do not count.
        simulated_seconds: Sum of ``Result.seconds``, measured or simulated. The trial that crosses the limit counts.
        real_seconds: Wall-clock time at work, over all sessions of the study.

    Raises:
        UserError: No limit at all, or one that is not positive.
    """

    evaluations: int | None = None
    simulated_seconds: float | None = None
    real_seconds: float | None = None

    def __post_init__(self) -> None:
        limits = self.to_json()
        if all(value is None for value in limits.values()):
            raise UserError("budget", None, allowed=f"at least one of {list(limits)}")
        for name, value in limits.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            number = whole if name == "evaluations" else whole or isinstance(value, float)
            if value is not None and not (number and value > 0 and math.isfinite(value)):
                kind = "an integer from 1" if name == "evaluations" else "seconds above 0"
                raise UserError(f"budget.{name}", value, allowed=kind)

    @classmethod
    def of(cls, given: int | StudyBudget) -> StudyBudget:
        """Return a budget as it is, an integer as that many evaluations."""
        return given if isinstance(given, StudyBudget) else cls(evaluations=given)

    def to_json(self) -> dict[str, float | None]:
        """Return the limits by name."""
        return {
            "evaluations": self.evaluations,
            "simulated_seconds": self.simulated_seconds,
            "real_seconds": self.real_seconds,
        }


class Record(Protocol):
    """Where a ledger says what it does, in order; each entry is one call on the strategy or one fact about a trial."""

    def asked(self, n: int, trials: Sequence[Trial]) -> None:
        """``strategy.ask(n)`` returned ``trials``, perhaps none."""

    def result(self, trial: Trial, result: Result, *, free: str | None, elapsed: float) -> None:
        """A result came; ``free`` says why it cost nothing ("infeasible", "cached"), if so."""

    def told(self, trial: Trial, result: Result) -> None:
        """``strategy.tell`` took the trial's result."""

    def lost(self, trial: Trial, reason: str) -> None:
        """Whoever evaluated the trial died; it waits to be taken up again."""

    def snapshot(self, state: Mapping[str, Any]) -> None:
        """The strategy's state after everything so far."""


class Ledger:
    """Asks, tells and counts for one study.

    Args:
        strategy: Freshly made; brought to the state of the record by ``replay``.
        record: Hears of every entry; entries replayed are not said again.
        budget: When to ask no more.
        order: ``"synchronous"`` tells results in the order of ``ask``, and after each one asks at once, so that the
            sequence of calls depends on ``batch`` alone, not on who is faster. ``"asynchronous"`` tells results as they
            come.
        batch: Largest number of trials that are asked and not told yet.
        feasible: Looks at an architecture before any evaluation; returns an infeasible result, or None to go on.
        cache: Whether equal networks at equal fidelity are evaluated once.
        snapshot_seconds: Time spent in the strategy after which its state is recorded, so that a resumed study need not
            ask all over again.

    Attributes:
        pending: Trials asked and not told, by id, in the order of ``ask``.
        evaluated: Evaluations carried out, told or not.
        told, failed, infeasible, free: Results told: all, the failed, the infeasible, those without an evaluation.
        simulated_seconds: Sum of ``Result.seconds`` told.
        losses: How often each pending trial was lost.
        best: The best told trial by the first objective, with its result.
    """

    def __init__(
        self,
        strategy: Strategy,
        record: Record,
        *,
        budget: StudyBudget,
        order: Order = "synchronous",
        batch: int = 1,
        feasible: Feasible | None = None,
        cache: bool = False,
        snapshot_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if order not in get_args(Order):
            raise UserError("order", order, allowed=f"one of {list(get_args(Order))}")
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise UserError("batch", batch, allowed="an integer from 1")
        self.strategy = strategy
        self.budget = budget
        self.order = order
        self.batch = batch
        self.pending: dict[int, Trial] = {}
        self.losses: dict[int, int] = {}
        self.asked = self.told = self.evaluated = self.failed = self.infeasible = self.free = 0
        self.simulated_seconds = 0.0
        self.best: tuple[Trial, Result] | None = None
        self._record = record
        self._feasible = feasible
        self._ready: dict[int, tuple[Result, str | None]] = {}
        self._known: dict[str, Result] | None = {} if cache else None
        self._followers: dict[str, list[int]] = {}  # pending trials by network: the first is the one evaluated
        self._waiting = False  # the strategy wants results before it proposes more
        self._free_in_a_row = 0
        self._snapshot_seconds = snapshot_seconds
        self._strategy_seconds = 0.0
        self._clock = clock
        self._started = clock()
        self._earlier = 0.0

    @property
    def elapsed(self) -> float:
        """Real seconds at work: earlier sessions up to their last result, and this one."""
        return self._earlier + self._clock() - self._started

    @property
    def end(self) -> str | None:
        """Why nothing more is asked, as a sentence's end; None to go on. Pending trials are not looked at."""
        limits = self.budget
        if limits.evaluations is not None and self._committed() >= limits.evaluations:
            return f"the budget of {limits.evaluations} evaluations is spent"
        if limits.simulated_seconds is not None and self.simulated_seconds >= limits.simulated_seconds:
            return f"the budget of {limits.simulated_seconds:g} simulated seconds is spent"
        if limits.real_seconds is not None and self.elapsed >= limits.real_seconds:
            return f"the budget of {limits.real_seconds:g} real seconds is spent"
        if self._free_in_a_row >= FREE_IN_A_ROW:
            return f"the last {FREE_IN_A_ROW} trials were infeasible or known, nothing new comes"
        if self.strategy.done:
            return "the strategy has nothing more to ask"
        if self._waiting and not self.pending:
            return "the strategy asks for nothing although no result is outstanding"
        return None

    def advance(self) -> list[Trial]:
        """Tell what can be told and ask what may be asked, until neither is possible; return what is to be evaluated.

        Every trial is returned once in a session; after ``replay``, ``unfinished`` returns those of earlier sessions.
        """
        fresh: list[Trial] = []
        while True:
            if self.order == "asynchronous":
                self._tell_all()  # what is known is told before anything is asked
            if room := self._room():
                fresh += self._ask(room)
            if (trial := self._next_to_tell()) is not None:
                self._tell(trial)
            elif not room or self._waiting:
                return fresh

    def finish(self, trial_id: int, result: Result) -> None:
        """Take in what an evaluation came to; ``advance`` tells it when its turn comes."""
        self._admit(self.pending[trial_id], result, None)

    def lose(self, trial_id: int, reason: str) -> int:
        """Note that whoever evaluated a trial died; return how often that has happened to it."""
        self.losses[trial_id] = self.losses.get(trial_id, 0) + 1
        self._record.lost(self.pending[trial_id], reason)
        return self.losses[trial_id]

    def is_open(self, trial_id: int) -> bool:
        """Return whether a trial still lacks a result."""
        return trial_id in self.pending and trial_id not in self._ready

    def _room(self) -> int:
        """Return how many trials may be asked now."""
        if self._waiting or self.end is not None:
            return 0
        outstanding = len(self.pending)
        if self.order == "asynchronous":
            outstanding -= len(self._ready)
        room = self.batch - outstanding
        if self.budget.evaluations is not None:
            room = min(room, self.budget.evaluations - self._committed())
        return max(0, room)

    def _committed(self) -> int:
        """Return the evaluations done or under way."""
        if self._known is None:
            return self.evaluated + len(self.pending) - len(self._ready)
        return self.evaluated + sum(1 for ids in self._followers.values() if ids)

    def _ask(self, n: int) -> list[Trial]:
        started = self._clock()
        trials = self.strategy.ask(n)
        self._strategy_seconds += self._clock() - started
        self._record.asked(n, trials)
        return self._take_in(n, trials)

    def _take_in(self, n: int, trials: Sequence[Trial]) -> list[Trial]:
        """Note the trials of an ``ask``, settle those that need no evaluation, and return the others."""
        self._waiting = len(trials) < n
        self.asked += len(trials)
        for trial in trials:
            self.pending[trial.id] = trial
        return [trial for trial in trials if self._needs_evaluation(trial)]

    def _needs_evaluation(self, trial: Trial) -> bool:
        """Return whether a trial must be evaluated; give it a result where one can be had without."""
        if self._feasible is not None and (refused := self._feasible(trial.architecture)) is not None:
            self._admit(trial, refused, "infeasible")
            return False
        if self._known is not None:
            key = _network(trial)
            if (known := self._known.get(key)) is not None:
                self._admit(trial, replace(known, seconds=0.0), "cached")
                return False
            self._followers.setdefault(key, []).append(trial.id)
            return len(self._followers[key]) == 1
        return True

    def _admit(self, trial: Trial, result: Result, free: str | None) -> None:
        self._record.result(trial, result, free=free, elapsed=self.elapsed)
        followers = self._take_result(trial, result, free)
        for follower in followers:
            if self.is_open(follower):
                self._admit(self.pending[follower], replace(result, seconds=0.0), "cached")

    def _take_result(self, trial: Trial, result: Result, free: str | None) -> list[int]:
        """Note a result; return the pending trials of the same network."""
        self._ready[trial.id] = (result, free)
        if free is None:
            self.evaluated += 1
            if self._known is not None:
                self._known[_network(trial)] = result
                return self._followers.pop(_network(trial), [])
        return []

    def _next_to_tell(self) -> Trial | None:
        if not self._ready:
            return None
        if self.order == "synchronous":
            first = next(iter(self.pending))
            return self.pending[first] if first in self._ready else None
        return self.pending[next(iter(self._ready))]

    def _tell_all(self) -> None:
        while (trial := self._next_to_tell()) is not None:
            self._tell(trial)

    def _tell(self, trial: Trial) -> None:
        started = self._clock()
        result = self._told(trial)
        self._strategy_seconds += self._clock() - started
        self._record.told(trial, result)
        if self._strategy_seconds >= self._snapshot_seconds:
            self._strategy_seconds = 0.0
            self._record.snapshot(self.strategy.state_dict())

    def _told(self, trial: Trial, *, to_strategy: bool = True) -> Result:
        result, free = self._ready.pop(trial.id)
        if to_strategy:
            self.strategy.tell(trial.id, result)
        del self.pending[trial.id]
        self.losses.pop(trial.id, None)
        self._waiting = False
        self.told += 1
        self.failed += result.status == "failed"
        self.infeasible += result.status == "infeasible"
        self.free += free is not None
        self._free_in_a_row = 0 if free is None else self._free_in_a_row + 1
        self.simulated_seconds += result.seconds
        objective = self.strategy.objective
        if result.status == "ok":
            value = objective.value(result)
            if not math.isnan(value) and (
                self.best is None or objective.is_better(value, objective.value(self.best[1]))
            ):
                self.best = (trial, result)
        return result

    def replay(self, events: Sequence[Event]) -> None:
        """Bring ledger and strategy to where the record ends; may be called again with what was added since.

        A strategy that was not used yet starts at the last recorded state, if there is one.

        Raises:
            UserError: The strategy asks for something else than was recorded: other settings, another seed or version.
        """
        jump = -1
        if self.asked == 0:
            states = [i for i, event in enumerate(events) if event["kind"] == "state"]
            jump = states[-1] if states else -1
        for i, event in enumerate(events):
            self._replay_one(event, to_strategy=i > jump)
            if i == jump:
                self.strategy.load_state_dict(event["state"])

    def _replay_one(self, event: Event, *, to_strategy: bool) -> None:
        kind = event["kind"]
        if kind == "asked":
            trials = self._replayed_ask(event) if to_strategy else [self._rebuilt(row) for row in event["trials"]]
            self._waiting = len(trials) < event["n"]
            self.asked += len(trials)
            self.pending.update({trial.id: trial for trial in trials})
        elif kind == "result":
            trial, result = self.pending[event["id"]], Result.from_json(event["result"])
            self._take_result(trial, result, event["free"])
            self._earlier = max(self._earlier, event["elapsed"])
            self._started = self._clock()
            if event.get("told"):
                self._told(trial, to_strategy=to_strategy)
        elif kind == "told":
            self._told(self.pending[event["id"]], to_strategy=to_strategy)
        elif kind == "lost":
            self.losses[event["id"]] = self.losses.get(event["id"], 0) + 1

    def _replayed_ask(self, event: Event) -> list[Trial]:
        trials = self.strategy.ask(event["n"])
        now = json.loads(json.dumps([trial.to_json() for trial in trials]))
        if now != event["trials"]:
            pairs = zip(event["trials"], now, strict=False)
            then, differs = next(((a, b) for a, b in pairs if a != b), (event["trials"], now))
            raise UserError(
                "strategy",
                Shown(f"{type(self.strategy).__name__}, which asks now for {_short(differs)}"),
                allowed=f"the strategy that asked for {_short(then)} when the study was recorded",
                hint="Resume with the same settings, seed and version of archsmith, or start another study.",
            )
        return trials

    def _rebuilt(self, row: Mapping[str, Any]) -> Trial:
        trial = Trial.from_json(row)
        return replace(trial, architecture=self.strategy.space.validate(trial.architecture))

    def unfinished(self) -> list[Trial]:
        """Return the pending trials that are to be evaluated (again), after a ``replay``; call it once per session."""
        for ids in self._followers.values():
            ids.clear()
        self._followers.clear()
        open_trials = [trial for trial in self.pending.values() if self.is_open(trial.id)]
        return [trial for trial in open_trials if self._needs_evaluation(trial)]


def _network(trial: Trial) -> str:
    return f"{trial.architecture.network_digest}@{trial.fidelity}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def space_fingerprint(space: Space) -> str:
    """Return a digest of how a space behaves: the questions, options and networks of fixed random walks.

    Two definitions that differ in a path, an option, a condition, a constraint or the canonical form give, but for
    rare coincidences, different fingerprints; it is the same in every process. Works for every walkable space.
    """
    rng = numpy_stream(0, "space-fingerprint")
    walks: list[Any] = []
    for _ in range(_FINGERPRINT_WALKS):
        recording = Recording(Uniform(rng))
        try:
            network = space.walk(recording).network_digest
        except DeadEnd as end:
            network = f"dead end at {end.path}"
        steps = [[d.path, d.group, _options_text(d.options), _mask_text(d.mask)] for d in recording.decisions]
        walks.append([steps, network])
    return digest_of({"name": space.name, "walks": walks})


def _options_text(options: Any) -> str:
    if isinstance(options, Interval) or len(options) <= _LONG_OPTIONS:
        return repr(options if isinstance(options, Interval) else list(options))
    return repr((len(options), options[0], options[len(options) - 1]))


def _mask_text(mask: np.ndarray | None) -> str:
    return "" if mask is None else digest_of([bool(flag) for flag in mask[:_LONG_OPTIONS]])


def study_header(strategy: Strategy, *, order: Order, batch: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a study: whoever goes on with it must come with the same."""
    return {
        "kind": "study",
        "space": strategy.space.name,
        "space_digest": space_fingerprint(strategy.space),
        "strategy": type(strategy).__name__,
        "seed": strategy.seed,
        "objectives": [objective.to_json() for objective in strategy.objectives],
        "order": order,
        "batch": batch,
        "settings": dict(settings),
    }


def trials_of(events: Iterable[Event]) -> Iterator[tuple[Trial, Result | None]]:
    """Yield every recorded trial, by id, with its result or None while it is pending."""
    trials: dict[int, Trial] = {}
    results: dict[int, Result] = {}
    for event in events:
        if event["kind"] == "asked":
            trials.update({row["id"]: Trial.from_json(row) for row in event["trials"]})
        elif event["kind"] == "result":
            results[event["id"]] = Result.from_json(event["result"])
    for trial_id, trial in sorted(trials.items()):
        yield trial, results.get(trial_id)
