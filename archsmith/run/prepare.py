"""From a configuration to a method that can start: the family, the costs, and what is noted about the machine."""

from __future__ import annotations

import inspect
import platform
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from archsmith import __version__
from archsmith.config import RunConfig, Runtime, validated
from archsmith.core.errors import Shown, UserError
from archsmith.core.processes import local_process_rank
from archsmith.core.protocols import Logger
from archsmith.cost import Deployment
from archsmith.families import family_table, relaxable_families
from archsmith.run.checkpoints import check_disk_space
from archsmith.run.costs import CALIBRATION_IMAGES, BuildableFamily, CostModel
from archsmith.run.directory import Run
from archsmith.run.drive import Searcher
from archsmith.space import Budget
from archsmith.tasks.base import Task
from archsmith.train.compute import Compute, resolve_device
from archsmith.train.workers import Workers

RELAXED = "relaxed"
"""What a method's ``WORKS_ON`` says if it works on every family whose choices can be relaxed."""


def prepare(
    config: RunConfig, task: Task, module: ModuleType, journal: Logger, workers: Workers
) -> tuple[CostModel, Searcher]:
    """Return the cost model and the method at its beginning.

    Raises:
        UserError: Something in the configuration is wrong, the method computes in the plain way alone, or it has no
            ``Searcher``: it trains children outside of one run.
    """
    if not hasattr(module, "Searcher"):
        raise UserError(
            "method",
            config.method,
            allowed="a method that searches inside one training run",
            hint=f"This one is used from Python: see docs/systems/{module.SYSTEM['slug']}.md.",
        )
    budget = None if config.budget is None else Budget.parse(config.budget)
    _require_fit(config, module)
    family = family_of(config, task)
    if not hasattr(module, "WORKS_ON"):
        _require_atoms(config.family["name"], family)
    deployment = deployment_of(config, module)
    calibration = None
    if deployment is not None:
        deployment.check()
        calibration = task.examples(min(CALIBRATION_IMAGES, task.size("train")), "train")
    costs = CostModel(family, budget, journal, deployment=deployment, calibration=calibration)
    given: dict[str, Any] = {}
    if config.architecture is not None:
        given["architecture"] = family.space.validate(config.architecture)
    compute = _compute(config.runtime, workers)
    if "compute" in inspect.signature(module.Searcher).parameters:
        given["compute"] = compute
    elif compute != Compute(workers=workers) or workers.count > 1:
        raise UserError(
            "runtime",
            Shown(f"{config.runtime.to_json()} for {config.method}"),
            allowed="one process on the CPU in float32, neither compiled nor in micro-batches, for this method",
        )
    searcher: Searcher = module.Searcher(
        **given,
        family=family,
        task=task,
        settings=validated(module.Settings, config.settings, field="settings"),
        costs=costs,
        seed=config.seed,
        memory_format=config.runtime.memory_format,
    )
    return costs, searcher


def deployment_of(config: RunConfig, module: ModuleType) -> Deployment | None:
    """Return where a run measures latency; None for a method that leaves no choice.

    A method says by ``LATENCY_DEVICES`` which devices it can search for, the usual one first.

    Raises:
        UserError: A device that the method cannot search for, or fields that do not fit each other.
    """
    devices = getattr(module, "LATENCY_DEVICES", ())
    given = dict(config.latency or {})
    if not devices:
        if given:
            raise UserError(
                "latency device",
                Shown(f"{given.get('device', '')} for the method {config.method}"),
                allowed="nothing: this method measures in torch on the CPU, with one thread",
                hint="bignas, linas and simq-nas search for other devices.",
            )
        return None
    try:
        deployment = Deployment(**{"device": devices[0], **given})
    except TypeError as error:
        raise UserError("config.latency", given, allowed="device, precision and threads") from error
    if deployment.device not in devices:
        raise UserError(
            "latency device",
            Shown(f"{deployment.device} for the method {config.method}"),
            allowed=", ".join(devices),
        )
    return deployment


def default_family(module: ModuleType) -> str:
    """Return the family of a run that names none: the first that the method says it works on, else "mobile"."""
    works_on = getattr(module, "WORKS_ON", None)
    return str(works_on[0]) if isinstance(works_on, tuple) and works_on else "mobile"


