"""The command line: ``archsmith search``, ``shrink``, ``resume``, ``report``, ``verify``, ``profile`` and others.

A thin layer over ``archsmith.api``. Rooms that import torch are imported inside the commands, so that ``--help`` and
the tables answer at once. Wrong input ends with one paragraph and exit code 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from archsmith.core.errors import ArchsmithError, Shown, UserError
from archsmith.core.processes import process_count, process_rank

if TYPE_CHECKING:
    from archsmith.api import Outcome

app = typer.Typer(
    name="archsmith",
    help="Find, train and verify the network that fits your task and your budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter of the method; repeat.")
]
TaskOptions = Annotated[
    list[str] | None, typer.Option("--task-set", metavar="KEY=VALUE", help="An option of the task; repeat.")
]
FamilyOptions = Annotated[
    list[str] | None, typer.Option("--family-set", metavar="KEY=VALUE", help="An option of the family; repeat.")
]
TimeLimit = Annotated[
    str | None, typer.Option("--time", help="End after this long with the best result so far: 90s, 20m, 2h.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Baselines = Annotated[
    int,
    typer.Option(
        "--baselines", metavar="N", help="Train N random architectures and the uniformly scaled one at the same cost."
    ),
]


Trust = Annotated[bool, typer.Option("--trust", help="Execute code that archsmith did not write.")]


@app.command()
def search(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="Run this config.yaml; beside it --set, --budget and --seed replace what it says."),
    ] = None,
    method: Annotated[str, typer.Option(help="Slug of a search method; see archsmith methods.")] = "atomnas",
    task: Annotated[str, typer.Option(help="Name of a task; see archsmith tasks.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="File or folder that the task reads.")] = None,
    budget: Annotated[
        str | None, typer.Option(help='Limits, for example "macs<=0.4x, params<=200k"; x = of the largest network.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/METHOD-TASK]")] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Name of a family; see archsmith families. [default: the first of the method, else mobile]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="For instatune and puzzle: folder of a trained Hugging Face model, or module:factory, whose code is "
            "executed."
        ),
    ] = None,
    objectives: Annotated[
        str | None, typer.Option(help='For methods that return a Pareto set, for example "accuracy,latency".')
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    settings: Settings = None,
    task_set: TaskOptions = None,
    family_set: FamilyOptions = None,
    threads: Annotated[int | None, typer.Option(help="Threads inside operators. [default: all cores]")] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, or auto: a CUDA device where there is one. For bignas, linas and simq-nas also where "
            "latency is measured; onnxruntime trains on the CPU and measures exported files."
        ),
    ] = "cpu",
    latency_device: Annotated[
        str | None,
        typer.Option(help="cpu, onnxruntime or cuda, to measure latency elsewhere than --device trains."),
    ] = None,
    latency_precision: Annotated[
        str | None,
        typer.Option(
            help="Precision in which the network is going to run: fp32; bf16 (cpu, cuda); int8-dynamic or int8-static "
            "(onnxruntime). [default: fp32]"
        ),
    ] = None,
    latency_threads: Annotated[
        int | None, typer.Option(help="Threads with which latency is measured. [default: 1]")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, or bf16 to train under autocast.")] = "float32",
    compile_forward: Annotated[
        bool, typer.Option("--compile", help="Run the training forward by torch.compile, anew after every cut.")
    ] = False,
    micro_batches: Annotated[int, typer.Option(help="Compute every batch in this many parts.")] = 1,
    time_limit: TimeLimit = None,
    baselines: Baselines = 0,
    quiet: Quiet = False,
    trust: Trust = False,
    workers: Annotated[int, typer.Option(help="For puzzle: processes for blocks and scores.")] = 1,
) -> None:
    """Find and train a network for a task within a budget; typed again, go on or show what was found."""
    from archsmith import api
    from archsmith.core.allocator import raise_malloc_thresholds
    from archsmith.run.stop import parse_duration

    raise_malloc_thresholds()
    limit = None if time_limit is None else parse_duration(time_limit)
    if config is not None:
        _refuse_beside_config(context)
        from_file = api.search_file(
            config,
            out=out or Path("runs") / config.stem,
            settings=_pairs(settings, "--set"),
            budget=budget,
            seed=seed if _was_typed(context, "seed") else None,
            time_limit=limit,
            baselines=baselines,
            quiet=quiet,
            trust=trust,
        )
        _summarise_any(from_file)
        return
    if method == "puzzle":
        if model is None or budget is None or data is None:
            raise UserError("--method", method, allowed="together with --model, --budget and --data FILE")
        found = api.search_blocks(
            model,
            task if _was_typed(context, "task") else "language-modelling",
            method=method,
            budget=budget,
            data=data,
            out=out or Path("runs") / f"puzzle-{Path(model).name.replace(':', '-')}",
            seed=seed,
            settings=_nested(_pairs(settings, "--set")),
            task_options=_pairs(task_set, "--task-set"),
            workers=workers,
            time_limit=limit,
            quiet=quiet,
        )
        _summarise_blocks(found)
        return
    outcome = api.search(
        task,
        method=method,
        family=family,
        model=model,
        budget=budget,
        out=out or Path("runs") / f"{method}-{task}",
        seed=seed,
        data=data,
        settings=_pairs(settings, "--set"),
        objectives=None if objectives is None else [name.strip() for name in objectives.split(",")],
        task_options=_pairs(task_set, "--task-set"),
        family_options=_pairs(family_set, "--family-set"),
        threads=threads,
        device=device,
        precision=precision,
        compile=compile_forward,
        micro_batches=micro_batches,
        latency={"device": latency_device, "precision": latency_precision, "threads": latency_threads},
        time_limit=limit,
        baselines=baselines,
        quiet=quiet,
    )
    _summarise(outcome)


@app.command()
def shrink(
    model: Annotated[str, typer.Argument(help="module:factory that returns the network; its code is executed.")],
    budget: Annotated[
        str | None, typer.Option(help='Limits, for example "macs<=0.5x, latency<=4ms"; x = of the network.')
    ] = None,
    task: Annotated[str, typer.Option(help="Name of a task; see archsmith tasks.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="File or folder that the task reads.")] = None,
    method: Annotated[str, typer.Option(help="shrink, or a published system of kind shrink (figs).")] = "shrink",
    score: Annotated[
        str | None,
        typer.Option(help="With the method shrink: scale, factor, l1, l2, taylor, figs or random. [default: scale]"),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file with trained weights.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/METHOD-TASK]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    settings: Settings = None,
    task_set: TaskOptions = None,
    threads: Annotated[int | None, typer.Option(help="Threads inside operators. [default: all cores]")] = None,
    time_limit: TimeLimit = None,
    quiet: Quiet = False,
) -> None:
    """Cut a network of your own to a budget while training it; typed again, go on or show what was found."""
    from archsmith import api
    from archsmith.core.allocator import raise_malloc_thresholds
    from archsmith.run.stop import parse_duration

    raise_malloc_thresholds()
    outcome = api.shrink(
        model,
        task,
        budget=budget,
        out=out or Path("runs") / f"{method}-{task}",
        method=method,
        score=score,
        weights=weights,
        seed=seed,
        data=data,
        settings=_pairs(settings, "--set"),
        task_options=_pairs(task_set, "--task-set"),
        threads=threads,
        time_limit=None if time_limit is None else parse_duration(time_limit),
        quiet=quiet,
    )
    _summarise(outcome)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    time_limit: TimeLimit = None,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Go on with an unfinished run, bit for bit as if it had never stopped."""
    from archsmith import api
    from archsmith.core.allocator import raise_malloc_thresholds
    from archsmith.run.stop import parse_duration

    raise_malloc_thresholds()
    limit = None if time_limit is None else parse_duration(time_limit)
    _summarise_any(api.resume(run, time_limit=limit, quiet=quiet, trust=trust))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished or stopped run.")],
    baselines: Baselines = 0,
    time_limit: TimeLimit = None,
    quiet: Quiet = False,
) -> None:
    """Write RUN/report.html anew, a page that needs no network; with --baselines train what it compares with."""
    from archsmith import api
    from archsmith.core.allocator import raise_malloc_thresholds
    from archsmith.run.stop import parse_duration

    raise_malloc_thresholds()
    limit = None if time_limit is None else parse_duration(time_limit)
    path = api.report(run, baselines=baselines, time_limit=limit, quiet=quiet)
    if process_rank() == 0:
        typer.echo(path)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a search in a supernet: bignas, linas, instatune, simq-nas.")],
    point: Annotated[
        list[str] | None, typer.Option(help="Number of a point of the measured Pareto set, or all; repeat.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the networks go. [default: RUN/exported]")] = None,
    trust: Trust = False,
) -> None:
    """Show the measured Pareto set of a search, or write points of it as finished, checked networks."""
    from archsmith import api

    given = point or []
    if wrong := [each for each in given if each != "all" and not each.isdigit()]:
        raise UserError("--point", wrong[0], allowed="a number of the list that archsmith export RUN shows, or all")
    if not given:
        rows = api.export(run, trust=trust)
        table = Table(title=f"the measured Pareto set of {escape(str(run))}", title_justify="left")
        for name in rows[0]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(*(f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in row.values()))
        Console().print(table)
        typer.echo(f"Next: archsmith export {run} --point {rows[-1]['point']}, or --point all")
        return
    points: Literal["all"] | list[int] = "all" if "all" in given else [int(each) for each in given]
    for record in api.export(run, points=points, out=out, trust=trust):
        accuracy = f"valid accuracy {100 * record['metrics']['valid_accuracy']:.2f} %"
        typer.echo(f"{record['folder']}: {accuracy}, {_latency_text(record['costs']['latency'])}")


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="Folder of a finished or stopped run.")],
    trust: Trust = False,
) -> None:
    """Rebuild every file of a result in a fresh process, compare, recount, re-measure; exit 1 on any mismatch."""
    from archsmith import api

    report = api.verify(run, trust=trust)
    table = Table(title=f"verify {escape(str(run))}", title_justify="left")
    for column in ("network", "check", "status", "detail"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "failed": "bold red", "not checked": "yellow"}
    for row in report.rows:
        table.add_row(row.subject, row.name, f"[{colours[row.status]}]{row.status}[/]", escape(row.detail))
    console = Console()
    console.print(table)
    counts = {status: sum(row.status == status for row in report.rows) for status in colours}
    failed = counts["failed"]
    console.print(f"{counts['ok']} checks passed, {failed} failed, {counts['not checked']} not checked")
    if failed:
        raise typer.Exit(1)


