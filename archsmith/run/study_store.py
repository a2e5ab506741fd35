"""Where a study of one coordinating process is recorded: in memory, or in the journal of a run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from archsmith.core.journal import Event
from archsmith.run.directory import Run
from archsmith.run.ledger import Record
from archsmith.space import Result, Trial

STUDY_EVENTS = ("asked", "leased", "result", "told", "lost", "state")
"""Kinds of the journal entries that a study writes between its start and its end."""


class StudyStore(Record, Protocol):
    """A record that a study can be resumed from."""

    def open(self, header: Mapping[str, Any]) -> list[Event]:
        """Start or go on with the study that ``header`` identifies; return what was recorded so far.

        Raises:
            UserError: Another study is recorded there, or somebody else works on it.
        """

    def leased(self, trial: Trial, owner: str) -> None:
        """Note that ``owner`` begins to evaluate a trial."""

    def flush(self, *, patience: float = 0.0) -> None:
        """Make everything said so far durable, unless the oldest entry is younger than ``patience`` seconds."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the session: ``status`` is "finished", "stopped", or "failed" (an error; nothing is summarised)."""

    def history(self) -> list[tuple[Trial, Result]]:
        """Return the told trials with their results that are kept in memory, in the order they were told."""


class MemoryStore:
    """Keeps told trials in memory, or nothing at all; nothing survives the process.

    Args:
        keep: Whether ``history`` is kept. Without it memory does not grow with the number of evaluations.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._history: list[tuple[Trial, Result]] = []

    def open(self, header: Mapping[str, Any]) -> list[Event]:
        """Forget what was there before: an instance records one study."""
        self._history = []
        return []

    def asked(self, n: int, trials: Sequence[Trial]) -> None:
        """Nothing to do: the strategy keeps pending trials."""

    def leased(self, trial: Trial, owner: str) -> None:
        """Nothing to do."""

    def result(self, trial: Trial, result: Result, *, free: str | None, elapsed: float) -> None:
        """Nothing to do: what counts is kept when it is told."""

    def told(self, trial: Trial, result: Result) -> None:
        """Keep the trial and its result, if anything is kept."""
        if self._keep:
            self._history.append((trial, result))

    def lost(self, trial: Trial, reason: str) -> None:
        """Nothing to do."""

    def snapshot(self, state: Mapping[str, Any]) -> None:
        """Nothing to do: there is no later session."""

    def flush(self, *, patience: float = 0.0) -> None:
        """Nothing to do."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def history(self) -> list[tuple[Trial, Result]]:
        """Return the told trials and results, in the order they were told."""
        return self._history


class Batch:
    """Entries of a study as JSON objects that are still to be written."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.events: list[Event] = []
        self._clock = clock
        self._oldest = 0.0

    @property
    def age(self) -> float:
        """Seconds since the oldest entry was made; 0 when there is none."""
        return self._clock() - self._oldest if self.events else 0.0

    def take(self) -> list[Event]:
        """Return the entries and forget them."""
        events, self.events = self.events, []
        return events

    def _add(self, kind: str, **fields: Any) -> None:
        if not self.events:
            self._oldest = self._clock()
        self.events.append({"kind": kind, **fields})

    def asked(self, n: int, trials: Sequence[Trial]) -> None:
        """Note an ``ask``."""
        self._add("asked", n=n, trials=[trial.to_json() for trial in trials])

    def leased(self, trial: Trial, owner: str) -> None:
        """Note who evaluates."""
        self._add("leased", id=trial.id, owner=owner)

    def result(self, trial: Trial, result: Result, *, free: str | None, elapsed: float) -> None:
        """Note a result."""
        self._add("result", id=trial.id, result=result.to_json(), free=free, elapsed=round(elapsed, 3))

    def told(self, trial: Trial, result: Result) -> None:
        """Note a ``tell``: in the entry of the result when that is the last one, which is the rule."""
        last = self.events[-1] if self.events else {}
        if last.get("kind") == "result" and last["id"] == trial.id:
            last["told"] = True
        else:
            self._add("told", id=trial.id)

    def lost(self, trial: Trial, reason: str) -> None:
        """Note a dead worker."""
        self._add("lost", id=trial.id, reason=reason)

    def snapshot(self, state: Mapping[str, Any]) -> None:
        """Note the strategy's state."""
        self._add("state", state=dict(state))


class JournalStore(Batch):
    """Records a study in the journal of a run directory; that journal is all it takes to go on.

    Args:
        path: Folder of the run, new or of this study.

    Entries are written, one ``fsync`` a batch, before the coordinator waits for anything; only where evaluations take
    less than 50 ms do up to 50 ms of them share a batch. What a kill can cost is therefore 50 ms of work, which the
    resumed study does again with the same ids, architectures and seeds. Memory does not grow with the evaluations.

    Raises:
        UserError: From ``open``, as ``Run.create_or_open``; from writing, as ``Run.record``.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._run: Run | None = None

    def open(self, header: Mapping[str, Any]) -> list[Event]:
        """Lock the folder and return what is recorded there."""
        self._run = Run.create_or_open(self.path, header)
        return self._run.events()

    @property
    def run(self) -> Run:
        """The open run."""
        if self._run is None:
            raise RuntimeError("the store is not open")
        return self._run

    def flush(self, *, patience: float = 0.0) -> None:
        """Write what was said; with ``patience`` only when the oldest entry is older."""
        if self.events and self.age >= patience:
            self.run.record_many(self.take(), keep=False)

    def forget(self) -> None:
        """Drop the entries read at ``open`` from memory."""
        self.run.forget(*STUDY_EVENTS)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Write what is left, then ``result.json`` where the session ended in good order; give up the lock."""
        run = self.run
        try:
            self.flush()
            if status == "stopped":
                run.stopped(summary)
            elif status == "finished" and run.status != "finished":
                run.finish(summary)
        finally:
            run.close()
            self._run = None

    def history(self) -> list[tuple[Trial, Result]]:
        """Return nothing: ``archsmith.run.study.recorded_trials`` reads the journal."""
        return []


def owner_name(pid: int | None = None) -> str:
    """Return how a lease names its holder on this machine."""
    return f"process {pid or os.getpid()}"
