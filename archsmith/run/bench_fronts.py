"""Comparing strategies by the fronts they find: several objectives, equal evaluations and seeds, random always there.

An arena is a data set of a benchmark table with some of its columns as objectives, or one of Once-for-All's published
accuracy predictors (with the latency of a phone, or MACs), which answer for their whole spaces. Nothing is trained. A
search is judged by the hypervolume of everything it has measured; each is recorded, and never done twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import Shown, UserError
from archsmith.core.files import write_atomic
from archsmith.core.rng import numpy_stream
from archsmith.evaluate.ofa_predictor import LATENCY_FILE, OfaLatency, OfaPredictor, OfaPredictorEvaluator
from archsmith.evaluate.ofa_resnet_predictor import OfaResnetPredictor
from archsmith.evaluate.tables import open_table
from archsmith.run.bench import RANDOM_SEARCH, Arena, Contender, arena_of, metrics_of
from archsmith.run.charts import line, plain_layout
from archsmith.run.directory import Run
from archsmith.run.page import chart, document, element, joined, section
from archsmith.run.page import table as html_table
from archsmith.run.statistics import compare_paired, holm, summarise
from archsmith.space import Architecture, Objective, Result, Space
from archsmith.space.hypervolume import hypervolume
from archsmith.space.pareto import losses
from archsmith.strategies import open_strategy

PHONE = "ofa-mobile/note10"
"""The arena of the published predictor: accuracy, MACs, parameters, and the latency of a Samsung Note10 in ms."""

RESNET = "ofa-resnet50/macs"
"""The arena of the published predictor of the elastic ResNet50: accuracy, MACs and parameters."""

PHONE_REFERENCE = {"latency": 70.0, "valid_accuracy": 72.0}
"""Reference point of the published objectives there."""

SAMPLED = 500
"""Random architectures whose medians bound the hypervolume where no reference point is published."""

MARKS = 20
"""Points of a curve, on a logarithmic scale of evaluations."""


class FrontsConfig(BaseModel):
    """Everything that determines a comparison.

    Attributes:
        contenders: Strategies that take any number of objectives; random search is added when it is missing.
        arenas: "TABLE/DATASET", or ``PHONE``.
        objectives: "accuracy" and costs of the arenas.
        evaluations: Of one search.
        seeds: Searches of each contender in each arena, seeds 0, 1, ...
        data: Folder of the tables.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contenders: tuple[Contender, ...]
    arenas: tuple[str, ...]
    objectives: tuple[str, ...] = Field(min_length=2, max_length=3)
    evaluations: int = Field(ge=2)
    seeds: int = Field(ge=2)
    data: str


@dataclass(frozen=True)
class FrontArena:
    """Where fronts are compared.

    Attributes:
        name: As typed.
        space: The space.
        objectives: With references.
        measure: Returns the result of an architecture.
    """

    name: str
    space: Space
    objectives: tuple[Objective, ...]
    measure: Callable[[Architecture], Result]


def open_arena(text: str, data: str | Path, names: Sequence[str]) -> FrontArena:
    """Return an arena with these objectives.

    Raises:
        UserError: No such table, data set, file or objective.
    """
    if text == PHONE:
        latency = OfaLatency(Path(data) / LATENCY_FILE)
        known = OfaPredictorEvaluator(OfaPredictor(data), latency)

        def predicted(architecture: Architecture) -> Result:
            accuracy = float(known.accuracy([architecture])[0])
            return Result(metrics={"valid_accuracy": accuracy}, costs=known.exact_costs(architecture))

        costs = ("macs", "params", "latency")
        return _with_references(text, known.space, predicted, names, "valid_accuracy", costs, PHONE_REFERENCE)
    if text == RESNET:
        resnet = OfaResnetPredictor(data)
        return _with_references(text, resnet.space, resnet.measure, names, "valid_accuracy", ("macs", "params"), {})
    try:
        arena: Arena = arena_of(text)
    except UserError as error:
        raise UserError("--arena", text, allowed=f"{PHONE}, {RESNET}, or {error.allowed}") from error
    table = open_table(arena.table, data)
    metric, _ = metrics_of(table, arena)
    columns = {name: np.asarray(column) for name, column in table.costs.get(arena.dataset, {}).items()}
    accuracy_of = np.asarray(table.values(metric, dataset=arena.dataset, fidelity=arena.fidelity))

    def looked_up(architecture: Architecture) -> Result:
        row = table.row(architecture)
        if row is None or math.isnan(accuracy_of[row]):
            return Result.failed(f"{table.name} holds no measurement of this architecture")
        costs = {name: float(column[row]) for name, column in columns.items()}
        return Result(metrics={metric: float(accuracy_of[row])}, costs=costs)

    return _with_references(text, table.space, looked_up, names, metric, tuple(columns), {})


