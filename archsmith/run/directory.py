"""A run is a directory, and its journal is the truth about it.

``RUN/journal.jsonl`` begins with ``run_started``, which holds the configuration and its digest. ``config.yaml`` is
written from that event and never again; ``result.json`` is written when the run ends or is stopped. Whoever works on
the run holds ``RUN/lock``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from archsmith.config import FORMAT_VERSION as FORMAT_VERSION
from archsmith.core.errors import Shown, UserError
from archsmith.core.files import read_json, remove_parts, sha256_file, sha256_of, storage_errors, to_json, write_atomic
from archsmith.core.journal import Event, Journal, JournalError
from archsmith.run.lock import RunLock

Status = Literal["new", "unfinished", "finished"]
_BEFORE_THE_START = {"lock", "journal.jsonl"}  # what a process killed while starting a run may leave


def _system_time() -> datetime:
    return datetime.now(UTC)


class Run:
    """A run directory held by this process: ``with Run.create_or_open(path, config) as run: ...``.

    Made by ``create_or_open`` and ``open`` only; both lock it until ``close`` or the end of the ``with`` block. It is a
    ``Logger`` (``archsmith.core.protocols``).

    Attributes:
        path: The directory.
        config: The configuration in plain JSON values, without ``format_version``.
    """

    def __init__(
        self, path: Path, events: list[Event], journal: Journal, lock: RunLock, now: Callable[[], datetime]
    ) -> None:
        self.path = path
        self.config: dict[str, Any] = events[0]["config"]
        self._events = events
        self._journal = journal
        self._lock = lock
        self._now = now

    @classmethod
    def create_or_open(
        cls, path: str | Path, config: Mapping[str, Any], *, now: Callable[[], datetime] = _system_time
    ) -> Self:
        """Start a run in a new or empty folder, or go on with the one that is there under the same configuration.

        Args:
            path: Folder of the run; missing parents are made.
            config: Complete configuration, JSON values (a tuple counts as a list). A key ``format_version`` is accepted
                and left out, so that the content of a ``config.yaml`` can be passed as it is.
            now: Clock for the times of events, timezone-aware.

        Raises:
            UserError: The folder holds another configuration (with the differences), something that is no run, or a run
                of a newer version; its ``config.yaml`` was edited or its journal damaged; another process works on it;
                or it cannot be written. What was there before is untouched, and nothing new is left behind.
            ValueError: ``config`` holds NaN or an infinity.
            TypeError: ``config`` holds something that JSON cannot express.
        """
        path = Path(path)
        wanted = _plain(config)
        _refuse_newer(wanted.pop("format_version", FORMAT_VERSION), "the configuration")
        with storage_errors("out", path), _new_folders_removed_on_failure(path):
            _refuse_strangers(path)
            path.mkdir(parents=True, exist_ok=True)
            lock = RunLock(path / "lock")
            with _released_on_failure(lock):
                journal = Journal(path / "journal.jsonl")
                if not (events := _read_events(journal)):
                    with storage_errors("out", path, hint="No run was started."):
                        events = [_start(path, journal, wanted, now())]
                run = cls(path, events, journal, lock, now)
                run._check()
                if differences := config_differences(run.config, wanted):
                    raise UserError(
                        "out",
                        Shown(f"{path}, which holds a run with another configuration"),
                        allowed="a new or empty folder, or the configuration of the run",
                        hint=f"Choose another folder. Differences (the run's -> yours):{_indented(differences)}",
                    )
        return run

    @classmethod
    def open(cls, path: str | Path, *, now: Callable[[], datetime] = _system_time) -> Self:
        """Go on with the run at ``path`` under its own configuration.

        Raises:
            UserError: As for ``create_or_open``, and when no run was started at ``path``.
        """
        path = Path(path)
        journal = Journal(path / "journal.jsonl")
        with storage_errors("run", path):
            if not _read_events(journal):
                raise _no_run(path)
            lock = RunLock(path / "lock")
        with _released_on_failure(lock):
            run = cls(path, _read_events(journal), journal, lock, now)  # again: nobody else writes from here on
            run._check()
        return run

    def _check(self) -> None:
        """Refuse an edited configuration, restore a missing one, and tidy up after killed writers."""
        with storage_errors("out", self.path):
            remove_parts(self.path)
            file = self.path / "config.yaml"
            if not file.exists():  # killed between the first event and the file
                write_atomic(file, _to_yaml(self.config))
                return
            text = file.read_text(encoding="utf-8")
        try:
            found = _plain(yaml.safe_load(text))
            version = found.pop("format_version", FORMAT_VERSION)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            problem = " ".join(str(error).split())
            raise UserError(
                "config",
                Shown(f"{file}, which cannot be read ({problem})"),
                allowed="the file as archsmith wrote it",
                hint="Delete it to have it written again from the journal.",
            ) from error
        _refuse_newer(version, str(file))
        if differences := config_differences(self.config, found):
            raise UserError(
                "config",
                Shown(f"{file}, which was edited after the run started"),
                allowed="the configuration that the run started with",
                hint="Undo the edit, delete the file to have it written again, or start another run with the edited "
                f"file. Differences (started with -> found):{_indented(differences)}",
            )

    def close(self) -> None:
        """Give up the lock; a second call does nothing."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def status(self) -> Status:
        """``new`` while nothing was recorded after the start, ``finished`` after ``finish``, else ``unfinished``."""
        if self.events("finished"):
            return "finished"
        return "new" if len(self._events) == 1 else "unfinished"

    def record(self, kind: str, **fields: Any) -> None:
        """Append one event to the journal; it is on the disk when this returns.

        Args:
            kind: What happened, ``snake_case``.
            fields: JSON values. ``time`` is added here: UTC, whole seconds.

        Raises:
            UserError: The journal cannot be written (disk full, say); the event is not kept.
            ValueError: NaN or an infinity, or a field named ``time``.
            TypeError: A value that JSON cannot express.
        """
        self.record_many([{"kind": kind, **fields}])

    def record_many(self, events: Sequence[Mapping[str, Any]], *, keep: bool = True) -> None:
        """Append several events, each with its ``kind``, at the price of one; all of them are kept or none.

        Args:
            events: The events.
            keep: Whether ``events`` returns them from now on; without, they are in the journal only, and memory does
                not grow with the length of the run.

        Raises:
            As ``record``, and ValueError for an event without a ``kind``.
        """
        for event in events:
            if not isinstance(event.get("kind"), str) or "time" in event:
                raise ValueError(f"an event needs a text 'kind' and no 'time' (it is added here), got {dict(event)!r}")
        batch = [_event(self._now(), event) for event in events]
        with storage_errors("out", self._journal.path, hint="Everything recorded before is safe."):
            self._journal.append(batch)
        if keep:
            self._events.extend(batch)

    def forget(self, *kinds: str) -> None:
        """Drop the events of these kinds from memory; the journal keeps them."""
        self._events = [event for event in self._events if event["kind"] not in kinds]

    def events(self, kind: str | None = None) -> list[Event]:
        """Return the events of one kind, or all of them, oldest first."""
        return [event for event in self._events if kind is None or event["kind"] == kind]

    def history(self, kind: str = "epoch", *, by: str = "epoch") -> list[Event]:
        """Return one event per epoch in ascending order, the last attempt winning.

        A run that resumes at an earlier checkpoint replays epochs: an event of epoch ``e`` supersedes all earlier
        recorded events of epochs ``>= e``.

        Args:
            kind: Kind of the events.
            by: Name of the integer field that counts epochs (or steps, rounds).
        """
        kept: list[Event] = []
        for event in self.events(kind):
            while kept and kept[-1][by] >= event[by]:
                kept.pop()
            kept.append(event)
        return kept

    def count_test_read(self, why: str) -> None:
        """Journal that the test split is about to be read; call it before reading."""
        self.record("test_read", why=why)

    @property
    def test_reads(self) -> int:
        """How often the test split was read in the life of this run."""
        return len(self.events("test_read"))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json`` with status "finished" and record its SHA-256; the run is finished from here on.

        Args:
            result: JSON values; ``format_version``, ``status`` and ``test_reads`` are filled in here.

        Raises:
            UserError: The file or the journal cannot be written; the run stays unfinished and resumable.
        """
        self._end("finished", result)

    def stopped(self, result: Mapping[str, Any]) -> None:
        """Write the best finished result so far with status "stopped"; the run stays unfinished and resumable.

        Args and raises: as ``finish``.
        """
        self._end("stopped", result)

    def _end(self, status: Literal["finished", "stopped"], result: Mapping[str, Any]) -> None:
        if self.status == "finished":
            raise RuntimeError(f"{self.path} is finished already; its result is never replaced")
        ours = {"format_version": FORMAT_VERSION, "status": status, "test_reads": self.test_reads}
        data = to_json({**ours, **result, **ours}).encode()
        with storage_errors("out", self.path / "result.json", hint="The run can be resumed."):
            write_atomic(self.path / "result.json", data)
        self.record(status, sha256=sha256_of(data))

    def result(self) -> dict[str, Any] | None:
        """Return the content of ``result.json``, or None when the run was neither finished nor stopped yet.

        None also when the process was killed between writing the file and recording it: resuming writes it again.

        Raises:
            UserError: The run is finished and the file is missing or not the one recorded.
        """
        file = self.path / "result.json"
        ends = [event for event in self._events if event["kind"] in ("finished", "stopped")]
        if ends and file.exists() and sha256_file(file) == ends[-1]["sha256"]:
            stored: dict[str, Any] = read_json(file)
            return stored
        if self.status == "finished":
            raise UserError(
                "result",
                Shown(f"{file}, which is not the file that the run finished with"),
                allowed="the file whose SHA-256 is in the journal",
                hint="Restore it from a copy, or run the search again in another folder.",
            )
        return None


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line ``path: old -> new`` per differing value, in the order of ``old``, then of ``new``.

    Example:
        >>> config_differences({"train": {"epochs": 3, "lr": 0.1}}, {"train": {"epochs": 5, "lr": 0.1}, "seed": 1})
        ['train.epochs: 3 -> 5', 'seed: (not set) -> 1']
    """
    left, right = dict(_leaves(old, "")), dict(_leaves(new, ""))
    paths = [*left, *(path for path in right if path not in left)]
    shown = [(path, left.get(path, "(not set)"), right.get(path, "(not set)")) for path in paths]
    return [f"{path}: {before} -> {after}" for path, before, after in shown if before != after]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, JSON text) of every scalar and every empty container."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _start(path: Path, journal: Journal, config: dict[str, Any], time: datetime) -> Event:
    """Make the first event durable, then the configuration file."""
    fields = {"format_version": FORMAT_VERSION, "config_digest": _digest(config), "config": config}
    event = _event(time, {"kind": "run_started", **fields})
    config_file = _to_yaml(config)
    try:
        journal.append(event)
        write_atomic(path / "config.yaml", config_file)
    except BaseException:
        journal.path.unlink(missing_ok=True)
        (path / "lock").unlink(missing_ok=True)
        raise
    return event


