"""Comparing strategies honestly: the same budget, the same seeds, random search and random sampling always included.

A bench is a grid: contenders × arenas × seeds. Each cell is one search; its record is what the search would have
returned after every improvement, judged by a figure that the search never saw. Cells are independent, recorded one by
one in the journal of a run directory, and never done twice: a killed bench goes on where it was. On tables nothing is
trained and time is simulated, so that the numbers are the same on every machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream
from archsmith.evaluate.tables import Table, TableEvaluator, open_table, table_catalogue
from archsmith.run.directory import Run
from archsmith.run.ledger import StudyBudget
from archsmith.run.statistics import compare, compare_paired, holm, summarise
from archsmith.run.stop import StopRequest
from archsmith.run.study import run_study
from archsmith.run.study_store import MemoryStore
from archsmith.space import Objective, Result, Trial
from archsmith.strategies import open_strategy, strategy_class

REPEATS = 20
"""Free repetitions for each evaluation of the budget after which a search is given up: it has converged."""

SAMPLED = 100
"""Randomly sampled architectures of an arena, at least; on a table they cost nothing."""

RANDOM_SEARCH = "random"
"""Name of the contender that is always there."""

CHECKPOINTS = 60
"""Points of an anytime curve, on a logarithmic scale of evaluations."""


class Contender(BaseModel):
    """A strategy with its settings.

    Attributes:
        strategy: Name in ``archsmith.strategies.strategy_table()``.
        settings: Its settings that differ from the defaults.
        label: Name in tables and charts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str
    settings: dict[str, Any] = Field(default_factory=dict)
    label: str


class Arena(BaseModel):
    """Where contenders meet: a data set of a benchmark table.

    Attributes:
        table: Name in ``table_catalogue()``.
        dataset: One of its data sets.
        fidelity: Fidelity of a query; None for the full one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    dataset: str
    fidelity: float | None = None

    @property
    def label(self) -> str:
        """Name in tables and charts: "nas-bench-201/cifar10@12"."""
        return f"{self.table}/{self.dataset}" + ("" if self.fidelity is None else f"@{self.fidelity:g}")


class BenchConfig(BaseModel):
    """Everything that determines a bench.

    Attributes:
        contenders: Strategies; random search is added when it is missing.
        arenas: Tables and data sets.
        seeds: Searches of each contender in each arena, seeds 0, 1, ...
        budget: Limits of one search (``StudyBudget``), by name.
        data: Folder of the tables.
        free_repeats: Whether a network that was evaluated before costs nothing again; such trials are counted beside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contenders: tuple[Contender, ...]
    arenas: tuple[Arena, ...]
    seeds: int = Field(ge=2)
    budget: dict[str, float | int | None]
    data: str
    free_repeats: bool = True


