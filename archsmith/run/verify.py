"""``verify``: believe nothing that can be checked.

Every claim of a finished result is established again from the files alone, one row each. Code is executed only if
``model.py`` equals, byte for byte, what archsmith writes for the ``architecture.json`` beside it, which can name
nothing but archsmith's own layers; any other ``model.py`` needs the user's trust. Nothing is ever unpickled.

A row that cannot be checked here (data or an optional package missing) says so and is no failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from archsmith.core.errors import ArchsmithError, Shown, UserError
from archsmith.core.files import read_json, sha256_file
from archsmith.core.journal import Event, Journal, JournalError
from archsmith.run.checks import Failed, NotChecked, Report, Row, Rows
from archsmith.run.directory import FORMAT_VERSION, config_differences
from archsmith.run.own_verify import is_own_network, verify_own_network
from archsmith.run.verify_network import OnTestRead, once, verify_network
from archsmith.space import Budget
from archsmith.tasks.base import Task
from archsmith.tasks.catalogue import open_task

__all__ = ["verify_network", "verify_run"]


def verify_run(
    run_path: str | Path, *, trust: bool = False, task: Task | None = None, on_test_read: OnTestRead | None = None
) -> Report:
    """Check everything that a finished or stopped run says about its networks.

    Args:
        run_path: Directory of the run; it is only read.
        trust: Execute a ``model.py`` that is not the one archsmith writes, or the "module:factory" of a network of the
            user's own. Only for code whose author the user trusts.
        task: The run's task, needed only when it was the user's own and not one by name.
        on_test_read: Called before the test split is read, once; ``lambda: run.count_test_read("verify")``, say.

    Returns:
        One row for each check; ``report.ok`` is false if any failed.

    Raises:
        UserError: There is no run at ``run_path``, or it has no result yet.
    """
    path = Path(run_path)
    events = _events(path)
    result = _result(path)
    rows = Rows("run")
    rows.check("result.json", lambda: _check_result(path, result, events))
    rows.check("config.yaml", lambda: _check_config(path, events))
    config = events[0].get("config", {}) if events else {}
    rows.check("budget", lambda: _check_budget(config or _config(path), result))
    opened: list[Task] = []
    rows.check("task data", lambda: _open_task(config or _config(path), result, task, opened))
    hook = once(on_test_read)
    found: list[Row] = []
    for outcome in result["outcomes"]:
        label = str(outcome.get("label", ""))
        try:
            folder = _inside(path, outcome.get("folder"))
        except Failed as error:
            found.append(Row(label, "folder", "failed", str(error)))
            continue
        limits = result.get("limits") or {}
        verified = verify_own_network if is_own_network(folder) else verify_network
        found += verified(
            folder,
            trust=trust,
            task=opened[0] if opened else None,
            expected=outcome,
            limits=limits,
            label=label,
            on_test_read=hook,
        ).rows
    return Report((*rows.rows, *found))


def _events(path: Path) -> list[Event]:
    """Return the journal of the run at ``path``, empty when it was not delivered along."""
    if not path.is_dir() or not any((path / name).exists() for name in ("journal.jsonl", "result.json")):
        raise UserError(
            "run",
            Shown(f"{path}, where no run is"),
            allowed="the folder of a run",
            hint="Check the path that --out named.",
        )
    try:
        return Journal(path / "journal.jsonl").read()
    except JournalError as error:
        raise UserError("run", Shown(f"{path}, which is damaged ({error})"), allowed="an undamaged journal") from error


def _result(path: Path) -> dict[str, Any]:
    """Return ``result.json`` after checking that it has the form of one."""
    file = path / "result.json"
    if not file.exists():
        raise UserError(
            "run",
            Shown(f"{path}, which has no result yet"),
            allowed="a run that is finished or was stopped with a result",
            hint=f"Type: archsmith resume {path}",
        )
    try:
        result = read_json(file)
    except ValueError as error:
        raise UserError("result", Shown(f"{file}, which is not JSON ({error})"), allowed="an undamaged file") from error
    version = result.get("format_version") if isinstance(result, dict) else None
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UserError("format_version", Shown(f"{version!r} in {file}"), allowed=f"1 to {FORMAT_VERSION}")
    outcomes = result.get("outcomes")
    if not isinstance(outcomes, list) or not all(isinstance(outcome, dict) for outcome in outcomes) or not outcomes:
        raise UserError(
            "run",
            Shown(f"{path}, whose result has no finished network"),
            allowed="a run with at least one outcome",
            hint=f"Type: archsmith resume {path}",
        )
    return dict(result)


def _check_result(path: Path, result: Mapping[str, Any], events: list[Event]) -> str:
    ends = [event for event in events if event.get("kind") in ("finished", "stopped")]
    if not events:
        raise NotChecked("there is no journal beside it")
    if not ends or ends[-1].get("sha256") != sha256_file(path / "result.json"):
        raise Failed("it is not the file that the journal recorded when the run ended")
    return f"{result.get('status')}, as the journal recorded it; reads of the test split: {result.get('test_reads')}"


def _check_config(path: Path, events: list[Event]) -> str:
    found = _config(path)
    if not events:
        raise NotChecked("there is no journal beside it")
    if differences := config_differences(events[0].get("config", {}), found):
        raise Failed(f"edited after the run started: {'; '.join(differences[:3])}")
    return "the configuration that the run started with"


def _config(path: Path) -> dict[str, Any]:
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise Failed("config.yaml holds no mapping")
    config.pop("format_version", None)
    return config


def _check_budget(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Compare the limits with those that the budget means for the recorded costs of the largest network."""
    budget, limits = config.get("budget"), result.get("limits") or {}
    resolved = Budget.parse(budget).resolve(result.get("reference") or {}) if budget else Budget()
    expected = {limit.cost: limit.value for limit in resolved.limits}
    if limits != expected:
        raise Failed(f"the limits are {limits}, the budget {budget!r} means {expected}")
    return str(resolved) or "none was set"


def _open_task(config: Mapping[str, Any], result: Mapping[str, Any], given: Task | None, opened: list[Task]) -> str:
    """Open the task that the configuration names and put it into ``opened`` if it is the one of the run."""
    section = config.get("task")
    if not isinstance(section, dict) or "name" not in section:
        raise NotChecked("the configuration names no task")
    if given is None and section.get("own"):
        raise NotChecked("the run was made with a task of the user's own: pass it as task= to verify_run")
    try:
        task = given or open_task(**section)
    except (ArchsmithError, OSError) as error:
        raise NotChecked(f"the data are not at hand: {error}") from error
    digest = config.get("task_digest") or result.get("task_digest")
    if digest is not None and digest != task.digest:
        raise Failed(
            f"the data or their split are not the run's: digest {task.digest[:12]}..., recorded {digest[:12]}..."
        )
    opened.append(task)
    return f"{task.name}, digest {task.digest[:12]}..."


def _inside(path: Path, folder: object) -> Path:
    """Return an outcome's folder after checking that it lies inside the run and exists."""
    if not isinstance(folder, str) or not (path / folder).resolve().is_relative_to(path.resolve()):
        raise Failed(f"{folder!r} does not lie inside the run")
    if not (path / folder).is_dir():
        raise Failed(f"{folder} is missing")
    return path / folder
