"""A study: a strategy asks, an evaluator answers, a store remembers, and nothing is lost on the way.

``run_study`` is the whole of it. Who evaluates is one of three: this process; worker processes of our own, which may
crash, hang and be killed; or any ``concurrent.futures.Executor`` (threads, processes, a cluster's).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from archsmith.core.errors import Shown, UserError
from archsmith.core.journal import Journal
from archsmith.core.protocols import Executor
from archsmith.evaluate.base import Evaluator, WeightStore
from archsmith.run.attempt import Attempt, attempt, judged
from archsmith.run.isolation import Limits, WorkerPool, attempt_apart
from archsmith.run.ledger import Feasible, Ledger, Order, StudyBudget, study_header, trials_of
from archsmith.run.stop import StopRequest
from archsmith.run.study_store import JournalStore, MemoryStore, StudyStore, owner_name
from archsmith.space import Result, Trial
from archsmith.strategies.base import Strategy

LOOK_SECONDS = 0.2
"""How often a waiting study looks whether it was asked to stop."""

_UNWRITTEN_SECONDS = 0.05


@dataclass(frozen=True)
class StudyOutcome:
    """How a study, or this session of it, ended.

    Attributes:
        status: ``"finished"``: nothing is pending and nothing more is asked. ``"stopped"``: to be resumed.
        reason: Why it ended, as a sentence's end.
        told: Trials with a result that the strategy knows.
        evaluated: Evaluations carried out.
        free: Trials told without an evaluation: refused as infeasible beforehand, or known from the cache.
        failed, infeasible: Told trials of that status.
        pending: Ids asked and not told; a resumed study takes them up.
        simulated_seconds: Sum of ``Result.seconds`` told.
        seconds: Real seconds at work, over all sessions.
        best: The best told trial by the first objective and its result; None when none is ok.
        history: Told trials and results in the order told, where the store keeps them in memory.
        reproducible: Whether the same study told the same results gives the same trials with any number of workers.
    """

    status: Literal["finished", "stopped"]
    reason: str
    told: int
    evaluated: int
    free: int
    failed: int
    infeasible: int
    pending: tuple[int, ...]
    simulated_seconds: float
    seconds: float
    best: tuple[Trial, Result] | None
    history: list[tuple[Trial, Result]] = field(repr=False)
    reproducible: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the outcome without its history as a JSON object."""
        counts = ("reason", "told", "evaluated", "free", "failed", "infeasible", "simulated_seconds", "seconds")
        best = None
        if self.best is not None:
            best = {"trial": self.best[0].to_json(), "result": self.best[1].to_json()}
        return {
            **{name: getattr(self, name) for name in counts},
            "pending": list(self.pending),
            "best": best,
            "reproducible": self.reproducible,
        }