@app.command()
def dashboard(
    run: Annotated[Path, typer.Argument(help="Folder of a study.")],
    storage: Annotated[
        str | None, typer.Option(help="URL of an Optuna storage. [default: sqlite file RUN/optuna.db]")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Start optuna-dashboard and keep the mirror fresh.")] = False,
    port: Annotated[int, typer.Option(help="Port of --serve.")] = 8080,
) -> None:
    """Mirror a study into an Optuna study that optuna-dashboard opens; typed again, bring the mirror up to date."""
    from archsmith.run.mirror import mirror_study, serve_mirror

    mirror = mirror_study(run, storage=storage)
    typer.echo(f"{mirror.trials} trials in the Optuna study {mirror.study!r}, {mirror.written} of them new or changed")
    typer.echo(f"Next: {mirror.command}")
    if serve:
        serve_mirror(run, mirror, port=port)


@app.command()
def profile(
    target: Annotated[str, typer.Argument(help="module:factory that returns an nn.Module, or a file.onnx.")],
    shape: Annotated[str, typer.Option(help="Shape of the input, batch included, for example 1x3x224x224.")],
    threads: Annotated[int, typer.Option(help="Threads inside operators.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters, MACs, output shape and latency of every layer."""
    from archsmith.cost import TABLE_COLUMNS, example_inputs, load_target, parse_shapes
    from archsmith.cost import profile as profile_layers

    result = profile_layers(load_target(target), example_inputs(parse_shapes(shape)), threads=threads)
    if as_json:
        layers = [asdict(layer) for layer in result.layers]
        latency = result.latency.to_dict()
        typer.echo(json.dumps({"layers": layers, "counts": result.counts.to_dict(), "latency": latency}, indent=2))
        return
    table = Table(title=escape(target), title_justify="left", caption=result.note, caption_justify="left")
    for number, column in enumerate(TABLE_COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
    for row in result.to_table():
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


@app.command()
def bench(
    strategies: Annotated[
        list[str] | None,
        typer.Option("--strategy", help="NAME or NAME:KEY=VALUE;KEY=VALUE; repeat. Random search is always there."),
    ] = None,
    arenas: Annotated[
        list[str] | None, typer.Option("--arena", help="TABLE/DATASET, with @FIDELITY for cheaper queries; repeat.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Of one search: evaluations<=N, simulated<=SECONDS, seconds<=SECONDS.")
    ] = "evaluations<=100",
    seeds: Annotated[int, typer.Option(help="Searches of each strategy in each arena.")] = 20,
    data: Annotated[Path | None, typer.Option(help="Folder of the benchmark tables.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the comparison; typed again, it goes on.")] = Path("runs/bench"),
    workers: Annotated[int, typer.Option(help="Processes; the numbers do not depend on it.")] = 1,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Compare fronts: accuracy and costs of the arenas (accuracy,latency), judged by hypervolume. Arenas "
            "are then tables, or ofa-mobile/note10: Once-for-All's accuracy predictor with a phone's latencies."
        ),
    ] = None,
    count_repeats: Annotated[
        bool, typer.Option("--count-repeats", help="Evaluating the same network again costs as much as the first time.")
    ] = False,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="Compare methods that train on tasks instead: SLUG or SLUG:KEY=VALUE; repeat."),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="With --method: NAME or NAME=FILE; repeat.")] = None,
    cost: Annotated[str, typer.Option(help="With --method: limits that every network keeps.")] = "macs<=0.4x",
    random: Annotated[int, typer.Option(help="With --method: random networks beside each search.")] = 1,
    seconds: Annotated[float | None, typer.Option(help="With --method: real seconds of one search.")] = None,
) -> None:
    """Compare strategies on benchmark tables, or methods on tasks, with intervals, tests and random baselines."""
    from archsmith import api

    if methods:
        _compare_methods(methods, tasks or ["digits"], out, cost, seeds, random, seconds)
        return

    if objectives is not None:
        names = [name.strip() for name in objectives.split(",")]
        _compare_fronts(
            strategies or ["linas", "nsga2"], arenas or ["ofa-mobile/note10"], names, data, budget, seeds, out
        )
        return

    result = api.bench(
        strategies or ["regularized-evolution"],
        arenas or ["nas-bench-201/cifar10"],
        data=data,
        budget=budget,
        seeds=seeds,
        out=out,
        workers=workers,
        free_repeats=not count_repeats,
    )
    from archsmith.run.bench_report import BENCH_COLUMNS, bench_rows

    short = (0, 1, 2, 4, 6, 7)  # what fits a terminal; the report has all
    console = Console()
    for arena in result["arenas"]:
        title = f"{arena['arena']}: best of the table {arena['best_of_table']:.2f}, judged by {arena['judged']}"
        table = Table(title=title, title_justify="left")
        for number in short:
            table.add_column(BENCH_COLUMNS[number], overflow="fold", justify="right" if number else "left")
        for row in bench_rows(arena):
            table.add_row(*(escape(row[number]) for number in short))
        console.print(table)
    console.print(f"report {out / 'report.html'}", soft_wrap=True)


