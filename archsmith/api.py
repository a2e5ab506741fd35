"""The three jobs as Python functions; the command line is a thin layer over them."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from archsmith.config import RunConfig, read_config, validated
from archsmith.core.errors import Shown, UserError
from archsmith.core.files import read_json
from archsmith.core.processes import local_process_count, process_count
from archsmith.cost.backends import threads_pinned
from archsmith.methods import load_method, method_table
from archsmith.run.baselines import FOLDER as BASELINES
from archsmith.run.baselines import ScalableFamily, baseline_budget, baseline_configs
from archsmith.run.block_drive import FAMILY as BLOCKS
from archsmith.run.block_drive import drive_blocks
from archsmith.run.block_result import write_block_report
from archsmith.run.block_verify import is_block_result, parent_here, verify_blocks
from archsmith.run.checks import Report
from archsmith.run.costs import CostModel
from archsmith.run.directory import Run
from archsmith.run.drive import drive, follow
from archsmith.run.own_finish import finish_own, is_own, prepare_own
from archsmith.run.own_model import FAMILY as OWN
from archsmith.run.own_model import is_folder
from archsmith.run.prepare import EarlyJournal, check_room, default_family, family_of, prepare, record_environment
from archsmith.run.progress import say
from archsmith.run.report import write_report
from archsmith.run.stop import StopRequest
from archsmith.run.verify import verify_run
from archsmith.space import Budget
from archsmith.tasks import Task, open_task, task_table
from archsmith.train.compute import resolve_device
from archsmith.train.workers import Workers, open_workers, refuse_unrepeatable


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
    family: str | None = None,
    model: str | None = None,
    budget: str | None = None,
    out: str | Path,
    seed: int = 0,
    data: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    objectives: Sequence[str] | None = None,
    task_options: Mapping[str, Any] | None = None,
    family_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    memory_format: str = "channels_last",
    device: str = "cpu",
    precision: str = "float32",
    compile: bool = False,
    micro_batches: int = 1,
    latency: Mapping[str, Any] | None = None,
    time_limit: float | None = None,
    baselines: int = 0,
    quiet: bool = False,
) -> Outcome:
    """Find and train a network for a task within a budget; go on if ``out`` holds the same run unfinished.

    Args:
        task: Name of a task (``archsmith tasks``), or a ``Task`` of your own. A run of your own task is resumed by
            calling this again with the same arguments.
        method: Slug of a search method (``archsmith methods``).
        family: Name of a family (``archsmith families``); the first that the method works on by default, else "mobile".
        model: Network with pre-trained weights, for methods that make a supernet of one (instatune): a Hugging Face
            folder, or "module:factory", whose code is executed. In place of ``family``.
        budget: For example "macs<=0.4x, params<=200k"; ``x`` is relative to the largest network.
        out: Folder of the run.
        seed: Seed of everything random.
        data: File or folder that the task reads.
        settings: Hyper-parameters of the method that differ from its recipe for this image size.
        objectives: What is improved, for methods that return a Pareto set: "accuracy", "macs", "params", "latency".
        task_options: Options of the task (resolution, limit, crop, ...).
        family_options: Options of the family (preset, rows, activation, ...).
        threads: Threads inside operators; default as many as the process may use (its share, under ``torchrun``).
        memory_format: "channels_last" or "contiguous".
        device: "cpu", "cuda", or "auto" for a CUDA device where there is one: where training takes place. Also where
            the latency of a search is measured, for the methods that search for a device (bignas, linas, simq-nas);
            "onnxruntime" trains on the CPU and measures exported files. What is exported is computed on the CPU.
        precision: "float32", or "bf16" to train under autocast; the exported network is float32 all the same.
        compile: Run the training forward by ``torch.compile``, anew after every cut.
        micro_batches: Compute every batch in this many parts one after another, each with its own batch statistics.
        latency: Where latency is measured where that is not what ``device`` says: fields of
            ``archsmith.cost.Deployment`` ("device", "precision", "threads").
        time_limit: Seconds after which the run ends with the best finished result so far.
        baselines: When above 0, train this many random architectures and the uniformly scaled network at the same cost
            afterwards, and compare in the report.
        quiet: No progress.

    Returns:
        The outcome; ``status`` is "stopped" when it was interrupted or out of time.

    Raises:
        UserError: Something given is wrong; nothing was written.
        ArchsmithError: The run cannot go on; what was saved is kept.
    """
    system, module = load_method(method)
    if not hasattr(module, "Searcher"):
        raise UserError(
            "method",
            method,
            allowed="a method that searches a family",
            hint="It needs a trained model: search_blocks(), or archsmith search --method puzzle --model FOLDER."
            if system["slug"] == "puzzle"
            else f"This one is used from Python: see docs/systems/{system['slug']}.md.",
        )
    chosen = _with_objectives(dict(settings or {}), objectives, method, module)
    _refuse_names("task option", task_options, ("name", "data", "own"))
    _refuse_names("family option", family_options, ("name", "image", "num_classes"))
    own = _own_section(model, method, module, family, family_options)
    if own is not None:
        memory_format = "contiguous"
    if isinstance(task, str):
        options = {**getattr(module, "TASK_OPTIONS", {}), **_tokenizer_of(model, task), **(task_options or {})}
        opened = open_task(task, data=data, **options)
        section = {"name": task, "data": None if data is None else str(Path(data).absolute()), **options}
    else:
        opened, section = _own_task(task, data, task_options), {"name": task.name, "data": None, "own": True}
    target = _latency_section(device, latency, module)
    config = validated(
        RunConfig,
        {
            "method": system["slug"],
            "task": section,
            "task_digest": opened.digest,
            "family": own or {"name": family or default_family(module), **(family_options or {})},
            "budget": None if budget is None else str(Budget.parse(budget)),
            "seed": seed,
            "settings": chosen,
            "runtime": {
                "threads": max(1, usable_cores() // local_process_count()) if threads is None else threads,
                "memory_format": memory_format,
                "processes": process_count(),
                "micro_batches": micro_batches,
                "device": resolve_device("cpu" if device == "onnxruntime" else device),
                "precision": precision,
                "compile": compile,
            },
            "latency": target,
        },
        field="config",
    )
    return _run(_completed(config, module, opened), opened, module, out, time_limit, quiet, baselines)


def search_blocks(
    model: str,
    task: str,
    *,
    budget: str,
    out: str | Path,
    data: str | Path,
    method: str = "puzzle",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    task_options: Mapping[str, Any] | None = None,
    workers: int = 1,
    time_limit: float | None = None,
    quiet: bool = False,
) -> Outcome:
    """Turn a trained residual model into a child within a budget, block by block; go on if ``out`` holds the same run.

    Args:
        model: Folder of a model of transformers, or "module:factory" (its code is executed; the model is called with
            ``input_ids``, for sentences with ``attention_mask`` too).
        task: "language-modelling" for causal models, "sentences" for encoders.
        budget: Limits on memory (weights and key-value caches), params, macs, latency, throughput; ``x`` is relative
            to the parent. Latency and throughput (sequences per second) are measured here, for the load in the
            settings.
        out: Folder of the run.
        data: Text file.
        method: Slug of a method that works on a given model.
        seed: Seed of everything random.
        settings: Hyper-parameters of the method.
        task_options: Of the text: tokenizer, length, batch, train, valid.
        workers: Processes for blocks and scores; the result does not depend on it.
        time_limit: Seconds after which the run stops; it can be resumed.
        quiet: No progress.

    Raises:
        UserError: Something given is wrong: the model, its blocks, the tokenizer, the text, or a budget that nothing
            reaches.
    """
    system, module = load_method(method)
    if hasattr(module, "Searcher"):
        raise UserError("method", method, allowed="puzzle with a model; others search a family")
    config = validated(
        RunConfig,
        {
            "method": system["slug"],
            "task": {"name": task, "data": str(Path(data).absolute()), **(task_options or {})},
            "family": {"name": BLOCKS, "target": str(Path(model).absolute()) if Path(model).is_dir() else model},
            "budget": str(Budget.parse(budget)),
            "seed": seed,
            "settings": validated(module.Settings, dict(settings or {}), field="settings").model_dump(mode="json"),
            "runtime": {"threads": 1, "memory_format": "contiguous"},
        },
        field="config",
    )
    return _blocks_run(config, module, Path(out), workers, time_limit, quiet)


def _blocks_run(
    config: RunConfig, module: ModuleType, out: Path, workers: int, time_limit: float | None, quiet: bool
) -> Outcome:
    with threads_pinned(1):
        result = drive_blocks(config, module, out, workers=workers, time_limit=time_limit, quiet=quiet)
    return Outcome(out, result)


def shrink(
    model: str,
    task: str | Task = "digits",
    *,
    budget: str | None = None,
    out: str | Path,
    method: str = "shrink",
    score: str | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    data: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    task_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    memory_format: str = "contiguous",
    time_limit: float | None = None,
    quiet: bool = False,
) -> Outcome:
    """Cut a network of your own to a budget while training it; go on if ``out`` holds the same run unfinished.

    Args:
        model: "module:factory", called without arguments; the network takes the task's images and gives its logits.
        task: Name of a task, or a ``Task`` of your own, as in ``search``.
        budget: For example "macs<=0.5x, latency<=4ms"; ``x`` is relative to the network as the factory makes it. None:
            only what the penalty closes goes (with the method "figs", or the schedule "dead").
        out: Folder of the run.
        method: "shrink" for a score and a schedule, or the slug of a published system of kind "shrink".
        score: Which units go first, see ``archsmith.Shrinker``; for the method "shrink".
        weights: Safetensors file with trained weights; without it, the network is trained at full width first.
        seed: Seed of everything random.
        data: File or folder that the task reads.
        settings: Hyper-parameters of the method.
        task_options: Options of the task.
        threads: As in ``search``.
        memory_format: "channels_last" or "contiguous".
        time_limit: As in ``search``.
        quiet: No progress.

    Returns:
        The outcome, with ``record.json``, ``weights.safetensors``, ``model.onnx`` and ``program.pt2`` in its folder.

    Raises:
        UserError: Something given is wrong; nothing was written.
        ArchsmithError: The run cannot go on; what was saved is kept.
    """
    module = _own_method(method)
    _refuse_names("task option", task_options, ("name", "data", "own"))
    if isinstance(task, str):
        options = {**getattr(module, "TASK_OPTIONS", {}), **(task_options or {})}
        opened = open_task(task, data=data, **options)
        section = {"name": task, "data": None if data is None else str(Path(data).absolute()), **options}
    else:
        opened, section = _own_task(task, data, task_options), {"name": task.name, "data": None, "own": True}
    chosen = dict(settings or {})
    if score is not None:
        chosen["score"] = score
    family: dict[str, Any] = {"name": OWN, "target": model}
    if weights is not None:
        family["weights"] = str(Path(weights).absolute())
        chosen.setdefault("epochs_before", 0)
    config = validated(
        RunConfig,
        {
            "method": method,
            "task": section,
            "task_digest": opened.digest,
            "family": family,
            "budget": None if budget is None else str(Budget.parse(budget)),
            "seed": seed,
            "settings": chosen,
            "runtime": {
                "threads": max(1, usable_cores() // local_process_count()) if threads is None else threads,
                "memory_format": memory_format,
                "processes": process_count(),
            },
        },
        field="config",
    )
    return _run(_completed(config, module, opened), opened, module, out, time_limit, quiet)


def _own_section(
    model: str | None, method: str, module: ModuleType, family: str | None, options: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the family of a search on the user's own network; None for a method that searches a family."""
    wanted = getattr(module, "SUPERNET_OF_OWN", False)
    if model is None:
        if wanted:
            raise UserError(
                "--model", None, allowed=f"a Hugging Face folder, or module:factory, for the method {method}"
            )
        return None
    if not wanted:
        raise UserError("--model", model, allowed=f"nothing for the method {method}, which searches a family")
    if family is not None or options:
        raise UserError("family", family or dict(options or {}), allowed="nothing beside --model")
    return {"name": OWN, "target": str(Path(model).expanduser().absolute()) if is_folder(model) else model}