def run_study(
    strategy: Strategy,
    evaluator: Evaluator,
    *,
    budget: int | StudyBudget,
    store: StudyStore | None = None,
    executor: Executor | None = None,
    workers: int = 1,
    order: Order = "synchronous",
    batch: int | None = None,
    stop: StopRequest | None = None,
    time_limit: float | None = None,
    memory_limit: int | None = None,
    attempts: int = 3,
    isolate: bool | None = None,
    feasible: Feasible | None = None,
    cache: bool = False,
    weights: WeightStore | None = None,
    on_result: Callable[[Trial, Result], None] | None = None,
    settings: Mapping[str, Any] | None = None,
    snapshot_seconds: float = 10.0,
    start_method: str | None = None,
) -> StudyOutcome:
    """Run a study until its budget is spent, the strategy has no more, or somebody asks to stop.

    A store that holds the study already is gone on with: the strategy, freshly made by the caller with the same
    arguments, is brought to where it was by replaying the record, and trials that were pending are evaluated again
    under the same id, with the same architecture and seed.

    Args:
        strategy: What to try; freshly made.
        evaluator: Evaluates a trial. Whatever a candidate does (raise, crash, hang, exhaust memory, return NaN) is a
            failed result; isolation says what of it this process survives.
        budget: A number of evaluations, or a ``StudyBudget``.
        store: ``MemoryStore()`` by default; ``JournalStore(folder)`` survives a kill.
        executor: Evaluates elsewhere; it is used, not closed. None for this process or our own workers.
        workers: Evaluations at the same time.
        order: ``"synchronous"`` tells results in the order of ``ask``: the same trials whatever is faster, with any
            number of workers, as long as ``batch`` is the same. ``"asynchronous"`` tells them as they come: nobody
            waits and nothing is lost, but the trials depend on timing.
        batch: Trials asked and not told at any time, at most; by default the number of workers. More than that keeps
            workers busy behind a slow trial in synchronous order.
        stop: Asked between evaluations; on its wish the study stops at once, and pending trials stay pending.
        time_limit: Seconds of one evaluation, then it is killed; needs isolation (switched on).
        memory_limit: Bytes one evaluation may take beyond its idle worker; needs isolation (switched on), Linux.
        attempts: How often a trial is begun whose worker is killed from outside, before it counts as failed.
        isolate: Whether worker processes of our own evaluate. By default only with several workers or a limit. With
            ``executor`` and a limit each evaluation gets a child process in the executor's worker.
        feasible: Looks at each architecture before its evaluation; returns an infeasible ``Result``, or None.
        cache: Whether equal networks (``network_digest``) at equal fidelity are evaluated once; the answer is free.
            Keeps one result per network in memory.
        weights: Passed on to the evaluator.
        on_result: Called with each trial and its result when the strategy is told; after a resume only with new ones.
        settings: JSON values that belong to the identity of the study; a resumed study must name the same.
        snapshot_seconds: Time in the strategy after which its state is recorded; a resume starts there.
        start_method: Of the worker processes, as ``multiprocessing`` names it.

    Raises:
        UserError: An argument is out of range; the store holds another study; the first trial shows that evaluator
            and study do not fit; workers cannot start, or the executor broke. What was recorded stays, and the same
            call goes on with it.
    """
    check_counts(workers=workers, attempts=attempts)
    limits = Limits(seconds=time_limit, memory_bytes=memory_limit)
    store = MemoryStore() if store is None else store
    ledger = Ledger(
        strategy,
        _Listening(store, on_result) if on_result else store,
        budget=StudyBudget.of(budget),
        order=order,
        batch=workers if batch is None else batch,
        feasible=feasible,
        cache=cache,
        snapshot_seconds=snapshot_seconds,
    )
    header = study_header(strategy, order=order, batch=ledger.batch, settings=settings or {})
    status = "failed"
    summary: dict[str, Any] = {}
    past = store.open(header)
    try:
        ledger.replay(past)
        already_finished = bool(past) and past[-1]["kind"] == "finished"
        del past
        if isinstance(store, JournalStore):
            store.forget()
        if already_finished and ledger.end is None:
            raise UserError(
                "budget",
                ledger.budget.to_json(),
                allowed=f"what the finished study spent ({ledger.evaluated} evaluations), or less",
                hint="A finished study is not prolonged: run another one in another folder.",
            )
        separate = workers > 1 if isolate is None else isolate
        backend = backend_for(executor, evaluator, workers, weights, limits, start_method, isolate=separate)
        try:
            reason = _loop(ledger, store, backend, workers, attempts, stop)
        finally:
            backend.close()
        status = "stopped" if reason is not None else "finished"
        outcome = outcome_of(ledger, status, reason, store.history(), order)
        summary = outcome.to_json()
        return outcome
    finally:
        store.close(status, summary)


