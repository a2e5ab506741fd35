"""Driving a search: epochs, journal, checkpoints, stops, and the finished result at the end.

``drive`` knows no method. A method is a ``Searcher``: it advances by an epoch, can say its whole state, and can deliver
a finished network at any time.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError
from archsmith.core.files import write_atomic
from archsmith.cost import Latency, claim, measure_latency
from archsmith.run.checkpoints import Checkpoint, CheckpointStore
from archsmith.run.costs import CostModel, exact_costs
from archsmith.run.deployed import deployed_record
from archsmith.run.diagnose import diagnose
from archsmith.run.directory import Run
from archsmith.run.export import export_network
from archsmith.run.onnx_file import missing_onnx_packages
from archsmith.run.progress import Progress
from archsmith.run.scalars import Scalars
from archsmith.run.stop import StopRequest
from archsmith.space import Architecture
from archsmith.tasks.base import Task
from archsmith.train.layout import use_memory_format_
from archsmith.train.loop import Diverged, Position
from archsmith.train.workers import Workers

CHECK_IMAGES = 16
"""Real images stored with their logits in ``check.safetensors``."""


@dataclass(frozen=True)
class Delivered:
    """A network as a method would hand it over now.

    Attributes:
        network: Trained, in evaluation mode, within the budget; a copy that training does not touch.
        architecture: Its point of the space.
        figures: Further numbers by name, for the diagnosis (``archsmith.run.diagnose`` says which it knows).
        label: Name of the outcome and of its folder.
        others: Further networks of the same run, each with a label of its own (the other points of a Pareto set, say);
            their ``others`` are not looked at. The first network is the one that reports speak of.
        files: Further files by name, written beside the network's own (the same network quantised, say).
        record: What is known of them, plain JSON; "further" in the outcome's record.
        deployed: Name of the file among them that runs on the device, and whose latency counts.
    """

    network: nn.Module
    architecture: Architecture
    figures: Mapping[str, float] = field(default_factory=dict)
    label: str = "final"
    others: Sequence[Delivered] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    deployed: str | None = None


class Monitor(Protocol):
    """What a method tells while it trains, and whom it asks whether to stop."""

    def step(self, total: int, **figures: float) -> None:
        """Tell that ``total`` steps are done, with present figures."""

    def should_stop(self) -> bool:
        """Return True when the method should return after this step."""


class Searcher(Protocol):
    """The contract of a method of kind "search"."""

    position: Position
    steps: int

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""

    def advance(self, monitor: Monitor) -> dict[str, Any] | None:
        """Go on to the end of an epoch and return its figures, or None when the monitor asked to stop before."""

    def deliver(self) -> Delivered:
        """Return the network as it would be delivered now; the search itself is not changed."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON values that ``load`` continues from, bit for bit."""

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""


class Finish(Protocol):
    """Writes the finished result of a run."""

    def __call__(self, run: Run, delivered: Delivered, task: Task, costs: Any, *, seconds: float) -> dict[str, Any]:
        """Evaluate, count, measure, export and check a delivered network; return the result record."""


@dataclass
class _RunMonitor:
    """Passes steps to the progress line and the wish to stop to the method."""

    progress: Progress | None
    stop: StopRequest
    workers: Workers
    fields: dict[str, float] = field(default_factory=dict)

    def step(self, total: int, **figures: float) -> None:
        if self.progress is not None:
            self.progress.update(total, **figures, **self.fields)

    def should_stop(self) -> bool:
        if not self.workers.any(self.stop.reason is not None):
            return False
        self.stop.request("a wish of another process")
        return True