def _with_references(
    text: str,
    space: Space,
    measure: Callable[[Architecture], Result],
    names: Sequence[str],
    metric: str,
    costs: Sequence[str],
    published: dict[str, float],
) -> FrontArena:
    """Return an arena whose objectives have references: published ones, else medians of random architectures."""
    if wrong := [name for name in names if name != "accuracy" and name not in costs]:
        raise UserError("--objectives", wrong[0], allowed=f"accuracy, {', '.join(costs)} in {text}")
    objectives = [
        Objective(metric) if name == "accuracy" else Objective(name, "minimize") for name in dict.fromkeys(names)
    ]
    if len(objectives) < 2:
        raise UserError("--objectives", list(names), allowed="at least two")
    if not {each.metric for each in objectives} <= set(published):
        rng = numpy_stream(0, "references", text)
        found = [measure(space.sample(rng)) for _ in range(SAMPLED)]
        medians = {each.metric: float(np.nanmedian([each.value(one) for one in found])) for each in objectives}
        published = {**medians, **published}
    whole = tuple(Objective(each.metric, each.direction, published[each.metric]) for each in objectives)
    return FrontArena(text, space, whole, measure)


def search_curve(arena: FrontArena, contender: Contender, *, evaluations: int, seed: int) -> list[list[float]]:
    """Return (evaluations, hypervolume) pairs of one search."""
    marks = curve_marks(evaluations)
    strategy = open_strategy(
        contender.strategy,
        arena.space,
        **{"objectives": _objectives_for(contender, arena)} | contender.settings,
        seed=seed,
    )
    signs = [-1.0 if each.direction == "maximize" else 1.0 for each in arena.objectives]
    reference = [sign * float(each.reference or 0.0) for sign, each in zip(signs, arena.objectives, strict=True)]
    results: list[Result] = []
    curve: list[list[float]] = []
    while len(results) < evaluations and (trials := strategy.ask(1)):
        for trial in trials:
            results.append(arena.measure(trial.architecture))
            strategy.tell(trial.id, results[-1])
        if len(results) in marks:
            found = losses(results, arena.objectives)
            curve.append([len(results), hypervolume(found, reference).value])
    return curve


def curve_marks(evaluations: int) -> list[int]:
    """Return after how many evaluations a search is judged; the last is all of them."""
    marks = np.geomspace(min(5, evaluations), evaluations, MARKS)
    return sorted({round(float(mark)) for mark in marks} | {evaluations})


def _objectives_for(contender: Contender, arena: FrontArena) -> list[Objective]:
    """Return all objectives; random search, which looks at none, takes one."""
    return list(arena.objectives[:1] if contender.strategy == RANDOM_SEARCH else arena.objectives)