def _compare_fronts(
    strategies: list[str],
    arenas: list[str],
    objectives: list[str],
    data: Path | None,
    budget: str,
    seeds: int,
    out: Path,
) -> None:
    """Print the tables of strategies compared by their fronts."""
    from archsmith import api
    from archsmith.run.bench_fronts import FRONT_COLUMNS, front_rows, reference_text

    result = api.bench_fronts(strategies, arenas, objectives, out=out, data=data, budget=budget, seeds=seeds)
    console = Console()
    for arena in result["arenas"]:
        table = Table(title=f"{arena['arena']}, reference {reference_text(arena)}", title_justify="left")
        for number, name in enumerate(FRONT_COLUMNS):
            table.add_column(name, overflow="fold", justify="right" if number else "left")
        for row in front_rows(arena):
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(f"report {out / 'report.html'}", soft_wrap=True)


def _compare_methods(
    methods: list[str], tasks: list[str], out: Path, cost: str, seeds: int, random: int, seconds: float | None
) -> None:
    """Print the tables of methods compared on tasks."""
    from archsmith import api
    from archsmith.run.bench_training import TRAINING_COLUMNS, training_rows

    result = api.bench_methods(methods, tasks, out=out, cost=cost, seeds=seeds, random=random, seconds=seconds)
    console = Console()
    short = (0, 1, 2, 3, 4, 5, 6)
    for each in result["tables"]:
        table = Table(title=f"{each['task']}, every network within {cost}", title_justify="left")
        for number in short:
            table.add_column(TRAINING_COLUMNS[number], overflow="fold", justify="right" if number else "left")
        for row in training_rows(each):
            table.add_row(*(escape(row[number]) for number in short))
        console.print(table)
    console.print(f"report {out / 'report.html'}", soft_wrap=True)