def _tokenizer_of(model: str | None, task: str) -> dict[str, Any]:
    """Return the tokenizer of a pre-trained folder as an option of a text task, where it has one."""
    texts = {row["name"] for row in task_table() if row["module"] == "text_tasks"}
    if model is None or task not in texts or not is_folder(model):
        return {}
    folder = Path(model).expanduser().absolute()
    there = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    return {"tokenizer": str(folder)} if there else {}


def _own_method(name: str) -> ModuleType:
    """Return the module of a method that shrinks the user's network."""
    from archsmith.run import shrink_model

    return shrink_model if name == shrink_model.SYSTEM["slug"] else load_method(name, kind="shrink")[1]


def _module_of(config: RunConfig) -> ModuleType:
    """Return the module of a configuration's method."""
    searches = any(row["slug"] == config.method and row["kind"] == "search" for row in method_table())
    return _own_method(config.method) if is_own(config) and not searches else load_method(config.method)[1]


def resume(
    run: str | Path,
    *,
    task: Task | None = None,
    time_limit: float | None = None,
    quiet: bool = False,
    trust: bool = False,
) -> Outcome:
    """Go on with an unfinished run under its own configuration; a finished one is only read.

    Args:
        run: Folder of the run.
        task: The task object, when the run was started with one of your own.
        time_limit: As in ``search``.
        quiet: No progress.
        trust: Execute the factory that the run names, where it shrinks a network of your own.

    Raises:
        UserError: Not a run, its data changed since it was started, or it would execute a factory without ``trust``.
        ArchsmithError: The run cannot go on; what was saved is kept.
    """

    def read() -> Outcome | RunConfig:
        with Run.open(run) as opened:
            return _read(opened) if opened.status == "finished" else validated(RunConfig, opened.config, field="config")

    with open_workers(_device_of(run)) as workers:
        found = workers.from_main(read)
        if isinstance(found, Outcome):
            return found
        _require_trust(found, trust)
        if found.family["name"] == BLOCKS:
            return _blocks_run(found, _module_of(found), Path(run), 1, time_limit, quiet)
        opened_task = task or task_of(found)
        _require_same_data(found, opened_task)
        return _run(found, opened_task, _module_of(found), run, time_limit, quiet)


