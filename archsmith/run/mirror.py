"""A study's journal as an Optuna study, for ``optuna-dashboard`` and every other tool that reads one.

The mirror is derived: it can be deleted and made again at any time, nothing is read back from it, and it may be brought
up to date while the study runs. Trial number ``n`` of Optuna is trial ``n + 1`` here.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.core.journal import Event, Journal
from archsmith.run.ledger import trials_of
from archsmith.space import Objective, Result, Trial

MIRROR_FILE = "optuna.db"
_MANY_VALUES = 32
_DISTRIBUTIONS = "archsmith_distributions"


@dataclass(frozen=True)
class Mirror:
    """Where a mirrored study is.

    Attributes:
        url: Of the storage, as Optuna and ``optuna-dashboard`` take it.
        study: Name of the study in it.
        trials: How many trials it holds.
        written: How many of them are new or changed.
    """

    url: str
    study: str
    trials: int
    written: int

    @property
    def command(self) -> str:
        """The command that opens it."""
        return f"optuna-dashboard {self.url}"


def mirror_study(run: str | Path, *, storage: str | None = None, study: str | None = None) -> Mirror:
    """Bring the Optuna study of a study's run directory up to date; make it when it is not there.

    Params are the decisions that the architecture has, values the objectives; ok is COMPLETE, failed FAIL, infeasible
    PRUNED, pending RUNNING. The user attributes ``trial`` and ``result`` hold the rest: id, fidelity, parent, seed,
    digest of the architecture; all metrics and costs, seconds, reason.
    Values of a path with few different ones, or with text, make a categorical distribution, others a range. When a
    value appears that a distribution lacks, the study is written anew.

    Args:
        run: Folder of the study; only its journal is read.
        storage: URL of an Optuna RDB storage; by default the SQLite file ``optuna.db`` in the folder.
        study: Name of the Optuna study; by default the folder's name.

    Raises:
        UserError: No study is recorded at ``run``, the Optuna study is not a mirror of one, or the storage cannot be
            used.
        MissingExtra: The extra ``dashboard`` is not installed.
    """
    optuna = _optuna()
    run = Path(run)
    events = Journal(run / "journal.jsonl").read()
    config = events[0].get("config", {}) if events else {}
    if config.get("kind") != "study":
        raise UserError("run", Shown(f"{run}, where no study is recorded"), allowed="the folder of a study")
    objectives = [Objective.from_json(row) for row in config["objectives"]]
    url = storage or f"sqlite:///{(run / MIRROR_FILE).resolve()}"
    name = study or run.resolve().name
    trials = list(trials_of(events))
    distributions = _distributions(optuna, (trial for trial, _ in trials))
    with _quiet(optuna), _storage_errors(url):
        place = optuna.storages.RDBStorage(url)
        if storage is None:  # our own file can be made again: no need to wait for the disk at each of many commits
            from sqlalchemy import event

            event.listen(place.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
            place.engine.dispose()
        found = _opened(optuna, place, name, objectives, distributions)
        written = _written(optuna, place, found, trials, objectives, distributions, _times(events))
        place.remove_session()
    return Mirror(url, name, len(trials), written)


def serve_mirror(
    run: str | Path, mirror: Mirror, *, host: str = "127.0.0.1", port: int = 8080, refresh_seconds: float = 5.0
) -> None:
    """Show a mirror in ``optuna-dashboard`` until Ctrl-C, and bring it up to date meanwhile.

    Raises:
        MissingExtra: ``optuna-dashboard`` is not installed.
    """
    try:
        run_server = import_module("optuna_dashboard").run_server
    except ImportError as error:
        raise MissingExtra("optuna-dashboard", "dashboard", "serving a dashboard") from error
    over = threading.Event()

    def refresh() -> None:
        while not over.wait(refresh_seconds):
            mirror_study(run, storage=mirror.url, study=mirror.study)

    threading.Thread(target=refresh, daemon=True).start()
    try:
        run_server(mirror.url, host=host, port=port)
    finally:
        over.set()


def _opened(optuna: Any, storage: Any, name: str, objectives: list[Objective], distributions: Mapping[str, Any]) -> int:
    """Return the id of the study, empty where it was missing or its distributions have changed."""
    wanted = {path: optuna.distributions.distribution_to_json(d) for path, d in distributions.items()}
    with contextlib.suppress(KeyError):
        study_id: int = storage.get_study_id_from_name(name)
        recorded = storage.get_study_user_attrs(study_id).get(_DISTRIBUTIONS)
        if recorded is None:
            raise UserError(
                "study",
                name,
                allowed="the name of a mirror, or a new name",
                hint="The storage holds another study of this name, which was left as it is.",
            )
        if recorded == wanted:
            return study_id
        storage.delete_study(study_id)
    directions = [optuna.study.StudyDirection[objective.direction.upper()] for objective in objectives]
    study_id = storage.create_new_study(directions, study_name=name)
    storage.set_study_user_attr(study_id, _DISTRIBUTIONS, wanted)
    storage.set_study_system_attr(study_id, "study:metric_names", [objective.metric for objective in objectives])
    return study_id


def _written(
    optuna: Any,
    storage: Any,
    study_id: int,
    trials: list[tuple[Trial, Result | None]],
    objectives: list[Objective],
    distributions: Mapping[str, Any],
    times: Mapping[int, tuple[datetime, datetime | None]],
) -> int:
    """Add trials that are new, finish those that were running; return how many."""
    present = storage.get_all_trials(study_id, deepcopy=False)
    state_of = optuna.trial.TrialState
    written = 0
    for trial, result in trials:
        state, values = _state(state_of, result, objectives)
        if trial.id <= len(present):
            old = present[trial.id - 1]
            if old.state == state_of.RUNNING and state != state_of.RUNNING:
                for key, value in _notes(trial, result).items():
                    storage.set_trial_user_attr(old._trial_id, key, value)
                storage.set_trial_state_values(old._trial_id, state, values)
                written += 1
            continue
        started, ended = times[trial.id]
        params = {path: _param(value) for path, value in trial.architecture.items()}
        template = optuna.trial.FrozenTrial(
            number=trial.id - 1,
            trial_id=-1,  # the storage gives it its own
            state=state,
            value=None,
            values=values,
            params=params,
            distributions={path: distributions[path] for path in params},
            user_attrs=_notes(trial, result),
            system_attrs={},
            intermediate_values={},
            datetime_start=started,
            datetime_complete=None if result is None else ended,
        )
        storage.create_new_trial(study_id, template_trial=template)
        written += 1
    return written


def _state(state_of: Any, result: Result | None, objectives: list[Objective]) -> tuple[Any, list[float] | None]:
    if result is None:
        return state_of.RUNNING, None
    if result.status == "ok":
        return state_of.COMPLETE, [objective.value(result) for objective in objectives]
    return (state_of.FAIL if result.status == "failed" else state_of.PRUNED), None


def _notes(trial: Trial, result: Result | None) -> dict[str, Any]:
    notes: dict[str, Any] = {"trial": {**trial.to_json(), "architecture": trial.architecture.digest}}
    return notes if result is None else notes | {"result": result.to_json()}


def _times(events: list[Event]) -> dict[int, tuple[datetime, datetime | None]]:
    """Return when each trial was asked or last begun, and when its result came: local time, as Optuna writes it."""
    times: dict[int, tuple[datetime, datetime | None]] = {}
    for event in events:
        if event["kind"] in ("asked", "leased", "result"):
            when = datetime.fromisoformat(event["time"]).astimezone().replace(tzinfo=None)
            if event["kind"] == "asked":
                times |= {row["id"]: (when, None) for row in event["trials"]}
            elif event["kind"] == "leased":
                times[event["id"]] = (when, None)
            else:
                times[event["id"]] = (times[event["id"]][0], when)
    return times


def _distributions(optuna: Any, trials: Iterable[Trial]) -> dict[str, Any]:
    """Return one distribution per path, that holds every value seen."""
    seen: dict[str, dict[str, Any]] = {}
    for trial in trials:
        for path, value in trial.architecture.items():
            param = _param(value)
            seen.setdefault(path, {})[json.dumps([type(param).__name__, param])] = param
    return {path: _distribution(optuna.distributions, list(values.values())) for path, values in seen.items()}


def _distribution(kinds: Any, values: list[Any]) -> Any:
    if all(type(value) is float for value in values):
        return kinds.FloatDistribution(min(values), max(values))
    if all(type(value) is int for value in values):
        if len(values) > _MANY_VALUES:
            return kinds.IntDistribution(min(values), max(values))
        return kinds.CategoricalDistribution(sorted(values))
    return kinds.CategoricalDistribution(sorted(values, key=lambda value: (type(value).__name__, str(value))))


def _param(value: Any) -> Any:
    """Return a decision's value as Optuna can hold it: subsets become text."""
    return json.dumps(value) if isinstance(value, tuple) else value


@contextlib.contextmanager
def _quiet(optuna: Any) -> Any:
    """Keep Optuna from writing a line per study."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextlib.contextmanager
def _storage_errors(url: str) -> Any:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(
            "storage",
            Shown(f"{url} ({cause})"),
            allowed="an RDB storage that Optuna can write",
            hint="The mirror can be made anew anywhere: name another place with --storage.",
        ) from error


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("optuna", "dashboard", "mirroring a study for optuna-dashboard") from error
    return optuna