@app.command()
def advise(
    evaluations: Annotated[
        int | None, typer.Option(help="Architectures you can train and evaluate one by one; none for a single run.")
    ] = None,
    data: Annotated[str, typer.Option(help="What the data are: images, or anything else.")] = "images",
    own_model: Annotated[
        bool, typer.Option("--own-model", help="You have a model that should become smaller.")
    ] = False,
    objectives: Annotated[int, typer.Option(help="Number of things to improve at once.")] = 1,
    devices: Annotated[int, typer.Option(help="Devices, or budgets, that need a network each.")] = 1,
    latency: Annotated[bool, typer.Option("--latency", help="Latency is improved or limited.")] = False,
    family: Annotated[str | None, typer.Option(help="Name of a family; see archsmith families.")] = None,
) -> None:
    """Say what to use, from figures that were measured, with random search beside them."""
    from archsmith.run.advise import advise as measured
    from archsmith.run.advise import measured_where

    console = Console(highlight=False)
    if own_model:
        console.print(
            "A model of your own: archsmith shrink module:factory --task TASK --budget 'macs<=0.5x'.", soft_wrap=True
        )
        console.print(
            "Measured with its scores side by side: docs/guide/shrink-your-model.md. In your own loop: "
            "archsmith.Shrinker.",
            soft_wrap=True,
        )
        return
    if objectives > 1 or devices != 1 or latency:
        from archsmith.run.advise_devices import device_advice

        trained = evaluations is not None and devices == 1 and family is None and not latency
        lines = device_advice(
            objectives=objectives, devices=devices, latency=latency, family=family, trained=trained or data != "images"
        )
        for line in lines:
            console.print(line, soft_wrap=True)
        return
    if evaluations is None:
        if data != "images":
            console.print(f"Nothing was measured for {escape(data)} in a single run. With --evaluations N there is.")
            return
        console.print(
            "A single run on images: archsmith search --method atomnas --budget 'macs<=0.4x'.", soft_wrap=True
        )
        console.print(
            "Measured (docs/systems/atomnas.md): on the digits it is no better than random networks of the same cost; "
            "compare yours with --baselines 3.",
            soft_wrap=True,
        )
        return
    step, found = measured(evaluations)
    arenas, command = measured_where()
    table = Table(title=f"after {step} evaluations: {arenas}", title_justify="left")
    table.add_column("strategy", overflow="fold")
    table.add_column("regret (average architecture 1, best 0)", justify="right")
    table.add_column("ahead of random search", justify="right", no_wrap=False)
    wide = console.width >= 120  # a narrow table of figures with intervals is unreadable
    for arena in found[0].figures if wide else ():
        table.add_column(arena.replace("/", "\n"), justify="right", no_wrap=True)
    for row in found:
        figures = (f"{mean:.2f}\n{low:.2f} to {high:.2f}" for mean, low, high in row.figures.values()) if wide else ()
        style = "bold" if row.strategy == "random" else None
        table.add_row(escape(row.strategy), f"{row.regret:.3f}", f"{row.ahead} of {row.arenas}", *figures, style=style)
    console.print(table)
    if not wide:
        console.print("The figures of each arena, with their intervals, show in a terminal of 120 columns or more.")
    console.print(f"Use {found[0].strategy}. Other spaces may differ. From: {escape(command)}", soft_wrap=True)