def run_fronts(
    config: FrontsConfig, out: str | Path, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Run what is missing of a comparison and return its results (the content of ``result.json``).

    Args:
        config: The comparison.
        out: Run directory; an unfinished comparison of the same configuration is gone on with.
        say: Told about progress.

    Raises:
        UserError: An arena or objective that does not exist, a strategy of one objective, or another configuration in
            ``out``; found before anything runs.
    """
    labels = [contender.label for contender in config.contenders]
    if len(set(labels)) < len(labels):
        raise UserError("--strategy", Shown(", ".join(labels)), allowed="each contender once")
    if RANDOM_SEARCH not in labels:
        random = Contender(strategy=RANDOM_SEARCH, label=RANDOM_SEARCH)
        config = config.model_copy(update={"contenders": (random, *config.contenders)})
    arenas = [open_arena(text, config.data, config.objectives) for text in config.arenas]
    for arena in arenas:
        for contender in config.contenders:
            wanted = {"objectives": _objectives_for(contender, arena)} | contender.settings
            open_strategy(contender.strategy, arena.space, **wanted, seed=0)
    with Run.create_or_open(out, {"fronts": config.model_dump(mode="json")}) as run:
        if run.status != "finished":
            done = {(e["arena"], e["contender"], e["seed"]): e["curve"] for e in run.events("front_search")}
            for arena in arenas:
                for seed in range(config.seeds):
                    for contender in config.contenders:
                        key = (arena.name, contender.label, seed)
                        if key in done:
                            continue
                        done[key] = search_curve(arena, contender, evaluations=config.evaluations, seed=seed)
                        run.record("front_search", arena=key[0], contender=key[1], seed=seed, curve=done[key])
                        say(f"{arena.name}: {contender.label}, seed {seed}: hypervolume {done[key][-1][1]:.4g}")
            run.finish({"fronts": config.model_dump(mode="json"), "arenas": [_judged(a, config, done) for a in arenas]})
        result = run.result()
        assert result is not None
        return result


def _judged(
    arena: FrontArena, config: FrontsConfig, done: dict[tuple[str, str, int], list[list[float]]]
) -> dict[str, Any]:
    """Return the table of an arena as JSON values."""
    ends: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    for contender in config.contenders:
        curves = [done[arena.name, contender.label, seed] for seed in range(config.seeds)]
        ends[contender.label] = [curve[-1][1] for curve in curves]
        shortest = min(map(len, curves))
        means = [[curves[0][i][0], float(np.mean([curve[i][1] for curve in curves]))] for i in range(shortest)]
        summary = summarise(ends[contender.label])
        row: dict[str, Any] = {"contender": contender.label, "each": ends[contender.label], "curve": means}
        rows.append({**row, "mean": summary.mean, "low": summary.low, "high": summary.high})
    others = [row for row in rows if row["contender"] != RANDOM_SEARCH]
    paired = [compare_paired(row["each"], ends[RANDOM_SEARCH]) for row in others]
    adjusted = holm([each.wilcoxon_p for each in paired])
    for other, each, p in zip(others, paired, adjusted, strict=True):
        gap = {"difference": each.difference, "low": each.low, "high": each.high, "wins": each.wins, "holm_p": p}
        other["against_random_search"] = gap
    objectives = [each.to_json() for each in arena.objectives]
    return {"arena": arena.name, "objectives": objectives, "contenders": rows}


FRONT_COLUMNS = ("strategy", "hypervolume, mean", "95 % interval", "minus random search (paired)", "ahead in", "Holm p")


def front_rows(arena: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of an arena's table as text."""
    rows: list[tuple[str, ...]] = []
    for row in arena["contenders"]:
        gap = row.get("against_random_search")
        against = ("baseline", "", "")
        if gap is not None:
            span = f"{gap['difference']:+.4g} ({gap['low']:+.4g} to {gap['high']:+.4g})"
            against = (span, f"{gap['wins']} of {len(row['each'])}", f"{gap['holm_p']:.3g}")
        rows.append((row["contender"], f"{row['mean']:.5g}", f"{row['low']:.5g} to {row['high']:.5g}", *against))
    return rows


def reference_text(arena: dict[str, Any]) -> str:
    """Return what the hypervolume is bounded by, in words."""
    return ", ".join(f"{each['metric']} {each['reference']:.4g}" for each in arena["objectives"])


def write_fronts_report(out: str | Path, result: dict[str, Any]) -> Path:
    """Write ``report.html`` beside a finished comparison and return its path.

    Raises:
        ImportError: Plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    config = result["fronts"]
    lead = (
        f"{len(config['contenders'])} strategies, {config['seeds']} seeds each, {config['evaluations']} evaluations a "
        "search. The hypervolume is that of everything a search has measured."
    )
    sections = []
    for number, arena in enumerate(result["arenas"]):
        curves = [
            line([x for x, _ in row["curve"]], [y for _, y in row["curve"]], row["contender"], f"var(--k{i % 5})", 2)
            for i, row in enumerate(arena["contenders"])
        ]
        layout = plain_layout(380, x="evaluations", y="mean hypervolume")
        layout["xaxis"]["type"] = "log"
        drawn = chart(f"front-{number}", {"data": curves, "layout": layout}, "Mean hypervolume over evaluations")
        about = f"Reference point: {reference_text(arena)}."
        table = html_table(FRONT_COLUMNS, front_rows(arena))
        sections.append(section(f"arena-{number}", arena["arena"], drawn, table, lead=about))
    body = joined(element("header", element("h1", "Fronts compared"), element("p", lead)), *sections)
    file = Path(out) / "report.html"
    write_atomic(file, document("archsmith bench", body, plotly=get_plotlyjs()))
    return file
