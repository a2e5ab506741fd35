"""One study in a database that several machines work on: its events, and a lease for each trial under way.

The events are the same as in a run's journal, and as there they are all it takes to rebuild the study. Whoever adds to
them locks the study's row first, so that there is one order. Leases say who evaluates what until when, by the clock of
the database; a lease that nobody renews is taken over by whoever asks next. PostgreSQL for several machines; SQLite for
several processes of one machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.core.journal import Event
from archsmith.run.directory import config_differences

T = TypeVar("T")

STORE_VERSION = 1
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_SQLITE_WAIT = 2.0


class StoreUnusable(UserError):
    """The database stayed locked or unreachable for longer than the worker's patience."""


class Lease(NamedTuple):
    """The right to evaluate a trial.

    Attributes:
        trial: Id of the trial.
        attempts: How often the trial was begun, this time included; given back in good order does not count.
    """

    trial: int
    attempts: int


class SharedStore:
    """A study's place in a database.

    Args:
        url: As SQLAlchemy writes it: ``"postgresql+psycopg://user:password@host/database"``, or
            ``"sqlite:///study.db"`` for one machine.
        study: Name of the study in the database.
        lease_seconds: How long a lease holds without being renewed; a dead worker's trial waits as long.
        patience: Seconds to go on trying, at growing intervals, while the database is locked or unreachable.

    Raises:
        UserError: The URL is none, or of another database.
        MissingExtra: The extra ``sql`` is not installed.
    """

    def __init__(self, url: str, study: str, *, lease_seconds: float = 60.0, patience: float = 60.0) -> None:
        for name, value in (("lease_seconds", lease_seconds), ("patience", patience)):
            if not value > 0:
                raise UserError(name, value, allowed="seconds above 0")
        self._sql = _sqlalchemy()
        try:
            parsed = self._sql.engine.make_url(url)
        except self._sql.exc.ArgumentError as error:
            raise UserError("url", url, allowed="postgresql+psycopg://user@host/database or sqlite:///file") from error
        if parsed.get_backend_name() not in ("postgresql", "sqlite"):
            raise UserError(
                "url", Shown(parsed.render_as_string(hide_password=True)), allowed="a PostgreSQL or SQLite database"
            )
        self.study, self.lease_seconds, self.patience = study, lease_seconds, patience
        self.place = parsed.render_as_string(hide_password=True)
        self._is_sqlite = parsed.get_backend_name() == "sqlite"
        try:
            self._engine = self._engine_of(parsed)
        except ImportError as error:
            raise MissingExtra("psycopg", "sql", "a study on PostgreSQL") from error
        self._tables = _Tables(self._sql)
        self._id = 0

    def open(self, header: Mapping[str, Any]) -> None:
        """Start the study, or join it if it is there.

        Raises:
            UserError: The study there has another header (another space or version of it, strategy, seed, ...), or the
                database stays locked or unreachable.
        """
        wanted = json.loads(json.dumps({**header, "store_version": STORE_VERSION}))
        self._do(self._tables.metadata.create_all, starting=True)
        found = self._do(lambda connection: self._find_or_start(connection, wanted), starting=True)
        if differences := config_differences(found, wanted):
            space = found.get("space_digest") != wanted["space_digest"]
            raise UserError(
                "study",
                Shown(f"{self.study!r} in {self.place}, where it is another study than this worker's"),
                allowed="workers with the same space, strategy, seed and settings as the one that started it",
                hint=("This worker has another version of the space. " if space else "")
                + "Install the same version, or choose another name. Differences (the study's -> this worker's):"
                + "".join(f"\n  {line}" for line in differences),
            )

    def transact(self, after: Callable[[], int], change: Callable[[list[Event]], tuple[list[Event], set[int]]]) -> int:
        """Add to the study, alone; when the database fails in between, both functions are called again.

        Args:
            after: Returns the number of the last event that the caller knows, 0 for none.
            change: Called with the later events while nobody else can add any; returns the events to add and the ids
                of all trials that wait for an evaluation, under way or not.

        Returns:
            The number of the last event.
        """

        def work(connection: Any) -> int:
            select, t = self._sql.select, self._tables
            mine = t.studies.c.id == self._id
            last: int = connection.execute(select(t.studies.c.events).where(mine).with_for_update()).scalar_one()
            rows = connection.execute(
                select(t.events.c.body)
                .where(t.events.c.study == self._id, t.events.c.number > after())
                .order_by(t.events.c.number)
            )
            events, waiting = change([json.loads(row.body) for row in rows])
            if events:
                self._append(connection, last, events)
                last += len(events)
                connection.execute(self._sql.update(t.studies).where(mine).values(events=last))
            self._offer(connection, waiting)
            return last

        return self._do(work)

    def _append(self, connection: Any, last: int, events: list[Event]) -> None:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        rows = [
            {
                "study": self._id,
                "number": last + i,
                "body": json.dumps({**event, "time": stamp}, ensure_ascii=False, allow_nan=False),
            }
            for i, event in enumerate(events, start=1)
        ]
        connection.execute(self._sql.insert(self._tables.events), rows)

    def _offer(self, connection: Any, waiting: set[int]) -> None:
        """Make the trials to be leased exactly those that wait for an evaluation."""
        leases = self._tables.leases
        mine = leases.c.study == self._id
        present = {row.trial for row in connection.execute(self._sql.select(leases.c.trial).where(mine))}
        if done := present - waiting:
            connection.execute(self._sql.delete(leases).where(mine, leases.c.trial.in_(done)))
        if fresh := sorted(waiting - present):
            empty = {"study": self._id, "owner": "", "expires": 0.0, "attempts": 0}
            connection.execute(self._sql.insert(leases), [{**empty, "trial": trial} for trial in fresh])

    def take(self, owner: str) -> Lease | None:
        """Lease the first trial that nobody works on, or whose worker stopped renewing; None when there is none."""

        def work(connection: Any) -> Lease | None:
            t = self._tables
            now = self._now()
            row = connection.execute(
                self._sql.select(t.leases.c.trial, t.leases.c.attempts)
                .where(t.leases.c.study == self._id, t.leases.c.expires < now)
                .order_by(t.leases.c.trial)
                .limit(1)
                .with_for_update(skip_locked=True)
            ).first()
            if row is None:
                return None
            self._set(connection, [row.trial], owner=owner, expires=now + self.lease_seconds, attempts=row.attempts + 1)
            return Lease(row.trial, row.attempts + 1)

        return self._do(work)

    def renew(self, owner: str, trials: Sequence[int]) -> None:
        """Hold leases for another ``lease_seconds``, those that are still the owner's."""
        self._do(lambda connection: self._set(connection, trials, mine=owner, expires=self._now() + self.lease_seconds))

    def give_back(self, owner: str, trials: Sequence[int], *, counted: bool) -> None:
        """Let others take these trials at once; ``counted`` says whether this attempt was one."""
        attempts = self._tables.leases.c.attempts - (0 if counted else 1)
        self._do(lambda connection: self._set(connection, trials, mine=owner, owner="", expires=0.0, attempts=attempts))

    def events(self) -> list[Event]:
        """Return all events, oldest first."""
        t = self._tables
        query = self._sql.select(t.events.c.body).where(t.events.c.study == self._id).order_by(t.events.c.number)
        return self._do(lambda connection: [json.loads(row.body) for row in connection.execute(query)])

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _set(self, connection: Any, trials: Sequence[int], *, mine: str | None = None, **values: Any) -> None:
        t = self._tables
        change = self._sql.update(t.leases).where(t.leases.c.study == self._id, t.leases.c.trial.in_(trials))
        if mine is not None:
            change = change.where(t.leases.c.owner == mine)
        connection.execute(change.values(**values))

    def _now(self) -> Any:
        """Return the database's clock, in seconds; the machine's own where database and workers share it."""
        if self._is_sqlite:
            return time.time()
        func = self._sql.func
        return self._sql.extract("epoch", func.clock_timestamp())

    def _find_or_start(self, connection: Any, header: dict[str, Any]) -> dict[str, Any]:
        t = self._tables
        query = self._sql.select(t.studies.c.id, t.studies.c.header).where(t.studies.c.name == self.study)
        row = connection.execute(query).first()
        if row is None:
            values = {"name": self.study, "header": json.dumps(header), "events": 0}
            connection.execute(self._sql.insert(t.studies), values)
            row = connection.execute(query).one()
        self._id = row.id
        found: dict[str, Any] = json.loads(row.header)
        return found

    def _do(self, work: Callable[[Any], T], *, starting: bool = False) -> T:
        """Carry out a transaction; while the database is locked or unreachable, again and again."""
        pause, limit = _FIRST_PAUSE, time.monotonic() + self.patience
        errors = self._sql.exc
        while True:
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except (errors.OperationalError, errors.InterfaceError, errors.InternalError) as error:
                problem: Exception = error
            except (errors.IntegrityError, errors.ProgrammingError) as error:
                if not starting:
                    raise
                problem = error  # two workers made the tables, or started the study, at the same time
            if time.monotonic() + pause > limit:
                raise StoreUnusable(
                    "store",
                    Shown(f"{self.place}, which cannot be used ({_cause(problem)})"),
                    allowed="a database that answers",
                    hint=f"Tried for {self.patience:g} s. What was recorded is safe: start this worker again when the "
                    "database is there; trials that it had begun are taken up under the same ids.",
                ) from problem
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _engine_of(self, url: Any) -> Any:
        if not self._is_sqlite:
            connect = {"connect_timeout": max(2, int(min(self.patience, 10)))}
            return self._sql.create_engine(url, pool_pre_ping=True, pool_size=1, connect_args=connect)
        engine = self._sql.create_engine(url, connect_args={"timeout": min(self.patience, _SQLITE_WAIT)})

        def prepare(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # transactions begin where we say, not where the driver guesses

        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # a writer from the start: nobody else adds meanwhile

        self._sql.event.listen(engine, "connect", prepare)
        self._sql.event.listen(engine, "begin", begin)
        return engine


class _Tables:
    """The three tables, in SQLAlchemy's words."""

    def __init__(self, sql: Any) -> None:
        column, integer, text = sql.Column, sql.Integer, sql.Text
        self.metadata = sql.MetaData()
        self.studies = sql.Table(
            "archsmith_studies",
            self.metadata,
            column("id", integer, primary_key=True),
            column("name", sql.String(200), unique=True, nullable=False),
            column("header", text, nullable=False),
            column("events", integer, nullable=False),  # how many: the number of the last one
        )
        self.events = sql.Table(
            "archsmith_events",
            self.metadata,
            column("study", integer, primary_key=True, autoincrement=False),
            column("number", integer, primary_key=True, autoincrement=False),
            column("body", text, nullable=False),
        )
        self.leases = sql.Table(
            "archsmith_leases",
            self.metadata,
            column("study", integer, primary_key=True, autoincrement=False),
            column("trial", integer, primary_key=True, autoincrement=False),
            column("owner", sql.String(200), nullable=False),
            column("expires", sql.Double, nullable=False),  # seconds of the database's clock; 0: nobody's
            column("attempts", integer, nullable=False),
        )


def _sqlalchemy() -> Any:
    try:
        import sqlalchemy
        import sqlalchemy.event
        import sqlalchemy.exc
    except ImportError as error:
        raise MissingExtra("sqlalchemy", "sql", "a study shared by several machines") from error
    return sqlalchemy


def _cause(error: Exception) -> str:
    original = getattr(error, "orig", None) or error
    return " ".join(str(original).split())[:300]