@app.command()
def strategies(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the strategies."""
    from archsmith.strategies import strategy_table

    _show(strategy_table(), ("name", "title", "paper", "extra"), as_json)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the published systems."""
    from archsmith.methods import method_table

    _show(method_table(), ("slug", "kind", "year", "title", "docs"), as_json)


@app.command()
def tasks(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the tasks."""
    from archsmith.tasks.catalogue import task_table

    _show(task_table(), ("name", "title", "data", "metric"), as_json)


@app.command()
def families(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the families of networks."""
    from archsmith.families import family_table

    _show(family_table(), ("name", "task", "title", "file"), as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of the ``archsmith`` script."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except ArchsmithError as error:
        if error.told and process_rank() != 0:
            sys.exit(2)  # the first process prints it
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)


def _was_typed(context: typer.Context, name: str) -> bool:
    """Return whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_beside_config(context: typer.Context) -> None:
    """A file's configuration is run as it is, except for what is often tried in another way."""
    accepted = ("config", "out", "time_limit", "quiet", "settings", "budget", "seed", "baselines")
    for parameter in context.command.params:
        name = parameter.name or ""
        if _was_typed(context, name) and name not in accepted:
            raise UserError(
                "--config",
                Shown(f"the file together with {parameter.opts[0]}"),
                allowed="beside --config only --out, --time, --quiet, --set, --budget, --seed and --baselines",
                hint="Write the change into a copy of the file.",
            )


def _pairs(texts: Sequence[str] | None, option: str) -> dict[str, Any]:
    """Return ``{"lr": 0.02}`` for ``["lr=0.02"]``; values are read as YAML."""
    values: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(option, text, allowed="KEY=VALUE", hint=f"For example {option} lr=0.02.")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(option, text, allowed="KEY=VALUE with a number, text, true, false or [a, list]") from error
    return values


def _show(rows: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(row.get(column, ""))) for column in columns))
    Console().print(table)