def _require_trust(config: RunConfig, trust: bool) -> None:
    """Refuse to execute code that only a file names: the file may come from somebody else."""
    target = config.family.get("target")
    executes = (is_own(config) or config.family["name"] == BLOCKS) and not is_folder(str(target))
    if executes and not trust:
        raise UserError(
            "run",
            Shown(f"one that executes {target}"),
            allowed="such a run with --trust (trust=True), if you trust the author of that code",
            hint="Or type the command again that started it.",
        )


def search_file(
    config: str | Path,
    *,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    budget: str | None = None,
    seed: int | None = None,
    time_limit: float | None = None,
    baselines: int = 0,
    quiet: bool = False,
    trust: bool = False,
) -> Outcome:
    """Search under the configuration of a file: the ``config.yaml`` of another run, as it is or edited.

    Settings that the file leaves out have the values that ``search`` gives them. Without ``task_digest`` (delete the
    line after editing the task) whatever data the task finds are used.

    Args:
        config: The file.
        out: Folder of the run.
        settings: Hyper-parameters that replace those of the file.
        budget: Replaces the budget of the file.
        seed: Replaces the seed of the file.
        time_limit: As in ``search``.
        baselines: As in ``search``.
        quiet: No progress.
        trust: Execute the factory that the file names, where it shrinks a network of your own.

    Raises:
        UserError: It would execute a factory without ``trust``; the file cannot be read, or is wrong, or the data are
            not those that it names by their digest.
        ArchsmithError: The run cannot go on; what was saved is kept.
    """
    written = read_config(config)
    changed = {"budget": None if budget is None else str(Budget.parse(budget)), "seed": seed}
    update = {key: value for key, value in changed.items() if value is not None}
    merged = {**written.model_dump(), **update, "settings": {**written.settings, **(settings or {})}}
    written = validated(RunConfig, merged, field="config")
    _require_trust(written, trust)
    module = _module_of(written)
    if written.family["name"] == BLOCKS:
        return _blocks_run(written, module, Path(out), 1, time_limit, quiet)
    task = task_of(written)
    if written.task_digest:
        _require_same_data(written, task)
    return _run(_completed(written, module, task), task, module, out, time_limit, quiet, baselines)