def drive(
    run: Run,
    searcher: Searcher,
    task: Task,
    costs: Any,
    *,
    stop: StopRequest,
    quiet: bool = False,
    checkpoint_seconds: float = 2.0,
    workers: Workers | None = None,
    write: Finish | None = None,
) -> dict[str, Any]:
    """Run a search to its end, or to the point where it is asked to stop, and write the finished result.

    Args:
        run: The open run; continued from its newest sound checkpoint.
        searcher: The method, freshly made.
        task: What is learned.
        costs: Costs and budget: a ``CostModel``, or what ``write`` takes instead.
        stop: Asked after every step.
        quiet: No progress line.
        checkpoint_seconds: Shortest time between two checkpoints at epoch ends. The last epoch, a stop and a new best
            epoch within the budget are always saved. Timing has no influence on the result.
        workers: The processes of the run, of which this is the first; the others are in ``follow``.
        write: Writes the finished result; ``finish`` when None.

    Returns:
        The content of ``result.json``.

    Raises:
        Diverged: The loss became NaN or infinite. The run keeps its last good checkpoint.
        UserError: The disk is full, or every checkpoint is damaged.
    """
    store = CheckpointStore(run.path / "checkpoints", run)
    workers = workers or Workers()
    loaded = workers.from_main(store.load_latest)
    if loaded is not None:
        _load(searcher, task, loaded)
        run.record("resumed", epoch=searcher.position.epoch, step=searcher.position.step, notes=loaded.notes)
    best = -1.0 if loaded is None else float(loaded.state["best"])
    seconds_before = 0.0 if loaded is None else float(loaded.state["seconds"])
    total = searcher.epochs * searcher.steps

    def save(best_now: bool = False) -> None:
        tensors, state = searcher.state()
        name = f"epoch-{searcher.position.epoch:04d}-step-{searcher.position.step:05d}"
        state = {"searcher": state, "best": best, "seconds": seconds_before + stop.seconds, "task": _state_of(task)}
        store.save(name, tensors, state, best=best_now)

    with (
        Progress(
            str(run.config.get("method", "search")), total=total, done=searcher.position.total, quiet=quiet
        ) as progress,
        Scalars(run.path / "tensorboard", purge_step=searcher.position.total if loaded else None) as scalars,
    ):
        if task.resume_note:
            progress.note(f"If this run is interrupted, {task.resume_note}.")
        _say_notes(progress, loaded)
        monitor = _RunMonitor(progress, stop, workers)
        saved = time.monotonic()
        while not searcher.done and not monitor.should_stop():
            try:
                figures = searcher.advance(monitor)
            except Diverged as error:
                raise _diverged(run, error) from error
            if figures is None:
                break
            _require_finite(run, figures, searcher.position)
            run.record("epoch", **figures)
            shown = {"valid_accuracy": figures["valid_accuracy"], "macs": figures["macs"]}
            if costs.limits.get("macs"):
                monitor.fields["macs_left"] = figures["macs"] / costs.largest["macs"]
            progress.milestone(
                searcher.position.total,
                loss=figures["loss"],
                **shown,
                **({"atoms": figures["atoms"]} if "atoms" in figures else {}),
            )
            scalars.add(searcher.position.total, _numbers(figures))
            better = bool(figures.get("within_budget", True)) and figures["valid_accuracy"] > best
            best = max(best, figures["valid_accuracy"]) if better else best
            if better or searcher.done or time.monotonic() - saved > checkpoint_seconds:
                save(best_now=better)
                saved = time.monotonic()
        if not searcher.done:
            save()
            progress.note(f"Stopping because of {stop.reason}: writing the best finished result so far.")
        else:
            progress.note("Writing and checking the finished result.")
    result = (write or finish)(run, searcher.deliver(), task, costs, seconds=seconds_before + stop.seconds)
    if searcher.done:
        run.finish(result)
    else:
        run.stopped(result)
    stored = run.result()
    assert stored is not None
    return stored


def follow(searcher: Searcher, task: Task, *, stop: StopRequest, workers: Workers) -> None:
    """Do what ``drive`` does in the first process, in another one: every step and every cut, and no file.

    Args:
        searcher: The method, freshly made as in the first process.
        task: What is learned.
        stop: Asked after every step; a wish of any process stops all.
        workers: The processes of the run.

    Raises:
        Diverged: As in the first process.
        WorkerFailed: Another process failed.
    """
    loaded: Checkpoint | None = workers.share(None)
    if loaded is not None:
        _load(searcher, task, loaded)
    monitor = _RunMonitor(None, stop, workers)
    while not searcher.done and not monitor.should_stop():
        if searcher.advance(monitor) is None:
            break
    searcher.deliver()


def _load(searcher: Searcher, task: Task, loaded: Checkpoint) -> None:
    searcher.load(loaded.tensors, loaded.state["searcher"])
    if loaded.state.get("task"):
        cast(Any, task).load_state_dict(loaded.state["task"])


def finish(run: Run, delivered: Delivered, task: Task, costs: CostModel, *, seconds: float) -> dict[str, Any]:
    """Evaluate, count, measure, export and check what is delivered; return the result record.

    The accuracies are those of the very networks that are exported: float32, default memory format.
    """
    every = [delivered, *delivered.others]
    labels = [each.label for each in every]
    assert len(set(labels)) == len(labels), f"outcomes need labels of their own, got {labels}"
    outcomes = [finish_one(run, each, task, costs) for each in every]
    notes = _broken_claims(outcomes, costs)
    if missing := missing_onnx_packages():
        notes.append(f"ONNX was not written: {', '.join(missing)} not installed (pip install 'archsmith[onnx]').")
    result: dict[str, Any] = {
        "method": run.config["method"],
        "task": task.name,
        "task_digest": task.digest,
        "family": run.config["family"]["name"],
        "seed": run.config["seed"],
        "budget": costs.budget_text or None,
        "limits": costs.limits,
        "reference": costs.largest,
        "examples": {split: task.size(split) for split in task.splits},
        # What guessing is worth is known of classes; of sequences of tokens it is not one in their number.
        "classes": task.num_classes if task.kind == "images" else None,
        "figures": dict(delivered.figures),
        "seconds": round(seconds, 1),
        "notes": notes,
        "outcomes": outcomes,
    }
    found = diagnose(run.history(), result, run.config, run=str(run.path))
    return {**result, "diagnosis": [asdict(finding) for finding in found]}


