"""A run on the user's own network: from its configuration to a method, and from its end to a finished result."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from archsmith.atoms.records import record
from archsmith.config import RunConfig, Runtime, validated
from archsmith.core.errors import Shown, UserError
from archsmith.core.protocols import Logger
from archsmith.cost import count, measure_latency
from archsmith.run.costs import exact_costs
from archsmith.run.diagnose import diagnose
from archsmith.run.directory import Run
from archsmith.run.drive import CHECK_IMAGES, Delivered, Searcher, evaluated
from archsmith.run.own_export import export_own_network
from archsmith.run.own_model import FAMILY, OwnCosts, OwnModel
from archsmith.run.own_supernet import SubnetCosts, prepare_supernet
from archsmith.space import Budget
from archsmith.tasks.base import Task
from archsmith.train.layout import use_memory_format_


def is_own(config: Mapping[str, Any] | RunConfig) -> bool:
    """Return whether a configuration is that of a run on the user's own network."""
    family = config.family if isinstance(config, RunConfig) else config.get("family", {})
    return bool(family.get("name") == FAMILY)


def prepare_own(
    config: RunConfig, task: Task, module: ModuleType, journal: Logger
) -> tuple[OwnCosts | SubnetCosts, Searcher]:
    """Return the costs and the method at its beginning.

    Raises:
        UserError: Something in the configuration is wrong, or the network and the task do not fit together.
    """
    plain = Runtime.model_validate({"threads": config.runtime.threads, "memory_format": config.runtime.memory_format})
    if config.runtime != plain:
        raise UserError(
            "runtime",
            Shown(f"{config.runtime.to_json()} for {config.method}"),
            allowed="one process on the CPU in float32, neither compiled nor in micro-batches, for this method",
        )
    if config.latency:
        raise UserError(
            "latency device",
            Shown(f"{dict(config.latency)} for {config.method}"),
            allowed="nothing: networks of one's own are measured in torch on the CPU, in fp32 with one thread",
        )
    model = OwnModel(str(config.family["target"]), config.seed, config.family.get("weights"), task)
    network = model.build()
    _check_outputs(network, task)
    if getattr(module, "SUPERNET_OF_OWN", False):
        return prepare_supernet(config, model, task, module, journal)
    settings = validated(module.Settings, config.settings, field="settings")
    budget = None if config.budget is None else Budget.parse(config.budget)
    costs = OwnCosts(network, task, budget, {"minimum": settings.minimum, "divisor": settings.divisor}, journal)
    searcher: Searcher = module.Searcher(
        model=model,
        task=task,
        settings=settings,
        costs=costs,
        seed=config.seed,
        memory_format=config.runtime.memory_format,
    )
    return costs, searcher


def _check_outputs(network: torch.nn.Module, task: Task) -> None:
    """Refuse a network that does not take the images of the task, or gives another number of classes."""
    inputs = task.plain_inputs(2)
    try:
        with torch.no_grad():
            outputs = copy.deepcopy(network).eval()(inputs)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            "model",
            Shown(f"{type(network).__name__}, which fails on inputs of shape {tuple(inputs.shape)}: {first}"),
            allowed=f"a network for {task.kind} of shape {tuple(task.input_shape)}",
        ) from error
    if not isinstance(outputs, torch.Tensor) or tuple(outputs.shape) != (2, task.num_classes):
        shown = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise UserError(
            "model",
            Shown(f"{type(network).__name__}, whose output for 2 examples is {shown}"),
            allowed=f"logits of shape (2, {task.num_classes}), one for each class of {task.name}",
        )


def finish_own(
    run: Run, delivered: Delivered, task: Task, costs: OwnCosts | SubnetCosts, *, seconds: float
) -> dict[str, Any]:
    """Evaluate, count, measure, export and check the delivered networks of the user's; return the result record."""
    found = [finish_one_own(run, each, task) for each in (delivered, *delivered.others)]
    notes = list(dict.fromkeys(note for _, own in found for note in own))
    network = delivered.network
    what = record(network)
    layers = [layer for layer in count(network, task.plain_inputs()).layers if layer.macs or layer.params]
    result: dict[str, Any] = {
        "method": run.config["method"],
        "task": task.name,
        "task_digest": task.digest,
        "family": run.config["family"]["name"],
        "target": run.config["family"]["target"],
        "seed": run.config["seed"],
        "budget": costs.budget_text or None,
        "limits": costs.limits,
        "reference": costs.largest,
        "examples": {name: task.size(name) for name in task.splits},
        "classes": task.num_classes,
        "figures": dict(delivered.figures),
        "seconds": round(seconds, 1),
        "notes": notes,
        "widths": {
            name: [list(what.shapes[name]), list(what.new_shape(name))] for name in what.tensors if name in what.shapes
        },
        "layers": [asdict(layer) for layer in layers],
        "outcomes": [outcome for outcome, _ in found],
    }
    diagnosed = diagnose(run.history(), result, run.config, run=str(run.path))
    return {**result, "diagnosis": [asdict(finding) for finding in diagnosed]}


def finish_one_own(
    run: Run, delivered: Delivered, task: Task, *, folder: Path | None = None, test: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Return the record of one network after writing and checking its files, and notes.

    Args:
        run: The open run.
        delivered: The network.
        task: The task of the run.
        folder: Where the files go; "networks/LABEL" of the run if None.
        test: Whether the test part is read.
    """
    network = copy.deepcopy(delivered.network).eval()
    use_memory_format_(network, torch.contiguous_format)
    metrics, split = evaluated(run, network, task, test=test)
    exact = exact_costs(network, task.plain_inputs())
    latency = measure_latency(network, task.plain_inputs())
    files, notes = export_own_network(
        network,
        run.path / "networks" / delivered.label if folder is None else folder,
        target=run.config["family"]["target"],
        input_shape=task.input_shape,
        normalisation=task.normalisation,
        class_names=task.class_names,
        examples=task.examples(min(CHECK_IMAGES, task.size(split)), split),
        blocks=delivered.record.get("blocks", {}),
    )
    outcome = {
        "label": delivered.label,
        "folder": f"networks/{delivered.label}" if folder is None else str(folder),
        "files": files,
        "metrics": metrics,
        "costs": {
            "macs": exact["macs"],
            "params": exact["params"],
            "memory_bytes": exact["memory"],
            "latency": latency.to_dict(),
        },
    }
    if sizes := delivered.record.get("sizes"):
        outcome["sizes"] = sizes
    return outcome, notes