@dataclass(frozen=True)
class Cell:
    """One search.

    Attributes:
        contender: Label of the contender.
        arena: Label of the arena.
        seed: Its seed.
        curve: ``(evaluations, simulated seconds, objective, judged)`` after every improvement of the objective.
        evaluations: Evaluations carried out.
        repeats: Trials that were answered for free.
        seconds: Simulated seconds.
        thinking: Real seconds that the strategy took for ask and tell; no figure of the comparison.
    """

    contender: str
    arena: str
    seed: int
    curve: tuple[tuple[int, float, float, float], ...]
    evaluations: int
    repeats: int
    seconds: float
    thinking: float = 0.0

    @property
    def judged(self) -> float:
        """Judged figure of the architecture that the search returns; NaN when it found none."""
        return self.curve[-1][3] if self.curve else math.nan

    def judged_after(self, evaluations: int) -> float:
        """Return the judged figure of what the search would have returned after that many evaluations."""
        found = math.nan
        for count, _, _, judged in self.curve:
            if count > evaluations:
                break
            found = judged
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the cell as a JSON object."""
        return {**self.__dict__, "curve": [list(point) for point in self.curve]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """Return the cell that ``to_json`` wrote; fields of the journal beside it are ignored."""
        known = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "curve": tuple((int(n), s, o, j) for n, s, o, j in data["curve"])})


def contender_of(text: str) -> Contender:
    """Return the contender that a text names: "regularized-evolution" or "regularized-evolution:population=20".

    Raises:
        UserError: No such strategy, or a setting that is not KEY=VALUE.
    """
    import yaml

    name, _, listed = text.partition(":")
    strategy_class(name)
    settings: dict[str, Any] = {}
    for pair in filter(None, listed.split(";")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError("--strategy", text, allowed="NAME or NAME:KEY=VALUE;KEY=VALUE")
        settings[key.strip()] = yaml.safe_load(value)
    return Contender(strategy=name, settings=settings, label=text)


def arena_of(text: str) -> Arena:
    """Return the arena that a text names: "nas-bench-201/cifar10", with "@12" for the table's fidelity 12.

    Raises:
        UserError: No such table, data set or fidelity.
    """
    where, _, fidelity = text.partition("@")
    table, _, dataset = where.partition("/")
    rows = {row["name"]: row for row in table_catalogue()}
    if table not in rows:
        raise UserError("--arena", text, allowed=f"TABLE/DATASET with a table of {', '.join(rows)}")
    datasets = list(rows[table]["datasets"])
    if not dataset and len(datasets) == 1:
        dataset = str(datasets[0])
    if dataset not in datasets:
        raise UserError("--arena", text, allowed=f"{table}/ and one of {datasets}")
    try:
        return Arena(table=table, dataset=dataset, fidelity=float(fidelity) if fidelity else None)
    except ValueError as error:
        raise UserError("--arena", text, allowed="a number after @") from error


def bench_budget(text: str) -> dict[str, float | int | None]:
    """Return the limits of "evaluations<=100", "simulated<=12000s" or "seconds<=60s", also several with commas.

    Raises:
        UserError: Anything else.
    """
    names = {"evaluations": "evaluations", "simulated": "simulated_seconds", "seconds": "real_seconds"}
    limits: dict[str, float | int | None] = {}
    for part in text.split(","):
        name, sign, number = (piece.strip() for piece in part.partition("<="))
        try:
            value = int(number) if name == "evaluations" else float(number.removesuffix("s"))
        except ValueError:
            value = 0
        if not sign or name not in names or not value > 0:
            raise UserError(
                "--budget", text, allowed="evaluations<=N, simulated<=SECONDS or seconds<=SECONDS, joined by commas"
            )
        limits[names[name]] = value
    return limits


def run_bench(
    config: BenchConfig, out: str | Path, *, workers: int = 1, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Run what is missing of a bench and return its results (the content of ``result.json``).

    Args:
        config: The comparison.
        out: Run directory; an unfinished bench of the same configuration is gone on with.
        workers: Processes that run cells; the numbers do not depend on it.
        say: Told about progress.

    Raises:
        UserError: A strategy that does not fit an arena (found before anything runs); another configuration in ``out``.
    """
    config = _with_random_search(config)
    for arena in config.arenas:
        table = _table(config.data, arena.table)
        _check_fidelity(arena, table)
        for contender in config.contenders:
            open_strategy(contender.strategy, table.space, **_settings(contender, table, arena), seed=0)
    with Run.create_or_open(out, {"bench": config.model_dump(mode="json")}) as run:
        if run.status == "finished":
            stored = run.result()
            assert stored is not None
            return stored
        done = {(c.contender, c.arena, c.seed): c for c in cells_of(run.events("bench_cell"))}
        missing = [key for key in _grid(config) if key not in done]
        started, shown = time.monotonic(), time.monotonic()
        for count, cell in enumerate(_cells(config, missing, workers), start=1):
            run.record("bench_cell", **cell.to_json())
            done[cell.contender, cell.arena, cell.seed] = cell
            if time.monotonic() - shown > 2 or count == len(missing):
                shown = time.monotonic()
                left = (shown - started) / count * (len(missing) - count)
                say(f"{len(done)} of {len(done) + len(missing) - count} searches, about {left:.0f} s left")
        result = results(config, [done[key] for key in _grid(config)])
        run.finish(result)
        stored = run.result()
        assert stored is not None
        return stored