def _broken_claims(outcomes: Sequence[Mapping[str, Any]], costs: CostModel) -> list[str]:
    """Return what to say of networks whose latency, measured at the end, does not keep its limit."""
    limit = costs.limits.get("latency")
    found = []
    for each in outcomes if limit is not None else ():
        latency = Latency.from_dict(each["costs"]["latency"])
        if claim(latency, float(limit or 0)) != "holds":
            low, high = latency.interval_ms
            found.append(
                f"{each['label']}: measured at the end, its latency is {latency.median_ms:.4g} ms (95 % interval "
                f"{low:.4g} to {high:.4g}{', too unsteady to claim' if latency.noisy else ''}), the limit {limit:.4g}."
            )
    return found


def finish_one(
    run: Run,
    delivered: Delivered,
    task: Task,
    costs: CostModel,
    *,
    folder: Path | None = None,
    test: bool = True,
) -> dict[str, Any]:
    """Return the record of one network after writing and checking its files.

    Args:
        run: The open run.
        delivered: The network.
        task: The task of the run.
        costs: Its costs.
        folder: Where the files go; "networks/LABEL" of the run if None.
        test: Whether the test part is read.
    """
    network = copy.deepcopy(delivered.network).eval()
    use_memory_format_(network, torch.contiguous_format)
    metrics, split = evaluated(run, network, task, test=test)
    exact = exact_costs(network, task.plain_inputs())
    place = run.path / "networks" / delivered.label if folder is None else folder
    files = export_network(
        network,
        place,
        family=run.config["family"]["name"],
        input_shape=task.input_shape,
        normalisation=task.normalisation,
        class_names=task.class_names,
        examples=task.examples(min(CHECK_IMAGES, task.size(split)), split),
        space=costs.family.space.without_canonical_form().to_json(),
        decisions=dict(delivered.architecture),
        digest=delivered.architecture.digest,
    )
    for name, content in delivered.files.items():
        write_atomic(place / name, content)
    further: dict[str, Any] = {}
    if delivered.files:
        further["further"] = {**delivered.record, "files": sorted(delivered.files)}
    if costs.deployment is None:
        latency = measure_latency(network, task.plain_inputs())
    else:
        latency, further["deployed"] = deployed_record(
            network, place, costs.deployment, costs.calibration, task, file=delivered.deployed
        )
    return {
        **further,
        "label": delivered.label,
        "folder": str(place.relative_to(run.path)) if folder is None else str(place),
        "files": files,
        "metrics": metrics,
        "costs": {
            "macs": exact["macs"],
            "params": exact["params"],
            "memory_bytes": exact["memory"],
            "latency": latency.to_dict(),
        },
    }


def evaluated(run: Run, network: nn.Module, task: Task, *, test: bool = True) -> tuple[dict[str, float], str]:
    """Return the metrics of a delivered network on the validation and test images, and the split of its examples."""
    metrics = _named("valid", task.evaluate(network.forward, "valid"))
    if "test" not in task.splits or not test:
        return metrics, "valid"
    run.count_test_read("final evaluation")
    return {**metrics, **_named("test", task.evaluate(network.forward, "test"))}, "test"


def _named(split: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Return everything that an evaluation gives but the number of its examples, by split and name."""
    return {f"{split}_{name}": value for name, value in scores.items() if name != "examples"}


def _state_of(task: Task) -> dict[str, Any]:
    """Return where the task's own loader stands, for tasks that keep such a state; else an empty dictionary."""
    return dict(cast(Any, task).state_dict()) if hasattr(task, "state_dict") else {}


def _say_notes(progress: Progress, loaded: Checkpoint | None) -> None:
    for note in loaded.notes if loaded else []:
        progress.note(note)


def _diverged(run: Run, error: Diverged) -> ArchsmithError:
    run.record("diverged", epoch=error.epoch, step=error.step)
    return ArchsmithError(f"{run.path}: {error} {_last_good(run)}")


def _require_finite(run: Run, figures: Mapping[str, Any], position: Position) -> None:
    """Refuse the figures of an epoch whose last step broke the network: no loss has shown it yet."""
    broken = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        run.record("diverged", epoch=figures["epoch"], step=None)
        name, value = broken[0], figures[broken[0]]
        raise ArchsmithError(
            f"{run.path}: the {name.replace('_', ' ')} is {value} after epoch {figures['epoch'] + 1}, whose last batch "
            f"was step {position.total} of the run. Lower the learning rate (--set lr=...), or look for NaN in the "
            f"data. {_last_good(run)}"
        )


def _last_good(run: Run) -> str:
    saved = run.events("checkpoint")
    return f"The last good checkpoint is {saved[-1]['file']}." if saved else "No checkpoint had been saved yet."


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"search/{name}": float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and name != "epoch"
    }
