"""Several processes, on several machines, at work on one study.

All are equal: each has the strategy, brought to the same state by the same events, and each may ask, evaluate and tell.
None is needed by the others; one that dies loses its lease, and another one takes its trial up under the same id.
"""

from __future__ import annotations

import copy
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from archsmith.core.journal import Event
from archsmith.core.protocols import Executor
from archsmith.evaluate.base import Evaluator, WeightStore
from archsmith.run.attempt import Attempt, judged
from archsmith.run.isolation import Limits
from archsmith.run.ledger import Feasible, Ledger, Order, StudyBudget, study_header, trials_of
from archsmith.run.shared_store import SharedStore, StoreUnusable
from archsmith.run.stop import StopRequest
from archsmith.run.study import LOOK_SECONDS, Backend, StudyOutcome, backend_for, check_counts, outcome_of
from archsmith.run.study_store import Batch
from archsmith.space import Result, Trial
from archsmith.strategies.base import Strategy

_RENEWALS = 4  # in the time of a lease


def work_on_study(
    strategy: Strategy,
    evaluator: Evaluator,
    *,
    store: SharedStore,
    budget: int | StudyBudget,
    batch: int,
    workers: int = 1,
    order: Order = "asynchronous",
    executor: Executor | None = None,
    isolate: bool = True,
    stop: StopRequest | None = None,
    time_limit: float | None = None,
    memory_limit: int | None = None,
    attempts: int = 3,
    feasible: Feasible | None = None,
    cache: bool = False,
    weights: WeightStore | None = None,
    settings: Mapping[str, Any] | None = None,
    snapshot_seconds: float = 10.0,
    start_method: str | None = None,
) -> StudyOutcome:
    """Work on a shared study, together with whoever else does, until it is finished or this worker is asked to stop.

    Start it as often and on as many machines as you like, with the same arguments; start it again after a crash.

    Args:
        strategy: Freshly made, with the same arguments everywhere.
        evaluator: As in ``run_study``.
        store: The study's place in a database.
        budget: Of the whole study; every worker should name the same.
        batch: Trials asked and not told at any time, over all workers: as many as evaluate together, or more.
        workers: Evaluations at the same time in this process.
        order: As in ``run_study``. In synchronous order the trials depend on ``batch`` only, whoever works.
        executor: Evaluates elsewhere; None for worker processes of our own.
        isolate: Whether worker processes of our own evaluate; False for threads of this process.
        stop: Asked a few times a second; on its wish the leases are given back at once.
        time_limit: Seconds of one evaluation, as in ``run_study``.
        memory_limit: Bytes of one evaluation, as in ``run_study``.
        attempts: How often a trial is begun whose worker dies or falls silent, before it counts as failed.
        feasible: As in ``run_study``; asked again whenever this worker looks at the study, so it should be quick.
        cache: As in ``run_study``.
        weights: As in ``run_study``.
        settings: As in ``run_study``.
        snapshot_seconds: As in ``run_study``.
        start_method: As in ``run_study``.

    Returns:
        The outcome of the whole study as this worker saw it last; ``history`` is empty (see ``shared_trials``).

    Raises:
        UserError: This worker's space, strategy, seed or settings are not the study's; the database stays locked or
            unreachable; or as ``run_study``.
    """
    check_counts(workers=workers, attempts=attempts)
    limits = Limits(seconds=time_limit, memory_bytes=memory_limit)

    def ledger(strategy: Strategy, record: Batch) -> Ledger:
        return Ledger(
            strategy,
            record,
            budget=StudyBudget.of(budget),
            order=order,
            batch=batch,
            feasible=feasible,
            cache=cache,
            snapshot_seconds=snapshot_seconds,
        )

    with ExitStack() as stack:
        replica = _Replica(strategy, ledger, store)
        stack.callback(store.close)
        store.open(study_header(strategy, order=order, batch=batch, settings=settings or {}))
        if executor is None and not isolate:
            executor = stack.enter_context(ThreadPoolExecutor(workers))
        backend = backend_for(executor, evaluator, workers, weights, limits, start_method, isolate=isolate)
        stack.callback(backend.close)
        worker = _Worker(replica, store, backend, workers, attempts)
        stack.callback(worker.give_back)
        reason = worker.work(stop)
        status = "finished" if reason is None else "stopped"
        return outcome_of(replica.ledger, status, reason, [], order)


def shared_trials(store: SharedStore) -> list[tuple[Trial, Result | None]]:
    """Return the trials of an opened shared study by id, each with its result, or None while it is pending."""
    return list(trials_of(store.events()))


