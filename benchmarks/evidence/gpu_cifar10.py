"""AtomNAS on the complete CIFAR-10 on one GPU: two budgets, equal penalty, uniformly scaled and random networks.

Eight runs as concurrent processes on the one device, at 32x32 with the strides of that size, in bfloat16. A command
ends by itself within ``--minutes``; what is unfinished goes on when the same command is typed again, and the table is
printed at the end of each. The networks that are not searched are trained by the same recipe, within the first budget.

Data:  ``make gpu-data DATA=cifar10.npz``, then ``python benchmarks/evidence/gpu_data.py unpack data/gpu cifar10.npz``
Run:   ``python benchmarks/evidence/gpu_cifar10.py --data cifar10.npz --out runs/gpu-cifar10``
Trial: ``... --device cpu --precision float32 --limit 20 --preset tiny --budgets 0.5x 0.3x --set epochs=1 --random 1``
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

RECIPE = {"epochs": 60, "batch_size": 256, "lr": 0.04, "warmup_epochs": 6.0, "lr_warmup_epochs": 3.0}
"""On top of the preset for small images; chosen without having seen a GPU."""

SPARE_SECONDS = 25.0
"""A run that has been asked to stop still saves, evaluates and exports."""


def base_config(given: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs have in common, as in a run's ``config.yaml``."""
    changed = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in given.set)}
    # Only what differs from the CPU's defaults is written, so that a trial needs no GPU options.
    runtime: dict[str, Any] = {"threads": given.threads}
    if given.device != "cpu":
        runtime["device"] = given.device
    if given.precision != "float32":
        runtime["precision"] = given.precision
    return {
        "method": "atomnas",
        "task": {
            "name": "cifar10",
            "data": str(given.data.absolute()),
            "label_smoothing": 0.1,
            **({"limit": given.limit} if given.limit else {}),
        },
        "family": {"name": "mobile", "preset": given.preset},
        "seed": given.seed,
        "settings": {**RECIPE, **changed},
        "runtime": runtime,
    }


def all_configs(base: Mapping[str, Any], budgets: list[str], count: int) -> dict[str, dict[str, Any]]:
    """Return the configuration of every run by name: searches first, then the networks within the first budget."""
    from archsmith.config import RunConfig, validated
    from archsmith.run.baselines import baseline_configs
    from archsmith.run.costs import CostModel
    from archsmith.run.prepare import EarlyJournal, family_of
    from archsmith.space import Budget
    from archsmith.tasks import open_task

    texts = [f"macs<={budget}" for budget in budgets]
    configs = {f"atomnas-{budget}": {**base, "budget": text} for budget, text in zip(budgets, texts, strict=True)}
    equal = {**base, "budget": texts[0], "settings": {**base["settings"], "penalty": "equal"}}
    configs[f"equal-{budgets[0]}"] = equal
    config = validated(RunConfig, {**base, "budget": texts[0]}, field="config")
    family: Any = family_of(config, open_task(**base["task"]))
    costs = CostModel(family, Budget.parse(texts[0]), EarlyJournal())
    for name, own in baseline_configs(config, family, costs, texts[0], count).items():
        configs[f"{name}-{budgets[0]}"] = {**base, "budget": texts[0], "architecture": own.architecture}
    return configs


def write_configs(out: Path, given: argparse.Namespace) -> dict[str, Path]:
    """Write the configurations once and return their files by name; a later command must ask for the same.

    Raises:
        SystemExit: The folder holds the runs of another command.
    """
    asked = {"base": base_config(given), "budgets": given.budgets, "random": given.random}
    plan = out / "plan.json"
    if not plan.exists():
        configs = all_configs(asked["base"], given.budgets, given.random)
        (out / "configs").mkdir(parents=True, exist_ok=True)
        for name, config in configs.items():
            (out / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        plan.write_text(json.dumps({"asked": asked, "names": list(configs)}))  # last: it says that all are there
    found = json.loads(plan.read_text())
    if found["asked"] != json.loads(json.dumps(asked)):
        raise SystemExit(f"{out} holds runs with other options: type the same command, or choose another --out.")
    return {name: out / "configs" / f"{name}.yaml" for name in found["names"]}


def train(config: str, out: str, deadline: float) -> None:
    """Go on with one run until it is finished or the time is up."""
    import archsmith

    left = deadline - time.time()
    if left > 0:
        archsmith.search_file(config, out=out, time_limit=left, quiet=True)


def status(out: Path, name: str) -> str:
    """Return the status of a run: "finished", "stopped", or "not started"."""
    file = out / name / "result.json"
    return str(json.loads(file.read_text())["status"]) if file.exists() else "not started"


def table(out: Path, names: list[str]) -> str:
    """Return the table of what is finished, and a line on the rest."""
    lines = [
        "| run | status | test accuracy, % | MACs | parameters | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        if status(out, name) != "finished":
            lines.append(f"| {name} | {status(out, name)} | | | | |")
            continue
        result = json.loads((out / name / "result.json").read_text())
        best = result["outcomes"][0]
        accuracy, costs = 100 * best["metrics"]["test_accuracy"], best["costs"]
        cells = f"{accuracy:.2f} | {costs['macs'] / 1e6:.1f}M | {costs['params'] / 1e6:.2f}M | {result['seconds']:.0f}"
        lines.append(f"| {name} | finished | {cells} |")
    return "\n".join(lines)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz of the complete CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--budgets", nargs="+", default=["100M", "50M"], help="MACs; the first is that of the baselines"
    )
    parser.add_argument("--random", type=int, default=4, help="random networks within the first budget")
    parser.add_argument("--preset", default="atomnas-a", help="supernet of the mobile family")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--minutes", type=float, default=9.0, help="the command ends within this time")
    parser.add_argument("--processes", type=int, default=8, help="concurrent runs")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="images per class, for a trial")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Go on with all runs for a while, then print the table."""
    given = parsed(arguments)
    deadline = time.time() + 60 * given.minutes - SPARE_SECONDS
    files = write_configs(given.out, given)
    unfinished = [name for name in files if status(given.out, name) != "finished"]
    context = multiprocessing.get_context("spawn")  # a forked process could not use the device
    jobs = [(str(files[name]), str(given.out / name), deadline) for name in unfinished]
    waiting, running, failed = list(zip(unfinished, jobs, strict=True)), {}, []
    while waiting or running:
        while waiting and len(running) < given.processes:
            name, job = waiting.pop(0)
            running[name] = context.Process(target=train, args=job, name=name)
            running[name].start()
        for name, process in list(running.items()):
            process.join(timeout=0.5)
            if process.exitcode is not None:
                failed += [name] if process.exitcode else []
                del running[name]
    print(table(given.out, list(files)))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if any(status(given.out, name) != "finished" for name in files):
        print("\nTime is up: type the same command again to go on.")


if __name__ == "__main__":
    main()
