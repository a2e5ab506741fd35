"""Evaluations in worker processes of our own: warm, watched, replaced when they die.

A worker takes one trial after the other. It may raise, crash, hang or exhaust its memory; the trial gets a failed
result, the worker is replaced, and nobody else notices. A worker that is killed from outside loses nothing but time:
its trial is handed back as lost, to be taken up again.

Workers end with the process that started them, however that ends: they hold a pipe whose closing they wait for, and
on Linux the kernel kills them besides.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from multiprocessing import connection, get_all_start_methods, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.base import Evaluator, WeightStore
from archsmith.run.attempt import Attempt, attempt
from archsmith.space import Result, Trial

OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Ends that come from outside (an operator, the kernel's out-of-memory killer) rather than from the candidate."""

_READY = "ready"
_FAILED_STARTS = 3
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one evaluation may use.

    Args:
        seconds: Wall-clock time; beyond it the worker is killed. None for any.
        memory_bytes: Address space beyond what the worker has when it is ready (libraries that the evaluator imports
            later count). None for any. Linux only.

    Raises:
        UserError: A limit that is not positive.
    """

    seconds: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("time_limit", self.seconds), ("memory_limit", self.memory_bytes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise UserError(name, value, allowed="a number above 0, or None")

    def __bool__(self) -> bool:
        return self.seconds is not None or self.memory_bytes is not None


class _Worker:
    """A process, its pipe, and what it is doing."""

    def __init__(self, context: Any, evaluator: Evaluator, weights: WeightStore | None, limits: Limits) -> None:
        self.pipe, theirs = context.Pipe()
        life, self._life = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, life, evaluator, weights, limits.memory_bytes), name="archsmith-worker"
        )
        self.process.start()
        theirs.close()
        life.close()
        self.ready = False
        self.trial: Trial | None = None
        self.started = 0.0

    def give(self, trial: Trial) -> None:
        self.trial = trial
        self.started = time.monotonic()
        with contextlib.suppress(OSError):  # it died: its sentinel tells
            self.pipe.send(trial)

    def end(self) -> int | None:
        """Kill it with everything it started; return its exit code."""
        pid = self.process.pid
        self.process.kill()
        self.process.join()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid is not None:
                os.killpg(pid, signal.SIGKILL)  # what it started lives in its process group
        code = self.process.exitcode
        self.pipe.close()
        self._life.close()
        return code


class WorkerPool:
    """Evaluates trials in worker processes.

    Args:
        evaluator: Sent to each worker once, so it has to pickle.
        workers: Number of processes, started with the first trials.
        limits: Of one evaluation.
        weights: Passed on to the evaluator; has to pickle.
        start_method: Of ``multiprocessing``; by default ``"forkserver"`` where there is one, else ``"spawn"``.

    A script that uses it needs the usual ``if __name__ == "__main__":`` around its body, because workers import it.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        workers: int = 1,
        limits: Limits | None = None,
        weights: WeightStore | None = None,
        start_method: str | None = None,
    ) -> None:
        methods = get_all_start_methods()
        self._context = get_context(start_method or ("forkserver" if "forkserver" in methods else "spawn"))
        if self._context.get_start_method() == "forkserver":
            self._context.set_forkserver_preload(["__main__", __name__])  # imported once, not once per worker
        self._evaluator, self._weights = evaluator, weights
        self._limits = limits or Limits()
        self._size = workers
        self._workers: list[_Worker] = []
        self._queue: deque[Trial] = deque()
        self._failed_starts = 0

    @property
    def running(self) -> dict[int, int]:
        """Process id by trial id, of the evaluations under way."""
        return {w.trial.id: w.process.pid or 0 for w in self._workers if w.trial is not None}

    def submit(self, trial: Trial) -> None:
        """Have a trial evaluated as soon as a worker is free; ``collect`` returns what came of it."""
        self._queue.append(trial)
        self._hand_out()

    def collect(self, timeout: float | None = None) -> list[Attempt]:
        """Wait for results and return those that came, in the order of trial ids; none when the time is over.

        Raises:
            UserError: Workers cannot be started (the evaluator cannot be rebuilt in another process, say).
        """
        limit = None if timeout is None else time.monotonic() + timeout
        found: list[Attempt] = []
        while not found:
            self._hand_out()
            if not self._workers:
                return []
            pause = self._pause(limit)
            handles: list[Any] = [w.pipe for w in self._workers] + [w.process.sentinel for w in self._workers]
            connection.wait(handles, pause)
            for worker in list(self._workers):
                if (made := self._look_at(worker)) is not None:
                    found.append(made)
            if limit is not None and time.monotonic() >= limit:
                break
        self._hand_out()
        return sorted(found, key=lambda made: made.trial.id)

    def close(self) -> None:
        """Kill the workers and what they started; evaluations under way are given up."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._queue.clear()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _hand_out(self) -> None:
        while self._queue:
            idle = next((w for w in self._workers if w.trial is None and w.ready), None)
            if idle is None:
                missing = min(self._size, len(self._queue) + sum(w.trial is not None for w in self._workers))
                while len(self._workers) < missing:
                    self._workers.append(self._start())
                return
            idle.give(self._queue.popleft())

    def _start(self) -> _Worker:
        try:
            return _Worker(self._context, self._evaluator, self._weights, self._limits)
        except (TypeError, AttributeError, ValueError, ImportError) as error:  # what pickling raises, PicklingError too
            raise _not_sendable(self._evaluator, error) from error
        except Exception as error:
            if type(error).__name__ == "PicklingError":
                raise _not_sendable(self._evaluator, error) from error
            raise

    def _pause(self, limit: float | None) -> float | None:
        """Return how long to wait at most: until the call's limit or the first evaluation's."""
        ends = [] if limit is None else [limit]
        if self._limits.seconds is not None:
            ends += [w.started + self._limits.seconds for w in self._workers if w.trial is not None]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _look_at(self, worker: _Worker) -> Attempt | None:
        """Return what a worker's trial came to, if it did; replace the worker when it is dead or out of time."""
        try:
            while worker.pipe.poll():
                message = worker.pipe.recv()
                if message == _READY:
                    worker.ready = True
                    self._failed_starts = 0
                    self._hand_out()
                    continue
                if isinstance(message, UserError):
                    raise message
                worker.trial = None
                if message.out_of_memory:
                    self._remove(worker)
                return message
        except (EOFError, OSError):
            worker.process.join(1.0)
        elapsed = time.monotonic() - worker.started
        trial, limit = worker.trial, self._limits.seconds
        if not worker.process.is_alive():
            return self._bury(worker, trial, elapsed)
        if trial is not None and limit is not None and elapsed >= limit:
            self._remove(worker)
            return Attempt(trial, Result.failed(f"time limit: not finished after {limit:g} s, killed", seconds=elapsed))
        return None

    def _bury(self, worker: _Worker, trial: Trial | None, elapsed: float) -> Attempt | None:
        code = self._remove(worker)
        if trial is None:
            self._failed_starts += not worker.ready
            if self._failed_starts >= _FAILED_STARTS:
                raise UserError(
                    "workers",
                    Shown(f"processes that end while they start ({how_it_ended(code)})"),
                    allowed="an evaluator that other processes can load",
                    hint="What they printed says why. A script needs if __name__ == '__main__': around its body.",
                )
            return None
        how = how_it_ended(code)
        if code is not None and -code in OUTSIDE_SIGNALS:
            return Attempt(trial, None, lost=f"the worker process {how}")
        return Attempt(trial, Result.failed(f"the process of the evaluation {how}", seconds=elapsed))

    def _remove(self, worker: _Worker) -> int | None:
        self._workers.remove(worker)
        return worker.end()