class _Replica:
    """This worker's ledger and strategy, kept equal to what the store says."""

    def __init__(self, strategy: Strategy, make: Callable[[Strategy, Batch], Ledger], store: SharedStore) -> None:
        self._blank, self._make, self._store = strategy, make, store
        self._batch = Batch()
        self.ledger = make(self._fresh_strategy(), self._batch)
        self._known = 0  # events taken in
        self._certain = True  # whether what was done here is what was recorded

    def catch_up(self, results: Mapping[int, Result] | None = None) -> None:
        """Take in what others added; add results, tell and ask what is possible now.

        A result of a trial that somebody else has finished meanwhile is dropped: it is the same trial.
        """
        self._known = self._store.transact(self._position, lambda events: self._change(events, results or {}))
        self._certain = True

    def _position(self) -> int:
        if not self._certain:  # a transaction that failed: nothing of it counts, or all of it; the store knows
            self._batch.take()
            self.ledger = self._make(self._fresh_strategy(), self._batch)
            self._known = 0
        return self._known

    def _fresh_strategy(self) -> Strategy:
        """Return a copy of the unused strategy; the space is immutable and shared."""
        return copy.deepcopy(self._blank, {id(self._blank.space): self._blank.space})

    def _change(self, events: list[Event], results: Mapping[int, Result]) -> tuple[list[Event], set[int]]:
        self._certain = False
        self.ledger.replay(events)
        waiting = {trial.id for trial in self.ledger.unfinished()}
        for trial_id, result in results.items():
            if self.ledger.is_open(trial_id):
                self.ledger.finish(trial_id, result)
        waiting |= {trial.id for trial in self.ledger.advance()}
        return self._batch.take(), {trial_id for trial_id in waiting if self.ledger.is_open(trial_id)}


class _Worker:
    """Leases trials, has them evaluated, renews the leases meanwhile, and hands in the results."""

    def __init__(self, replica: _Replica, store: SharedStore, backend: Backend, workers: int, attempts: int) -> None:
        self._replica, self._store, self._backend = replica, store, backend
        self._workers, self._attempts = workers, attempts
        self._running: dict[int, int] = {}  # attempts by trial
        self._renewed = time.monotonic()
        self.owner = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex[:8]}"

    def work(self, stop: StopRequest | None) -> str | None:
        """Work until the study is finished (None) or somebody asks to stop (the reason)."""
        try:
            while stop is None or stop.reason is None:
                self._take()
                if self._running:
                    self._hand_in(self._backend.collect(LOOK_SECONDS))
                    self._renew()
                    continue
                self._replica.catch_up()
                ledger = self._replica.ledger
                if not ledger.pending and ledger.end is not None:
                    return None
                if not self._take():
                    time.sleep(LOOK_SECONDS)  # others evaluate what is pending
            return stop.reason
        except StoreUnusable:
            self._running.clear()  # nobody to give leases back to
            raise

    def give_back(self) -> None:
        """Give back the leases of what is not finished."""
        if self._running:
            self._store.give_back(self.owner, list(self._running), counted=False)
            self._running.clear()

    def _take(self) -> bool:
        """Begin with as many trials as there are hands and leases; return whether there was any."""
        took = False
        while len(self._running) < self._workers and (lease := self._store.take(self.owner)) is not None:
            took = True
            if lease.trial not in self._replica.ledger.pending:
                self._replica.catch_up()  # somebody else asked for it
            if not self._replica.ledger.is_open(lease.trial) or lease.trial in self._running:
                continue  # finished this moment; or our own lease, come back after a long silence
            if lease.attempts > self._attempts:
                reason = f"given up after {self._attempts} attempts: each time its worker died or fell silent"
                self._replica.catch_up({lease.trial: Result.failed(reason)})
                continue
            self._running[lease.trial] = lease.attempts
            self._backend.submit(self._replica.ledger.pending[lease.trial])
        return took

    def _hand_in(self, found: Sequence[Attempt]) -> None:
        objectives = self._replica.ledger.strategy.objectives
        results: dict[int, Result] = {}
        for made in found:
            trial_id = made.trial.id
            if made.result is not None:
                results[trial_id] = judged(made, objectives)
            elif self._running[trial_id] >= self._attempts:
                results[trial_id] = Result.failed(f"given up after {self._attempts} attempts: {made.lost}")
            else:
                self._store.give_back(self.owner, [trial_id], counted=True)
                del self._running[trial_id]
        if results:
            self._replica.catch_up(results)
            for trial_id in results:
                del self._running[trial_id]

    def _renew(self) -> None:
        now = time.monotonic()
        if self._running and now - self._renewed >= self._store.lease_seconds / _RENEWALS:
            self._store.renew(self.owner, list(self._running))
            self._renewed = now