def _summarise(outcome: Outcome) -> None:
    """Print what was found, where it is, and what to type next."""
    from archsmith.run.progress import format_count, summary

    if process_rank() != 0:
        return
    result, best = outcome.result, outcome.best
    metrics, costs, reference = best["metrics"], best["costs"], result["reference"]
    rows: dict[str, object] = {}
    for name in ("valid", "test"):
        if f"{name}_accuracy" in metrics:
            rows[f"{name} accuracy"] = f"{100 * metrics[f'{name}_accuracy']:.2f} %"
    share = costs["macs"] / reference["macs"]
    whole = "supernet's" if result["family"] != "own" else "whole network's"
    rows["MACs"] = f"{costs['macs']:,} ({share:.3f}x of the {whole} {reference['macs']:,})"
    figures = result.get("figures", {})
    for name, label in (("accuracy_before", "valid before"), ("accuracy_after_cut", "valid after the cut")):
        if name in figures:
            rows[label] = f"{100 * figures[name]:.2f} %"
    rows["parameters"] = f"{costs['params']:,} (of {reference['params']:,})"
    rows["memory"] = f"{format_count(costs['memory_bytes'])}B (weights and peak activations, batch 1)"
    rows["latency"] = _latency_text(costs["latency"])
    if result["budget"]:
        rows["budget"] = f"{result['budget']}: {_kept(result, costs)}"
    rows["time"] = f"{result['seconds']:.0f} s"
    rows["test reads"] = result["test_reads"]
    for number, note in enumerate(result["notes"], start=1):
        rows["note" if number == 1 else f"note {number}"] = note
    for file in best["files"]:
        rows[file] = outcome.folder / file
    for other in result["outcomes"][1:]:
        valid, macs = other["metrics"].get("valid_accuracy"), other["costs"]["macs"]
        accuracy = "" if valid is None else f"valid accuracy {100 * valid:.2f} %, "
        rows[other["label"]] = f"{accuracy}{macs:,} MACs: {outcome.path / other['folder']}"
    if (outcome.path / "report.html").exists():
        rows["report"] = outcome.path / "report.html"
    _diagnosis(result.get("diagnosis", []))
    trust = " --trust" if result["family"] == "own" else ""
    if outcome.status == "finished":
        summary(f"{result['method']} on {result['task']}: finished", rows, f"archsmith verify {outcome.path}{trust}")
    else:
        count = process_count()
        program = "archsmith" if count == 1 else f"torchrun --nproc-per-node {count} -m archsmith"
        summary(
            f"{result['method']} on {result['task']}: stopped early", rows, f"{program} resume {outcome.path}{trust}"
        )


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"training": {"steps": 3}}`` for ``{"training.steps": 3}``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        first, dot, rest = name.partition(".")
        if dot:
            found.setdefault(first, {})[rest] = value
        else:
            found[first] = value
    return found


