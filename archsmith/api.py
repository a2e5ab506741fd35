"""The three jobs as Python functions; the command line is a thin layer over them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from archsmith.config import RunConfig, validated
from archsmith.core.errors import UserError
from archsmith.methods import load_method
from archsmith.run.costs import CostModel
from archsmith.run.directory import Run
from archsmith.run.drive import drive
from archsmith.run.report import Report
from archsmith.run.stop import StopRequest
from archsmith.run.verify import verify_run
from archsmith.space import Budget
from archsmith.tasks import Task, open_task


@dataclass(frozen=True)
class Outcome:
    """What a run ended with.

    Attributes:
        path: Folder of the run.
        result: Content of ``result.json``: status, budget, outcomes with files, metrics and costs.
    """

    path: Path
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        """Return "finished", or "stopped" for a run that can be resumed."""
        return str(self.result["status"])

    @property
    def best(self) -> Mapping[str, Any]:
        """The first outcome: label, folder, files, metrics, costs."""
        outcome: Mapping[str, Any] = self.result["outcomes"][0]
        return outcome

    @property
    def folder(self) -> Path:
        """Folder with ``model.py``, ``weights.safetensors``, ``model.onnx`` and ``architecture.json``."""
        return self.path / str(self.best["folder"])


def search(
    task: str | Task = "digits",
    *,
    method: str = "atomnas",
    family: str = "mobile",
    budget: str | None = None,
    out: str | Path,
    seed: int = 0,
    data: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    task_options: Mapping[str, Any] | None = None,
    family_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    memory_format: str = "channels_last",
    time_limit: float | None = None,
    quiet: bool = False,
) -> Outcome:
    """Find and train a network for a task within a budget; go on if ``out`` holds the same run unfinished.

    Args:
        task: Name of a task (``archsmith tasks``), or a ``Task`` of your own. A run of your own task is resumed by
            calling this again with the same arguments.
        method: Slug of a search method (``archsmith methods``).
        family: Name of a family (``archsmith families``).
        budget: For example "macs<=0.4x, params<=200k"; ``x`` is relative to the largest network.
        out: Folder of the run.
        seed: Seed of everything random.
        data: File or folder that the task reads.
        settings: Hyper-parameters of the method that differ from its recipe for this image size.
        task_options: Options of the task (resolution, limit, crop, ...).
        family_options: Options of the family (preset, rows, activation, ...).
        threads: Threads inside operators; default as many as the process may use.
        memory_format: "channels_last" or "contiguous".
        time_limit: Seconds after which the run ends with the best finished result so far.
        quiet: No progress.

    Returns:
        The outcome; ``status`` is "stopped" when it was interrupted or out of time.

    Raises:
        UserError: Something given is wrong; nothing was written.
        ArchsmithError: The run cannot go on; what was saved is kept.
    """
    system, module = load_method(method)
    if isinstance(task, str):
        options = {**getattr(module, "TASK_OPTIONS", {}), **(task_options or {})}
        opened = open_task(task, data=data, **options)
        section = {"name": task, "data": None if data is None else str(Path(data).absolute()), **options}
    else:
        opened, section = task, {"name": task.name, "data": None, "own": True}
    config = validated(
        RunConfig,
        {
            "method": system["slug"],
            "task": section,
            "task_digest": opened.digest,
            "family": {"name": family, **(family_options or {})},
            "budget": str(Budget.parse(budget)) if budget else None,
            "seed": seed,
            "settings": {**module.preset_settings(opened.input_shape), **(settings or {})},
            "runtime": {"threads": threads or usable_cores(), "memory_format": memory_format},
        },
        field="config",
    )
    complete = validated(module.Settings, config.settings, field="settings").model_dump()
    return _run(config.model_copy(update={"settings": complete}), opened, module, out, time_limit, quiet)


def resume(
    run: str | Path, *, task: Task | None = None, time_limit: float | None = None, quiet: bool = False
) -> Outcome:
    """Go on with an unfinished run under its own configuration; a finished one is only read.

    Args:
        run: Folder of the run.
        task: The task object, when the run was started with one of your own.
        time_limit: As in ``search``.
        quiet: No progress.

    Raises:
        UserError: Not a run, or its data changed since it was started.
    """
    with Run.open(run) as opened:
        config = validated(RunConfig, opened.config, field="config")
    opened_task = task or task_of(config)
    if opened_task.digest != config.task_digest:
        raise UserError(
            "task.data",
            opened_task.digest,
            allowed=f"the data that the run started with, digest {config.task['digest']}",
            hint="The data or its split changed since; restore it, or start another run.",
        )
    _, module = load_method(config.method)
    return _run(config, opened_task, module, run, time_limit, quiet)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def task_of(config: RunConfig) -> Task:
    """Open the task that a configuration names.

    Raises:
        UserError: The run was started with a task object; data is missing or wrong.
    """
    if config.task.get("own"):
        raise UserError(
            "task",
            config.task["name"],
            allowed="a task that archsmith can open by name",
            hint="The run was started from Python with a task of its own: run that script again with the same out=.",
        )
    return open_task(**config.task)


def _run(
    config: RunConfig, task: Task, module: ModuleType, out: str | Path, time_limit: float | None, quiet: bool
) -> Outcome:
    """Open the run, build the method and drive it; a finished run is only read."""
    with StopRequest(time_limit=time_limit) as stop, _threads(config.runtime.threads):
        open_family = import_module(f"archsmith.families.{config.family['name']}").open_family
        family = open_family(image=task.input_shape, num_classes=task.num_classes, **config.family)
        budget = Budget.parse(config.budget) if config.budget else None
        CostModel(family, budget, _NoJournal())  # refuse an impossible budget before anything is written
        with Run.create_or_open(out, config.model_dump()) as run:
            if run.status == "finished":
                result = run.result()
                assert result is not None
                return Outcome(Path(out), result)
            _record_environment(run)
            costs = CostModel(family, budget, run)
            searcher = module.Searcher(
                family=family,
                task=task,
                settings=validated(module.Settings, config.settings, field="settings"),
                costs=costs,
                seed=config.seed,
                memory_format=config.runtime.memory_format,
            )
            return Outcome(Path(out), drive(run, searcher, task, costs, stop=stop, quiet=quiet))


class _NoJournal:
    """A journal that forgets; for checks before a run exists."""

    def record(self, kind: str, **fields: Any) -> None:
        """Forget the event."""

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return nothing."""
        return []


def _record_environment(run: Run) -> None:
    """Journal what decides bits besides the configuration, and warn when it changed since the run started."""
    now = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    before = run.events("environment")
    run.record("environment", **now)
    for name, value in now.items():
        if before and before[0][name] != value:
            warnings.warn(
                f"this run started with {name} {before[0][name]}, now it is {value}: it goes on, but not bit for bit.",
                stacklevel=2,
            )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def verify(run: str | Path, *, trust: bool = False) -> Report:
    """Check everything that a finished or stopped run says about its networks; see ``archsmith.run.verify``.

    The read of the test split is recorded in the run's journal.

    Args:
        run: Folder of the run.
        trust: Execute a ``model.py`` that is not the one archsmith writes.

    Raises:
        UserError: No run at ``run``, or one without a result.
    """

    def journal_the_read() -> None:
        with suppress(UserError), Run.open(run) as opened:  # a run received without its journal has none to note it in
            opened.count_test_read("verify")

    return verify_run(run, trust=trust, on_test_read=journal_the_read)