def how_it_ended(code: int | None) -> str:
    """Return the end of a sentence about an exit code: ``was ended by SIGSEGV``, ``ended with exit code 3``."""
    if code is not None and code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with exit code {code}"


def attempt_apart(
    evaluator: Evaluator, trial: Trial, weights: WeightStore | None, limits: Limits, start_method: str | None = None
) -> Attempt:
    """Evaluate a trial in a child process of its own and wait for it: limits in an executor that knows none."""
    with WorkerPool(evaluator, limits=limits, weights=weights, start_method=start_method) as pool:
        pool.submit(trial)
        while not (made := pool.collect()):
            pass
        return made[0]


def _not_sendable(evaluator: Evaluator, error: Exception) -> UserError:
    return UserError(
        "evaluator",
        Shown(f"{type(evaluator).__name__}, which cannot be sent to another process ({error})"),
        allowed="an evaluator (and weight store) that pickles: an instance of a class at the top of a module",
        hint="Or evaluate in this process: workers=1 without time and memory limits.",
    )


def _serve(
    pipe: Connection, life: Connection, evaluator: Evaluator, weights: WeightStore | None, memory_bytes: int | None
) -> None:
    """Evaluate what comes through the pipe until it closes; the main function of a worker."""
    os.setsid()  # own process group: Ctrl-C is the coordinator's business, and children can be killed together
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, args=(life,), daemon=True).start()
    if memory_bytes is not None:
        _limit_memory(memory_bytes)
    pipe.send(_READY)
    while True:
        try:
            trial = pipe.recv()
        except (EOFError, OSError):
            return
        made = attempt(evaluator, trial, weights)
        try:
            pipe.send(made)
        except (TypeError, AttributeError, ValueError) as error:
            reason = f"the result cannot be sent ({type(error).__name__}: {error})"
            pipe.send(replace(made, result=Result.failed(reason), misuse=None))


def _end_with_parent(life: Connection) -> None:
    """Wait for the pipe to close, which only the end of the parent does, and end this process at once."""
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    import resource

    present = 0
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as stream:
        present = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + memory_bytes, present + memory_bytes))
