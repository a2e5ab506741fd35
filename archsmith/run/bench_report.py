"""The page of a bench: tables with intervals, the curves over evaluations, and how to run it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from archsmith.core.files import write_atomic
from archsmith.run.bench import RANDOM_SEARCH
from archsmith.run.bench_training import TRAINING_COLUMNS, training_rows
from archsmith.run.charts import anytime_curves, every_network
from archsmith.run.page import Html, chart, document, element, joined, section, table


def write_bench_report(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write ``report.html`` beside a finished bench and return its path.

    Args:
        path: Run directory of the bench.
        result: Its results.

    Raises:
        ImportError: Plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    file = Path(path) / "report.html"
    write_atomic(file, render_bench(str(path), result, plotly=get_plotlyjs()))
    return file


def render_bench(out: str, result: Mapping[str, Any], *, plotly: str) -> str:
    """Return the page."""
    bench = result["bench"]
    arenas = [_arena(index, arena, bench) for index, arena in enumerate(result["arenas"])]
    lead = (
        f"{len(bench['contenders'])} strategies, {len(bench['arenas'])} arenas, {bench['seeds']} seeds each, under "
        f"{budget_text(bench['budget'])} a search. Random search and the average random architecture are always here."
    )
    body = joined(
        element("header", element("h1", "Strategies compared"), element("p", lead)),
        *arenas,
        _reading(bench),
        _reproduce(out, bench),
    )
    return document("archsmith bench", body, plotly=plotly)


def write_training_report(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write ``report.html`` beside a finished comparison of methods and return its path.

    Raises:
        ImportError: Plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    bench = result["training_bench"]
    lead = (
        f"{len(bench['methods'])} methods, {len(bench['tasks'])} tasks, {bench['seeds']} seeds, every network within "
        f"{bench['cost']}. Random and uniformly scaled networks of that cost are trained by each method's own recipe."
    )
    tables = [
        section(f"task-{number}", each["task"], table(TRAINING_COLUMNS, training_rows(each)), *_dots(number, each))
        for number, each in enumerate(result["tables"])
    ]
    body = joined(element("header", element("h1", "Methods compared"), element("p", lead)), *tables)
    file = Path(path) / "report.html"
    write_atomic(file, document("archsmith bench", body, plotly=get_plotlyjs()))
    return file


def _dots(number: int, each: Mapping[str, Any]) -> list[Html]:
    return [chart(f"dots-{number}", every_network(each), f"test accuracy of every network on {each['task']}")]


def bench_rows(arena: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of an arena's table as text; ``BENCH_COLUMNS`` names the columns."""
    random = arena["random_architectures"]
    rows = [_text_row(row, arena) for row in arena["contenders"]]
    spread = f"{random['mean']:.2f} ± {random['std']:.2f}"
    interval = f"{random['low']:.2f} to {random['high']:.2f}"
    empty = ("",) * (len(BENCH_COLUMNS) - 5)
    return [*rows, ("average random architecture", str(random["n"]), spread, interval, "0 (by definition)", *empty)]


BENCH_COLUMNS = (
    "strategy",
    "n",
    "judged, mean ± sd",
    "95 % interval",
    "RI over random architectures, %",
    "regret",
    "minus random search (paired)",
    "Holm p",
    "evaluations",
    "repeats",
)


def _text_row(row: Mapping[str, Any], arena: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["improvement_interval"]
    paired = row.get("against_random_search")
    gap = p = "baseline"
    if paired is not None:
        gap = f"{paired['difference']:+.2f} ({paired['low']:+.2f} to {paired['high']:+.2f})"
        p = f"{paired['holm_p']:.3g}"
    name = row["contender"] + (f" ({row['nothing_found']} found nothing)" if row["nothing_found"] else "")
    return (
        name,
        str(row["n"]),
        f"{row['mean']:.2f} ± {row['std']:.2f}",
        f"{row['low']:.2f} to {row['high']:.2f}",
        f"{row['improvement']:.2f} ({low:.2f} to {high:.2f})",
        f"{row['regret']:.2f}",
        gap,
        p,
        f"{row['evaluations']:.0f}",
        f"{row['repeats']:.1f}",
    )


def budget_text(budget: Mapping[str, Any]) -> str:
    """Return "100 evaluations", "12,000 simulated seconds" and the like."""
    names = {
        "evaluations": "evaluations",
        "simulated_seconds": "simulated seconds",
        "real_seconds": "seconds on this machine",
    }
    return ", ".join(f"{value:,.0f} {names[name]}" for name, value in budget.items() if value is not None)


def _arena(index: int, arena: Mapping[str, Any], bench: Mapping[str, Any]) -> Html:
    same = arena["seen"] == arena["judged"]
    note = (
        " This table has no validation figures: the searches see what they are judged by."
        if same
        else f" The searches see {arena['seen']} and are judged by {arena['judged']}."
    ).replace("_", " ")
    lead = f"Best of the whole table: {arena['best_of_table']:.2f}.{note}"
    return section(
        f"arena-{index}",
        arena["arena"],
        chart(f"curve-{index}", anytime_curves(arena), f"judged figure over evaluations in {arena['arena']}"),
        table(BENCH_COLUMNS[:6], [row[:6] for row in bench_rows(arena)]),
        element("h3", "Against random search, and what it took"),
        table(BENCH_COLUMNS[:1] + BENCH_COLUMNS[6:], [row[:1] + row[6:] for row in bench_rows(arena)[:-1]]),
        lead=lead,
    )


def _reading(bench: Mapping[str, Any]) -> Html:
    free = "cost nothing and are counted beside" if bench["free_repeats"] else "count like any other"
    points: Sequence[str] = (
        "Judged: what the returned architecture reaches; a search returns the best it has seen by its own figure.",
        "RI: the relative improvement over uniformly sampled architectures (arXiv 1912.12522), not random search.",
        f"The paired difference is to {RANDOM_SEARCH} search with the same seeds; p is of Wilcoxon's signed-rank test, "
        "adjusted by Holm for the number of strategies in the arena.",
        f"Networks that were evaluated before {free}.",
        "Intervals are percentile bootstraps over seeds. They say nothing about other tables or other budgets.",
    )
    return section("reading", "How to read this", element("ul", *(element("li", point) for point in points)))


def _reproduce(out: str, bench: Mapping[str, Any]) -> Html:
    return section(
        "reproduce",
        "How to reproduce it",
        element("pre", bench_command(out, bench)),
        element("details", element("summary", "configuration"), element("pre", json.dumps(bench, indent=2))),
    )


def bench_command(out: str, bench: Mapping[str, Any]) -> str:
    """Return the command that runs the bench again."""
    words = ["archsmith", "bench"]
    for contender in bench["contenders"]:
        words += ["--strategy", contender["label"]]
    for arena in bench["arenas"]:
        at = "" if arena["fidelity"] is None else f"@{arena['fidelity']:g}"
        words += ["--arena", f"{arena['table']}/{arena['dataset']}{at}"]
    short = {"evaluations": "evaluations", "simulated_seconds": "simulated", "real_seconds": "seconds"}
    limits = [f"{short[name]}<={value:g}" for name, value in bench["budget"].items() if value is not None]
    words += ["--budget", ",".join(limits), "--seeds", str(bench["seeds"]), "--data", "FOLDER", "--out", f"{out}-again"]
    return shlex.join(words if bench["free_repeats"] else [*words, "--count-repeats"])