def _loop(
    ledger: Ledger, store: StudyStore, backend: Backend, workers: int, attempts: int, stop: StopRequest | None
) -> str | None:
    """Evaluate until nothing is left (None) or somebody asks to stop (the reason)."""
    waiting = deque(ledger.unfinished())
    running: set[int] = set()
    objectives = ledger.strategy.objectives
    while True:
        if stop is not None and stop.reason is not None:
            return stop.reason
        waiting.extend(ledger.advance())
        while waiting and len(running) < workers:
            trial = waiting.popleft()
            running.add(trial.id)
            store.leased(trial, backend.submit(trial))
        if not running:
            return None
        store.flush(patience=backend.patience)
        for made in backend.collect(LOOK_SECONDS):
            trial = ledger.pending[made.trial.id]
            running.discard(trial.id)
            if made.result is not None:
                ledger.finish(trial.id, judged(made, objectives))
                continue
            reason = made.lost or "its worker died"
            if ledger.lose(trial.id, reason) < attempts:
                waiting.appendleft(trial)
            else:
                ledger.finish(trial.id, Result.failed(f"given up after {attempts} attempts: {reason}"))


class Backend(Protocol):
    """Who evaluates."""

    patience: float
    """Seconds that entries of the record may wait to be written while evaluations run."""

    def submit(self, trial: Trial) -> str:
        """Begin with a trial as soon as possible; return whose it is."""

    def collect(self, timeout: float) -> list[Attempt]:
        """Return what was finished, by trial id; wait for it at most ``timeout`` seconds."""

    def close(self) -> None:
        """Give up what is under way."""


def backend_for(
    executor: Executor | None,
    evaluator: Evaluator,
    workers: int,
    weights: WeightStore | None,
    limits: Limits,
    start_method: str | None,
    *,
    isolate: bool,
) -> Backend:
    """Return who evaluates: the executor, worker processes of our own, or this process."""
    if executor is not None:
        return _ExecutorBackend(executor, evaluator, weights, limits, start_method)
    if isolate or limits:
        return _PoolBackend(evaluator, workers, weights, limits, start_method)
    if workers > 1:
        raise UserError("isolate", isolate, allowed="True or None with several workers and no executor")
    return _Here(evaluator, weights)


class _Here:
    """Evaluates in this process, one after the other, when asked to collect."""

    def __init__(self, evaluator: Evaluator, weights: WeightStore | None) -> None:
        self._evaluator, self._weights = evaluator, weights
        self._trials: deque[Trial] = deque()
        self._owner = owner_name()
        self.patience = _UNWRITTEN_SECONDS

    def submit(self, trial: Trial) -> str:
        self._trials.append(trial)
        return self._owner

    def collect(self, timeout: float) -> list[Attempt]:
        started = time.perf_counter()
        made = attempt(self._evaluator, self._trials.popleft(), self._weights)
        slow = time.perf_counter() - started >= _UNWRITTEN_SECONDS
        self.patience = 0.0 if slow else _UNWRITTEN_SECONDS
        return [made]

    def close(self) -> None:
        self._trials.clear()


class _PoolBackend:
    """Evaluates in worker processes of our own."""

    patience = 0.0

    def __init__(
        self, evaluator: Evaluator, workers: int, weights: WeightStore | None, limits: Limits, method: str | None
    ) -> None:
        self._pool = WorkerPool(evaluator, workers=workers, limits=limits, weights=weights, start_method=method)

    def submit(self, trial: Trial) -> str:
        self._pool.submit(trial)
        pid = self._pool.running.get(trial.id)
        return owner_name(pid) if pid else f"a worker of {owner_name()}"

    def collect(self, timeout: float) -> list[Attempt]:
        return self._pool.collect(timeout)

    def close(self) -> None:
        self._pool.close()