def _require_fit(config: RunConfig, module: ModuleType) -> None:
    """Refuse a family that a method says it does not work on."""
    works_on = getattr(module, "WORKS_ON", None)
    if works_on == RELAXED:
        works_on = relaxable_families()
    if works_on is not None and config.family["name"] not in works_on:
        raise UserError(
            "family",
            config.family["name"],
            allowed=" or ".join(map(repr, works_on)) + f" for the method {config.method}",
            hint="archsmith families lists them.",
        )


def _require_atoms(name: str, family: BuildableFamily) -> None:
    """Refuse a family without atoms for the methods that cut them."""
    if not hasattr(family, "atoms"):
        raise UserError(
            "family",
            name,
            allowed="a family whose networks have atoms to remove ('mobile', say)",
            hint=f"{name} has choices only, and this method cuts atoms.",
        )


def _compute(runtime: Runtime, workers: Workers) -> Compute:
    """Return how the steps are computed under a configuration."""
    device = resolve_device(runtime.device)
    if device == "cuda":
        torch.cuda.set_device(local_process_rank())
    return Compute(
        workers=workers,
        micro_batches=runtime.micro_batches,
        device=torch.device(device, local_process_rank()) if device == "cuda" else torch.device(device),
        precision=runtime.precision,
        compile="inductor" if runtime.compile else None,
    )


def family_of(config: RunConfig, task: Task) -> BuildableFamily:
    """Return the family that a configuration names, for the images of the task.

    Raises:
        UserError: No such family, or one that cannot be made with these options.
    """
    name = config.family["name"]
    rows = {row["name"]: row for row in family_table()}
    files = {key: row["file"] for key, row in rows.items()}
    if name not in files:
        raise UserError("family", name, allowed=", ".join(files), hint="archsmith families lists them.")
    if rows[name]["task"] != task.kind:
        fitting = [key for key, row in rows.items() if row["task"] == task.kind]
        raise UserError("family", name, allowed=f"{', '.join(fitting)} for {task.kind}, which the task {task.name} has")
    module = import_module(files[name].removesuffix(".py").replace("/", "."))
    try:
        family: BuildableFamily = module.open_family(
            image=task.input_shape, num_classes=task.num_classes, **config.family
        )
        family.build(family.largest())
    except (TypeError, ValueError, LookupError) as error:
        options = {key: value for key, value in config.family.items() if key != "name"}
        if isinstance(error, UserError) or not options:
            raise
        raise UserError(
            "family options",
            options,
            allowed=f"what the family {name} can be built with",
            hint=f"Building it fails: {error}.",
        ) from error
    return family


def check_room(out: str | Path, searcher: Searcher) -> None:
    """Refuse to start where three checkpoints (two kept, one written) and two finished results have no room."""
    tensors, _ = searcher.state()
    check_disk_space(out, 5 * sum(tensor.nbytes for tensor in tensors.values()))


class EarlyJournal:
    """The journal of a run that does not exist yet: keeps its events and hands them over once there is one.

    Args:
        events: What it holds from the beginning: in a process that only follows, what the first one has measured.
    """

    def __init__(self, events: Sequence[Mapping[str, Any]] = ()) -> None:
        self._early: list[dict[str, Any]] = [dict(event) for event in events]
        self._run: Run | None = None

    def record(self, kind: str, **fields: Any) -> None:
        """Keep the event, or pass it on to the run."""
        if self._run is None:
            self._early.append({"kind": kind, **fields})
        else:
            self._run.record(kind, **fields)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the events of one kind, or all of them."""
        if self._run is not None:
            return self._run.events(kind)
        return [event for event in self._early if kind is None or event["kind"] == kind]

    def continue_in(self, run: Run) -> None:
        """Write what was kept to ``run``, and everything from now on."""
        if self._early:
            run.record_many(self._early)
        self._run = run


def record_environment(run: Run) -> None:
    """Journal what decides bits besides the configuration, and warn when it changed since the run started."""
    now = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    before = run.events("environment")
    run.record("environment", **now, python=platform.python_version(), archsmith=__version__)
    for name, value in now.items():
        if before and before[0][name] != value:
            warnings.warn(
                f"this run started with {name} {before[0][name]}, now it is {value}: it goes on, but not bit for bit.",
                stacklevel=2,
            )