def _read_events(journal: Journal) -> list[Event]:
    """Read the journal; its first event must say how the run started, in a version known here."""
    with storage_errors("run", journal.path):
        try:
            events = journal.read()
        except JournalError as error:
            raise _damaged(journal.path, str(error)) from error
    if events:
        started = events[0]
        _refuse_newer(started.get("format_version", FORMAT_VERSION), f"the run in {journal.path.parent}")
        if started.get("kind") != "run_started" or _digest(started.get("config")) != started.get("config_digest"):
            raise _damaged(journal.path, "its first event is not a run's start")
    return events


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        "run",
        Shown(f"{path}, which is damaged ({problem.rstrip('.')})"),
        allowed="a journal as archsmith wrote it",
        hint="Restore it from a copy, or start again in another folder.",
    )


def _no_run(path: Path) -> UserError:
    return UserError(
        "run", Shown(f"{path}, where no run is"), allowed="the folder of a run", hint="Check the path that --out named."
    )


def _refuse_newer(version: Any, what: str) -> None:
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            "format_version",
            Shown(f"{version!r} in {what}"),
            allowed=f"1 to {FORMAT_VERSION}",
            hint="Install the version of archsmith that made it, or a newer one.",
        )


def _refuse_strangers(path: Path) -> None:
    """Refuse a folder that holds files and no journal with a run's start."""
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    strangers = [name for name in names if name not in _BEFORE_THE_START and not name.endswith(".part")]
    if strangers and not _read_events(Journal(path / "journal.jsonl")):
        more = ", ..." if len(strangers) > 3 else ""
        raise UserError(
            "out",
            Shown(f"{path}, which holds something else ({', '.join(strangers[:3])}{more})"),
            allowed="a new or empty folder, or a run",
            hint="Choose another folder; nothing was changed.",
        )


@contextmanager
def _new_folders_removed_on_failure(path: Path) -> Iterator[None]:
    """Remove the folders that the block makes at ``path`` when it fails; those that existed before stay."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


@contextmanager
def _released_on_failure(lock: RunLock) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lock.release()
        raise


def _event(time: datetime, fields: Mapping[str, Any]) -> Event:
    """Return the event as the journal will hold it: plain JSON values, ``kind`` and ``time`` in front."""
    stamp = time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return _plain({"kind": fields["kind"], "time": stamp, **fields})


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy in the types that JSON gives back."""
    if not isinstance(value, Mapping):
        raise TypeError(f"a mapping is needed, got {type(value).__name__}")
    copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    return copy


def _digest(config: Any) -> str:
    return sha256_of(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())


def _to_yaml(config: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump({"format_version": FORMAT_VERSION, **config}, sort_keys=False, width=120)
    return text


def _indented(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)