class _ExecutorBackend:
    """Evaluates wherever an executor does."""

    patience = 0.0

    def __init__(
        self,
        executor: Executor,
        evaluator: Evaluator,
        weights: WeightStore | None,
        limits: Limits,
        start_method: str | None,
    ) -> None:
        self._executor = executor
        self._arguments = (evaluator, weights)
        self._limits, self._start_method = limits, start_method
        self._futures: dict[Future[Attempt], Trial] = {}

    def submit(self, trial: Trial) -> str:
        evaluator, weights = self._arguments
        try:
            if self._limits:
                future = self._executor.submit(
                    attempt_apart, evaluator, trial, weights, self._limits, self._start_method
                )
            else:
                future = self._executor.submit(attempt, evaluator, trial, weights)
        except BrokenExecutor as error:
            raise _broken(self._executor, error) from error
        self._futures[future] = trial
        return type(self._executor).__name__

    def collect(self, timeout: float) -> list[Attempt]:
        done, _ = wait(self._futures, timeout, FIRST_COMPLETED)
        found = [self._attempt(future) for future in done]
        for future in done:
            del self._futures[future]
        return sorted(found, key=lambda made: made.trial.id)

    def _attempt(self, future: Future[Attempt]) -> Attempt:
        trial = self._futures[future]
        if future.cancelled():
            return Attempt(trial, None, lost="the executor cancelled it")
        error = future.exception()
        if isinstance(error, BrokenExecutor):
            raise _broken(self._executor, error) from error
        if isinstance(error, UserError):
            raise error
        if isinstance(error, WorkerLost):
            return Attempt(trial, None, lost=str(error))
        if error is not None:  # evaluations raise nothing: the executor could not send, or lost, its call
            return Attempt(trial, Result.failed(f"{type(error).__name__}: {error}"[:1_000]))
        return future.result()

    def close(self) -> None:
        for future in self._futures:
            future.cancel()
        self._futures.clear()


class WorkerLost(Exception):
    """What an executor's future raises when the worker, not the candidate, died: the trial is taken up again."""


class _Listening:
    """A record that passes everything on and calls somebody when a result is told."""

    def __init__(self, store: StudyStore, on_result: Callable[[Trial, Result], None]) -> None:
        self._store, self._on_result = store, on_result
        self.asked, self.result, self.lost, self.snapshot = store.asked, store.result, store.lost, store.snapshot

    def told(self, trial: Trial, result: Result) -> None:
        self._store.told(trial, result)
        self._on_result(trial, result)


def recorded_trials(path: str | Path) -> Iterator[tuple[Trial, Result | None]]:
    """Yield the trials of a study's run directory by id, each with its result, or None while it is pending.

    Reads the journal only; a living process may go on writing it.

    Raises:
        UserError: There is no study at ``path``.
    """
    events = Journal(Path(path) / "journal.jsonl").read()
    if not events or events[0].get("config", {}).get("kind") != "study":
        raise UserError("run", Shown(f"{path}, where no study is recorded"), allowed="the folder of a study")
    return trials_of(events)


def outcome_of(
    ledger: Ledger, status: str, reason: str | None, history: list[tuple[Trial, Result]], order: Order
) -> StudyOutcome:
    """Return what a ledger has come to."""
    return StudyOutcome(
        status="stopped" if status == "stopped" else "finished",
        reason=reason or ledger.end or "nothing is left to do",
        told=ledger.told,
        evaluated=ledger.evaluated,
        free=ledger.free,
        failed=ledger.failed,
        infeasible=ledger.infeasible,
        pending=tuple(ledger.pending),
        simulated_seconds=ledger.simulated_seconds,
        seconds=ledger.elapsed,
        best=ledger.best,
        history=history,
        reproducible=order == "synchronous",
    )


def check_counts(**counts: int) -> None:
    """Refuse a count that is not a positive integer."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(name, value, allowed="an integer from 1")


def _broken(executor: Executor, error: BaseException) -> UserError:
    return UserError(
        "executor",
        Shown(f"{type(executor).__name__}, which is broken ({error or type(error).__name__})"),
        allowed="an executor that works",
        hint="Everything recorded is safe: the same call with a new executor goes on. Worker processes of our own "
        "(workers=N without an executor) survive the death of a worker.",
    )
