"""Comparing methods that search and train in one run: methods × tasks × seeds, each with random networks of its own.

Every search is a run of its own below the folder of the comparison, resumable by itself. Beside each, random networks
of the same family and cost and the uniformly scaled one are trained by the method's own recipe, so that the relative
improvement is that of the search and not of the recipe (arXiv 1912.12522, Sec. 3.1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import Shown, UserError
from archsmith.core.files import read_json
from archsmith.run.baselines import read_baselines
from archsmith.run.directory import Run
from archsmith.run.statistics import compare, compare_paired, holm, summarise

FOLDER = "searches"


class Method(BaseModel):
    """A method with its settings.

    Attributes:
        method: Slug.
        settings: Settings that differ from its recipe for the task.
        label: Name in tables.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    label: str


class TaskArena(BaseModel):
    """A task with its data.

    Attributes:
        task: Name.
        data: File or folder that it reads, or None.
        label: Name in tables.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    data: str | None = None
    label: str


class TrainingBench(BaseModel):
    """Everything that determines a comparison.

    Attributes:
        methods: At least one.
        tasks: At least one.
        seeds: Searches of each method on each task, seeds 0, 1, ...
        cost: Limits that every network keeps, "macs<=0.4x" for example.
        random: Random networks beside each search.
        seconds: Real seconds after which a search ends with its best so far; None for none.
        threads: Threads inside operators; one is fastest where several searches share a machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[Method, ...] = Field(min_length=1)
    tasks: tuple[TaskArena, ...] = Field(min_length=1)
    seeds: int = Field(ge=2)
    cost: str
    random: int = Field(default=1, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    threads: int = Field(default=1, ge=1)


def method_of(text: str) -> Method:
    """Return the method that "atomnas" or "atomnas:penalty=equal;epochs=10" names.

    Raises:
        UserError: A setting that is not KEY=VALUE.
    """
    import yaml

    name, _, listed = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in filter(None, listed.split(";")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError("--method", text, allowed="NAME or NAME:KEY=VALUE;KEY=VALUE")
        settings[key.strip()] = yaml.safe_load(value)
    return Method(method=name, settings=settings, label=text)


def task_of(text: str) -> TaskArena:
    """Return the task that "digits" or "cifar10=FILE" names."""
    name, _, data = text.partition("=")
    return TaskArena(task=name, data=str(Path(data).absolute()) if data else None, label=name)


def run_training_bench(
    config: TrainingBench,
    out: str | Path,
    search: Callable[..., Any],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run what is missing of a comparison and return its results (the content of ``result.json``).

    Args:
        config: The comparison.
        out: Its folder; an unfinished one of the same configuration is gone on with.
        search: ``archsmith.search``, or something with its arguments that leaves finished runs.
        say: Told about progress.

    Raises:
        UserError: What ``search`` refuses; another configuration in ``out``.
    """
    if len({each.label for each in config.methods}) < len(config.methods):
        raise UserError("--method", Shown(", ".join(m.label for m in config.methods)), allowed="each method once")
    out = Path(out)
    with Run.create_or_open(out, {"training_bench": config.model_dump(mode="json")}) as run:
        if run.status == "finished":
            stored = run.result()
            assert stored is not None
            return stored
        grid = [(m, t, s) for t in config.tasks for m in config.methods for s in range(config.seeds)]
        for number, (method, task, seed) in enumerate(grid, start=1):
            say(f"search {number} of {len(grid)}: {method.label} on {task.label}, seed {seed}")
            search(
                task.task,
                method=method.method,
                settings=method.settings,
                budget=config.cost,
                data=task.data,
                seed=seed,
                out=folder_of(out, method, task, seed),
                baselines=config.random,
                time_limit=config.seconds,
                threads=config.threads,
                quiet=True,
            )
        run.finish(training_results(config, out))
        stored = run.result()
        assert stored is not None
        return stored


def folder_of(out: Path, method: Method, task: TaskArena, seed: int) -> Path:
    """Return the run of one search: names are made of letters that every file system takes."""
    name = re.sub(r"[^A-Za-z0-9.=-]+", "_", f"{method.label}-{task.label}-{seed}")
    return out / FOLDER / name


def training_results(config: TrainingBench, out: Path) -> dict[str, Any]:
    """Return one table for each task, from the finished runs: test accuracies in percent.

    For each method: searched, random and uniformly scaled networks with spread and interval, relative improvement over
    the random ones with interval, Welch and Mann-Whitney p; the paired difference to the first method on the same seeds
    with Wilcoxon p, Holm-adjusted.
    """
    tables = []
    for task in config.tasks:
        rows = [_row(config, out, method, task) for method in config.methods]
        for row in rows[1:]:
            row["against_first"] = compare_paired(row["each"], rows[0]["each"]).__dict__
        adjusted = holm([row["against_first"]["wilcoxon_p"] for row in rows[1:]])
        for row, p in zip(rows[1:], adjusted, strict=True):
            row["against_first"]["holm_p"] = p
        tables.append({"task": task.label, "methods": rows})
    return {"training_bench": config.model_dump(mode="json"), "tables": tables, "outcomes": []}


def _row(config: TrainingBench, out: Path, method: Method, task: TaskArena) -> dict[str, Any]:
    searched, macs, seconds = list[float](), list[float](), list[float]()
    random, uniform = list[float](), list[float]()
    for seed in range(config.seeds):
        folder = folder_of(out, method, task, seed)
        result = read_json(folder / "result.json")
        searched.append(_accuracy(result, folder))
        macs.append(result["outcomes"][0]["costs"]["macs"])
        seconds.append(result["seconds"])
        for baseline in read_baselines(folder):
            (uniform if baseline.name == "uniform" else random).append(_accuracy(baseline.result, folder))
    against = compare(searched, random)
    return {
        "method": method.label,
        "each": searched,
        **against.searched.__dict__,
        "random": {**against.random.__dict__, "each": random},
        "uniform": {**summarise(uniform).__dict__, "each": uniform},
        "improvement": against.improvement,
        "improvement_interval": [against.low, against.high],
        "welch_p": against.welch_p,
        "mannwhitney_p": against.mannwhitney_p,
        "macs": sum(macs) / len(macs),
        "seconds": sum(seconds) / len(seconds),
    }


def _accuracy(result: Mapping[str, Any], folder: Path) -> float:
    metrics = result["outcomes"][0]["metrics"]
    if "test_accuracy" not in metrics:
        raise UserError("--task", str(folder), allowed="tasks with a test split: searches are compared on it")
    return 100 * float(metrics["test_accuracy"])


TRAINING_COLUMNS = (
    "method",
    "n",
    "test accuracy, %",
    "random networks (n)",
    "uniformly scaled",
    "RI over random, %",
    "Mann-Whitney p",
    "minus the first method",
    "MACs",
    "seconds",
)


def training_rows(table: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    """Return a task's table as text; ``TRAINING_COLUMNS`` names the columns."""
    rows = []
    for row in table["methods"]:
        low, high = row["improvement_interval"]
        paired = row.get("against_first")
        gap = "-"
        if paired is not None:
            gap = (
                f"{paired['difference']:+.2f} ({paired['low']:+.2f} to {paired['high']:+.2f}), p {paired['holm_p']:.2g}"
            )
        rows.append(
            (
                row["method"],
                str(row["n"]),
                f"{row['mean']:.2f} ± {row['std']:.2f}",
                f"{row['random']['mean']:.2f} ± {row['random']['std']:.2f} ({row['random']['n']})",
                f"{row['uniform']['mean']:.2f} ± {row['uniform']['std']:.2f}",
                f"{row['improvement']:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{row['mannwhitney_p']:.3g}",
                gap,
                f"{row['macs']:,.0f}",
                f"{row['seconds']:.0f}",
            )
        )
    return rows