def cells_of(events: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Return the cells among the events of a journal."""
    return [Cell.from_json(event) for event in events if event["kind"] == "bench_cell"]


def run_cell(config: BenchConfig, contender: Contender, arena: Arena, seed: int) -> Cell:
    """Run one search on a table."""
    table = _table(config.data, arena.table)
    metric, judge = metrics_of(table, arena)
    evaluator = TableEvaluator(table, dataset=arena.dataset, fidelity=arena.fidelity)
    judged = table.values(judge, dataset=arena.dataset)
    settings = _settings(contender, table, arena)
    strategy = _Timed(open_strategy(contender.strategy, table.space, **settings, seed=seed))
    stop = StopRequest()
    evaluations = config.budget.get("evaluations")
    most = math.inf if evaluations is None else REPEATS * evaluations
    watch = _Watch(Objective(metric), table, judged, full=_full(table, arena), most=most, stop=stop)
    outcome = run_study(
        strategy.inner,
        evaluator,
        budget=StudyBudget(**config.budget),  # type: ignore[arg-type]
        store=MemoryStore(keep=False),
        cache=config.free_repeats,
        on_result=watch,
        stop=stop,
    )
    return Cell(
        contender=contender.label,
        arena=arena.label,
        seed=seed,
        curve=tuple(watch.curve),
        evaluations=outcome.evaluated,
        repeats=outcome.free,
        seconds=outcome.simulated_seconds,
        thinking=round(strategy.seconds, 3),
    )


def metrics_of(table: Table, arena: Arena) -> tuple[str, str]:
    """Return the metric that searches see and the one that judges: validation and test accuracy where both exist.

    A table without validation accuracies (NAS-Bench-101, NAS-Bench-Macro) shows the searches what it judges by; its
    label in the results says so.
    """
    seen = table.reading(arena.dataset, arena.fidelity).metrics
    full = table.reading(arena.dataset, None).metrics
    judge = next((name for name in ("test_accuracy", "test_perf", "valid_accuracy") if name in full), next(iter(full)))
    metric = next((name for name in ("valid_accuracy", "valid_perf", judge) if name in seen), next(iter(seen)))
    return metric, judge


def results(config: BenchConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the tables of a bench as JSON values: one entry for each arena.

    For each contender: judged figure with spread and interval, regret to the best of the table, relative improvement
    over randomly *sampled* architectures (arXiv 1912.12522) with interval and Mann-Whitney p, paired difference to
    random *search* on the same seeds with interval and Wilcoxon p (Holm-adjusted over the contenders), the judged
    figure over evaluations. Searches that found nothing are counted, and left out of the means.
    """
    arenas = []
    for arena in config.arenas:
        table = _table(config.data, arena.table)
        metric, judge = metrics_of(table, arena)
        judged = np.asarray(table.values(judge, dataset=arena.dataset))
        best = float(np.nanmax(judged))
        samples = _samples(table, judged, arena, max(config.seeds, SAMPLED))
        groups = {
            c.label: [x for x in cells if (x.contender, x.arena) == (c.label, arena.label)] for c in config.contenders
        }
        rows = [_row(label, group, samples, best) for label, group in groups.items()]
        _add_paired(rows, groups)
        steps = _steps(cells, arena)
        for row, group in zip(rows, groups.values(), strict=True):
            row["anytime"] = [_anytime(group, step) for step in steps]
        arenas.append(
            {
                "arena": arena.label,
                "seen": metric,
                "judged": judge,
                "best_of_table": best,
                "random_architectures": summarise(samples).__dict__,
                "contenders": sorted(rows, key=lambda row: -row["mean"]),
            }
        )
    return {"bench": config.model_dump(mode="json"), "arenas": arenas, "outcomes": []}


def _row(label: str, group: Sequence[Cell], samples: Sequence[float], best: float) -> dict[str, Any]:
    found = [cell.judged for cell in group if math.isfinite(cell.judged)]
    if len(found) < 2:
        raise UserError(
            "budget", label, allowed="one within which at least two searches of each contender find something"
        )
    whole, against = summarise(found), compare(found, samples)
    return {
        "contender": label,
        **whole.__dict__,
        "nothing_found": len(group) - len(found),
        "regret": best - whole.mean,
        "improvement": against.improvement,
        "improvement_interval": [against.low, against.high],
        "mannwhitney_p": against.mannwhitney_p,
        "evaluations": float(np.mean([cell.evaluations for cell in group])),
        "repeats": float(np.mean([cell.repeats for cell in group])),
        "simulated_seconds": float(np.mean([cell.seconds for cell in group])),
    }


def _add_paired(rows: list[dict[str, Any]], groups: Mapping[str, Sequence[Cell]]) -> None:
    """Add the paired comparison with random search; a seed counts where both found something."""
    baseline = {cell.seed: cell.judged for cell in groups[RANDOM_SEARCH]}
    others = [row for row in rows if row["contender"] != RANDOM_SEARCH]
    for row in others:
        pairs = [(cell.judged, baseline[cell.seed]) for cell in groups[row["contender"]]]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        row["against_random_search"] = compare_paired(*zip(*pairs, strict=True)).__dict__
    adjusted = holm([row["against_random_search"]["wilcoxon_p"] for row in others])
    for row, p in zip(others, adjusted, strict=True):
        row["against_random_search"]["holm_p"] = p


def _anytime(group: Sequence[Cell], evaluations: int) -> list[float | int | None]:
    """Return ``[evaluations, mean, low, high]`` of the judged figure; None before two searches found something."""
    found = [value for cell in group if math.isfinite(value := cell.judged_after(evaluations))]
    if len(found) < 2:
        return [evaluations, None, None, None]
    whole = summarise(found)
    return [evaluations, whole.mean, whole.low, whole.high]


def _steps(cells: Sequence[Cell], arena: Arena) -> list[int]:
    most = max(cell.evaluations for cell in cells if cell.arena == arena.label)
    return sorted({round(step) for step in np.geomspace(1, most, CHECKPOINTS)})


def _samples(table: Table, judged: np.ndarray, arena: Arena, count: int) -> list[float]:
    """Return the judged figures of ``count`` rows drawn uniformly: the average random architecture."""
    rng = numpy_stream(0, "bench", "random architectures", arena.label)
    known = judged[np.isfinite(judged)]
    return [float(value) for value in known[rng.integers(len(known), size=count)]]


class _Watch:
    """Follows a study: what would it return now, and how good is that really?"""

    def __init__(
        self,
        objective: Objective,
        table: Table,
        judged: np.ndarray,
        *,
        full: float | None,
        most: float,
        stop: StopRequest,
    ) -> None:
        self.objective, self.table, self.judged, self.full = objective, table, judged, full
        self.trials, self.most, self.stop = 0, most, stop
        self.curve: list[tuple[int, float, float, float]] = []
        self.best = (-math.inf, -math.inf)
        self.evaluations, self.seconds = 0, 0.0
        self._seen: set[tuple[str, float | None]] = set()

    def __call__(self, trial: Trial, result: Result) -> None:
        self.trials += 1
        if self.trials - self.evaluations > self.most:
            self.stop.request("it only repeats itself")
        key = (trial.architecture.network_digest, trial.fidelity)
        if key not in self._seen:
            self._seen.add(key)
            self.evaluations += 1
        self.seconds += result.seconds
        value = self.objective.value(result)
        # results of a higher fidelity rank before those of a lower one: what a multi-fidelity search returns
        rank = (math.inf if trial.fidelity is None or trial.fidelity == self.full else trial.fidelity, value)
        if math.isfinite(value) and rank > self.best:
            row = self.table.row(trial.architecture)
            if row is not None and math.isfinite(self.judged[row]):
                self.best = rank
                self.curve.append((self.evaluations, self.seconds, value, float(self.judged[row])))


class _Timed:
    """Measures how long a strategy thinks, by wrapping its two public methods on the instance."""

    def __init__(self, strategy: Any) -> None:
        self.inner, self.seconds = strategy, 0.0
        for name in ("ask", "tell"):
            setattr(strategy, name, self._timed(getattr(strategy, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def _grid(config: BenchConfig) -> list[tuple[str, str, int]]:
    return [(c.label, a.label, s) for a in config.arenas for c in config.contenders for s in range(config.seeds)]


def _cells(config: BenchConfig, keys: Sequence[tuple[str, str, int]], workers: int) -> Iterator[Cell]:
    contenders = {each.label: each for each in config.contenders}
    arenas = {each.label: each for each in config.arenas}
    calls = [(config, contenders[contender], arenas[arena], seed) for contender, arena, seed in keys]
    if workers == 1 or len(calls) < 2:
        yield from (run_cell(*call) for call in calls)
        return
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(run_cell, *call) for call in calls]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=8)
def _table(data: str, name: str) -> Table:
    return open_table(name, data)


def _full(table: Table, arena: Arena) -> float | None:
    return max(table.fidelities(arena.dataset)) if arena.fidelity is None else arena.fidelity


def _settings(contender: Contender, table: Table, arena: Arena) -> dict[str, Any]:
    """Return a contender's settings, with the objective of the arena and what its metrics in percent ask for."""
    metric, _ = metrics_of(table, arena)
    given: dict[str, Any] = {"objectives": [Objective(metric)], **contender.settings}
    if contender.strategy == "mcts":
        top = 100.0 if np.nanmax(table.values(metric, dataset=arena.dataset, fidelity=arena.fidelity)) > 1 else 1.0
        given.setdefault("reward_range", (0.0, top))
    return given


def _check_fidelity(arena: Arena, table: Table) -> None:
    if arena.fidelity is not None:
        table.reading(arena.dataset, arena.fidelity)


def _with_random_search(config: BenchConfig) -> BenchConfig:
    labels = [contender.label for contender in config.contenders]
    if len(set(labels)) < len(labels):
        raise UserError("--strategy", Shown(", ".join(labels)), allowed="each contender once")
    if RANDOM_SEARCH in labels:
        return config
    random = Contender(strategy=RANDOM_SEARCH, label=RANDOM_SEARCH)
    return config.model_copy(update={"contenders": (random, *config.contenders)})