def bench(
    strategies: Sequence[str],
    arenas: Sequence[str],
    *,
    out: str | Path,
    data: str | Path | None = None,
    budget: str = "evaluations<=100",
    seeds: int = 20,
    workers: int = 1,
    free_repeats: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare strategies on benchmark tables; go on if ``out`` holds the same comparison unfinished.

    Args:
        strategies: Names, or "NAME:KEY=VALUE;KEY=VALUE" with settings. Random search is added.
        arenas: "TABLE/DATASET" or "TABLE/DATASET@FIDELITY".
        out: Folder of the comparison; ``report.html`` is written there.
        data: Folder of the tables; by default what the environment variable ARCHSMITH_DATA names, or its folder
            ``nas-benchmarks``.
        budget: Of one search: "evaluations<=100", "simulated<=12000s", "seconds<=60s", or several with commas.
        seeds: Searches of each strategy in each arena, at least 2.
        workers: Processes; the numbers do not depend on it.
        free_repeats: Whether a network that was evaluated before costs nothing again.
        quiet: No progress.

    Returns:
        The content of ``result.json``: for each arena the table of the contenders.

    Raises:
        UserError: Something given is wrong; nothing was run.
    """
    from archsmith.run.bench import BenchConfig, arena_of, bench_budget, contender_of, run_bench
    from archsmith.run.bench_report import write_bench_report

    folder = _tables_folder(data)
    config = validated(
        BenchConfig,
        {
            "contenders": [contender_of(text) for text in strategies],
            "arenas": [arena_of(text) for text in arenas],
            "seeds": seeds,
            "budget": bench_budget(budget),
            "data": str(folder.absolute()),
            "free_repeats": free_repeats,
        },
        field="bench",
    )
    if workers < 1:
        raise UserError("workers", workers, allowed="an integer from 1")
    result = run_bench(config, out, workers=workers, say=(lambda text: None) if quiet else say)
    write_bench_report(out, result)
    return result


def bench_fronts(
    strategies: Sequence[str],
    arenas: Sequence[str],
    objectives: Sequence[str],
    *,
    out: str | Path,
    data: str | Path | None = None,
    budget: str = "evaluations<=100",
    seeds: int = 10,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare strategies by the fronts they find; go on if ``out`` holds the same comparison unfinished.

    Args:
        strategies: As in ``bench``, of several objectives ("linas", "nsga2"). Random search is added.
        arenas: "TABLE/DATASET", or "ofa-mobile/note10": Once-for-All's accuracy predictor with a phone's latencies.
        objectives: "accuracy" and costs of the arenas, two or three.
        out: Folder of the comparison; ``report.html`` is written there.
        data: As in ``bench``.
        budget: "evaluations<=100", of one search.
        seeds: Searches of each strategy in each arena, at least 2.
        quiet: No progress.

    Returns:
        The content of ``result.json``: for each arena the table of the contenders.

    Raises:
        UserError: Something given is wrong; nothing was run.
    """
    from archsmith.run.bench import bench_budget, contender_of
    from archsmith.run.bench_fronts import FrontsConfig, run_fronts, write_fronts_report

    limits = bench_budget(budget)
    if set(limits) != {"evaluations"}:
        raise UserError("--budget", budget, allowed="evaluations<=N with --objectives")
    values = {
        "contenders": [contender_of(text) for text in strategies],
        "arenas": list(arenas),
        "objectives": list(objectives),
        "evaluations": limits["evaluations"],
        "seeds": seeds,
        "data": str(_tables_folder(data).absolute()),
    }
    config = validated(FrontsConfig, values, field="bench")
    result = run_fronts(config, out, say=(lambda text: None) if quiet else say)
    write_fronts_report(out, result)
    return result


def bench_methods(
    methods: Sequence[str],
    tasks: Sequence[str],
    *,
    out: str | Path,
    cost: str = "macs<=0.4x",
    seeds: int = 3,
    random: int = 1,
    seconds: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare methods that search and train in one run; go on if ``out`` holds the same comparison unfinished.

    Args:
        methods: Slugs, or "SLUG:KEY=VALUE;KEY=VALUE" with settings.
        tasks: Names, or "NAME=FILE" with the data that the task reads. They need a test split.
        out: Folder of the comparison; its searches are runs below it, ``report.html`` is written there.
        cost: Limits that every network keeps.
        seeds: Searches of each method on each task, at least 2.
        random: Random networks beside each search, trained by the same recipe.
        seconds: Real seconds of one search, or None.
        quiet: No progress.

    Returns:
        The content of ``result.json``: for each task the table of the methods.

    Raises:
        UserError: Something given is wrong.
    """
    from archsmith.run.bench_report import write_training_report
    from archsmith.run.bench_training import TrainingBench, method_of, run_training_bench
    from archsmith.run.bench_training import task_of as arena

    values = {
        "methods": [method_of(text) for text in methods],
        "tasks": [arena(text) for text in tasks],
        "seeds": seeds,
        "cost": str(Budget.parse(cost)),
        "random": random,
        "seconds": seconds,
    }
    config = validated(TrainingBench, values, field="bench")
    for method in config.methods:
        load_method(method.method)
    result = run_training_bench(config, out, search, say=(lambda text: None) if quiet else say)
    write_training_report(out, result)
    return result


def _tables_folder(data: str | Path | None) -> Path:
    """Return the folder of the benchmark tables."""
    root = data or os.environ.get("ARCHSMITH_DATA")
    if root is None:
        raise UserError(
            "--data",
            None,
            allowed="the folder of the benchmark tables",
            hint="docs/guide/tables.md says where they are.",
        )
    inner = Path(root) / "nas-benchmarks"
    return inner if inner.is_dir() else Path(root)


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


def _own_task(task: object, data: str | Path | None, options: Mapping[str, Any] | None) -> Task:
    """Return the user's task object after checking that it is one, and that nothing beside it would be ignored."""
    if not isinstance(task, Task):
        raise UserError("task", task, allowed="the name of a task, or an archsmith.Task")
    if data is not None or options:
        given = {"data": data, "task_options": options}
        raise UserError("task", Shown(f"a task object together with {given}"), allowed="these for tasks given by name")
    return task


def _completed(config: RunConfig, module: ModuleType, task: Task) -> RunConfig:
    """Return the configuration with every setting of the method and the digest of the data written out."""
    given = {**module.preset_settings(task.input_shape), **config.settings}
    settings = validated(module.Settings, given, field="settings")
    found: dict[str, Any] = {"settings": settings.model_dump(), "task_digest": task.digest}
    if hasattr(module, "family_options"):  # a family whose options follow from the task's vocabulary, say
        found["family"] = {**module.family_options(task, settings), **config.family}
    return config.model_copy(update=found)


def _require_same_data(config: RunConfig, task: Task) -> None:
    if task.digest != config.task_digest:
        raise UserError(
            "task.data",
            Shown(f"data with the digest {task.digest}"),
            allowed=f"the data of the configuration, digest {config.task_digest}",
            hint="The data or their split changed since; restore them, or start another run.",
        )


def _latency_section(device: str, given: Mapping[str, Any] | None, module: ModuleType) -> dict[str, Any] | None:
    """Return where latency is measured as the configuration keeps it: None for what was always the default.

    A search for a device measures where it trains, unless something else was asked for or it cannot.
    """
    devices = getattr(module, "LATENCY_DEVICES", ())
    if device not in ("auto", "cpu", "cuda", "onnxruntime"):
        raise UserError("device", device, allowed="auto, cpu, cuda" + (", onnxruntime" if devices else ""))
    section = {name: value for name, value in (given or {}).items() if value is not None}
    if device == "onnxruntime" or (devices and resolve_device(device) in devices):
        section.setdefault("device", "onnxruntime" if device == "onnxruntime" else resolve_device(device))
    if section == {"device": "cpu"} and "cpu" in devices:
        return None
    return section or None


def _with_objectives(
    settings: dict[str, Any], objectives: Sequence[str] | None, method: str, module: ModuleType
) -> dict[str, Any]:
    """Return the settings with the objectives among them.

    Raises:
        UserError: The method has one objective and no choice.
    """
    if objectives is None:
        return settings
    if "objectives" not in module.Settings.model_fields:
        raise UserError("objectives", list(objectives), allowed=f"nothing for {method}, which improves the accuracy")
    return {**settings, "objectives": list(objectives)}


def _refuse_names(field: str, given: Mapping[str, Any] | None, reserved: Sequence[str]) -> None:
    """Refuse options whose names stand for something else in the configuration."""
    for name in given or {}:
        if name in reserved:
            raise UserError(
                field, name, allowed="an option's own name", hint=f"{', '.join(reserved)} are set elsewhere."
            )


def _run(
    config: RunConfig,
    task: Task,
    module: ModuleType,
    out: str | Path,
    time_limit: float | None,
    quiet: bool,
    baselines: int = 0,
) -> Outcome:
    """Drive the run to its end, then its baselines, and write the report; a finished run is only read."""
    if time_limit is not None and not time_limit > 0:
        raise UserError("time_limit", time_limit, allowed="seconds above 0, or None")
    started = time.monotonic()
    if baselines:
        _check_baselines(config, module, baselines)
    path = Path(out)
    with open_workers(config.runtime.device) as workers, threads_pinned(config.runtime.threads):
        _require_processes(config, workers)
        refuse_unrepeatable(task.resume_note, workers.count)
        read_only = workers.from_main(lambda: _is_finished(path))
        outcome = _driven(config, task, module, path, time_limit, quiet, workers)
        if not read_only and workers.main:
            _write_report(path)  # now, because baselines take long
        if baselines and outcome.status == "finished":
            left = None if time_limit is None else max(1.0, time_limit - (time.monotonic() - started))
            trained = _train_baselines(config, task, module, outcome, baselines, left, quiet, workers)
            if (trained or read_only) and workers.main:
                _write_report(path)
    return outcome


def _require_processes(config: RunConfig, workers: Workers) -> None:
    """A batch's parts decide the bits, so a run goes on with as many processes as it was started with."""
    wanted = config.runtime.processes
    if wanted != workers.count:
        command = f"torchrun --nproc-per-node {wanted} -m archsmith" if wanted > 1 else "archsmith"
        raise UserError(
            "processes",
            workers.count,
            allowed=f"{wanted}, as the configuration says",
            hint=f"Start it with {command}, or start another run: --micro-batches {wanted} does the same in one "
            "process, up to rounding.",
        )


def _device_of(path: str | Path) -> str:
    """Return the device in the configuration of a run, without locking it; "cpu" where that cannot be read."""
    with suppress(UserError):
        return read_config(Path(path) / "config.yaml").runtime.device
    return "cpu"


def _driven(
    config: RunConfig,
    task: Task,
    module: ModuleType,
    out: Path,
    time_limit: float | None,
    quiet: bool,
    workers: Workers,
) -> Outcome:
    """Open the run, build the method and drive it; a finished run is only read.

    For a new run the method is built first, so that whatever it refuses is refused before anything is written. Of
    several processes the first holds the run; the others are told what was measured for it, and follow its steps.
    """
    if is_own(config):
        return _driven_own(config, task, module, out, time_limit, quiet)
    with StopRequest(time_limit=time_limit) as stop:
        if not workers.main:
            measured: list[dict[str, Any]] | None = workers.share(None)
            if measured is not None:
                _, searcher = prepare(config, task, module, EarlyJournal(measured), workers)
                follow(searcher, task, stop=stop, workers=workers)
            return Outcome(out, workers.share({}))
        journal = EarlyJournal()
        prepared = None if (out / "journal.jsonl").exists() else prepare(config, task, module, journal, workers)
        if prepared is not None:
            check_room(out, prepared[1])
        with Run.create_or_open(out, config.to_json()) as run:
            if run.status == "finished":
                workers.share(None)
                return Outcome(out, workers.share(_read(run).result))
            if prepared is None or run.status != "new":
                prepared = prepare(config, task, module, run, workers)
            else:
                journal.continue_in(run)
            record_environment(run)
            costs, searcher = prepared
            workers.share(run.events("latency_measured"))
            result = drive(run, searcher, task, costs, stop=stop, quiet=quiet, workers=workers)
            return Outcome(out, workers.share(result))


def _driven_own(
    config: RunConfig, task: Task, module: ModuleType, out: Path, time_limit: float | None, quiet: bool
) -> Outcome:
    """Do what ``_driven`` does for a run on the user's own network, in one process."""
    with StopRequest(time_limit=time_limit) as stop:
        journal = EarlyJournal()
        prepared = None if (out / "journal.jsonl").exists() else prepare_own(config, task, module, journal)
        if prepared is not None:
            check_room(out, prepared[1])
        with Run.create_or_open(out, config.to_json()) as run:
            if run.status == "finished":
                return _read(run)
            if prepared is None or run.status != "new":
                prepared = prepare_own(config, task, module, run)
            else:
                journal.continue_in(run)
            record_environment(run)
            costs, searcher = prepared
            return Outcome(out, drive(run, searcher, task, costs, stop=stop, quiet=quiet, write=finish_own))


def _check_baselines(config: RunConfig, module: ModuleType, count: int) -> None:
    """Refuse, before anything is trained, what cannot be compared."""
    if count < 0:
        raise UserError("--baselines", count, allowed="0 or more random architectures")
    if is_own(config):
        raise UserError("--baselines", count, allowed="a run that searches; this one shrinks a network of your own")
    if config.architecture is not None:
        raise UserError("--baselines", count, allowed="a run that searches; this one trains a given architecture")
    if "architecture" not in inspect.signature(module.Searcher).parameters:
        raise UserError("--baselines", count, allowed="a method that can train a given architecture by its recipe")


def _train_baselines(
    config: RunConfig,
    task: Task,
    module: ModuleType,
    searched: Outcome,
    count: int,
    time_limit: float | None,
    quiet: bool,
    workers: Workers,
) -> bool:
    """Train what is missing of the baselines of a finished run; return whether all of them are finished."""
    started = time.monotonic()
    budget = baseline_budget(config, searched.result)
    family = family_of(config, task)
    costs = CostModel(family, Budget.parse(budget), EarlyJournal())
    configs = baseline_configs(config, cast(ScalableFamily, family), costs, budget, count)
    for number, (name, own) in enumerate(configs.items(), start=1):
        path = searched.path / BASELINES / name
        if workers.from_main(partial(_is_finished, path)):
            continue
        left = None if time_limit is None else workers.share(time_limit - (time.monotonic() - started))
        if (left is None or left > 0) and workers.main:
            say(f"Baseline {number} of {len(configs)}: {name}, trained by the same recipe without the search.")
        spent = left is not None and left <= 0
        if spent or _driven(own, task, module, path, left, quiet, workers).status != "finished":
            if workers.main:
                say(f"Stopped; archsmith report {searched.path} --baselines {count} goes on with the baselines.")
            return False
    return True


def _is_finished(path: Path) -> bool:
    """Return whether a finished run is at ``path``; cheap, and False for anything strange."""
    file = path / "result.json"
    return file.exists() and (path / "journal.jsonl").exists() and read_json(file).get("status") == "finished"


def _write_report(path: Path) -> None:
    """Write the report; a result that is finished and checked never fails because its picture cannot be drawn."""
    try:
        with Run.open(path) as run:
            write_report(run)
    except ImportError as error:
        warnings.warn(f"report.html was not written: {error}.", stacklevel=3)


def report(
    run: str | Path,
    *,
    baselines: int = 0,
    task: Task | None = None,
    time_limit: float | None = None,
    quiet: bool = False,
) -> Path:
    """Write ``report.html`` of a finished or stopped run anew, with the time of each layer, and return its path.

    Args:
        run: Folder of the run.
        baselines: As in ``search``; those that are there already are not trained again.
        task: The task object, when the run was started with one of your own and baselines are to be trained.
        time_limit: Seconds after which training of baselines stops; the same call goes on later.
        quiet: No progress.

    Raises:
        UserError: Not a run, one without a result yet, or baselines of one that is not finished.
    """
    path = Path(run)

    def read() -> tuple[RunConfig, dict[str, Any]]:
        with Run.open(path) as opened:
            result = opened.result()
            if result is None:
                raise UserError(
                    "run",
                    str(path),
                    allowed="a run that is finished or was stopped",
                    hint=f"archsmith resume {path} goes on with it.",
                )
            return validated(RunConfig, opened.config, field="config"), result

    def write() -> Path:
        with Run.open(path) as opened:
            blocks = opened.config["family"]["name"] == BLOCKS
            return write_block_report(opened) if blocks else write_report(opened, timed=True)

    with open_workers(_device_of(path)) as workers:
        config, result = workers.from_main(read)
        if baselines:
            module = _module_of(config)
            _check_baselines(config, module, baselines)
            if result["status"] != "finished":
                raise UserError(
                    "--baselines", baselines, allowed="a finished run", hint=f"archsmith resume {path} goes on with it."
                )
            _require_processes(config, workers)
            own = task or task_of(config)
            _require_same_data(config, own)
            with threads_pinned(config.runtime.threads):
                _train_baselines(config, own, module, Outcome(path, result), baselines, time_limit, quiet, workers)
        return workers.from_main(write)


def _read(run: Run) -> Outcome:
    """Return what a finished run ended with."""
    result = run.result()
    assert result is not None
    return Outcome(run.path, result)


def export(
    run: str | Path,
    *,
    points: Sequence[int] | Literal["all"] = (),
    out: str | Path | None = None,
    task: Task | None = None,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Return the measured Pareto set of a search in a supernet, or write points of it as finished networks.

    Args:
        run: Folder of the run.
        points: Numbers of points, or "all"; none returns the set.
        out: Where a folder "front-NUMBER" for each point goes; "exported" in the run by default.
        task: The task object, when the run was started with one of your own.
        trust: Execute the factory that the run names, where its network is one of your own.

    Returns:
        Without points, a row for each point of the set: "point", metrics, costs. Else their records, as outcomes of
        ``result.json``.

    Raises:
        UserError: Not a run, one of another kind of method, no such point, or its data changed.
    """
    from archsmith.run.export_points import export_points, front_rows, restored

    with Run.open(Path(run)) as opened:
        config = validated(RunConfig, opened.config, field="config")
        _require_trust(config, trust)
        own = task or task_of(config)
        _require_same_data(config, own)
        with threads_pinned(config.runtime.threads), open_workers(config.runtime.device) as workers:
            costs: Any
            if is_own(config):
                costs, searcher = prepare_own(config, own, _module_of(config), opened)
            else:
                costs, searcher = prepare(config, own, _module_of(config), opened, workers)
            search = restored(opened, searcher)
            rows = front_rows(search)
            if not points:
                return rows
            numbers = [row["point"] for row in rows] if points == "all" else [int(point) for point in points]
            return export_points(opened, search, own, costs, numbers, Path(out or Path(run) / "exported"))


def verify(run: str | Path, *, trust: bool = False) -> Report:
    """Check everything that a finished or stopped run says about its networks; see ``archsmith.run.verify``.

    The read of the test split is recorded in the run's journal.

    Args:
        run: Folder of the run.
        trust: Execute a ``model.py`` that is not the one archsmith writes, or the factory of a network of your own.

    Raises:
        UserError: No run at ``run``, or one without a result.
    """
    file = Path(run) / "result.json"
    if file.is_file() and is_block_result(result := read_json(file)):
        target = str(read_config(Path(run) / "config.yaml").family["target"])
        return verify_blocks(Path(run), result, parent_here(target, trust=trust))

    def journal_the_read() -> None:
        with suppress(UserError), Run.open(run) as opened:  # a run received without its journal has none to note it in
            opened.count_test_read("verify")

    return verify_run(run, trust=trust, on_test_read=journal_the_read)