def _summarise_any(outcome: Outcome) -> None:
    """Print what a run ended with, of whichever kind it is."""
    if "load" in outcome.result or "outcomes" not in outcome.result:
        _summarise_blocks(outcome)
    else:
        _summarise(outcome)


def _summarise_blocks(outcome: Outcome) -> None:
    """Print the children of a block-by-block search beside the parent and the baselines."""
    result, console = outcome.result, Console(highlight=False)
    if "outcomes" not in result:
        console.print(f"stopped early; next: archsmith resume {outcome.path}", soft_wrap=True)
        return
    score = result["score"]
    table = Table(title=f"{result['method']} within {result['budget']}", title_justify="left")
    for column in ("", "parameters", "sum of scores", "predicted ms", "measured ms", score, "after training"):
        table.add_column(column, justify="right" if column else "left")
    for row in (*result["outcomes"], *result["baselines"]):
        runtime, measured, metrics = row["predicted"].get("runtime"), row["runtime_ms"], row["metrics"]
        cells = [row["label"], f"{row['predicted']['params']:,.0f}", f"{row['score']:.4g}"]
        cells += ["" if value is None else f"{value:.3f}" for value in (runtime, measured)]
        cells += [f"{metrics[f'{score}_before']:.4g}"]
        cells += [f"{metrics[f'{score}_after']:.4g}" if f"{score}_after" in metrics else ""]
        table.add_row(*cells)
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    console.print(f"child {outcome.folder / 'model'}", soft_wrap=True)
    console.print(f"report {outcome.path / 'report.html'}", soft_wrap=True)
    console.print(f"next: archsmith verify {outcome.path}", soft_wrap=True)


def _diagnosis(findings: Sequence[dict[str, str]]) -> None:
    """Print what is doubtful about a run, each with the next command to try."""
    console = Console(highlight=False)
    for finding in findings:
        colour = "bold yellow" if finding["level"] == "warning" else "bold"
        console.print(f"[{colour}]{escape(finding['title'])}.[/] {escape(finding['text'])}", soft_wrap=True)
        console.print(f"  Try: {escape(finding['next_command'])}", soft_wrap=True)


def _kept(result: Mapping[str, Any], costs: Mapping[str, Any]) -> str:
    """Say whether the budget is kept: exact costs are, a latency is judged by the rule for claims."""
    from archsmith.cost import Latency, claim

    limit = result["limits"].get("latency")
    if limit is None:
        return "kept"
    verdict = claim(Latency.from_dict(costs["latency"]), limit)
    words = {"holds": "kept", "violated": "latency above its limit", "not verifiable now": "latency too noisy to claim"}
    return words[verdict]


def _latency_text(latency: dict[str, Any]) -> str:
    from archsmith.cost import Latency

    measured = Latency.from_dict(latency)
    noisy = ", too noisy to claim" if measured.noisy else ""
    where = measured.provenance
    low, high = measured.interval_ms
    device = "" if where.device == "cpu" else f" on {where.device}"
    precision = "fp32" if where.precision == "as stored" else where.precision.removeprefix("as stored: ")
    threads = f"{where.threads} thread{'s' if where.threads > 1 else ''}"
    return (
        f"{measured.median_ms:.3f} ms, 95 % interval {low:.3f} to {high:.3f} "
        f"({where.backend}{device}, {precision}, {threads}, batch 1{noisy})"
    )
